"""One virtual environment per tool, made on demand and kept until its pins change."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENTS = ROOT / ".venv-compat"
SECONDS = 540  # for one run of a tool


@dataclass(frozen=True)
class Environment:
    """A tool's environment, with `folder` as a place for what its runs write."""

    path: Path

    def run(self, program: str, *arguments: str, folder: Path, **variables: str) -> str:
        """Run a program of the environment in `folder` and return what it printed; fail with its output if it fails.

        It inherits nothing that could lead it elsewhere: no proxy, no key, no PYTHONPATH.
        """
        env = {"PATH": f"{self.path}/bin:/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "LANG": "C.UTF-8"}
        finished = subprocess.run(
            [str(self.path / "bin" / program), *arguments],
            cwd=folder,
            env=env | variables,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        output = f"{finished.stdout[-6000:]}\n{finished.stderr[-6000:]}"
        assert finished.returncode == 0, f"{program} {' '.join(arguments)} exited {finished.returncode}:\n{output}"
        return finished.stdout


def environment(tool: str) -> Environment:
    """The tool's environment, installed first if it is missing or its requirements have changed."""
    path, pins = ENVIRONMENTS / tool, (HERE / "requirements" / f"{tool}.txt").read_text()
    stamp = path / ".installed"
    if not stamp.is_file() or stamp.read_text() != pins:
        stamp.unlink(missing_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(path)], check=True)
        # torch first and alone where it is named, so that what follows finds it in place
        for pin in [line for line in pins.splitlines() if line.startswith("torch==")]:
            _install(path, pin)
        _install(path, *pins.splitlines())
        stamp.write_text(pins)
    return Environment(path)


def _install(path: Path, *requirements: str) -> None:
    subprocess.run([str(path / "bin/python"), "-m", "pip", "install", "--quiet", *requirements], check=True)
