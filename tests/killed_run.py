"""Runs `experiments.run` and kills itself, as by SIGKILL, at the n-th change of its files: `killed_run.py N ARGUMENTS`.

With N = 0 it lives, and prints how many changes there were.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    limit, arguments = int(sys.argv[1]), sys.argv[2:]
    folder = os.path.abspath(arguments[arguments.index("--out") + 1])
    changes = 0

    def watch(event: str, details: tuple[object, ...]) -> None:
        nonlocal changes
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            return
        if event == "open" and not (isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if not isinstance(details[0], str | os.PathLike) or not os.path.abspath(details[0]).startswith(folder):
            return
        changes += 1
        if changes == limit:
            os.kill(os.getpid(), signal.SIGKILL)

    from experiments.run import main as run

    sys.addaudithook(watch)
    code = run(arguments)
    print(changes)
    return code


if __name__ == "__main__":
    sys.exit(main())
