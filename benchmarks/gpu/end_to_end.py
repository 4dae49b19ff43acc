"""Whole steps of the real runner on dummy weights: against the bandwidth ceiling, by share of depth and width, mixed; what a
switch of sub-models costs; scheduling and launch overhead; a refill against a prefill.

Device time is that of the step's graphs (or kernels) launched again and again; wall time is the runner's, from the plan
to the sampled ids. The ceiling counts the weights that some row needs, each once, and every row's K/V.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from benchmarks.gpu.common import Clock, ceilings, milliseconds, model_dtype, small
from benchmarks.gpu.model import LLAMA_1B, LLAMA_8B, TINY, Bench, Setup
from benchmarks.gpu.scheduling import scheduled
from sortserve.engine.plan import Plan

CONTEXT = 1024
BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Row:
    """One line of a table: device milliseconds, wall milliseconds (0: not measured), the ceiling or the ideal, and a
    figure held against the issue's number."""

    section: str
    what: str
    device_ms: float
    wall_ms: float = 0.0
    ideal_ms: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    target: str = ""
    reached: bool | None = None


def setups(device: torch.device, name: str) -> Setup:
    """The setup of that name; a tiny one under the interpreter."""
    return TINY if small(device) else {"1b": LLAMA_1B, "8b": LLAMA_8B}[name]


def run(name: str, device: torch.device, clock: Clock, say: Callable[[str], None], rows: list[Row]) -> None:
    """All measurements on one shape, added to `rows`, as far as the time reaches; what is left out is said."""
    began = time.monotonic()
    bench = Bench.build(setups(device, name), device, model_dtype(device))
    graphs = bench.runner.graphs
    assert graphs is not None
    say(f"{bench.setup.name}: weights, pool and graphs in {time.monotonic() - began:.1f} s")
    memory = {"graphs_mib": graphs.capture_bytes / (1 << 20)}
    rows.append(Row("start", f"{bench.setup.name}: capture", 0.0, 1e3 * graphs.capture_seconds, figures=memory))
    for section in (full_depth, shares, mixed, switches, refill, overhead, fp8_kv):
        if clock.spent():
            say(f"{bench.setup.name}: no time left for {section.__name__}")
            continue
        for made in section(bench, clock):
            row = replace(made, reached=None) if small(device) else made  # its times mean nothing
            rows.append(row)
            say(described(row))


