"""The ladder: the sub-models a checkpoint offers, with measured quality, in `ladder.json` beside the weights.

`ladder_file` says what the file looks like. The costs that order a ladder are not in it; they follow from the model's
shape.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from sortserve.engine import ladder_file
from sortserve.engine.errors import LadderError, NotFoundError
from sortserve.engine.ladder_file import DepthHeadEntry, Figures, Measured, Pair, Quality, Score
from sortserve.engine.submodel import Cost, ModelShape, SubModel

__all__ = ["DepthHeadEntry", "Entry", "Figures", "Ladder", "Measured", "Pair", "Quality", "Score"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One rung: its id, the sub-model, its quality if measured, and whether it is too poor to be chosen by `auto`.

    The rest is for readers; no policy looks at it: figures by domain of text, scores by task, milliseconds per token
    where it was measured (None: not timed), and the method that found the sub-model.
    """

    id: str
    submodel: SubModel
    quality: Quality | None = None
    degraded: bool = False
    domains: Mapping[str, Figures] = field(default_factory=dict, hash=False)
    scores: Mapping[str, Score] = field(default_factory=dict, hash=False)
    token_ms: float | None = None
    method: str = ""


@dataclass(frozen=True)
class Ladder:
    """Entries from the cheapest to the full model. The full model is always the last one."""

    shape: ModelShape
    entries: tuple[Entry, ...]
    measured: Measured | None = None
    pairs: tuple[Pair, ...] = ()
    depth_head: DepthHeadEntry | None = None  # for these very exits: a ladder made anew has none
    layer_importance: tuple[float, ...] = ()  # of each layer, higher matters more (LIM's); empty: not known

    def __post_init__(self) -> None:
        ids = [entry.id for entry in self.entries]
        if len(set(ids)) != len(ids):
            raise LadderError(f"ladder has two entries of one id among {ids}; give them an `id` of their own")
        if len({entry.submodel for entry in self.entries}) != len(ids):
            raise LadderError(f"ladder has the same sub-model twice among {ids}; drop one of them")
        if not self.entries or self.entries[-1].submodel != SubModel.full(self.shape):
            raise LadderError("the last entry of a ladder must be the full model")
        foreign = [name for pair in self.pairs for name in (pair.prompt, pair.answer) if name not in ids]
        if foreign:
            raise LadderError(f"pairs name {foreign[0]!r}, which is no entry of the ladder: {', '.join(ids)}")
        if len(self.layer_importance) not in (0, self.shape.num_layers):
            told = f"{len(self.layer_importance)} layers, the model has {self.shape.num_layers}"
            raise LadderError(f"layer_importance lists {told}")

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        entries: Sequence[Entry],
        measured: Measured | None = None,
        pairs: Sequence[Pair] = (),
        depth_head: DepthHeadEntry | None = None,
        layer_importance: Sequence[float] = (),
    ) -> "Ladder":
        """A ladder of `entries` in order of cost; the full model is added if it is not among them."""
        full = SubModel.full(shape)
        kept = list(entries)
        if all(entry.submodel != full for entry in kept):
            kept.append(Entry(f"d{shape.num_layers}", full, Quality(1.0)))
        # ties by depth: of two entries that read the same bytes the deeper one is the better candidate
        kept.sort(key=lambda entry: (entry.submodel != full, entry.submodel.cost(shape), entry.submodel.depth))
        kept = kept[1:] + kept[:1]
        return cls(shape, tuple(kept), measured, tuple(pairs), depth_head, tuple(layer_importance))

    @classmethod
    def default(cls, shape: ModelShape, width_percents: Sequence[int] = (75, 100)) -> "Ladder":
        """What a checkpoint without `ladder.json` offers: full depth at these widths, snapped to multiples of 128
        neurons where the FFN is wide enough, unmeasured."""
        entries: list[Entry] = []
        for percent in width_percents:
            exact = shape.ffn_width * percent / 100
            width = round(exact / 128) * 128 if exact >= 512 else max(1, round(exact))
            submodel = SubModel.make(shape.num_layers, shape.ffn_width if percent == 100 else width)
            name = submodel.name(shape)
            if name is not None and all(entry.id != name for entry in entries):  # tiny FFNs snap two onto one
                entries.append(Entry(name, submodel))
        return cls.of(shape, entries)

    @classmethod
    def of_folder(cls, folder: Path, shape: ModelShape, path: Path | None = None) -> "Ladder":
        """What a model folder offers: the ladder of `path` if one is given, else of its `ladder.json`, else the default
        one. Raises as `load`."""
        own = folder / "ladder.json"
        return cls.default(shape) if path is None and not own.is_file() else cls.load(path or own, shape)

    @classmethod
    def load(cls, path: Path, shape: ModelShape) -> "Ladder":
        """Read `ladder.json`.

        Raises LadderError, naming the file and the place in it, if it is malformed or made for another model.
        """
        file = ladder_file.read(path)
        if (file.num_layers, file.ffn_width) != (shape.num_layers, shape.ffn_width):
            raise LadderError(
                f"{path}: made for {file.num_layers} layers of {file.ffn_width} FFN neurons, "
                f"the model has {shape.num_layers} of {shape.ffn_width}"
            )
        entries: list[Entry] = []
        for place, entry in enumerate(file.entries):
            try:
                entries.append(_entry(entry, shape, len(entries)))
            except ValueError as error:
                raise LadderError(f"{path}: entries[{place}]: {error}") from error
        try:
            return cls.of(shape, entries, file.measured, file.pairs, file.depth_head, file.layer_importance)
        except LadderError as error:
            raise LadderError(f"{path}: {error.message}") from error

    def dump(self, path: Path) -> None:
        """Write the ladder as `load` reads it."""
        entries = []
        for entry in self.entries:
            submodel = entry.submodel
            width = submodel.widths[0] if len(set(submodel.widths)) == 1 else list(submodel.widths)
            entries.append(
                ladder_file.FileEntry(
                    depth=submodel.depth,
                    width=width,
                    skip_attention=list(submodel.skip_attention),
                    id=None if entry.id == submodel.name(self.shape) else entry.id,
                    quality=entry.quality,
                    degraded=entry.degraded,
                    domains=dict(entry.domains),
                    scores=dict(entry.scores),
                    token_ms=entry.token_ms,
                    method=entry.method,
                )
            )
        ladder_file.write(
            path,
            self.shape.num_layers,
            self.shape.ffn_width,
            entries,
            self.measured,
            list(self.pairs),
            self.depth_head,
            self.layer_importance,
        )

    def narrowed(self, share: float) -> "Ladder":
        """The ladder of a model that keeps so many of its layers, the least important ones, in `shape.weight_bytes`; all of
        them and the head for 1. Raises LadderError where it is not known which layers these are."""
        if share == 1.0:
            return self
        if not self.layer_importance:
            raise LadderError("it is not known how important which layer is; `sortserve ladder measure` finds out")
        layers = sorted(range(self.shape.num_layers), key=self.layer_importance.__getitem__)
        shape = replace(self.shape, narrow_layers=frozenset(layers[: max(1, round(share * len(layers)))]))
        return Ladder.of(shape, self.entries, self.measured, self.pairs, self.depth_head, self.layer_importance)

    @cached_property
    def exits(self) -> tuple[int, ...]:
        """Depths at which some entry stops, ascending; the last is the model's own depth."""
        return tuple(sorted({entry.submodel.depth for entry in self.entries}))

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Segment s is layers [bounds[s], bounds[s + 1])."""
        return (0, *self.exits)

    @property
    def num_segments(self) -> int:
        """Number of segments, one per exit."""
        return len(self.exits)

    @cached_property
    def costs(self) -> tuple[Cost, ...]:
        """Cost of each entry, in the ladder's order."""
        return tuple(entry.submodel.cost(self.shape) for entry in self.entries)

    @cached_property
    def qualities(self) -> tuple[float, ...]:
        """Quality of each entry, in the ladder's order: the measured one. Where nothing was measured the share of the full
        model's weight bytes stands in, so that more is never worse."""
        full_bytes = self.costs[-1].weight_bytes
        return tuple(
            entry.quality.value if entry.quality is not None else cost.weight_bytes / full_bytes
            for entry, cost in zip(self.entries, self.costs, strict=True)
        )

    def mean_quality(self, tokens: Mapping[str, int]) -> float | None:
        """Quality of an answer: the mean over its output tokens, given their numbers by id. None without any, or where one
        is of no entry (an engine that was replaced may have read another file)."""
        total = sum(tokens.values())
        if not total or not tokens.keys() <= self._places.keys():
            return None
        return sum(self.qualities[self._places[name]] * number for name, number in tokens.items()) / total

    @cached_property
    def _places(self) -> dict[str, int]:
        return {entry.id: place for place, entry in enumerate(self.entries)}

    @property
    def full(self) -> int:
        """Place of the full model."""
        return len(self.entries) - 1

    @cached_property
    def default_floor(self) -> int:
        """Place of the smallest entry not marked `degraded`: the floor of a request with a budget."""
        return next(place for place, entry in enumerate(self.entries) if not entry.degraded)

    @cached_property
    def dearest(self) -> tuple[int, ...]:
        """By exit: the place of the costliest entry that stops there."""
        depths = [entry.submodel.depth for entry in self.entries]
        return tuple(max(place for place, own in enumerate(depths) if own == depth) for depth in self.exits)

    def place(self, submodel_id: str, *, param: str = "submodel") -> int:
        """Place of an entry by id. Raises NotFoundError that lists the ids there are."""
        if submodel_id not in self._places:
            known = ", ".join(self._places)
            raise NotFoundError(f"no sub-model {submodel_id[:64]!r}; this ladder has: {known}", param=param)
        return self._places[submodel_id]

    def quality_floor(self, share: float) -> int:
        """Place of the cheapest entry from which on every entry is measured to have at least `share` of the full model's
        quality; the full model always has. All of them, since a policy may choose any place above a floor."""
        floor = self.full
        while floor > 0:
            quality = self.entries[floor - 1].quality
            if quality is None or quality.value < share:
                break
            floor -= 1
        return floor

    def ffn_boundaries(self, layer: int, most: int = 4) -> tuple[int, ...]:
        """At most `most` ascending column boundaries for layer's FFN blocks, the last one the full width.

        Every width is a boundary where they are few. More blocks than that cost more than they save (16 packed blocks
        made an FFN 1.9x slower at 8 rows), so then they are spread, and a width between two boundaries is masked.
        """
        widths = {entry.submodel.widths[layer] for entry in self.entries if entry.submodel.depth > layer}
        ascending = sorted((widths | {self.shape.ffn_width}) - {0})
        if len(ascending) <= most:
            return tuple(ascending)
        picked = [ascending[round((i + 1) * (len(ascending) - 1) / most)] for i in range(most)]
        return tuple(sorted(set(picked)))


