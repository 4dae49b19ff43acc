"""A server for a run, and the client process beside it."""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.slo.wire import Ask, Outcome, Plan
from tests.server.real_server import Server, serving

_COUNTED = (
    "submodel_selected",
    "submodel_switches",
    "requests_dropped",
    "refilled_tokens",
    "preemptions",
    "generation_tokens",
)
_SLACK_SECONDS = 60.0  # over what a client process should take
_END_SECONDS = 60.0  # that a server may take to end


@dataclass(frozen=True)
class Settings:
    """What every server of a comparison has in common."""

    model: Path
    flags: tuple[str, ...]  # of `sortserve serve`
    nice: int  # of the client


@contextmanager
def started(settings: Settings, policy: str, *flags: str) -> Iterator["Served"]:
    """A server under one policy, ready. It is asked to end: on vLLM it keeps the costs that it has learned by then."""
    with serving(str(settings.model), *settings.flags, "--policy", policy, *flags) as server:
        yield Served(settings, server)
        server.process.terminate()
        server.process.wait(_END_SECONDS)


@dataclass(frozen=True)
class Served:
    """A running server, and what is done with it."""

    settings: Settings
    server: Server

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server.url.rpartition(":")[2])

    def get(self, path: str) -> dict[str, Any]:
        """A JSON answer of the server."""
        answer = httpx.get(f"{self.server.url}{path}", timeout=60, trust_env=False)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def tokens_of(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        asked = {"prompt": text, "add_special_tokens": False}
        answer = httpx.post(f"{self.server.url}/tokenize", json=asked, timeout=60, trust_env=False)
        answer.raise_for_status()
        found: list[int] = answer.json()["tokens"]
        return found

    def counters(self) -> Counter[str]:
        """What the server counts, by name and labels: `submodel_selected{reason=deadline}` summed over sub-models."""
        text = httpx.get(f"{self.server.url}/metrics", timeout=60, trust_env=False).text
        found: Counter[str] = Counter()
        for name, labels, value in re.findall(r"^sortserve_(\w+)_total\{([^}]*)\} (\S+)$", text, re.M):
            if name in _COUNTED:
                kept = ",".join(label for label in labels.replace('"', "").split(",") if _tells(name, label))
                found[f"{name}{{{kept}}}" if kept else name] += round(float(value))
        return found

    def open_loop(self, asks: list[Ask], drain_seconds: float) -> list[Outcome]:
        """Replay; answers that take longer than `drain_seconds` after the last request are given up."""
        return self._client(Plan(self.port, asks, "open", 0, drain_seconds, self.settings.nice))

    def closed_loop(self, asks: list[Ask], clients: int, seconds: float) -> list[Outcome]:
        """So many clients for so long."""
        return self._client(Plan(self.port, asks, "closed", clients, seconds, self.settings.nice))

    def _client(self, plan: Plan) -> list[Outcome]:
        last = max((ask.due for ask in plan.asks), default=0.0)
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder) / "plan", Path(folder) / "outcomes"
            files[0].write_bytes(msgspec.msgpack.encode(plan))
            command = [sys.executable, "-m", "benchmarks.slo.client", *map(str, files)]
            subprocess.run(command, check=True, timeout=last + plan.seconds + _SLACK_SECONDS)
            return msgspec.msgpack.decode(files[1].read_bytes(), type=list[Outcome])


def _tells(name: str, label: str) -> bool:
    """Whether a label is worth keeping apart: reasons and directions; of output tokens, the sub-model."""
    key = label.partition("=")[0]
    return key in ("reason", "direction") or (key == "submodel" and name == "generation_tokens")
