"""`sortserve` and `python -m sortserve`: the server's commands and the sorting toolkit's, in one program.

The server imports nothing of the toolkit, so that it runs without transformers; here the two meet. `sortserve ladder
measure`, `import` and `head` are commands of their own, since `sortserve ladder MODEL` prints a ladder.
"""

import sys
from collections.abc import Sequence

from sortserve.server import cli
from sortserve.sorting import head_cli, ladder_cli
from sortserve.sorting.cli import add_sort_arguments, run_sort

COMMANDS = (
    cli.Command(
        "sort", "make a checkpoint's sub-models good: by training, or in minutes without", add_sort_arguments, run_sort
    ),
    cli.Command(
        "ladder-measure",
        "measure a model's sub-models and write its ladder (also: ladder measure)",
        ladder_cli.add_measure_arguments,
        ladder_cli.run_measure,
    ),
    cli.Command(
        "ladder-import",
        "write ladder entries from other tools' files (also: ladder import)",
        ladder_cli.add_import_arguments,
        ladder_cli.run_import,
    ),
    cli.Command(
        "ladder-head",
        "fit the head that foretells how deep the next token must run (also: ladder head)",
        head_cli.add_head_arguments,
        head_cli.run_head,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["ladder"] and given[1:2] in (["measure"], ["import"], ["head"]):
        given[:2] = ["-".join(given[:2])]
    return cli.main(given, COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
