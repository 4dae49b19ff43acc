"""Sub-models published in other tools' forms, as ladder entries.

| form | what is read |
| --- | --- |
| EvoPress | `layer_drop_config.txt`: a line per layer, `none`, `attn`, `mlp` or `attn+mlp`: what is dropped |
| LLM-Drop | `config.json` with `drop_attn_list` and `drop_mlp_list`: layer numbers, or a true/false per layer |
| LayerSkip | a list of exit layers: JSON, or numbers apart by commas or blanks, or a config with such a list |
| MatFormer | a slicing table as of Gemma 3n: CSV with `Layers Skipped` and `FFN Hidden Dims`, or JSON of such rows |

LayerSkip's exits are counted 1..layers here as there; its -1 (the full model) is accepted as such.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sortserve.engine.errors import SortingError
from sortserve.engine.submodel import ModelShape, SubModel

_EVOPRESS = {"none": (False, False), "attn": (True, False), "mlp": (False, True), "attn+mlp": (True, True)}
_EXIT_KEYS = ("exit_layers", "early_exit_layers", "exit_layer_list", "exit_layer")


@dataclass(frozen=True)
class Imported:
    """A sub-model and what it is called."""

    submodel: SubModel
    id: str | None  # None: made from its shape
    method: str


def import_file(form: str, path: Path, shape: ModelShape) -> list[Imported]:
    """The sub-models in a file of one of `FORMS`. Raises SortingError, naming file and place, if it is malformed or for
    another model."""
    try:
        text = path.read_text(encoding="utf-8")
        found = FORMS[form](text, shape)
    except (OSError, UnicodeDecodeError) as error:
        raise SortingError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SortingError(f"{path} is no {form} file for this model: {error}") from error
    for one in found:
        try:
            one.submodel.check(shape)
        except ValueError as error:
            raise SortingError(f"{path} is for another model: {error}") from error
    return found


def evopress(text: str, shape: ModelShape) -> list[Imported]:
    """`layer_drop_config.txt`."""
    lines = [line.strip().lower() for line in text.splitlines() if line.strip()]
    unknown = [(number, line) for number, line in enumerate(lines, start=1) if line not in _EVOPRESS]
    if unknown:
        raise ValueError(f"line {unknown[0][0]} is {unknown[0][1]!r}, must be one of {', '.join(_EVOPRESS)}")
    if len(lines) != shape.num_layers:
        raise ValueError(f"{len(lines)} lines, the model has {shape.num_layers} layers")
    no_attention = [layer for layer, line in enumerate(lines) if _EVOPRESS[line][0]]
    no_ffn = [layer for layer, line in enumerate(lines) if _EVOPRESS[line][1]]
    return [Imported(SubModel.make(shape.num_layers, shape.ffn_width, no_attention, no_ffn), None, "evopress")]


def llm_drop(text: str, shape: ModelShape) -> list[Imported]:
    """LLM-Drop's `config.json`."""
    config = json.loads(text)
    missing = [name for name in ("drop_attn_list", "drop_mlp_list") if name not in config]
    if len(missing) == 2:
        raise ValueError("it has neither drop_attn_list nor drop_mlp_list")
    no_attention = _layers(config.get("drop_attn_list", []), "drop_attn_list", shape)
    no_ffn = _layers(config.get("drop_mlp_list", []), "drop_mlp_list", shape)
    return [Imported(SubModel.make(shape.num_layers, shape.ffn_width, no_attention, no_ffn), None, "llm-drop")]


def layerskip(text: str, shape: ModelShape) -> list[Imported]:
    """A list of exits."""
    exits = [shape.num_layers if exit == -1 else exit for exit in _exits(text)]
    if not exits:
        raise ValueError("it names no exit layer")
    bad = [exit for exit in exits if not 1 <= exit <= shape.num_layers]
    if bad:
        raise ValueError(f"exit layer {bad[0]}, must be in [1, {shape.num_layers}] or -1")
    return [Imported(SubModel.make(exit, shape.ffn_width), None, "layerskip") for exit in sorted(set(exits))]


