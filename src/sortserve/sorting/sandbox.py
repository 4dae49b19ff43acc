"""Programs that a model wrote, run in processes of their own, because HumanEval's answers are judged by running them.

Only where the user asked for it in so many words. An isolated interpreter without site packages, an empty folder that goes
away, no environment, limits on processor time, memory, file size and open files, and no network where the system lets an
ordinary user leave it (`unshare`). That stops accidents, not an attacker.
"""

import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM_SECONDS = 10  # of processor time; twice that by the clock
PROGRAM_BYTES = 1 << 30  # of address space


def runs(program: str) -> bool:
    """Whether the program ends without an error, in a process of its own with narrow limits."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "program.py").write_text(program, encoding="utf-8", errors="replace")
        command = [sys.executable, "-I", "-S", "program.py"]
        if _can_leave_network():
            command = ["unshare", "--user", "--net", "--", *command]
        try:
            finished = subprocess.run(
                command,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": folder},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=2 * PROGRAM_SECONDS,
                preexec_fn=_limit,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
        return finished.returncode == 0


def _limit() -> None:
    for what, value in (
        (resource.RLIMIT_CPU, PROGRAM_SECONDS),
        (resource.RLIMIT_AS, PROGRAM_BYTES),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))


def _can_leave_network() -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(["unshare", "--user", "--net", "--", "true"], capture_output=True)
    return tried.returncode == 0
