"""One set of weights: 160 ladder entries against one, in resident memory, in full-model decode, and in the weight bytes
that switching among them moves; and the peak of memory while loading."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import CONTEXT, Driver, alternate, grid_ladder, median, report
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.engine.runner import Runner
from sortserve.engine.submodel import SubModel

ROUNDS = 120


def ladder_160(model: Path, shares: Sequence[float]) -> Ladder:
    """160 entries: exits x widths x 20 sets of skipped attentions and FFNs among the first three layers."""
    shape = load_model_config(model).shape
    layers = shape.num_layers
    subsets = [[layer for layer in range(3) if number >> layer & 1] for number in range(8)]
    skips = list(itertools.product(subsets, subsets))[:20]
    entries = []
    num_exits = 8 // len(shares)
    for depth in range(layers // num_exits, layers + 1, layers // num_exits):
        for share in shares:
            for number, (attention, ffn) in enumerate(skips):
                submodel = SubModel.make(depth, round(shape.ffn_width * share), attention, ffn)
                entries.append(Entry(f"d{depth}-w{round(100 * share)}-s{number}", submodel))
    return Ladder.of(shape, entries)


def ladder_widths(model: Path) -> Ladder:
    """Four widths: as many blocks as an FFN is ever cut into."""
    return grid_ladder(model, [load_model_config(model).shape.num_layers], (0.25, 0.5, 0.75, 1.0))


def run(model: Path) -> None:
    """Memory in two fresh processes, decode in pairs in this one."""
    one, many = (_memory(model, count) for count in (1, 160))
    resident, peak = many["resident"] / one["resident"], many["peak"] / many["weights"]
    sizes = [memory["resident"] / 2**20 for memory in (one, many)]
    print(f"resident after load: 1 entry {sizes[0]:.0f} MiB, 160 entries {sizes[1]:.0f} MiB: {resident:.4f}")
    print(
        f"peak while loading over weights: {many['peak'] / 2**20:.0f} / {many['weights'] / 2**20:.0f} MiB: {peak:.3f}"
    )
    shape = load_model_config(model).shape
    drivers = [
        Driver.load(model, ladder, kv_bytes=256 << 20, max_model_len=1024)
        for ladder in (
            Ladder.of(shape, []),
            ladder_160(model, (0.5, 1.0)),
            ladder_160(model, (1.0,)),
            ladder_widths(model),
        )
    ]
    one_ms, mixed_ms, deep_ms, wide_ms = (
        1e3 * median(seconds) for seconds in alternate([_decode(driver) for driver in drivers], ROUNDS)
    )
    print(f"full-model decode, 1 entry: {one_ms:.1f} ms")
    print(f"160 entries of exits, two widths and skips: {mixed_ms:.1f} ms, {one_ms / mixed_ms:.3f} of its speed")
    print(f"160 entries of exits and skips: {deep_ms:.1f} ms, {one_ms / deep_ms:.3f}")
    print(f"four widths, four blocks a layer: {wide_ms:.1f} ms, {one_ms / wide_ms:.3f} (no target)")
    moved = _moved(drivers[1])
    print(f"weight bytes moved by switching through all {len(drivers[1].engine.info.ladder.entries)} entries: {moved}")
    figures: dict[str, object] = {
        "resident_ratio": resident,
        "peak_ratio": peak,
        "speed_ratio_160_with_two_widths": one_ms / mixed_ms,
        "speed_ratio_160_exits_and_skips": one_ms / deep_ms,
        "speed_ratio_four_widths": one_ms / wide_ms,
        "moved_bytes": moved,
    }
    checks = {
        "resident memory with 160 entries at most 1.01x": resident <= 1.01,
        "peak while loading at most 1.3x the weights": peak <= 1.3,
        "full-model decode at least 0.97x of a one-entry ladder, with two widths": one_ms / mixed_ms >= 0.97,
        "full-model decode at least 0.97x of a one-entry ladder, exits and skips": one_ms / deep_ms >= 0.97,
        "0 weight bytes moved by switches": moved == 0,
    }
    report("one_set", figures, checks)


def _decode(driver: Driver) -> Callable[[], float]:
    """Seconds of one step of one request on the full model."""
    ids = driver.group([driver.engine.info.ladder.full], ROUNDS + 4)
    return lambda: driver.step(ids)


def _weight_places(driver: Driver) -> dict[str, tuple[int, int]]:
    """Address and bytes of every weight tensor."""
    runner = driver.engine.runner
    assert isinstance(runner, Runner)
    weights = runner._model.weights
    places = {"embedding": (weights.embedding.data_ptr(), weights.embedding.nbytes)}
    for number, layer in enumerate(weights.layers):
        for part, tensor in enumerate(layer.tensors):
            # what oneDNN packed has no address; its identity stands for it
            places[f"{number}.{part}"] = (id(tensor), tensor.nbytes)
    return places


def _moved(driver: Driver) -> int:
    """Run one step on each of the entries; bytes of weight tensors that were replaced meanwhile."""
    before = _weight_places(driver)
    driver.clear()
    ladder = driver.engine.info.ladder
    request_id = driver.submit(CONTEXT, len(ladder.entries) + 4)
    driver.catch_up()
    for place in range(len(ladder.entries)):
        driver.policy.places[request_id] = place
        driver.step()
    driver.clear()
    after = _weight_places(driver)
    return sum(size for key, (place, size) in after.items() if before[key][0] != place)


def _memory(model: Path, entries: int) -> dict[str, int]:
    """Bytes after loading in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.one_set", str(model), str(entries)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    answer: dict[str, int] = json.loads(out.splitlines()[-1])
    return answer


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _measure_memory(model: Path, entries: int) -> None:
    shape = load_model_config(model).shape
    ladder = ladder_160(model, (0.5, 1.0)) if entries > 1 else Ladder.of(shape, [])
    before = _status("VmRSS")
    driver = Driver.load(model, ladder, kv_bytes=256 << 20, max_model_len=1024)
    peak, resident = _status("VmHWM") - before, _status("VmRSS")
    print(json.dumps({"resident": resident, "peak": peak, "weights": driver.engine.info.weight_bytes}))


if __name__ == "__main__":
    _measure_memory(Path(sys.argv[1]), int(sys.argv[2]))
