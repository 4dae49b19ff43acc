"""What ladder.json looks like: its keys, its versions, and how it is read and written.

Versioned, readable by hand, and strict: an unknown key or a value of the wrong type is an error that names its place.
Version 1 had no `domains`, `scores`, `token_ms`, `method`, `pairs` and no provenance beyond `command`; it is still read.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from sortserve.engine.errors import LadderError

FORMAT = "sortserve-ladder"
VERSION = 2
READ_VERSIONS = (1, 2)
_SINCE_2 = {
    "entries": ("domains", "scores", "token_ms", "method"),
    "measured": ("quality", "data_sha256", "versions", "machine", "date", "seconds"),
}


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Quality relative to the full model, in [0, 1]; `low` and `high` bound it at 95 %."""

    value: float
    low: float | None = None
    high: float | None = None


class Estimate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A measured number and its 95 % interval."""

    value: float
    low: float
    high: float


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sub-model on one domain of held-out text, over `tokens` tokens: loss and KL divergence from the full model in
    nats per token, and the share of tokens where both think the same token likeliest."""

    loss: Estimate
    agreement: Estimate
    kl: Estimate
    tokens: int


class Score(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task's score in [0, 1] over so many questions, with its 95 % interval."""

    value: float
    low: float
    high: float
    questions: int


class Pair(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Prompts computed by one entry and answers by another, both named by id, measured on the answers."""

    prompt: str
    answer: str
    domains: dict[str, Figures]
    scores: dict[str, Score] = {}


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the qualities were measured: the metric by name, the data, and the command that did it."""

    metric: str
    data: str = ""
    command: str = ""
    tokens: int = 0
    quality: str = ""  # what `quality` was made of: "loss", or the name of a task
    data_sha256: dict[str, str] = {}  # of the tokens, by domain
    versions: dict[str, str] = {}  # of what computed it
    machine: str = ""
    date: str = ""  # YYYY-MM-DD
    seconds: float = 0.0  # wall time of measuring


class DepthHeadEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The head that foretells how deep the next token must run, in a file beside this one, and how good it was on text
    that it was neither fitted nor calibrated on."""

    file: str
    layer_share: float  # what a row reads of it over what a layer has
    loss: float  # nats per token, of the exit that the next token needs
    loss_blind: float  # the same without looking: every token gets the mean distribution
    calibration_error: float  # mean distance of told and true probabilities, in ten bins of equal number
    tokens: int  # fitted on
    data: str = ""
    command: str = ""


class FileEntry(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One entry as written; see docs/ladder.md."""

    depth: int
    width: int | list[int]
    skip_attention: list[int] = []
    skip_ffn: list[int] = []
    id: str | None = None
    quality: Quality | None = None
    degraded: bool = False
    domains: dict[str, Figures] = {}
    scores: dict[str, Score] = {}
    token_ms: float | None = None
    method: str = ""


class _Header(msgspec.Struct):
    """Read first and leniently: a file of another version may have keys that this one does not know."""

    format: str
    version: int


class File(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The whole file."""

    format: str
    version: int
    num_layers: int
    ffn_width: int
    entries: list[FileEntry]
    measured: Measured | None = None
    pairs: list[Pair] = []
    depth_head: DepthHeadEntry | None = None
    layer_importance: list[float] = []  # higher matters more; empty: not known


def read(path: Path) -> File:
    """The file's content. Raises LadderError, naming the file and the place in it, if it is malformed."""
    try:
        content = path.read_bytes()
        header = msgspec.json.decode(content, type=_Header)
        if header.format != FORMAT or header.version not in READ_VERSIONS:
            raise LadderError(
                f"{path}: format {header.format!r} version {header.version}, "
                f"this server reads {FORMAT!r} version {VERSION} and before"
            )
        file = msgspec.json.decode(content, type=File)
        if header.version == 1:
            _check_version_1(path, content)
        if file.depth_head is not None and Path(file.depth_head.file).name != file.depth_head.file:
            raise LadderError(f"{path}: depth_head.file is {file.depth_head.file!r}, must be a name without a folder")
    except OSError as error:
        raise LadderError(f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise LadderError(f"{path}: {error}") from error
    return file


def write(
    path: Path,
    num_layers: int,
    ffn_width: int,
    entries: list[FileEntry],
    measured: Measured | None,
    pairs: list[Pair],
    depth_head: DepthHeadEntry | None = None,
    layer_importance: Sequence[float] = (),
) -> None:
    """Write the file as `read` reads it."""
    file = File(FORMAT, VERSION, num_layers, ffn_width, entries, measured, pairs, depth_head, list(layer_importance))
    path.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n")


def _check_version_1(path: Path, content: bytes) -> None:
    """A key of version 2 in a file that says 1 would be refused by a server that reads only 1; here it is too."""
    raw = msgspec.json.decode(content)
    places = [(f"entries[{number}]", "entries", entry) for number, entry in enumerate(raw["entries"])]
    if raw.get("measured"):
        places.append(("measured", "measured", raw["measured"]))
    for place, kind, found in places:
        new = sorted(set(found) & set(_SINCE_2[kind]))
        if new:
            raise LadderError(f'{path}: {place} has {new[0]!r}, a key of version 2; write "version": 2')
    for name in ("pairs", "depth_head", "layer_importance"):
        if name in raw:
            raise LadderError(f'{path}: {name!r} is a key of version 2; write "version": 2')
