"""C++ of this package, compiled once for this processor and kept: `$XDG_CACHE_HOME/sortserve/kernels`, else in `~/.cache`.

It takes some seconds of the first start, and g++ or clang++ (`$CXX` names another). The file's name is a hash of source,
headers and flags, so an update compiles anew, and a library that is there needs no compiler. What cannot be had is an
`UnavailableError` with the reason; nothing else is ever raised, and the caller goes on with the libraries' own products.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

logger = logging.getLogger(__name__)

NEEDED = {"avx512f": "-mavx512f", "avx512bw": "-mavx512bw", "avx512vl": "-mavx512vl", "avx512_vnni": "-mavx512vnni"}
"""Processor flags, as Linux calls them, and what tells the compiler."""
OPTIONAL = {"avx512_bf16": "-mavx512bf16"}
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
MOST_SECONDS = 120.0
COMPILERS = ("g++", "c++", "clang++")


class UnavailableError(Exception):
    """Why there is no compiled library here, in words for the log."""


def cache_folder() -> Path:
    """The user's folder for what can be made again. Raises RuntimeError without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sortserve"


def library(source: Path) -> ctypes.CDLL:
    """`source`, with the headers beside it, compiled, or loaded from the cache folder. OpenMP's library must be
    loaded already (PyTorch's), so that no second one comes in. Raises UnavailableError."""
    try:
        texts = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
        flags = [*FLAGS, *_processor_flags()]
        name = f"{source.stem}-{hashlib.sha256(repr((texts, flags)).encode()).hexdigest()[:32]}.so"
        kept = cache_folder() / "kernels" / name
        if kept.exists():
            _check_owner(kept)
            return ctypes.CDLL(str(kept))
        return _compiled(source, flags, kept)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"{type(error).__name__}: {error}") from error


def _processor_flags() -> list[str]:
    """The compiler's flags for this processor. Raises UnavailableError where it has not what the kernels need."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise UnavailableError(f"made for Linux on x86-64, not {platform.system()} on {platform.machine()}")
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    has = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())
    missing = [flag for flag in NEEDED if flag not in has]
    if missing:
        raise UnavailableError(f"this processor has no {', '.join(missing)}")
    return [*NEEDED.values(), *(given for flag, given in OPTIONAL.items() if flag in has)]


def _check_owner(path: Path) -> None:
    """Raise UnavailableError if somebody else could have written what is to be loaded into this process."""
    for part in (path, path.parent):
        status = part.stat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            raise UnavailableError(f"{part} can be written by others")


def _compiled(source: Path, flags: list[str], kept: Path) -> ctypes.CDLL:
    """Compile, load, and keep for the next start where the folder can be written."""
    compiler = os.environ.get("CXX") or next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        raise UnavailableError(f"no C++ compiler is there ({', '.join(COMPILERS)})")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sortserve-") as folder:
        made = Path(folder) / kept.name
        done = subprocess.run(
            [compiler, *flags, "-w", "-o", str(made), str(source)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=MOST_SECONDS,
        )
        if done.returncode != 0:
            words = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
            raise UnavailableError(f"{compiler} failed: {words.strip()}")
        loaded = ctypes.CDLL(str(made))  # stays mapped when the folder goes
        where = str(kept)
        try:
            kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            ours = kept.with_suffix(f".{os.getpid()}")  # moved in whole: another start may be looking for it
            shutil.copyfile(made, ours)
            ours.chmod(0o755)
            ours.replace(kept)
        except OSError as error:
            where = f"nowhere ({error}): the next start compiles again"
    logger.info("compiled %s with %s in %.1f s, kept in %s", source.name, compiler, time.monotonic() - began, where)
    return loaded
