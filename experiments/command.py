"""How a command ends: its exit code, and one line that says what went wrong."""

from __future__ import annotations

import errno
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from jax.errors import JaxRuntimeError

from data import DataError, WorkerError
from experiments.config.arguments import parsed
from experiments.config.errors import ConfigError, PluginError, RunError, failure
from experiments.launch import CLOSED, STOPPED, interruptible
from experiments.reporting.display import Display
from experiments.terminal import OutputClosed, write_output
from experiments.training.stopping import stop_signals
from unet.files.saving import LoadError

Settings = TypeVar("Settings")

ADVICE = {
    errno.ENOSPC: "make room there, then repeat the command",
    errno.EDQUOT: "make room there, then repeat the command",
    errno.EACCES: "check its permissions, or name another place",
    errno.EPERM: "check its permissions, or name another place",
    errno.EROFS: "name a place that can be written to",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ENOTDIR: "a part of this path is a file; name another place",
    errno.ELOOP: "links there lead in a circle; name another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOENT: "check the path",
    errno.EIO: "check the disk or the network",
}
"""What to do about an `OSError`."""


def exit_code(display: Display, command: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Run `command` and return the exit code: its own (None counts as 0), or 2 for invalid input and 1 for a failure of what is
    around it, with one line that says so; 130 after Ctrl-C, with the line `stopped`; 141 where nobody reads standard output."""
    try:
        interruptible()
        code = command() or 0
        write_output("")
        return code
    except KeyboardInterrupt:
        # One more Ctrl-C would be a traceback.
        with stop_signals(signal.SIG_IGN):
            display.note(stopped)
        return STOPPED
    except OutputClosed:
        return CLOSED
    except (ConfigError, DataError, LoadError) as error:
        if isinstance(error, PluginError):
            traceback.print_exception(error.__cause__)
        display.error(str(error))
        return 1 if isinstance(error, WorkerError) else 2
    except RunError as error:
        display.error(str(error))
    except OSError as error:
        display.error(sentence_of(error))
    except MemoryError:
        display.error("there is not enough memory: a smaller --batch, --length or model takes less")
    except JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        reason = str(error).splitlines()[0]
        display.error(f"there is not enough memory ({reason}): a smaller --batch, --length or model takes less")
    return 1


def command_line(
    settings: type[Settings],
    command: Callable[[Settings, Display], None],
    name: str,
    arguments: Sequence[str] | None,
    stopped: str = "stopped",
) -> int:
    """Run `command` with settings parsed from the command line. Returns the exit code.

    `name`: the module name for `python -m`. `arguments`: the command line; None for that of this process.
    """
    display = Display()
    given = sys.argv[1:] if arguments is None else list(arguments)
    return exit_code(display, lambda: command(parsed(settings, f"python -m {name}", given), display), stopped)


def sentence_of(error: OSError) -> str:
    """What the operating system refused, where, and what to do."""
    advice = ADVICE.get(error.errno or 0, "")
    return failure(error) + (advice and f"; {advice}")
