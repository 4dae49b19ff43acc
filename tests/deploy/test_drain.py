"""Rollouts as Kubernetes does them, under load: real servers behind a real proxy, and no request fails.

One replica after the other is replaced, with maxSurge 1 and maxUnavailable 0: a new server starts and becomes ready, then
an old one is deleted. Deleting begins two things at once, and neither waits for the other: its endpoint is taken from the
proxy, some time later; and the preStop hook sleeps, then comes SIGTERM. The chart's 15 s of sleep are 1 s here,
and the proxy hears within 0.1 to 0.8 s of it.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.deploy.load import Load
from tests.deploy.proxy import Proxy, proxy
from tests.server.real_server import Server, serving

NUM_ROLLOUTS = int(os.environ.get("SORTSERVE_ROLLOUTS", "20"))
PRE_STOP_SECONDS = 1.0
GRACE_SECONDS = 60.0
SETTLED_REQUESTS = 6


@dataclass
class Replicas:
    """Servers behind a proxy, by the place they have there."""

    proxy: Proxy
    stack: ExitStack
    by_slot: dict[int, Server] = field(default_factory=dict)
    stacks: dict[int, ExitStack] = field(default_factory=dict)

    def start(self, slot: int) -> None:
        """A new replica; it is an endpoint once it is ready, as the kubelet sees to."""
        own = self.stack.enter_context(ExitStack())
        server = own.enter_context(serving("--kv-memory", "16MiB", "--shutdown-timeout", "30"))
        self.by_slot[slot], self.stacks[slot] = server, own
        self.proxy.add(slot, int(server.url.rpartition(":")[2]))

    def delete(self, slot: int, heard_after: float, pre_stop: float = PRE_STOP_SECONDS) -> Server:
        """The end of a replica, from its deletion to its exit; the server, which has ended."""
        server = self.by_slot.pop(slot)
        endpoint = threading.Timer(heard_after, self.proxy.remove, [slot])
        endpoint.start()
        time.sleep(pre_stop)
        server.process.terminate()
        code = server.process.wait(GRACE_SECONDS)
        endpoint.join()
        self.proxy.forget(slot)
        self.stacks.pop(slot).close()
        assert code == 0, "".join(server.log)
        return server


@contextmanager
def replicas(folder: Path, num: int) -> Iterator[Replicas]:
    """So many ready replicas behind a proxy."""
    with ExitStack() as stack:
        made = Replicas(stack.enter_context(proxy(folder)), stack)
        for slot in range(num):
            made.start(slot)
        yield made


@pytest.mark.timeout(900)
def test_rollouts_under_load_fail_no_request(tmp_path: Path) -> None:
    with replicas(tmp_path, 2) as running, Load(running.proxy.url) as load:
        load.wait_for(SETTLED_REQUESTS)
        for rollout in range(NUM_ROLLOUTS):
            new, old = (rollout + 2) % 4, rollout % 4
            running.start(new)
            load.wait_for(SETTLED_REQUESTS)
            ended = running.delete(old, heard_after=0.1 + 0.7 * (rollout % 4) / 3)
            log = "".join(ended.log)
            assert " ERROR " not in log, log[-4000:]
            assert "draining" in log
            assert load.failures == [], (rollout, log[-4000:])
        load.wait_for(SETTLED_REQUESTS)
    print(f"{NUM_ROLLOUTS} rollouts, {load.num_done} requests, {len(load.failures)} failed")
    assert load.failures == []
    assert load.num_done > 5 * NUM_ROLLOUTS


def test_without_the_sleep_requests_fail(tmp_path: Path) -> None:
    """What the preStop hook is for, and that the test above can fail: SIGTERM before the proxy has heard of it. The proxy
    asks for readiness itself, but in the time between two questions requests reach a server that takes none."""
    with replicas(tmp_path, 2) as running, Load(running.proxy.url, num_clients=8, max_tokens=4) as load:
        load.wait_for(SETTLED_REQUESTS)
        for slot in (0, 1):
            running.start(slot + 2)
            running.delete(slot, heard_after=2.0, pre_stop=0.0)
            if load.failures:
                break
    assert any("503" in failure for failure in load.failures), load.failures


def test_readiness_is_obeyed(tmp_path: Path) -> None:
    """A server that drains turns /ready to 503 at once, the proxy then gives it nothing, and what it had it finishes."""
    with replicas(tmp_path, 2) as running:
        draining = running.by_slot[0]
        long = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True}
        answers: list[httpx.Response] = []
        asked = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{draining.url}/v1/completions", json=long, timeout=60))
        )
        asked.start()
        deadline = time.monotonic() + 30
        while draining.metric("requests_running") < 1:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        draining.process.terminate()
        running.proxy.wait_for(0, "DOWN")
        before = running.proxy.sessions()
        for _ in range(8):
            body = {"prompt": "Once", "max_tokens": 4}
            assert httpx.post(f"{running.proxy.url}/v1/completions", json=body, timeout=60).status_code == 200
        after = running.proxy.sessions()
        assert after["slot0"] == before["slot0"]
        assert after["slot1"] == before["slot1"] + 8
        asked.join(60)
        assert draining.process.wait(GRACE_SECONDS) == 0
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] == 400
