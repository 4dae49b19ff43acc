"""Servers for tools to talk to: stopped as an operator stops them, and with nothing wrong in their log."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.server.real_server import Server
from tests.server.real_server import serving as starting

STOP_SECONDS = 30.0


@contextmanager
def serving(*flags: str) -> Iterator[Server]:
    """A server of the bundled model, in float32 so that log-probabilities can be compared.

    An error in its log, or an exit code that is not 0, fails the test.
    """
    with starting(*flags) as server:
        yield server
        if server.process.poll() is None:
            server.process.terminate()
        assert server.process.wait(STOP_SECONDS) == 0, "".join(server.log)
    log = "".join(server.log)
    assert " ERROR " not in log, log[-4000:]
    assert "Traceback" not in log, log[-4000:]


def counted(server: Server, metric: str, **labels: str) -> float:
    """Sum over the samples of a metric that carry these labels."""
    wanted = [f'{name}="{value}"' for name, value in labels.items()]
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    found = [line for line in lines if re.match(rf"sortserve_{metric}[ {{]", line)]
    return sum(float(line.split()[-1]) for line in found if all(label in line for label in wanted))
