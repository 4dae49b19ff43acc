"""Time per token of shallower and narrower sub-models at batch 1 against the share of weight bytes they read, and a
batch of mixed depths against the time that its segments take at their own row counts."""

from pathlib import Path

from benchmarks.common import Bandwidth, Driver, alternate, grid_ladder, median, paired_ratio, report
from sortserve.engine.config import load_model_config

CONTEXT = 64
STEPS = 8
ROUNDS = 9


def run(model: Path) -> None:
    """Print predictions and measurements."""
    layers = load_model_config(model).shape.num_layers
    depths = [layers // 4, layers // 2, layers * 3 // 4, layers]
    driver = Driver.load(model, grid_ladder(model, depths, (1.0, 0.5, 0.25)), kv_bytes=1 << 30, dtype="bfloat16")
    ladder = driver.engine.info.ladder
    full = ladder.costs[ladder.full].weight_bytes
    bandwidth_meter = Bandwidth()
    bandwidth = bandwidth_meter.rate(bandwidth_meter.pass_seconds())
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s: full model at best {1e3 * full / bandwidth:.1f} ms a token")
    figures: dict[str, object] = {"bandwidth_gb_s": bandwidth / 1e9, "context": CONTEXT}
    checks: dict[str, bool] = {}
    wanted = [(f"d{depth}", 1.10) for depth in depths[:-1]] + [(f"d{layers}-w50", 1.15), (f"d{layers}-w25", 1.15)]
    for name, limit in wanted:
        place = driver.place(name)
        full_times, times = _pair(driver, [ladder.full], [place])
        share = ladder.costs[place].weight_bytes / full
        ratio = paired_ratio(times, full_times)
        print(
            f"{name:8s} {1e3 * median(times):6.1f} ms, full {1e3 * median(full_times):6.1f}: {ratio:.3f} of it, "
            f"share of bytes {share:.3f}: {ratio / share:.3f} x the prediction"
        )
        figures[name] = {"ms": 1e3 * median(times), "share_of_time": ratio, "share_of_bytes": share}
        checks[f"{name}: at most {limit}x the share of bytes"] = ratio / share <= limit
    figures["mixed"], checks["mixed depths: at most 1.08x the segments at their own row counts"] = _mixed(
        driver, depths
    )
    report("submodels", figures, checks)


def _pair(driver: Driver, a: list[int], b: list[int]) -> tuple[list[float], list[float]]:
    """Seconds a step of batches pinned to places `a` and `b`, in turn."""
    times = alternate([_batch(driver, a), _batch(driver, b)], ROUNDS)
    return times[0], times[1]


def _batch(driver: Driver, places: list[int]):  # type: ignore[no-untyped-def]
    def seconds() -> float:
        driver.clear()
        for place in places:
            driver.submit(CONTEXT, STEPS + 4, place, pinned=True)
        driver.catch_up()
        driver.step()
        return median(driver.step()[0] for _ in range(STEPS))

    return seconds


def _mixed(driver: Driver, depths: list[int]) -> tuple[dict[str, float], bool]:
    """8 rows with depths 24, 18, 12, 6 twice. Segment s runs n_s rows; its time at n rows is the difference of two
    uniform batches of n rows that end after and before it, so the ideal is a sum of such differences plus the head."""
    ladder = driver.engine.info.ladder
    place = {depth: driver.place(f"d{depth}") for depth in depths}
    mixed = [place[depth] for depth in reversed(depths) for _ in range(2)]
    uniform: list[tuple[int, int]] = []  # (depth, rows)
    for number, depth in enumerate(depths):
        rows = 2 * (len(depths) - number)
        uniform.append((depth, rows))
        if number > 0:
            uniform.append((depths[number - 1], rows))
    runs = [_batch(driver, mixed), *(_batch(driver, [place[depth]] * rows) for depth, rows in uniform)]
    times = alternate(runs, ROUNDS)
    ratios = []
    for number in range(ROUNDS):
        at = {key: times[1 + i][number] for i, key in enumerate(uniform)}
        ideal = at[uniform[0]]
        for i, depth in enumerate(depths[1:], start=1):
            rows = 2 * (len(depths) - i)
            ideal += at[depth, rows] - at[depths[i - 1], rows]
        ratios.append(times[0][number] / ideal)
    ratio = median(ratios)
    del ladder
    print(f"mixed batch of 8: {1e3 * median(times[0]):.1f} ms, {ratio:.3f} x its segments at their own row counts")
    return {"ms": 1e3 * median(times[0]), "ratio": ratio}, ratio <= 1.08
