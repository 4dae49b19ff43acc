"""The page's arithmetic, without a browser: each `modules/*.test.mjs` under Node's own test runner."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SUITES = sorted((Path(__file__).parent / "modules").glob("*.test.mjs"))
OLDEST = (20, 19)  # takes a .js file with imports for a module without being told


def node() -> str:
    """Where Node is; skips without one that is new enough."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("no node on this machine")
    told = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    version = tuple(int(part) for part in re.findall(r"\d+", told)[:2])
    if version < OLDEST:
        pytest.skip(f"node is {told.strip()}, older than {'.'.join(map(str, OLDEST))}")
    return found


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name.removesuffix(".test.mjs"))
def test_module(suite: Path) -> None:
    done = subprocess.run([node(), "--test", str(suite)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^# pass [1-9]", done.stdout, re.M), f"no test ran:\n{done.stdout}"