def _entry(entry: ladder_file.FileEntry, shape: ModelShape, number: int) -> Entry:
    """Validate one entry of the file; raises ValueError with the value and the limit."""
    if not 1 <= entry.depth <= shape.num_layers:
        raise ValueError(f"depth is {entry.depth}, must be in [1, {shape.num_layers}]: the model's layers")
    if not isinstance(entry.width, int) and len(entry.width) < entry.depth:
        raise ValueError(f"width lists {len(entry.width)} layers, depth is {entry.depth}")
    if entry.quality is not None:
        value = entry.quality.value
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"quality is {value}, must be in [0, 1]")
        low = value if entry.quality.low is None else entry.quality.low
        high = value if entry.quality.high is None else entry.quality.high
        if not 0.0 <= low <= value <= high <= 1.0:
            raise ValueError(f"quality interval is [{low}, {high}], must hold {value} and lie in [0, 1]")
    submodel = SubModel.make(entry.depth, entry.width, entry.skip_attention, entry.skip_ffn)
    submodel.check(shape)
    percent = round(100 * max(submodel.widths) / shape.ffn_width)
    made = submodel.name(shape) or f"d{submodel.depth}-w{percent}-s{number}"
    return Entry(
        entry.id or made,
        submodel,
        entry.quality,
        entry.degraded,
        entry.domains,
        entry.scores,
        entry.token_ms,
        entry.method,
    )
