"""A server process as a user starts it, with the bundled model, and what the system knows of it."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai

from sortserve.server.cli import BUNDLED

READY_SECONDS = 300.0  # vLLM takes half a minute to import, three times over


@dataclass
class Server:
    """A running server process and its log."""

    process: "subprocess.Popen[str]"
    log: list[str] = field(default_factory=list)
    url: str = ""

    def client(self) -> openai.OpenAI:
        """The official client; it tries nothing twice."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests now."""
        return bool(self.url) and self.get("/ready").status_code == 200

    def get(self, path: str) -> httpx.Response:
        """An answer, however long it takes. Reading the system's certificates would cost each question 20 ms."""
        return httpx.get(f"{self.url}{path}", timeout=60, verify=False)

    @property
    def engine_pid(self) -> int:
        """The process of its engine: its only child."""
        [pid] = children(self.process.pid)
        return pid

    def metric(self, name: str) -> float:
        """The sum of a family's samples, of all labels."""
        found = re.findall(rf"^sortserve_{name}(?:\{{[^}}]*\}})? (\S+)$", self.get("/metrics").text, re.M)
        return sum(float(value) for value in found)


def children(pid: int) -> list[int]:
    """Processes that `pid` started and that have not been waited for."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serving(*flags: str) -> Iterator[Server]:
    """A server of the bundled model at a port of its own choice, ready; killed at the end if it is still there."""
    # a proxy in the environment is no way to 127.0.0.1
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    command = [sys.executable, "-m", "sortserve.server.cli", "serve", "--port", "0", "--dtype", "float32"]
    process = subprocess.Popen(
        [*command, "--kv-memory", "64MiB", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=env | {"PYTHONPATH": str(BUNDLED.parent.parent)},
    )
    server = Server(process)
    reader = threading.Thread(target=_read_log, args=(server,), daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not server.is_ready:
            assert process.poll() is None, "".join(server.log)
            assert time.monotonic() < deadline, "".join(server.log)
            time.sleep(0.05)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)
        reader.join(10)
        assert process.stderr is not None
        process.stderr.close()


def _read_log(server: Server) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.log.append(line)
        found = re.search(r"listening on (http://[\d.]+:\d+)", line)
        if found:
            server.url = found[1]
