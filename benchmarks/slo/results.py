"""Where the figures go: which targets are reached, the JSON, the Markdown, the plots."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, machine, module_command
from benchmarks.slo import report
from benchmarks.slo.bench import Bench
from benchmarks.slo.capacity import Capacity

_TARGET_OF_FLOOR = 0.8
_ROUNDING = 0.005
LEAST_RATIO = 2.5


def save(
    bench: Bench, points: Sequence[dict[str, Any]], after: Sequence[Capacity] = (), plots: Sequence[Path] = ()
) -> dict[str, Any]:
    """The JSON and the Markdown as of now: a run that is ended early keeps its points. What the file says of all of them."""
    head = _head(bench)
    head["capacity_after"] = [_fields(found) for found in after]
    head["reached"] = checks(head, points)
    stem = stem_of(bench)
    stem.with_suffix(".md").write_text(report.markdown(head, points, plots))
    rows = ",\n".join(json.dumps(point) for point in points)
    stem.with_suffix(".json").write_text(f'{json.dumps(head)[:-1]},\n"points": [\n{rows}\n]}}\n')
    return head


def stem_of(bench: Bench) -> Path:
    """Where the results go, without the suffix."""
    asked = bench.asked
    return RESULTS / f"slo-{asked.name or f'{asked.model.name}-{asked.trace.stem}'}"


def finish(bench: Bench, points: Sequence[dict[str, Any]], after: Sequence[Capacity]) -> None:
    """Plots, what is reached, and one line of JSON at the end."""
    stem = stem_of(bench)
    try:
        from benchmarks.slo.plots import draw

        plots = draw(points, stem)
    except ImportError as error:
        print(f"  no plots: {error}; pip install -e '.[simulate]', then python -m benchmarks.slo.plots {stem}.json")
        plots = []
    head = save(bench, points, after, plots)
    for check, reached in head["reached"].items():
        print(f"  {'reached ' if reached else 'MISSED  '} {check}")
    print(json.dumps(head))


def checks(head: dict[str, Any], points: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """What must be reached, as far as these points can tell; void ones tell nothing."""
    rates = {found["submodel"]: found["requests_per_second"] for found in head["capacity"]}
    full = head["capacity"][-1]["requests_per_second"]
    reached = {
        f"the floor's capacity is at least {LEAST_RATIO}x the full model's": rates[head["floor"]] >= LEAST_RATIO * full
    }
    most = _TARGET_OF_FLOOR + _ROUNDING
    counted = [point for point in points if not point["void"]]
    slack = [point for point in counted if point["policy"] == "slack"]
    held = [point for point in slack if point["load_of_floor"] <= most and point["attainment_worst_30s"] is not None]
    if held:
        reached["slack: at least 98 % met in any 30 s, up to 0.8 of the floor's capacity"] = all(
            point["attainment_worst_30s"] >= 0.98 for point in held
        )
    light = [point for point in slack if point["load"] < 1.0 and point["mean_quality"] is not None]
    if light:
        reached["slack: mean quality within 1 % of the full model's below its capacity"] = all(
            point["mean_quality"] >= 0.99 for point in light
        )
    fixed = [point for point in counted if point["policy"] == "fixed" and point["load"] > 1.0]
    there = [point for point in fixed if abs(point["load_of_floor"] - _TARGET_OF_FLOOR) <= _ROUNDING]
    if there:
        reached["fixed at full size: below 50 % met at 0.8 of the floor's capacity"] = all(
            point["attainment"] < 0.5 for point in there
        )
    return reached


def _head(bench: Bench) -> dict[str, Any]:
    """Everything but the points."""
    asked = bench.asked
    of_id = dict(zip((entry.id for entry in bench.ladder.entries), bench.ladder.qualities, strict=True))
    known = {entry.id for entry in bench.ladder.entries if entry.quality is not None}
    return {
        "benchmark": "slo",
        "date": time.strftime("%Y-%m-%d"),
        "commit": bench.commit,
        "command": module_command(),
        "machine": machine(),
        "model": asked.model.name,
        "trace": asked.trace.name,
        "told": _told(bench),
        "unloaded_seconds": _fields(bench.unloaded),
        "slowness": None if bench.slowness is None else _fields(bench.slowness),
        "budgets": {"seed": asked.seed, **_fields(bench.mix)},
        "capacity": [
            {**_fields(found), "quality": of_id[found.submodel], "measured": found.submodel in known}
            for found in bench.capacity
        ],
        "floor": bench.floor.submodel,
    }


def _told(bench: Bench) -> str:
    """The conditions in words."""
    asked, trace, quality = bench.asked, bench.trace, bench.ladder.measured
    return (
        f"Lengths x {asked.lengths:g} (mean {trace.num_prompt.mean():.0f} tokens in, {trace.num_output.mean():.0f} out,\n"
        f"forced with `ignore_eos`), {asked.seconds:g} s per point from request {asked.start} on, greedy, no prompt like\n"
        f"another; budgets drawn with seed {asked.seed}, {asked.strict:.0%} of them `strict`,\n"
        f"{asked.no_budget:.0%} of the requests without one. A lone request of the full\n"
        f"model: {1e3 * bench.unloaded.first:.0f} ms + {1e3 * bench.unloaded.prompt_token:.2f} ms per prompt token to the\n"
        f"first token, {1e3 * bench.unloaded.token:.1f} ms for each further one. Capacity: {asked.clients} clients in a\n"
        f"closed loop for {asked.capacity_seconds:g} s. The floor is {bench.floor.submodel}. Loads are multiples of the\n"
        f"full model's capacity. Quality: {'not measured' if quality is None else quality.metric}."
    )


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
