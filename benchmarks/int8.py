"""Decode throughput with int8 weights against bfloat16, both with our own products, and against oneDNN's bfloat16 products,
at batch 1, 8 and 32, step by step in turn in one process."""

from pathlib import Path

import numpy as np

from benchmarks.common import CONTEXT, Driver, alternate, median, paired_ratio, report
from sortserve.engine.ladder import Ladder
from sortserve.engine.model_config import load_model_config

ROUNDS = 40
TARGET = 1.6  # times our own bfloat16 at batch 1
BATCHES = (1, 8, 32)


def run(model: Path) -> None:
    """Print medians and paired ratios."""
    ladder = Ladder.of(load_model_config(model).shape, [])
    drivers = {
        name: Driver.load(
            model,
            ladder,
            kv_bytes=512 << 20,
            dtype="bfloat16",
            max_step_tokens=512,
            weights=weights,
            compile_kernels=own,
        )
        for name, weights, own in (
            ("int8", "int8", True),
            ("bfloat16", "auto", True),
            ("bfloat16_onednn", "auto", False),
        )
    }
    figures: dict[str, object] = {
        "context": CONTEXT,
        "weight_bytes": {name: driver.engine.info.weight_bytes for name, driver in drivers.items()},
        "kernels": {name: driver.engine.info.kernels for name, driver in drivers.items()},
    }
    checks: dict[str, bool] = {}
    for batch in BATCHES:
        for driver in drivers.values():
            for _ in range(batch):
                driver.submit(CONTEXT, ROUNDS + 4)
            driver.catch_up()
        times = dict(zip(drivers, alternate([driver.step for driver in drivers.values()], ROUNDS), strict=True))
        for driver in drivers.values():
            driver.clear()
        rates = {name: batch / median(seconds) for name, seconds in times.items()}
        ratios = {name: paired_ratio(seconds, times["int8"]) for name, seconds in times.items() if name != "int8"}
        pairs = [theirs / ours for theirs, ours in zip(times["bfloat16"], times["int8"], strict=True)]
        low, high = np.quantile(pairs, (0.25, 0.75))
        print(
            f"batch {batch:2d}: int8 {rates['int8']:6.1f} tokens/s, bfloat16 {rates['bfloat16']:6.1f} (oneDNN's products "
            f"{rates['bfloat16_onednn']:6.1f}); int8 {ratios['bfloat16']:.2f}x bfloat16 (middle half of the pairs "
            f"{low:.2f}-{high:.2f}), {ratios['bfloat16_onednn']:.2f}x oneDNN's"
        )
        figures[f"batch_{batch}"] = {"tokens_s": rates, "int8_times": ratios}
        if batch == 1:
            checks[f"batch 1: at least {TARGET}x our own bfloat16"] = ratios["bfloat16"] >= TARGET
    report("int8", figures, checks)
