"""Do the pins hold? Run by `make check` with the interpreter whose environment is judged; needs no network.

Everything that the package and its `test` and `dev` extras need, directly or through others, is pinned in
constraints.txt, exactly, and installed as pinned; every pin lies within the range that pyproject.toml gives. What a
developer installed beside it is not looked at. Known advisories are another matter and need the network: `make audit`.
"""

import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("test", "dev")  # what `make check` and `make test` install; the others are not pinned


def read_pins(text: str) -> tuple[dict[str, Version], list[str]]:
    """Canonical name -> version, and what is wrong with the other lines."""
    pins: dict[str, Version] = {}
    wrong = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            wrong.append(f"constraints.txt: {line!r} is no requirement")
            continue
        [*specifiers] = requirement.specifier
        if len(specifiers) != 1 or specifiers[0].operator != "==" or "*" in specifiers[0].version:
            wrong.append(f"constraints.txt: {line!r} pins no exact version; write name==version")
        elif canonicalize_name(requirement.name) in pins:
            wrong.append(f"constraints.txt: {requirement.name} is there twice")
        else:
            pins[canonicalize_name(requirement.name)] = Version(specifiers[0].version)
    return pins, wrong


def asked_for(project: Mapping[str, Any]) -> list[Requirement]:
    """The requirements of pyproject.toml; an extra that names another one of the project's own has that one's."""
    pending = [*project["dependencies"], *(f"{project['name']}[{extra}]" for extra in EXTRAS)]
    asked = []
    while pending:
        requirement = Requirement(pending.pop())
        if requirement.name == project["name"]:
            pending += [line for extra in requirement.extras for line in project["optional-dependencies"][extra]]
        else:
            asked.append(requirement)
    return asked


def out_of_range(asked: list[Requirement], pins: Mapping[str, Version]) -> Iterator[str]:
    """Requirements that have no pin or one outside of their range."""
    for requirement in asked:
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None:
            yield f"pyproject.toml: {str(requirement)!r} has no pin in constraints.txt"
        elif pin not in requirement.specifier:
            yield f"pyproject.toml: {str(requirement)!r} does not allow the pinned {pin}"


def needed(asked: list[Requirement]) -> dict[str, str]:
    """Canonical name -> installed version of what the requirements need here; what is missing, `pip check` tells."""
    found: dict[str, str] = {}
    pending, seen = list(asked), set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        found[name] = installed.version
        for below in map(Requirement, installed.requires or ()):
            environments = [{"extra": extra} for extra in ("", *requirement.extras)]
            if below.marker is None or any(below.marker.evaluate(environment) for environment in environments):
                pending.append(below)
    return found


def not_as_pinned(installed: Mapping[str, str], pins: Mapping[str, Version]) -> Iterator[str]:
    """Distributions that are not pinned, or are another version. torch's `+cpu` is the same one."""
    for name, version in sorted(installed.items()):
        if name not in pins:
            yield f"{name} {version} is needed but not in constraints.txt; pin it"
        elif Version(version).public != pins[name].public:
            yield f"{name} {version} is installed, {pins[name]} is pinned"


def main() -> int:
    """1 if anything is wrong, each thing on a line."""
    pins, wrong = read_pins((ROOT / "constraints.txt").read_text())
    asked = asked_for(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])
    wrong += [*out_of_range(asked, pins), *not_as_pinned(needed(asked), pins)]
    print("\n".join(wrong) or f"{len(pins)} pins hold")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
