"""`sortserve` and `python -m sortserve`: the server's commands and the sorting toolkit's, in one program.

The server imports nothing of the toolkit, so that it runs without transformers; here the two meet.
"""

import sys
from collections.abc import Sequence

from sortserve.server import cli
from sortserve.sorting.cli import add_sort_arguments, run_sort

SORT = cli.Command(
    "sort", "make a checkpoint's sub-models good: by training, or in minutes without", add_sort_arguments, run_sort
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return cli.main(argv, (SORT,))


if __name__ == "__main__":
    sys.exit(main())