def matformer(text: str, shape: ModelShape) -> list[Imported]:
    """A slicing table: per row a name, the layers skipped whole, and the FFN width of each layer or one for all.

    Widths are listed for the layers that stay, or for all layers. A neuron must be a prefix of the checkpoint's, as
    MatFormer trains it.
    """
    if text.lstrip().startswith(("[", "{")):
        raw = json.loads(text)
        rows = list(raw) if isinstance(raw, list) else [{"name": name, **row} for name, row in raw.items()]
    else:
        rows = list(csv.DictReader(io.StringIO(text)))
    if not rows:
        raise ValueError("it has no rows")
    return [_slice(number, row, shape) for number, row in enumerate(rows, start=1)]


FORMS: Mapping[str, Callable[[str, ModelShape], list[Imported]]] = {
    "evopress": evopress,
    "llm-drop": llm_drop,
    "layerskip": layerskip,
    "matformer": matformer,
}


def _layers(value: Any, name: str, shape: ModelShape) -> list[int]:
    """Layer numbers, from numbers or from a true/false per layer."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is {value!r}, must be a list")
    if value and all(isinstance(item, bool) for item in value):
        if len(value) != shape.num_layers:
            raise ValueError(f"{name} has {len(value)} entries, the model has {shape.num_layers} layers")
        return [layer for layer, dropped in enumerate(value) if dropped]
    for item in value:
        if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < shape.num_layers:
            raise ValueError(f"{name} has {item!r}, must be layers in [0, {shape.num_layers})")
    return list(value)


def _exits(text: str) -> list[int]:
    stripped = text.strip()
    if stripped.startswith(("[", "{")):
        raw = json.loads(stripped)
        if isinstance(raw, dict):
            key = next((key for key in _EXIT_KEYS if key in raw), None)
            if key is None:
                raise ValueError(f"it has none of {', '.join(_EXIT_KEYS)}")
            raw = raw[key]
        raw = raw if isinstance(raw, list) else [raw]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in raw):
            raise ValueError(f"exits are {raw!r}, must be whole numbers")
        return list(raw)
    return [int(part) for part in re.split(r"[\s,]+", stripped) if part]


def _slice(number: int, row: Mapping[str, Any], shape: ModelShape) -> Imported:
    cells = {re.sub(r"[^a-z]", "", str(key).lower()): value for key, value in row.items()}
    skipped = _numbers(cells.get("layersskipped", cells.get("skippedlayers")))
    named = [cells[key] for key in ("ffnhiddendims", "ffnhiddendim", "ffnwidths") if key in cells]
    if not named:
        raise ValueError(f"row {number} has no FFN Hidden Dims")
    widths = _numbers(named[0])
    wrong = [layer for layer in skipped if not 0 <= layer < shape.num_layers]
    if wrong:
        raise ValueError(f"row {number} skips layer {wrong[0]}, must be in [0, {shape.num_layers})")
    kept = [layer for layer in range(shape.num_layers) if layer not in skipped]
    if len(widths) == 1:
        widths = widths * shape.num_layers
    elif len(widths) == len(kept):
        by_layer = dict(zip(kept, widths, strict=True))
        widths = [by_layer.get(layer, 0) for layer in range(shape.num_layers)]
    if len(widths) != shape.num_layers:
        raise ValueError(f"row {number} has {len(widths)} widths; {len(kept)} layers stay of {shape.num_layers}")
    name = next((str(cells[key]) for key in ("name", "modelname", "slice", "id") if cells.get(key)), None)
    identity = None if name is None else re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-").lower() or None
    return Imported(SubModel.make(shape.num_layers, widths, skipped, skipped), identity, "matformer")


def _numbers(value: Any) -> list[int]:
    """Whole numbers of a list, of one number, or of a cell such as `[2_048 * 8, 2_048 * 4]` (products) or `null`."""
    if value is None or value == "":
        return []
    if isinstance(value, list):
        return [int(item) for item in value]
    if isinstance(value, int):
        return [value]
    text = str(value).strip().strip("[]")
    if text.lower() in ("", "null", "none"):
        return []
    return [math.prod(int(factor) for factor in part.split("*")) for part in text.split(",")]
