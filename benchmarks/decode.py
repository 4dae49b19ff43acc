"""Decode throughput of the full model at batch 1, 8 and 32, paired with Hugging Face transformers in one process."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import CONTEXT, Bandwidth, Driver, alternate, median, paired_ratio, report
from sortserve.engine.config import load_model_config
from sortserve.engine.ladder import Ladder
from sortserve.engine.submodel import SubModel

STEPS = 12
TARGETS = {1: 1.5, 8: 1.45, 32: 1.15}  # times transformers
SHARE_OF_CEILING = 0.65


def run(model: Path, rounds: int = 5) -> None:
    """Print the ceiling, then medians and paired ratios."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import AutoModelForCausalLM

    shape = load_model_config(model).shape
    bandwidth = Bandwidth()
    bytes_per_token = SubModel.full(shape).cost(shape).weight_bytes
    at_start = bandwidth.rate(bandwidth.pass_seconds())
    print(f"read bandwidth {at_start / 1e9:.1f} GB/s, {bytes_per_token / 1e9:.3f} GB of weights a step at batch 1")
    print(f"ceiling {at_start / bytes_per_token:.1f} tokens/s at batch 1 (measured again beside each run)")
    print(f"context {CONTEXT}-{CONTEXT + STEPS * rounds} tokens, bfloat16")
    driver = Driver.load(model, Ladder.of(shape, []), kv_bytes=1 << 30, dtype="bfloat16", max_step_tokens=512)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    figures: dict[str, object] = {"context": CONTEXT}
    checks: dict[str, bool] = {}
    for batch, target in TARGETS.items():
        for _ in range(batch):
            driver.submit(CONTEXT, STEPS * (rounds + 1) + 2)
        driver.catch_up()
        runs = [_our_steps(driver), _their_steps(theirs, batch), bandwidth.pass_seconds]
        ours, other, passes = alternate(runs, rounds)
        driver.clear()
        ratio = paired_ratio(other, ours)
        rate, their_rate = batch / median(ours), batch / median(other)
        bounds = [bandwidth.seconds_for(bytes_per_token, seconds) for seconds in passes]
        share = paired_ratio(bounds, ours) if batch == 1 else None
        print(
            f"batch {batch:2d}: {rate:6.1f} tokens/s, transformers {their_rate:6.1f}, ratio {ratio:.2f} "
            f"({min(o / u for o, u in zip(other, ours, strict=True)):.2f} at worst)"
            + (f", {share:.0%} of the ceiling ({1 / median(bounds):.1f} tokens/s)" if share else "")
        )
        figures[f"batch_{batch}"] = {"tokens_s": rate, "transformers_tokens_s": their_rate, "ratio": ratio}
        checks[f"batch {batch}: at least {target}x transformers"] = ratio >= target
        if share is not None:
            figures |= {"share_of_ceiling": share, "ceiling_tokens_s": 1 / median(bounds)}
            checks[f"batch 1: at least {SHARE_OF_CEILING:.0%} of the bandwidth ceiling"] = share >= SHARE_OF_CEILING
    report("decode", figures, checks)


def _our_steps(driver: Driver) -> Callable[[], float]:
    return lambda: median(driver.step() for _ in range(STEPS))


def _their_steps(theirs: torch.nn.Module, batch: int) -> Callable[[], float]:
    tokens = torch.randint(1000, 100_000, (batch, CONTEXT), generator=torch.Generator().manual_seed(0))
    state: dict[str, object] = {}

    @torch.inference_mode()
    def steps() -> float:
        if not state:
            first = theirs(tokens, use_cache=True)
            state["cache"], state["next"] = first.past_key_values, first.logits[:, -1:].argmax(-1)
        seconds = []
        for _ in range(STEPS):
            began = time.perf_counter()
            out = theirs(state["next"], past_key_values=state["cache"], use_cache=True)
            state["cache"], state["next"] = out.past_key_values, out.logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - began)
        return median(seconds)

    return steps
