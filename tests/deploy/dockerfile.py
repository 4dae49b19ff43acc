"""Reads our Dockerfile: stages, each a list of instructions with `ARG`s and `ENV`s filled in as they are reached.

It knows the part of the language that docker/Dockerfile uses; an instruction beyond it is an error, so that nothing is
skipped in silence.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

KNOWN = ("ARG", "ENV", "COPY", "RUN", "USER", "WORKDIR", "ENTRYPOINT", "CMD", "HEALTHCHECK", "VOLUME")
IGNORED = ("EXPOSE", "STOPSIGNAL", "LABEL")  # they change nothing that is run here
_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `text` is what follows its name, lines joined."""

    name: str
    text: str

    def words(self) -> list[str]:
        """The JSON list that the text is, or else its shell words."""
        if self.text.startswith("["):
            words: list[str] = json.loads(self.text)
            return words
        return shlex.split(self.text)


@dataclass(slots=True)
class Stage:
    """`FROM base AS name`, and what follows. `base` is another stage's name or an image."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def read_stages(text: str) -> dict[str, Stage]:
    """Stages by name, in order. Raises ValueError for an instruction that is not known, or a stage without a name."""
    stages: dict[str, Stage] = {}
    before: dict[str, str] = {}
    for instruction in _instructions(text):
        if instruction.name == "FROM":
            found = re.fullmatch(r"(\S+) AS (\S+)", instruction.text)
            if found is None:
                raise ValueError(f"FROM {instruction.text}: write FROM image AS name")
            stages[found[2]] = Stage(found[2], fill(found[1], before))
        elif instruction.name not in (*KNOWN, *IGNORED):
            raise ValueError(f"{instruction.name} is not known here; known are {', '.join((*KNOWN, *IGNORED))}")
        elif stages:
            stages[[*stages][-1]].instructions.append(instruction)
        elif instruction.name == "ARG":
            name, _, value = instruction.text.partition("=")
            before[name] = value
        else:
            raise ValueError(f"{instruction.name} before the first FROM")
    return stages


def chain(stages: Mapping[str, Stage], target: str) -> list[str]:
    """Stages to build for `target`, each after those it is made from or copies from."""
    stage = stages[target]
    needed = [stage.base] if stage.base in stages else []
    needed += [
        source
        for instruction in stage.instructions
        if instruction.name == "COPY" and (source := copy_source(instruction)) is not None
    ]
    order: list[str] = []
    for name in needed:
        order += [stage for stage in chain(stages, name) if stage not in order]
    return [*order, target]


def copy_source(instruction: Instruction) -> str | None:
    """The stage that a COPY takes from; None: the build's context."""
    flags = [word for word in instruction.words() if word.startswith("--")]
    if any(not flag.startswith("--from=") for flag in flags):
        raise ValueError(f"COPY {instruction.text}: only --from is known here")
    return flags[0].removeprefix("--from=") if flags else None


def fill(text: str, variables: Mapping[str, str]) -> str:
    """`$name` and `${name}` replaced, as Docker does outside of RUN. Raises KeyError for one that is not set."""
    return _VARIABLE.sub(lambda found: variables[found[1] or found[2]], text)


def _instructions(text: str) -> Iterator[Instruction]:
    """Comments and empty lines left out, lines that end in a backslash joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = ""
    for line in lines:
        joined += line.removesuffix("\\").strip() + " "
        if not line.endswith("\\"):
            name, _, rest = joined.strip().partition(" ")
            yield Instruction(name, rest.strip())
            joined = ""