def described(row: Row) -> str:
    """One line of progress."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in row.figures.items())
    verdict = "" if row.reached is None else f"  [{'reached' if row.reached else 'MISSED'}: {row.target}]"
    times = f"device {row.device_ms:.3f} ms, wall {row.wall_ms:.3f}, ideal {row.ideal_ms:.3f}"
    return f"  {row.section}: {row.what}: {times}; {figures}{verdict}"


def device_ms(bench: Bench, plan: Plan) -> float:
    """Device time of a step."""
    return milliseconds(bench.runner.prepared(plan).launch, bench.device, rounds=15)


def wall_ms(bench: Bench, plan: Plan) -> float:
    """Wall time of a step, plan to ids."""
    times = []
    for _ in range(1 if small(bench.device) else 12):
        began = time.perf_counter()
        bench.runner.run(plan)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times) * 1e3


def full_depth(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Decode of the full model at batch 1-64."""
    context = min(CONTEXT, bench.setup.context // 2)
    ceiling = ceilings(bench.device)
    for batch in [count for count in BATCHES if count <= bench.setup.max_running]:
        if clock.spent():
            return
        places = [bench.full] * batch
        plan = bench.decode(places, context)
        ideal = ceiling.milliseconds(bench.decode_bytes(places, context), bench.decode_flops(places, context))
        took, wall = device_ms(bench, plan), wall_ms(bench, plan)
        share = ideal / took
        yield Row(
            "decode",
            f"{bench.setup.name}, batch {batch}, context {context}",
            took,
            wall,
            ideal,
            {"of_ceiling": share, "tokens_per_second_wall": 1e3 * batch / wall},
            "at least 0.80 of the ceiling",
            share >= 0.8 if bench.setup is LLAMA_8B else None,
        )


def shares(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Depths at full width, and widths at full depth, against the full model's time times the share of bytes."""
    setup, context = bench.setup, min(CONTEXT, bench.setup.context // 2)
    full_width, full_depth = setup.widths[-1], setup.depths[-1]
    others = [(depth, full_width) for depth in setup.depths[:-1]] + [(full_depth, w) for w in setup.widths[:-1]]
    for batch in sorted({min(count, setup.max_running) for count in (1, 8, 32)})[-3:]:
        if clock.spent():
            return
        full_places = [bench.full] * batch
        full_ms = device_ms(bench, bench.decode(full_places, context))
        for depth, width in others:
            places = [bench.place(depth, width)] * batch
            plan = bench.decode(places, context)
            took = device_ms(bench, plan)
            share = bench.decode_bytes(places, context) / bench.decode_bytes(full_places, context)
            ratio = took / (full_ms * share)
            yield Row(
                "depth" if width == full_width else "width",
                f"{setup.name}, batch {batch}, depth {depth}, width {width}",
                took,
                wall_ms(bench, plan),
                full_ms * share,
                {"share_of_bytes": share, "over_share": ratio},
                "at most 1.05 of the share",
                ratio <= 1.05,
            )


def mixed(bench: Bench, clock: Clock) -> Iterator[Row]:
    """All depths and widths in one step. The ideal: for every layer the deepest and widest row's bytes, at the speed that
    the full model's step of as many rows reaches."""
    setup, context = bench.setup, min(CONTEXT, bench.setup.context // 2)
    kinds = [bench.place(depth, width) for depth in setup.depths for width in setup.widths]
    for batch in sorted({min(count, setup.max_running) for count in (8, 32)}):
        for what, palette in (
            ("depths and widths", kinds),
            ("depths", [bench.place(depth, setup.widths[-1]) for depth in setup.depths]),
            ("below full", [place for place in kinds if place != bench.full][: len(kinds) // 2]),
        ):
            if clock.spent():
                return
            places = [palette[number % len(palette)] for number in range(batch)]
            plan = bench.decode(places, context)
            took, reference = device_ms(bench, plan), device_ms(bench, bench.decode([bench.full] * batch, context))
            full_bytes = bench.decode_bytes([bench.full] * batch, context)
            ideal = reference * bench.decode_bytes(places, context) / full_bytes
            yield Row(
                "mixed",
                f"{setup.name}, batch {batch}, {what}",
                took,
                wall_ms(bench, plan),
                ideal,
                {"over_ideal": took / ideal},
                "at most 1.05 of the ideal",
                took / ideal <= 1.05,
            )


def switches(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Steps whose rows change their sub-model every time, against steps that stay: what a switch adds to the wall time, and
    bytes of weights that moved (memory allocated on the device before and after)."""
    setup, context = bench.setup, min(CONTEXT, bench.setup.context // 2)
    batch = min(8, setup.max_running)
    places = [bench.place(depth, width) for depth in setup.depths for width in setup.widths]
    steady = [bench.decode([place] * batch, context) for place in places]
    for plan in steady:
        bench.runner.run(plan)
    before = torch.cuda.memory_allocated(bench.device) if not small(bench.device) else 0
    same, changing = list[float](), list[float]()
    for _ in range(1 if small(bench.device) else 20):
        if clock.spent():
            break
        same += [_seconds(bench, plan) for plan in steady for _ in range(2)][1::2]
        changing += [_seconds(bench, plan) for plan in steady]
    moved = torch.cuda.memory_allocated(bench.device) - before if not small(bench.device) else 0
    added = (statistics.fmean(changing) - statistics.fmean(same)) * 1e6
    yield Row(
        "switch",
        f"{setup.name}, batch {batch}, another sub-model every step",
        0.0,
        statistics.fmean(changing) * 1e3,
        statistics.fmean(same) * 1e3,
        {"added_microseconds": added, "weight_bytes_moved": float(moved)},
        "under 100 us, 0 bytes",
        added < 100 and moved == 0,
    )


def _seconds(bench: Bench, plan: Plan) -> float:
    began = time.perf_counter()
    bench.runner.run(plan)
    return time.perf_counter() - began


def refill(bench: Bench, clock: Clock) -> Iterator[Row]:
    """A prompt's K/V from the states kept at half depth, against the whole prompt from its tokens."""
    setup, geometry = bench.setup, bench.geometry
    count = min(512, setup.context // 2)
    enters = bench.settings.exits[bench.place(setup.depths[0], setup.widths[-1])]
    prefill = bench.plan([bench.part(0, bench.full, 0, count)])
    marks = (count,) * enters + (0,) * (geometry.num_segments - enters)
    deeper = bench.plan([bench.part(0, bench.full, 0, count, first_segment=enters, watermark=marks)])
    shallow = bench.plan([bench.part(0, bench.place(setup.depths[0], setup.widths[-1]), 0, count, states=True)])
    bench.runner.run(shallow)  # keeps the states that the refill starts from
    prefill_ms, refill_ms = device_ms(bench, prefill), device_ms(bench, deeper)
    yield Row(
        "refill",
        f"{setup.name}, {count} tokens from layer {setup.depths[0]} of {setup.depths[-1]}",
        refill_ms,
        wall_ms(bench, deeper),
        prefill_ms,
        {"prefill_ms": prefill_ms, "of_prefill": refill_ms / prefill_ms},
        "at most 0.6 of a prefill",
        refill_ms / prefill_ms <= 0.6,
    )


def fp8_kv(bench: Bench, clock: Clock) -> Iterator[Row]:
    """The longest contexts that fit, with K/V in fp8 against the model's dtype: by their shares of bytes. On the small
    shape only, where K/V weigh more and a second model takes seconds."""
    setup = bench.setup
    if setup is LLAMA_8B:
        return
    context, places = setup.context - 1, [bench.full] * setup.max_running
    wide_ms = device_ms(bench, bench.decode(places, context))
    wide_bytes = bench.decode_bytes(places, context)
    narrow = Bench.build(
        replace(setup, shape=replace(setup.shape, kv_value_bytes=1)),
        bench.device,
        bench.dtype,
        eager=not clock.left > 20,
    )
    plan = narrow.decode(places, context)
    share = narrow.decode_bytes(places, context) / wide_bytes
    took = device_ms(narrow, plan)
    yield Row(
        "fp8 K/V",
        f"{setup.name}, batch {len(places)}, context {context}",
        took,
        wall_ms(narrow, plan),
        wide_ms * share,
        {"share_of_bytes": share, "over_share": took / (wide_ms * share)},
        "at most 1.05 of the share",
        took / (wide_ms * share) <= 1.05,
    )


def overhead(bench: Bench, clock: Clock) -> Iterator[Row]:
    """The real scheduler at batch 32: what of a step is not the device's, with planning beside the device's work."""
    setup = bench.setup
    batch = min(32, setup.max_running)
    steps = 1 if small(bench.device) else 60
    waiting = scheduled(bench, batch, steps, clock, ahead=False)
    seconds = scheduled(bench, batch, steps, clock, ahead=True)
    context = min(CONTEXT, setup.context // 2)
    took = device_ms(bench, bench.decode([bench.full] * batch, min(context, 128)))
    step_ms = float(np.median(seconds)) * 1e3
    share = (step_ms - took) / step_ms
    yield Row(
        "overhead",
        f"{setup.name}, batch {batch}, the whole engine's step",
        took,
        step_ms,
        took,
        {"not_device_share": share, "not_ahead_ms": float(np.median(waiting)) * 1e3},
        "under 0.05 of a step",
        share < 0.05,
    )
