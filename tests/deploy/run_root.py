"""Starts what an image starts, in a root that is read-only, as the unprivileged user, without capabilities.

Only volumes are writable: those of the image and /tmp, as `docker run --read-only --tmpfs /tmp` has them, or the ones of
a pod. Each is an empty tmpfs of its own. The network is this machine's: the server listens on a port of its own choice.
What a container engine adds beyond that, and what is not shown here, is its seccomp profile.
"""

import http.client
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deploy.clean_root import Image

READY_SECONDS = 120.0
STOP_SECONDS = 60.0
_DEVICES = ("null", "zero", "full", "random", "urandom")


@dataclass(frozen=True, slots=True)
class Start:
    """How a container is started: what its pod says over what its image says."""

    command: list[str]
    env: dict[str, str]
    user: int
    group: int
    volumes: list[str]  # mount paths of empty, writable volumes
    workdir: str = "/"


@dataclass(slots=True)
class Running:
    """A server that runs in the root."""

    process: "subprocess.Popen[bytes]"
    port: int
    log_file: Path
    ready_seconds: float = 0.0

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return self.log_file.read_text(errors="replace")

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET; (0, b"") where nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        except OSError:
            return 0, b""
        finally:
            connection.close()

    def inner_pid(self) -> int:
        """The first process of the container, as this machine numbers it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])


def start_of_image(image: Image, arguments: Sequence[str] = ()) -> Start:
    """What `docker run --read-only --tmpfs /tmp IMAGE ARGUMENTS` would start."""
    user, group = map(int, image.user.split(":"))
    command = [*image.entrypoint, *(arguments or image.command)]
    return Start(command, dict(image.env), user, group, [*image.volumes, "/tmp", "/dev/shm"], image.workdir)


def start_of_pod(image: Image, pod: Mapping[str, Any], cpus: int = 2) -> Start:
    """What the kubelet would start for the `server` container of a pod. Its volumes must all be emptyDirs."""
    [container] = [each for each in pod["containers"] if each["name"] == "server"]
    empty = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
    mounts = container["volumeMounts"]
    assert {mount["name"] for mount in mounts} <= empty, "a volume is no emptyDir"
    security = {**pod["securityContext"], **container["securityContext"]}
    assert security["readOnlyRootFilesystem"]
    assert security["runAsNonRoot"]
    assert not security["allowPrivilegeEscalation"]
    env = dict(image.env)
    for variable in container.get("env", ()):
        env[variable["name"]] = variable["value"] if "value" in variable else str(cpus)
    command = [*container.get("command", image.entrypoint), *container.get("args", image.command)]
    for name, value in env.items():
        command = [word.replace(f"$({name})", value) for word in command]
    paths = [mount["mountPath"] for mount in mounts]
    return Start(command, env, security["runAsUser"], security["runAsGroup"], paths, image.workdir)


@contextmanager
def running(image: Image, start: Start, port: int, log_file: Path) -> Iterator[Running]:
    """The server, ready; it is ended at the end if it still runs. `port` is added to the arguments."""
    command = _inside(image.root, start, [*start.command, f"--port={port}"])
    began = time.monotonic()
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=start.env)
    server = Running(process, port, log_file)
    try:
        while server.get("/ready")[0] != 200:
            assert process.poll() is None, server.log
            assert time.monotonic() - began < READY_SECONDS, server.log
            time.sleep(0.02)
        server.ready_seconds = time.monotonic() - began
        yield server
    finally:
        if process.poll() is None:
            os.kill(server.inner_pid(), signal.SIGKILL)
        process.wait(STOP_SECONDS)


def run_once(image: Image, start: Start, command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """A command in the same kind of place as the server's, to its end."""
    return subprocess.run(
        _inside(image.root, start, command), env=start.env, capture_output=True, text=True, timeout=READY_SECONDS
    )


def stop(server: Running) -> int:
    """SIGTERM, as the kubelet sends it to the first process of the container; its exit code."""
    os.kill(server.inner_pid(), signal.SIGTERM)
    return server.process.wait(STOP_SECONDS)


def _inside(root: Path, start: Start, command: Sequence[str]) -> list[str]:
    """The command line that ends in `command`, with the root mounted read-only at itself in a namespace of its own.

    The process is number 1 of a process namespace, as in a container: signals it does not handle do not reach it.
    """
    owner = f"uid={start.user},gid={start.group},mode=0770"
    dev = root / "dev"
    lines = [
        f"mount --bind {root} {root}",
        f"mount -t tmpfs -o mode=0755 tmpfs {dev}",
        *(f"touch {dev}/{name}; mount --bind /dev/{name} {dev}/{name}" for name in _DEVICES),
        f"mkdir {dev}/shm",
        f"mount -o remount,ro,bind {root}",
        f"mount -o remount,ro {dev}",
        *(f"mount -t tmpfs -o {owner} tmpfs {root}{path}" for path in start.volumes),
        f"mount -t proc proc {root}/proc",
    ]
    drop = ["setpriv", f"--reuid={start.user}", f"--regid={start.group}", "--clear-groups", "--no-new-privs"]
    drop += ["--inh-caps=-all", "--bounding-set=-all"]
    inside = ["chroot", str(root), *drop, "sh", "-c", f'cd {start.workdir}; exec "$@"', "sh", *command]
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL"]
    return [*namespaces, "sh", "-c", "set -e; " + "; ".join(lines) + '; exec "$@"', "sh", *inside]


def writable_places(image: Image) -> list[str]:
    """Folders and files of the root that the user could write to if it were not read-only."""
    user = image.user.split(":")[0]
    found = subprocess.run(
        ["find", str(image.root), "-xdev", "(", "-user", user, "-o", "-perm", "-o+w", ")", "!", "-type", "l"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return sorted(path.removeprefix(str(image.root)) for path in found)
