"""`sortserve serve` as a user starts it, with the bundled model, for tools to talk to."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from sortserve.server.cli import BUNDLED

READY_SECONDS = 120.0
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    url: str
    process: "subprocess.Popen[bytes]"

    def counted(self, metric: str, **labels: str) -> float:
        """Sum over the samples of a metric that carry these labels."""
        wanted = [f'{name}="{value}"' for name, value in labels.items()]
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        found = [line for line in lines if re.match(rf"sortserve_{metric}[ {{]", line)]
        return sum(float(line.split()[-1]) for line in found if all(label in line for label in wanted))


@contextmanager
def serving(log: Path, *flags: str) -> Iterator[Server]:
    """A server at a port of its own choice, in float32 so that log-probabilities can be compared; stopped at the end.

    Its log goes to the file `log`. An error in it, or an exit code that is not 0, fails the test.
    """
    # a proxy in the environment is no way to 127.0.0.1
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    command = [sys.executable, "-m", "sortserve.server.cli", "serve", "--port", "0", "--dtype", "float32"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--kv-memory", "64MiB", *flags],
            stderr=output,
            env=env | {"PYTHONPATH": str(BUNDLED.parent.parent)},
        )
    try:
        yield Server(_ready(process, log), process)
        if process.poll() is None:
            process.terminate()
        assert process.wait(STOP_SECONDS) == 0, log.read_text()[-4000:]
        told = log.read_text()
        assert " ERROR " not in told, told[-4000:]
        assert "Traceback" not in told, told[-4000:]
    finally:
        process.kill()
        process.wait()


def _ready(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """The URL of the server once it is ready."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        found = re.search(r"listening on (http://[\d.]+:\d+)", log.read_text())
        if found and httpx.get(f"{found[1]}/ready").status_code == 200:
            return found[1]
        time.sleep(0.1)
