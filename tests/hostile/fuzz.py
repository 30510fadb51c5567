"""Many more inputs than the tests try: `python -m tests.hostile.fuzz --count 50000`."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.hostile.drive import failures
from tests.hostile.subjects import SUBJECTS


def main() -> int:
    """Prints every failure; returns 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50_000, help="inputs of each subject")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--folder", type=Path, default=Path(".cache/fuzz"), help="where inputs at fault are kept")
    names = [subject.name for subject in SUBJECTS]
    parser.add_argument("subjects", nargs="*", help=f"by default all: {', '.join(names)}")
    given = parser.parse_args()
    if unknown := sorted(set(given.subjects) - set(names)):
        parser.error(f"there is no subject {unknown[0]}; there are {', '.join(names)}")
    found = 0
    with ThreadPoolExecutor(given.jobs) as pool:

        def tried(name: str):
            return name, failures([name], given.folder / name, given.count, given.seed)

        for name, problems in pool.map(tried, given.subjects or names):
            found += len(problems)
            print(f"{name}: {given.count:,} inputs, {len(problems)} failures")
            for problem in problems:
                print(f"  {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
