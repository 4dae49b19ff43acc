"""Sampling on the device against the CPU's sampler: the same random numbers, the same tokens."""

import itertools

import pytest
import torch

from sortserve.engine.cuda.forward import HeadOutput
from sortserve.engine.cuda.sampling import DeviceSampler
from sortserve.engine.sampler import Sampler, SamplingRow
from sortserve.engine.sampling import SamplingParams
from tests.engine.cuda import plain_kernels

VOCAB = 700
PARAMS = {
    "greedy": {"temperature": 0.0},
    "greedy with log-probabilities": {"temperature": 0.0, "logprobs": 3},
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.2},
    "top-k": {"temperature": 1.3, "top_k": 5},
    "top-k and top-p": {"temperature": 1.3, "top_k": 20, "top_p": 0.7},
    "large top-k": {"temperature": 2.0, "top_k": 300, "top_p": 0.8},
    "top-p": {"temperature": 0.9, "top_p": 0.5},
    "narrow top-p": {"temperature": 0.9, "top_p": 0.01},
    "min-p": {"temperature": 1.5, "min_p": 0.2},
    "penalties": {"temperature": 0.7, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "bias": {"temperature": 0.0, "logit_bias": {3: 50.0}},
}


def output_of(logits: torch.Tensor) -> HeadOutput:
    return HeadOutput(logits, *plain_kernels.argmax(logits))


@pytest.mark.parametrize("kind", [*PARAMS, "all together"])
def test_tokens_are_the_cpus(kind: str) -> None:
    """Rows of all kinds in one call take four ways; each row's token is that of the row alone on the CPU."""
    chosen = [SamplingParams(**PARAMS[name]) for name in (PARAMS if kind == "all together" else [kind])]  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    count = 2 if kind == "all together" else 6
    rows = [
        SamplingRow(params, seed, position=seed + 7, prompt_tokens=(1, 2, 3), output_tokens=(4, 4, 5))
        for seed, params in itertools.product(range(count), chosen)
    ]
    logits = torch.randn(len(rows) + 2, VOCAB, generator=generator) * 3
    logits[:, 11] = logits.amax(1)  # ties: the smaller id is the better
    places = [(7 * number + 1) % len(logits) for number in range(len(rows))]
    if len(set(places)) < len(places):
        places = list(range(1, len(rows) + 1))
    expected = Sampler(VOCAB).sample(logits[places], rows)
    drawn = DeviceSampler(VOCAB).launch(output_of(logits), places, rows)
    found = drawn.tokens()
    assert [token for token, _ in found] == [token for token, _ in expected]
    left = [(int(drawn.ids[place]), known) for place, known in zip(places, drawn.known, strict=True)]
    assert [known for _, known in left] == [row.params.plain and row.params.logprobs is None for row in rows]
    assert all(token == told for (token, known), (told, _) in zip(left, found, strict=True) if known)
    for (_, mine), (_, other) in zip(found, expected, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert mine.top == other.top


def test_logits_that_are_not_finite_end_the_step() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 5] = torch.nan
    rows = [SamplingRow(SamplingParams(temperature=0.0), 0, 0)] * 3
    tokens = DeviceSampler(VOCAB).launch(output_of(logits), [0, 1, 2], rows).tokens
    with pytest.raises(AssertionError, match=r"rows \[1\]"):
        tokens()
