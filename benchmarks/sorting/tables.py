"""Sub-models found without training, method against method at the same bytes, on held-out text.

    python -m benchmarks.sorting.tables SORTED --held-out NAME=PATH ... [--stages widths,drop]

SORTED is a folder written by `sortserve sort MODEL --no-training`. Stage `widths`: the ladder's searched widths, against one
width for all layers and against whole layers dropped evenly (Unified Layer Skipping) at the same weight bytes or more; and
against one width of neurons sorted by what they add on the first calibration source alone, such as books. Stage
`drop`: 25 % of sub-layers, by Unified Layer Skipping, LLM-Drop, LIM, ZD, and EvoPress that starts from them. Prints
tables, writes benchmarks/results/untrained_STAGE.json.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import report
from sortserve.engine.ladder import Ladder
from sortserve.engine.submodel import ModelShape, SubModel
from sortserve.engine.text import Tokenizer
from sortserve.sorting import layer_drop
from sortserve.sorting.compare import Sums, Variant, compare
from sortserve.sorting.decoder import Decoder
from sortserve.sorting.fitness import KLFitness
from sortserve.sorting.importance import measure_importance
from sortserve.sorting.ladder_cli import Told
from sortserve.sorting.machine import dtype_of, keep_freed_memory
from sortserve.sorting.quality import by_loss
from sortserve.sorting.search import Settings, Space, evolve
from sortserve.sorting.texts import Domain, batches, built_in, load_domains, mixed_batches

DROPPED = 0.25  # of sub-layers
Row = tuple[str, SubModel]
Measured = tuple[str, SubModel, dict[str, Sums]]


def main() -> None:
    """Parse and run the stages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sorting.tables", description=__doc__)
    parser.add_argument("model", type=Path, metavar="SORTED")
    parser.add_argument("--held-out", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--calibration", action="append", default=[], metavar="NAME=PATH", help="for stage drop")
    parser.add_argument("--tokens", type=int, default=768, help="held out, per domain")
    parser.add_argument("--search-seconds", type=float, default=300.0, help="of each EvoPress search")
    parser.add_argument("--stages", default="widths,drop")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    keep_freed_memory()
    decoder = Decoder.load(asked.model, dtype_of(asked.model), 256)
    tokenizer = Tokenizer.load(asked.model)
    held_out = load_domains(
        asked.held_out or built_in("held_out"), tokenizer, window=256, tokens=asked.tokens, seed=asked.seed
    )
    for stage in asked.stages.split(","):
        started = time.monotonic()
        figures: dict[str, object] = {}
        calibration = load_domains(
            asked.calibration or built_in("calibration"), tokenizer, window=256, tokens=768, seed=asked.seed
        )
        if stage == "widths":
            rows = width_rows(asked.model, decoder.config.shape)
        else:
            rows, figures = drop_rows(decoder, calibration, asked.search_seconds)
        figures["seconds_before_measuring"] = time.monotonic() - started
        shape = decoder.config.shape
        results = measure(decoder, held_out, [("full", SubModel.full(shape)), *rows])
        if stage == "widths":
            results += measure(decoder, held_out, sorted_by(calibration[0], decoder, rows))
        _report(stage, shape, held_out, results, figures)


def width_rows(model: Path, shape: ModelShape) -> list[Row]:
    """Each searched entry beside one width for all layers, and beside whole layers dropped, at its bytes or more."""
    rows: list[Row] = []
    full = SubModel.full(shape)
    for entry in Ladder.load(model / "ladder.json", shape).entries:
        if entry.method != "widths":
            continue
        own = entry.submodel.cost(shape).weight_bytes
        evens = (SubModel.make(shape.num_layers, width) for width in range(1, shape.ffn_width + 1))
        even = next(one for one in evens if one.cost(shape).weight_bytes >= own)
        # as many layers as may go while no fewer bytes than the entry's are read
        fewer = full
        for keep in range(shape.num_layers, 1, -1):
            one = layer_drop.unified_layer_skipping(shape.num_layers, shape.ffn_width, keep)
            if one.cost(shape).weight_bytes < own:
                break
            fewer = one
        rows += [(entry.id, entry.submodel), (f"one width, for {entry.id}", even), (f"layers, for {entry.id}", fewer)]
    return rows


def drop_rows(decoder: Decoder, calibration: Sequence[Domain], seconds: float) -> tuple[list[Row], dict[str, object]]:
    """25 % of sub-layers by every method; EvoPress once per mix of attention and FFN that the others ask for."""
    shape = decoder.config.shape
    count, width = round(shape.num_layers * DROPPED), shape.ffn_width
    texts = mixed_batches(calibration, 96, 3)
    similarity = layer_drop.measure_similarity(decoder, texts)
    rows: list[Row] = [
        (
            "Unified Layer Skipping",
            layer_drop.unified_layer_skipping(shape.num_layers, width, shape.num_layers - count),
        ),
        ("LLM-Drop, half of each kind", layer_drop.llm_drop(similarity, width, attention=count, ffn=count)),
        ("LIM layers", layer_drop.drop_layers(similarity.lim, width, count)),
        ("ZD layers", layer_drop.drop_layers(layer_drop.zd(decoder), width, count)),
    ]
    joint = ("LLM-Drop, joint", layer_drop.llm_drop(similarity, width, joint=2 * count))
    fitness = KLFitness(decoder, texts, [1, len(texts)], 3)
    space = Space((0, width), shape.num_layers, drop_attention=True)
    figures: dict[str, object] = {"calibration_rows": fitness.num_rows, "search_seconds": seconds}
    found_rows: list[Row] = []
    for name, starts in (("EvoPress, half of each kind", rows), ("EvoPress, joint's mix", [joint])):
        told = Told()
        found = evolve(
            space,
            [submodel for _, submodel in starts],
            fitness,
            Settings(10_000, 8, (2,), seconds=seconds),
            told,
            fitness.rebase,
        )
        figures[name] = {
            "generations": found.generations,
            "evaluations": found.evaluations,
            "calibration_kl": found.fitness,
            "calibration_kl_of_starts": dict(zip((row[0] for row in starts), found.start_fitness, strict=True)),
        }
        found_rows.append((name, found.submodel))
    return [*rows, found_rows[0], joint, found_rows[1]], figures


def sorted_by(domain: Domain, decoder: Decoder, rows: Sequence[Row]) -> list[Row]:
    """The rows of one width again, after the decoder's neurons were sorted by what they add on one domain: root mean square
    of the activation x norm of the column."""
    importance = measure_importance(decoder, batches(domain, 512))
    for layer, scores in zip(decoder.layers, importance.activation, strict=True):
        layer.permute_ffn(scores.argsort(descending=True, stable=True))
    return [(f"{domain.name} alone: {name}", submodel) for name, submodel in rows if name.startswith("one width")]


def measure(decoder: Decoder, held_out: Sequence[Domain], rows: Sequence[Row]) -> list[Measured]:
    """Each row's sums by domain."""
    sums = compare(decoder, held_out, [Variant(submodel) for _, submodel in rows], progress=Told())
    return [(name, submodel, one) for (name, submodel), one in zip(rows, sums, strict=True)]


def _report(
    stage: str,
    shape: ModelShape,
    held_out: Sequence[Domain],
    results: Sequence[Measured],
    figures: dict[str, object],
) -> None:
    """Of results whose first is the full model's: print a table, write a file."""
    full_bytes = SubModel.full(shape).cost(shape).weight_bytes
    domains = [domain.name for domain in held_out]
    print(
        f"{'':42s} {'bytes':>6s} {'quality':>8s}  " + "  ".join(f"{name + ': loss, same, KL':>28s}" for name in domains)
    )
    table = []
    for name, submodel, sums in results:
        share = submodel.cost(shape).weight_bytes / full_bytes
        quality = by_loss(sums, results[0][2])
        told = {domain: sums[domain].figures() for domain in domains}
        cells = "  ".join(
            f"{one.loss.value:12.3f} {one.agreement.value:6.3f} {one.kl.value:8.3f}" for one in told.values()
        )
        print(f"{name:42s} {share:6.1%} {quality.value:8.3f}  {cells}")
        table.append(
            {
                "name": name,
                "bytes_share": round(share, 4),
                "quality": [quality.value, quality.low, quality.high],
                "mean_kl": round(mean_kl(sums), 4),
                "widths": list(submodel.widths),
                "skip_attention": list(submodel.skip_attention),
                "domains": {
                    domain: {
                        kind: [estimate.value, estimate.low, estimate.high]
                        for kind, estimate in (("loss", one.loss), ("agreement", one.agreement), ("kl", one.kl))
                    }
                    for domain, one in told.items()
                },
            }
        )
    figures |= {"tokens": {domain.name: domain.num_scored for domain in held_out}, "rows": table}
    figures["data_sha256"] = {domain.name: domain.digest for domain in held_out}
    report(f"untrained_{stage}", figures, _checks(stage, {name: mean_kl(sums) for name, _, sums in results}))


def mean_kl(sums: Mapping[str, Sums]) -> float:
    """Nats per token from the full model, the mean over domains."""
    return sum(float(one.kl.sum() / one.tokens.sum()) for one in sums.values()) / len(sums)


def _checks(stage: str, kl: Mapping[str, float]) -> dict[str, bool]:
    """What must hold, by mean KL over domains."""
    if stage == "drop":
        best = min(kl[name] for name in kl if name not in ("full",) and "EvoPress" not in name and "joint" not in name)
        return {
            "EvoPress no worse than what it starts from": kl["EvoPress, half of each kind"] <= best,
            "EvoPress no worse than LLM-Drop joint": kl["EvoPress, joint's mix"] <= kl["LLM-Drop, joint"],
        }
    checks = {}
    for name in kl:
        if f"one width, for {name}" in kl:
            checks[f"{name}: better than one width"] = kl[name] < kl[f"one width, for {name}"]
            checks[f"{name}: better than layers dropped"] = kl[name] < kl[f"layers, for {name}"]
            alone = [key for key in kl if key.endswith(f"alone: one width, for {name}")]
            checks[f"{name}: better than one width sorted on one domain"] = all(kl[name] < kl[key] for key in alone)
    return checks


if __name__ == "__main__":
    main()
