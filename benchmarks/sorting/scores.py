"""What `sortserve ladder measure SORTED --task ...` wrote, as a table: `python -m benchmarks.sorting.scores SORTED`.

Per entry: share of the weight bytes, quality, loss and agreement by domain, task scores with intervals, milliseconds per
token; per pair of entries, one for prompts and one for answers, loss, agreement and task scores. Writes
results/untrained_scores.json.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import msgspec

from benchmarks.common import report
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.ladder_file import Figures, Score
from sortserve.engine.model_config import load_model_config
from sortserve.sorting.quality import DEGRADED_UNDER


def main() -> None:
    """Read, print, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sorting.scores", description=__doc__)
    parser.add_argument("model", type=Path, metavar="SORTED")
    asked = parser.parse_args()
    ladder = Ladder.load(asked.model / "ladder.json", load_model_config(asked.model).shape)
    shares = [cost.weight_bytes / ladder.costs[-1].weight_bytes for cost in ladder.costs]
    entries = {}
    for entry, share in zip(ladder.entries, shares, strict=True):
        quality = f"{entry.quality.value:.3f}" if entry.quality is not None else "-"
        ms = "-" if entry.token_ms is None else f"{entry.token_ms:.1f}"
        told = f"{_told(entry.domains)} | {_scores(entry.scores)}"
        print(f"| {entry.id} | {share:.1%} | {quality} | {told} | {ms} | {entry.degraded} |")
        entries[entry.id] = {
            "bytes_share": round(share, 4),
            "degraded": entry.degraded,
            "quality": msgspec.to_builtins(entry.quality),
            "domains": msgspec.to_builtins(entry.domains),
            "scores": msgspec.to_builtins(entry.scores),
            "token_ms": entry.token_ms,
            "widths": list(entry.submodel.widths),
            "skip_attention": list(entry.submodel.skip_attention),
        }
    for pair in ladder.pairs:
        print(f"| prompt {pair.prompt}, answer {pair.answer} | {_told(pair.domains)} | {_scores(pair.scores)} |")
    figures = {
        "entries": entries,
        "pairs": msgspec.to_builtins(ladder.pairs),
        "data_sha256": ladder.measured.data_sha256 if ladder.measured is not None else {},
        "default_floor": ladder.entries[ladder.default_floor].id,
    }
    full = ladder.entries[-1]
    checks = {
        "every entry has scores with intervals": all(entry.scores for entry in ladder.entries),
        "every pair has scores with intervals": bool(ladder.pairs) and all(pair.scores for pair in ladder.pairs),
        "degraded is what keeps under half of the full model": all(
            entry.degraded == (_least_kept(entry, full) < DEGRADED_UNDER) for entry in ladder.entries[:-1]
        ),
        "no budget takes a degraded entry by itself": not any(
            entry.degraded for entry in ladder.entries[ladder.default_floor :]
        ),
    }
    report("untrained_scores", figures, checks)


def _least_kept(entry: Entry, full: Entry) -> float:
    """The least of what is kept of the full model: of a task's score, or exp of the gap of a domain's loss."""
    kept = [
        score.value / full.scores[task].value for task, score in entry.scores.items() if full.scores[task].value > 0
    ]
    kept += [math.exp(full.domains[name].loss.value - one.loss.value) for name, one in entry.domains.items()]
    return min(kept, default=1.0)


def _scores(scores: Mapping[str, Score]) -> str:
    return ", ".join(
        f"{task} {score.value:.0%} [{score.low:.0%}, {score.high:.0%}] of {score.questions}"
        for task, score in scores.items()
    )


def _told(domains: Mapping[str, Figures]) -> str:
    return ", ".join(f"{name} {one.loss.value:.2f} {one.agreement.value:.0%}" for name, one in domains.items())


if __name__ == "__main__":
    main()
