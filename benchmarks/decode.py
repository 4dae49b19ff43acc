"""Decode throughput of the full model at batch 1, 8 and 32, paired with Hugging Face transformers in one process."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import CONTEXT, Bandwidth, Driver, alternate, median, paired_ratio, report
from sortserve.engine.ladder import Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.engine.submodel import SubModel

ROUNDS = 40
TARGETS = {1: 1.5, 8: 1.45, 32: 1.15}  # times transformers
SHARE_OF_CEILING = 0.65


def run(model: Path) -> None:
    """Print the ceiling, then medians and paired ratios."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import AutoModelForCausalLM

    shape = load_model_config(model).shape
    bandwidth = Bandwidth()
    bytes_per_token = SubModel.full(shape).cost(shape).weight_bytes
    at_start = bandwidth.rate(bandwidth.pass_seconds())
    print(f"read bandwidth {at_start / 1e9:.1f} GB/s, {bytes_per_token / 1e9:.3f} GB of weights a step at batch 1")
    print(f"ceiling {at_start / bytes_per_token:.1f} tokens/s at batch 1 (measured again beside each run)")
    print(f"context {CONTEXT}-{CONTEXT + ROUNDS} tokens, bfloat16; {ROUNDS} rounds of one step each, in turn")
    driver = Driver.load(model, Ladder.of(shape, []), kv_bytes=1 << 30, dtype="bfloat16", max_step_tokens=512)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    figures: dict[str, object] = {"context": CONTEXT}
    checks: dict[str, bool] = {}
    for batch, target in TARGETS.items():
        for _ in range(batch):
            driver.submit(CONTEXT, ROUNDS + 4)
        driver.catch_up()
        runs = [driver.step, _their_step(theirs, batch), bandwidth.pass_seconds]
        ours, other, passes = alternate(runs, ROUNDS)
        driver.clear()
        ratio = paired_ratio(other, ours)
        quartiles = np.quantile([o / u for o, u in zip(other, ours, strict=True)], (0.25, 0.75))
        rate, their_rate = batch / median(ours), batch / median(other)
        bounds = [bandwidth.seconds_for(bytes_per_token, seconds) for seconds in passes]
        share = paired_ratio(bounds, ours) if batch == 1 else None
        print(
            f"batch {batch:2d}: {rate:6.1f} tokens/s, transformers {their_rate:6.1f}, ratio {ratio:.2f} "
            f"(middle half of the pairs {quartiles[0]:.2f}-{quartiles[1]:.2f})"
            + (f", {share:.0%} of the ceiling ({1 / median(bounds):.1f} tokens/s)" if share else "")
        )
        figures[f"batch_{batch}"] = {"tokens_s": rate, "transformers_tokens_s": their_rate, "ratio": ratio}
        checks[f"batch {batch}: at least {target}x transformers"] = ratio >= target
        if share is not None:
            figures |= {"share_of_ceiling": share, "ceiling_tokens_s": 1 / median(bounds)}
            checks[f"batch 1: at least {SHARE_OF_CEILING:.0%} of the bandwidth ceiling"] = share >= SHARE_OF_CEILING
    report("decode", figures, checks)


def _their_step(theirs: torch.nn.Module, batch: int) -> Callable[[], float]:
    """Seconds of one greedy step of transformers with its own K/V cache."""
    tokens = torch.randint(1000, 100_000, (batch, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        out = theirs(tokens, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def step() -> float:
        nonlocal out
        began = time.perf_counter()
        out = theirs(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - began

    return step
