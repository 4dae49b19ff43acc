"""Time per token of shallower and narrower sub-models at batch 1 against the share of weight bytes they read, and a
batch of mixed depths against the time that its segments take at their own row counts."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from benchmarks.common import CONTEXT, Bandwidth, Driver, alternate, grid_ladder, median, report
from sortserve.engine.model_config import load_model_config

ROUNDS = 60
MAX_TOKENS = ROUNDS + 8


def run(model: Path) -> None:
    """Print predictions and measurements."""
    layers = load_model_config(model).shape.num_layers
    depths = [layers // 4, layers // 2, layers * 3 // 4, layers]
    driver = Driver.load(model, grid_ladder(model, depths, (1.0, 0.5, 0.25)), kv_bytes=1 << 30, dtype="bfloat16")
    ladder = driver.engine.info.ladder
    full = ladder.costs[ladder.full].weight_bytes
    meter = Bandwidth()
    bandwidth = meter.rate(meter.pass_seconds())
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s: full model at best {1e3 * full / bandwidth:.1f} ms a token")
    print(f"context {CONTEXT}-{CONTEXT + ROUNDS} tokens, {ROUNDS} rounds of one step each, all in turn")
    figures: dict[str, object] = {"bandwidth_gb_s": bandwidth / 1e9, "context": CONTEXT}
    checks: dict[str, bool] = {}
    limits = {f"d{depth}": 1.10 for depth in depths[:-1]} | {f"d{layers}-w50": 1.15, f"d{layers}-w25": 1.15}
    names = [f"d{layers}", *limits]
    times = alternate([_group_step(driver, [driver.place(name)]) for name in names], ROUNDS)
    driver.clear()
    full_seconds = median(times[0])
    for name, seconds in zip(names[1:], times[1:], strict=True):
        share = ladder.costs[driver.place(name)].weight_bytes / full
        ratio = median(seconds) / full_seconds
        print(
            f"{name:8s} {1e3 * median(seconds):6.1f} ms, full {1e3 * full_seconds:6.1f}: {ratio:.3f} of it, "
            f"share of bytes {share:.3f}: {ratio / share:.3f} x the prediction"
        )
        figures[name] = {"ms": 1e3 * median(seconds), "share_of_time": ratio, "share_of_bytes": share}
        checks[f"{name}: at most {limits[name]}x the share of bytes"] = ratio / share <= limits[name]
    ratio = _mixed(driver, depths)
    figures["mixed_ratio"], checks["mixed depths: at most 1.08x their segments' own times"] = ratio, ratio <= 1.08
    report("submodels", figures, checks)


def _group_step(driver: Driver, places: list[int]) -> Callable[[], float]:
    """Seconds of one step of requests pinned to `places`, while all others sit out."""
    ids = driver.group(places, MAX_TOKENS)
    return lambda: driver.step(ids)


def _mixed(driver: Driver, depths: list[int]) -> float:
    """8 rows with depths 24, 18, 12, 6 twice. Segment s runs n_s rows; what it takes at n rows is the difference of two
    uniform batches of n rows that end after it and before it, so the ideal is a sum of differences, plus the head."""
    place = {depth: driver.place(f"d{depth}") for depth in depths}
    mixed = [place[depth] for depth in reversed(depths) for _ in range(2)]
    rows = {depth: 2 * (len(depths) - number) for number, depth in enumerate(depths)}
    uniform = [(depth, rows[depth]) for depth in depths]
    uniform += [(before, rows[depth]) for before, depth in pairwise(depths)]
    runs = [_group_step(driver, mixed), *(_group_step(driver, [place[depth]] * count) for depth, count in uniform)]
    times = alternate(runs, ROUNDS)
    driver.clear()
    at = {key: median(seconds) for key, seconds in zip(uniform, times[1:], strict=True)}
    ideal = at[depths[0], rows[depths[0]]]
    for before, depth in pairwise(depths):
        ideal += at[depth, rows[depth]] - at[before, rows[depth]]
    measured = median(times[0])
    print(
        f"mixed batch of 8: {1e3 * measured:.1f} ms, its segments at their own row counts {1e3 * ideal:.1f}: "
        f"{measured / ideal:.3f}"
    )
    return measured / ideal
