"""`docker/prove.sh`: builds an image's steps in a clean root, starts the server there, and says what it found.

    docker/prove.sh [--target cpu] [--folder .clean-root] [--build-arg NAME=VALUE ...]

The last line is JSON: sizes in bytes, seconds from start to ready, and what the server answered.
"""

import argparse
import http.client
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.deploy.clean_root import ROOT, Image, build, tree_bytes
from tests.deploy.ports import free_port
from tests.deploy.run_root import Running, Start, run_once, running, start_of_image, stop

FOLDER = ROOT / ".clean-root"


def build_args(given: list[str]) -> dict[str, str]:
    """NAME=VALUE pairs; where pip is set up to find torch by itself, PyTorch's own index is not asked."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    args = {"TORCH_CPU_INDEX": ""} if "find-links" in listed or "index-url" in listed else {}
    return {**args, **dict(pair.split("=", 1) for pair in given)}


def ask(server: Running) -> dict[str, Any]:
    """One completion with a budget; what the server says of it."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 16})
    connection.request(
        "POST", "/v1/completions", body, {"Content-Type": "application/json", "X-Latency-Budget-Ms": "2000"}
    )
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert response.status == 200, answer
    connection.close()
    return {"submodel": response.headers["X-Submodel"], "tokens": answer["usage"]["completion_tokens"]}


def serve_once(image: Image, start: Start, log: Path) -> dict[str, Any]:
    """Start, wait until it is ready, check its health as the image does, ask, stop."""
    port = free_port()
    with running(image, start, port, log) as server:
        health = run_once(image, start, [*image.healthcheck, str(port)])
        assert health.returncode == 0, health.stderr
        told = {"ready_seconds": round(server.ready_seconds, 2), **ask(server)}
        code = stop(server)
        assert code == 0, server.log
    return told


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--build-arg", action="append", default=[])
    args = parser.parse_args()
    folder = args.folder.resolve()
    image = build(args.target, folder / "stages", folder / "debian", build_args(args.build_arg))
    compressed = subprocess.run(
        f"tar -C {image.root} -c . | gzip -6 | wc -c", shell=True, capture_output=True, text=True, check=True
    ).stdout
    told = {"target": args.target, "bytes": tree_bytes(image.root), "compressed_bytes": int(compressed)}
    starts = [serve_once(image, start_of_image(image), folder / "server.log") for _ in range(3)]
    print(json.dumps({**told, "starts": starts}))


if __name__ == "__main__":
    main()
