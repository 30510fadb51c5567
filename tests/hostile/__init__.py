"""Files as accidents and strangers leave them: every reader of the library says what is wrong, in bounded time and memory."""
