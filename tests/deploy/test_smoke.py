"""The script that `helm test` runs, against real servers: it passes where a client would be served, and only there."""

import os
import subprocess
import sys

from tests.deploy.tools import CHART
from tests.server.real_server import serving

KEY = "sk-smoke"


def smoke(url: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run it as the chart's pod does."""
    code = (CHART / "files" / "smoke_test.py").read_text()
    env = {"PATH": os.environ["PATH"], "SORTSERVE_URL": url, "SORTSERVE_ASKS_FOR_KEYS": "no", **variables}
    return subprocess.run([sys.executable, "-I", "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_with_and_without_keys() -> None:
    with serving() as open_server, serving("--api-key", KEY) as keyed:
        served = smoke(open_server.url)
        assert served.returncode == 0, served.stderr
        assert "models: bundled" in served.stdout
        assert "made by d" in served.stdout
        assert smoke(keyed.url, SORTSERVE_ASKS_FOR_KEYS="yes", SORTSERVE_API_KEY=KEY).returncode == 0
        assert "asks for a key" in smoke(keyed.url, SORTSERVE_ASKS_FOR_KEYS="yes").stdout
        # what must not pass: a wrong key, no key where one is needed, and a server that should ask for keys and does not
        assert "401" in smoke(keyed.url, SORTSERVE_ASKS_FOR_KEYS="yes", SORTSERVE_API_KEY="another").stderr
        assert smoke(keyed.url).returncode == 1
        assert "answered without a key" in smoke(open_server.url, SORTSERVE_ASKS_FOR_KEYS="yes").stderr
    gone = smoke(open_server.url)
    assert gone.returncode == 1
    assert open_server.url in gone.stderr
