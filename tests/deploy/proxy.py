"""A HAProxy in front of servers that come and go, told by its own socket as a controller of endpoints tells a proxy.

It tries nothing twice and hides nothing: what fails behind it fails for the client. It asks /ready of each server, as the
kubelet does (every 200 ms here; one failure is enough), and also keeps a list of its own, the endpoints.
"""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.ports import free_port
from tests.deploy.tools import system_tool

NUM_SLOTS = 4
_WAIT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running HAProxy with places for servers, `slot0` to `slot3`."""

    port: int
    control: Path

    @property
    def url(self) -> str:
        """Where clients ask."""
        return f"http://127.0.0.1:{self.port}"

    def add(self, slot: int, port: int) -> None:
        """An endpoint more: it gets requests once the proxy has found it ready."""
        self._tell(f"set server servers/slot{slot} addr 127.0.0.1 port {port}")
        self._tell(f"set server servers/slot{slot} state ready")
        self._tell(f"enable health servers/slot{slot}")
        self.wait_for(slot, "UP")

    def remove(self, slot: int) -> None:
        """An endpoint less: requests that it has go on, and no new one goes there."""
        self._tell(f"set server servers/slot{slot} state drain")

    def forget(self, slot: int) -> None:
        """The server has ended; its place is free."""
        self._tell(f"disable health servers/slot{slot}")
        self._tell(f"set server servers/slot{slot} state maint")

    def wait_for(self, slot: int, state: str) -> None:
        """Until the proxy sees a server in this state."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while not self.state(slot).startswith(state):
            assert time.monotonic() < deadline, f"slot{slot} is {self.state(slot)}"
            time.sleep(0.02)

    def state(self, slot: int) -> str:
        """What the proxy thinks of a server: UP, DOWN, DRAIN, MAINT."""
        return self._columns()[f"slot{slot}"]["status"]

    def sessions(self) -> dict[str, int]:
        """Requests that each place was given so far."""
        return {name: int(row["stot"]) for name, row in self._columns().items() if name.startswith("slot")}

    def _columns(self) -> dict[str, dict[str, str]]:
        head, *rows = self._tell("show stat").strip().splitlines()
        names = head.removeprefix("# ").split(",")
        return {row["svname"]: row for line in rows if (row := dict(zip(names, line.split(","), strict=False)))}

    def _tell(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_WAIT_SECONDS)
            connection.connect(str(self.control))
            connection.sendall(f"{command}\n".encode())
            answer = b""
            while part := connection.recv(65536):
                answer += part
        return answer.decode()


@contextmanager
def proxy(folder: Path) -> Iterator[Proxy]:
    """A HAProxy without servers."""
    port, control = free_port(), folder / "control"
    slots = "\n".join(f"    server slot{slot} 127.0.0.1:1 disabled check" for slot in range(NUM_SLOTS))
    (folder / "haproxy.cfg").write_text(
        f"""global
    stats socket {control} mode 600 level admin
    maxconn 500
defaults
    mode http
    retries 0
    timeout connect 2s
    timeout client 120s
    timeout server 120s
frontend clients
    bind 127.0.0.1:{port}
    default_backend servers
backend servers
    balance roundrobin
    option httpchk GET /ready
    default-server inter 200ms fall 1 rise 1
{slots}
"""
    )
    command = [system_tool("haproxy", "haproxy"), "-db", "-f", str(folder / "haproxy.cfg")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + _WAIT_SECONDS
        while not control.exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield Proxy(port, control)
    finally:
        process.terminate()
        process.wait(30)
