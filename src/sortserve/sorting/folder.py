"""A folder is written whole or not at all, and so is a file.

`new_folder` gives an empty folder beside the wanted one; when the block ends without an exception it is flushed to disk
and takes the wanted name by renaming. Until then an older folder of that name stays as it is, and after a full disk, an
exception or a kill in the middle it still is; only the unfinished folder (`.NAME.partial-*`) may be left by a kill.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sortserve.engine.errors import SortingError

_SPARE_BYTES = 1 << 20


@contextlib.contextmanager
def new_folder(wanted: Path, *, needed_bytes: int = 0, replace: bool = False) -> Iterator[Path]:
    """Write into the folder that this yields; it becomes `wanted` at the end.

    Raises SortingError before anything is written if `wanted` is there and not an empty folder (unless `replace`), if its
    parent is missing or `needed_bytes` are not free; and if the disk is full or fails on the way.
    """
    check_target(wanted, needed_bytes, replace=replace)
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{wanted.name}.partial-", dir=wanted.parent))
    except OSError as error:
        raise SortingError(f"{wanted.parent} cannot be written to: {error.strerror}") from error
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's is for its owner only
        _flush(partial)
        _take_name(partial, wanted)
    except OSError as error:
        raise SortingError(f"writing {wanted} failed ({error.strerror}); nothing was changed") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def new_file(wanted: Path) -> Iterator[Path]:
    """Write to the path that this yields; at the end it takes the place of `wanted`, which until then stays as it is.

    Raises SortingError if the disk is full or fails.
    """
    partial = wanted.with_name(f".{wanted.name}.partial-{os.getpid()}")
    try:
        yield partial
        to_disk(partial)
        partial.replace(wanted)
    except OSError as error:
        raise SortingError(f"writing {wanted} failed ({error.strerror}); nothing was changed") from error
    finally:
        partial.unlink(missing_ok=True)


def check_target(wanted: Path, needed_bytes: int = 0, *, replace: bool = False) -> None:
    """Raise SortingError unless `wanted` can be written: to be called before hours of work, too."""
    if not wanted.absolute().parent.is_dir():
        raise SortingError(f"{wanted.parent} is no folder; make it first")
    if wanted.exists() and not replace and (not wanted.is_dir() or any(wanted.iterdir())):
        raise SortingError(f"{wanted} is there already and not empty; name another folder or remove it")
    free = shutil.disk_usage(wanted.absolute().parent).free
    if needed_bytes + _SPARE_BYTES > free:
        raise SortingError(
            f"{wanted} needs {needed_bytes / 1e6:.0f} MB, {free / 1e6:.0f} MB are free on its disk; make room"
        )


def _take_name(partial: Path, wanted: Path) -> None:
    if not wanted.exists():
        partial.rename(wanted)
        return
    # a folder cannot be renamed over one that is not empty: the old one steps aside first, and back if that fails
    aside = Path(tempfile.mkdtemp(prefix=f".{wanted.name}.old-", dir=wanted.parent))
    old = aside / wanted.name
    wanted.rename(old)
    try:
        partial.rename(wanted)
    except OSError:
        old.rename(wanted)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            to_disk(path)


def to_disk(path: Path) -> None:
    """Flush a file's content, or a folder's names. Raises OSError where the disk is full or fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # a full disk may only tell now
    finally:
        os.close(descriptor)
