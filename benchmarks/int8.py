"""Decode throughput with int8 weights against the model's own dtype, at batch 1, 8 and 32, paired in one process."""

from pathlib import Path

import numpy as np

from benchmarks.common import CONTEXT, Driver, alternate, median, paired_ratio, report
from sortserve.engine.config import load_model_config
from sortserve.engine.ladder import Ladder

ROUNDS = 40
TARGET = 1.6  # times bfloat16 at batch 1


def run(model: Path) -> None:
    """Print medians and paired ratios."""
    ladder = Ladder.of(load_model_config(model).shape, [])
    plain, int8 = (
        Driver.load(model, ladder, kv_bytes=512 << 20, dtype="bfloat16", max_step_tokens=512, weights=weights)
        for weights in ("auto", "int8")
    )
    figures: dict[str, object] = {
        "context": CONTEXT,
        "weight_bytes": {"bfloat16": plain.engine.info.weight_bytes, "int8": int8.engine.info.weight_bytes},
    }
    checks: dict[str, bool] = {}
    for batch in (1, 8, 32):
        for driver in (plain, int8):
            for _ in range(batch):
                driver.submit(CONTEXT, ROUNDS + 4)
            driver.catch_up()
        theirs, ours = alternate([plain.step, int8.step], ROUNDS)
        plain.clear()
        int8.clear()
        ratio = paired_ratio(theirs, ours)
        low, high = np.quantile([a / b for a, b in zip(theirs, ours, strict=True)], (0.25, 0.75))
        print(
            f"batch {batch:2d}: int8 {batch / median(ours):6.1f} tokens/s, bfloat16 {batch / median(theirs):6.1f}, "
            f"ratio {ratio:.2f} (middle half of the pairs {low:.2f}-{high:.2f})"
        )
        figures[f"batch_{batch}"] = {"tokens_s": batch / median(ours), "ratio": ratio}
        if batch == 1:
            checks[f"batch 1: at least {TARGET}x bfloat16"] = ratio >= TARGET
    report("int8", figures, checks)
