"""A training recipe: one TOML file that says what is trained and how, saved resolved beside the result.

Contract: `read_recipe` gives a frozen value; an unknown key, a wrong type or an impossible value is a SortingError that
names the place. `write_recipe` writes what `read_recipe` reads back as the same value.
"""

import json
from pathlib import Path
from typing import Any, Literal

import msgspec

from sortserve.engine.errors import SortingError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class NewModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Llama made from nothing. Left out where `sortserve sort` is given a MODEL. All sizes are counts."""

    layers: int
    hidden: int
    ffn_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    """Tokens of the byte-level BPE that is trained on the same text."""
    context: int = 1024
    rope_theta: float = 10000.0


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which text is trained on. A file is a document; a line of a .jsonl file is one as well."""

    hold_out_every: int = 0
    """Every so many-th file by name is held out, with what repeats it; 0 holds out none."""
    fields: list[str] = []
    """Of a .jsonl line, joined by blank lines; empty: `text`."""
    tokenizer_bytes: int = 12_000_000
    """Of the training text, for the tokenizer of a new model."""
    max_tokens: int = 0
    """Encode no more than this; 0: everything."""


class Grid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sub-models: every exit with every FFN width. The full depth and width are always among them."""

    exits: list[int] = []
    widths: list[int] = []


class Method(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an update's gradient is made of: `passes` forward and backward passes, each over tokens of its own."""

    kind: Literal["soft", "sorted"] = "soft"
    """soft: a pass trains all exits, or some, of one width. sorted: a pass trains one sub-model of the grid."""
    passes: int = 1
    exits_per_pass: int = 0
    """soft: so many exits, the deepest among them, are drawn for a pass; 0: all of them."""
    full_width_share: float = 0.5
    """soft: share of the passes at full width; the others draw a narrower one."""
    full_weight: float = 0.0
    """soft: the deepest exit's weight in the mean of the losses; 0: the same as the others'."""
    distill: float = 0.0
    """Share in [0, 1] of an exit's loss that is KL to the full model instead of cross-entropy."""
    layer_dropout: float = 0.0
    """Chance of skipping the last layer in a pass; lower layers proportionally less, the first never."""


class Lora(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Adapters in place of full weights, merged into them at the end."""

    rank: int = 16
    alpha: float = 32.0
    targets: list[str] = msgspec.field(default_factory=lambda: list(PROJECTIONS))
    norms: bool = False
    """Train the norm weights too."""
    sorted_ranks: bool = False
    """DyLoRA: each pass draws a rank b and trains the first b of the adapter only, so every rank works after."""
    merge_rank: int = 0
    """What is merged at the end; 0: all ranks."""


class Train(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Optimiser, schedule and batches."""

    updates: int = 0
    """0: as many as `minutes` allow, or else one pass over the text."""
    tokens_per_pass: int = 4096
    window: int = 256
    """Tokens that attend to each other."""
    long_every: int = 0
    """Every so many-th update reads windows of `long_window`; 0: none does."""
    long_window: int = 1024
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    muon_lr: float = 0.02
    """muon: of the layers' matrices; embedding, head and norms use AdamW at `lr`."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """linear: held until `decay_from` of the run, then linearly down."""
    decay_from: float = 0.6
    warmup: float = 0.04
    """Share of the run."""
    final_lr: float = 0.02
    """Share of the peak that the schedule ends at."""
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip: float = 1.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What is computed in; the optimiser's weights are float32 always."""
    checkpointed: bool = False
    """Layers are computed again in the backward pass instead of kept: a third slower, a tenth of the memory."""
    save_minutes: float = 5.0
    log_every: int = 20
    """Updates between two lines of training.jsonl."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run."""

    data: Data = Data()
    grid: Grid = Grid()
    method: Method = Method()
    train: Train = Train()
    model: NewModel | None = None
    lora: Lora | None = None
    seed: int = 0
    alone: bool = False
    """Train the full model only, to compare with."""


def read_recipe(path: Path) -> Recipe:
    """Raises SortingError that names the file and the place in it."""
    try:
        recipe = msgspec.toml.decode(path.read_bytes(), type=Recipe)
    except OSError as error:
        raise SortingError(f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SortingError(f"{path}: {error}") from error
    wrong = _wrong(recipe)
    if wrong:
        raise SortingError(f"{path}: {wrong}")
    return recipe


def write_recipe(recipe: Recipe) -> str:
    """As TOML: the values that are no tables first, then one table for each section."""
    built: dict[str, Any] = msgspec.to_builtins(recipe)
    lines = [f"{key} = {_toml(value)}" for key, value in built.items() if not isinstance(value, dict | None)]
    for key, section in built.items():
        if isinstance(section, dict):
            lines += ["", f"[{key}]", *(f"{name} = {_toml(value)}" for name, value in section.items())]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    return json.dumps(value)  # JSON's strings, numbers, booleans and arrays are TOML's as well


def _wrong(recipe: Recipe) -> str:
    """What no run could do; empty if all is well."""
    shares = {
        "method.full_width_share": recipe.method.full_width_share,
        "method.full_weight": recipe.method.full_weight,
        "method.distill": recipe.method.distill,
        "method.layer_dropout": recipe.method.layer_dropout,
        "train.warmup": recipe.train.warmup,
        "train.final_lr": recipe.train.final_lr,
        "train.decay_from": recipe.train.decay_from,
    }
    for name, value in shares.items():
        if not 0 <= value <= 1:
            return f"{name} is {value}, must be in [0, 1]"
    counts = {
        "method.passes": recipe.method.passes,
        "train.tokens_per_pass": recipe.train.tokens_per_pass,
        "train.window": recipe.train.window,
        "train.log_every": recipe.train.log_every,
        **{f"grid.{axis}": min(getattr(recipe.grid, axis), default=1) for axis in ("exits", "widths")},
    }
    if recipe.model is not None:
        counts |= {f"model.{name}": getattr(recipe.model, name) for name in ("layers", "hidden", "ffn_width", "heads")}
        counts |= {f"model.{name}": getattr(recipe.model, name) for name in ("kv_heads", "head_dim", "context")}
    if recipe.lora is not None:
        counts |= {"lora.rank": recipe.lora.rank}
    for name, count in counts.items():
        if count < 1:
            return f"{name} is {count}, must be at least 1"
    longest = max(recipe.train.window, recipe.train.long_window if recipe.train.long_every else 0)
    if recipe.train.tokens_per_pass % longest:
        return f"train.tokens_per_pass is {recipe.train.tokens_per_pass}, must be a multiple of the window, {longest}"
    if recipe.model is not None and longest > recipe.model.context:
        return f"the window is {longest} tokens, model.context {recipe.model.context}"
    if recipe.model is not None and recipe.lora is not None:
        return "lora adapts a model that there is; leave out [model] or [lora]"
    if recipe.lora is not None and not 0 <= recipe.lora.merge_rank <= recipe.lora.rank:
        return f"lora.merge_rank is {recipe.lora.merge_rank}, must be in [0, {recipe.lora.rank}]: lora.rank"
    return ""
