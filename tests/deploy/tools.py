"""What the suite needs beside Python, made on demand and kept until its pins change.

Python tools live in an environment of their own, `.venv-deploy`; schemas of custom resources are npm packages; the rest
are Debian packages: installed if we are root, otherwise the test fails with the command that installs them.
"""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENT = ROOT / ".venv-deploy"
CHART = ROOT / "deploy" / "helm" / "sortserve"
CRDS = HERE / "crds"
SECONDS = 540
_PLACES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@cache
def python_tool(name: str) -> str:
    """A program of the environment, which is installed first if it is missing or its pins have changed."""
    pins = (HERE / "requirements.txt").read_text()
    stamp = ENVIRONMENT / ".installed"
    if not stamp.is_file() or stamp.read_text() != pins:
        stamp.unlink(missing_ok=True)
        run(sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT))
        run(str(ENVIRONMENT / "bin/python"), "-m", "pip", "install", "--quiet", "-r", str(HERE / "requirements.txt"))
        stamp.write_text(pins)
    return str(ENVIRONMENT / "bin" / name)


@cache
def system_tool(name: str, package: str) -> str:
    """The path of a program of a Debian package (or the first of several), installed first if it is missing and we may."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_PLACES}")
    if found is None:
        assert os.geteuid() == 0, f"{name} is missing: sudo apt-get install --no-install-recommends {package}"
        # nothing that is installed for a test is to be started as a service of the machine
        settings = dict(os.environ, DEBIAN_FRONTEND="noninteractive", RUNLEVEL="1")
        run("apt-get", "update", "-qq", env=settings)
        run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *package.split(), env=settings)
        found = shutil.which(name, path=_PLACES)
    assert found is not None, f"{package} is installed but has no {name}"
    return found


@cache
def crd_validator() -> list[str]:
    """The command that checks custom resources, its packages installed as the lock file names them."""
    node = system_tool("node", "nodejs")
    stamp, lock = CRDS / "node_modules" / ".installed", (CRDS / "package-lock.json").read_text()
    if not stamp.is_file() or stamp.read_text() != lock:
        run(system_tool("npm", "npm"), "ci", "--no-audit", "--no-fund", "--loglevel=error", cwd=CRDS)
        stamp.write_text(lock)
    return [node, str(CRDS / "validate.mjs")]


def kustomize() -> list[str]:
    """The command that builds a kustomization: of kubectl, or kustomize itself."""
    for name, words in (("kubectl", ["kubectl", "kustomize"]), ("kustomize", ["kustomize", "build"])):
        if shutil.which(name) is not None:
            return words
    pytest.skip("neither kubectl nor kustomize is there: kubernetes.io/docs/tasks/tools says how to install them")


def run(*command: str, text: str = "", env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run to the end with `text` on standard input and return what it printed; fail with its output if it fails."""
    finished = subprocess.run(command, input=text, capture_output=True, text=True, timeout=SECONDS, env=env, cwd=cwd)
    output = f"{finished.stdout[-6000:]}\n{finished.stderr[-6000:]}"
    assert finished.returncode == 0, f"{' '.join(command)[:500]} exited {finished.returncode}:\n{output}"
    return finished.stdout
