"""Compiles the CPU's kernels while an image is built, for every kind of processor that they know, whatever this one is.

    XDG_CACHE_HOME=FOLDER python compile_kernels.py     they then lie in FOLDER/sortserve/kernels

By the server's own code, so that names and flags are those that it looks for; the processor alone is made up.
"""

import itertools
from pathlib import Path

import sortserve
from sortserve.kernels import compiling


def compile_all(sources: Path) -> None:
    """Every source of the folder, with and without each instruction set that is optional. Raises UnavailableError."""
    optional = list(compiling.OPTIONAL.values())
    kinds = [kind for count in range(len(optional) + 1) for kind in itertools.combinations(optional, count)]
    usual = compiling._processor_flags
    try:
        for source, kind in itertools.product(sorted(sources.glob("*.cpp")), kinds):
            flags = [*compiling.NEEDED.values(), *kind]
            compiling._processor_flags = lambda flags=flags: flags  # type: ignore[misc]
            compiling.library(source)
    finally:
        compiling._processor_flags = usual


if __name__ == "__main__":
    compile_all(Path(sortserve.__file__).parent / "kernels" / "cpu")
