"""What makes the pages of the documentation; nothing of the library imports it."""
