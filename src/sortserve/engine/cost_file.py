"""A fitted cost table as a JSON file: what the profile's cache holds, and what a simulation can be given."""

import os
import tempfile
from pathlib import Path

import msgspec
import numpy as np

from sortserve.engine.cost import CostTable

FORMAT = "sortserve-cost"
VERSION = 1


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """Seconds, by the names of CostTable. `about`: what it was measured on, for a reader."""

    format: str
    version: int
    layers: list[int]
    buckets: list[float]
    layer: list[float]
    ffn: list[float]
    head: list[float]
    base: float
    context_seconds: float
    pair_seconds: float
    spread: float
    about: dict[str, str] = {}


def encode_cost(table: CostTable, about: dict[str, str] | None = None) -> bytes:
    """The table as JSON."""
    file = _File(
        format=FORMAT,
        version=VERSION,
        layers=table.layers.tolist(),
        buckets=table.buckets.tolist(),
        layer=table.layer.tolist(),
        ffn=table.ffn.tolist(),
        head=table.head.tolist(),
        base=float(table.base),
        context_seconds=float(table.context_seconds),
        pair_seconds=float(table.pair_seconds),
        spread=float(table.spread),
        about=about or {},
    )
    return msgspec.json.encode(file)


def write_cost(path: Path, table: CostTable, about: dict[str, str] | None = None) -> None:
    """Write the table. Raises OSError; a file of that name is whole at all times."""
    content = msgspec.json.format(encode_cost(table, about), indent=1) + b"\n"
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "wb") as made:
            made.write(content)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def read_cost(path: Path) -> CostTable:
    """Read a table. Raises ValueError, naming the file, if it holds none, and OSError if it cannot be read."""
    return decode_cost(path.read_bytes(), str(path))


def decode_cost(content: bytes, source: str) -> CostTable:
    """A table from its JSON. Raises ValueError, naming the source, if it holds none."""
    try:
        file = msgspec.json.decode(content, type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{source}: {error}") from error
    if (file.format, file.version) != (FORMAT, VERSION):
        raise ValueError(
            f"{source}: format {file.format!r} version {file.version}, expected {FORMAT!r} version {VERSION}"
        )
    columns = [np.array(column, np.float64) for column in (file.buckets, file.layer, file.ffn, file.head)]
    scalars = (file.base, file.context_seconds, file.pair_seconds, file.spread)
    if not columns[0].size or any(len(column) != len(columns[0]) for column in columns):
        raise ValueError(f"{source}: buckets, layer, ffn and head must be lists of one length")
    finite = np.isfinite([*scalars, *np.concatenate(columns)]).all()
    if not finite or min(*scalars, *map(np.min, columns)) < 0 or (np.diff(columns[0]) <= 0).any():
        raise ValueError(f"{source}: times must be finite and not negative, buckets ascending")
    buckets, layer, ffn, head = columns
    return CostTable(
        np.array(file.layers, np.int64),
        buckets,
        layer,
        ffn,
        head,
        file.base,
        file.context_seconds,
        file.pair_seconds,
        file.spread,
    )
