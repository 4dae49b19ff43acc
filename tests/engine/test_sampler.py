"""The sampler against a plain float64 implementation, and what a seed promises."""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import chisquare

from sortserve.engine.errors import RequestError
from sortserve.engine.sampler import Sampler, SamplingRow, adjusted_logits, uniform
from sortserve.engine.sampling import SamplingParams

VOCAB = 257
Doubles = npt.NDArray[np.float64]


def reference_logits(logits: Doubles, row: SamplingRow) -> Doubles:
    """Bias, penalties and minimum length, token by token."""
    params, result = row.params, logits.copy()
    for token, bias in params.logit_bias.items():
        result[token] += bias
    for token in set(row.prompt_tokens) | set(row.output_tokens):
        old = result[token]
        result[token] = old / params.repetition_penalty if old > 0 else old * params.repetition_penalty
    for token in row.output_tokens:
        result[token] -= params.frequency_penalty
    for token in set(row.output_tokens):
        result[token] -= params.presence_penalty
    if len(row.output_tokens) < params.min_tokens:
        for token in row.eos_token_ids + params.stop_token_ids:
            result[token] = -math.inf
    return result


def reference_distribution(logits: Doubles, row: SamplingRow) -> Doubles:
    """Probabilities [vocab], by sorting everything."""
    params, adjusted = row.params, reference_logits(logits, row)
    order = sorted(range(len(adjusted)), key=lambda token: (-adjusted[token], token))
    if params.greedy:
        certain: Doubles = np.eye(len(adjusted))[order[0]]
        return certain
    weights = np.exp((adjusted - adjusted.max()) / params.temperature)
    kept = order[: params.top_k] if params.top_k else order
    total, mass = sum(weights[token] for token in kept), 0.0
    nucleus = []
    for token in kept:
        nucleus.append(token)
        mass += weights[token]
        if params.top_p < 1.0 and mass >= params.top_p * total:
            break
    final = [token for token in nucleus if weights[token] >= params.min_p * weights.max()]
    result: Doubles = np.zeros(len(adjusted))
    result[final] = weights[final] / weights[final].sum()
    return result


def random_params(rng: np.random.Generator) -> SamplingParams:
    def maybe(value: Any, off: Any) -> Any:
        return value if rng.random() < 0.5 else off

    return SamplingParams(
        max_tokens=64,
        temperature=maybe(float(rng.uniform(0.1, 2)), maybe(0.0, 1.0)),
        top_k=maybe(int(rng.integers(1, 2 * VOCAB)), 0),
        top_p=maybe(float(rng.uniform(0.01, 1)), 1.0),
        min_p=maybe(float(rng.uniform(0, 0.5)), 0.0),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2)), 1.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        min_tokens=maybe(int(rng.integers(0, 20)), 0),
        logit_bias=maybe({int(token): float(rng.uniform(-5, 5)) for token in rng.integers(0, VOCAB, 4)}, {}),
        stop_token_ids=maybe((9, 11), ()),
        logprobs=maybe(int(rng.integers(0, 21)), None),
    )


def random_row(rng: np.random.Generator) -> SamplingRow:
    prompt = tuple(int(token) for token in rng.integers(0, VOCAB, 12))
    output = tuple(int(token) for token in rng.integers(0, 20, rng.integers(0, 15)))
    seed, position = int(rng.integers(-(2**63), 2**63 - 1)), int(rng.integers(0, 10_000))
    return SamplingRow(random_params(rng), seed, position, prompt, output, eos_token_ids=(3, 4))


def random_logits(rng: np.random.Generator, num_rows: int, vocab: int = VOCAB) -> torch.Tensor:
    """Rounded as bfloat16 rounds them in places, so that ties occur."""
    logits = torch.from_numpy(rng.normal(0, 3, (num_rows, vocab)).astype(np.float32))
    logits[::2] = logits[::2].bfloat16().float()
    return logits


@pytest.mark.parametrize("seed", range(12))
def test_tokens_equal_the_reference(seed: int) -> None:
    """The token is the reference distribution's at the same uniform number.

    A row is left out where that number lies within 1e-5 of a boundary between tokens (float32 may differ there), and
    where a cut-off of top-p or min-p does; a fifth of the rows at most may be.
    """
    rng = np.random.default_rng(seed)
    logits, rows = random_logits(rng, 64), [random_row(rng) for _ in range(64)]
    left_out = 0
    for row_logits, row, (token, _) in zip(logits, rows, Sampler(VOCAB).sample(logits, rows), strict=True):
        probabilities = reference_distribution(row_logits.double().numpy(), row)
        cumulative = probabilities.cumsum()
        share = uniform(row.seed, row.position)
        expected = int(np.searchsorted(cumulative, share, side="right"))
        if token != expected:
            shifted = np.abs(cumulative - share).min() < 1e-5 or cut_is_close(row_logits.double().numpy(), row)
            assert shifted, f"seed {seed}: {row} drew {token}, expected {expected}"
            left_out += 1
    assert left_out < 13


def cut_is_close(logits: Doubles, row: SamplingRow) -> bool:
    """Whether moving top-p and min-p by 1e-5 of their value changes the tokens that are kept."""
    kept = []
    for factor in (1 - 1e-5, 1 + 1e-5):
        top_p = min(1.0, row.params.top_p * factor) if row.params.top_p < 1 else 1.0
        moved = SamplingParams(
            temperature=row.params.temperature,
            top_k=row.params.top_k,
            top_p=top_p,
            min_p=min(1.0, row.params.min_p * factor),
        )
        kept.append(reference_distribution(reference_logits(logits, row), SamplingRow(moved, 0, 0)) > 0)
    return not np.array_equal(kept[0], kept[1])


@pytest.mark.parametrize("seed", range(4))
def test_logprobs_are_of_the_raw_logits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, rows = random_logits(rng, 32), [random_row(rng) for _ in range(32)]
    for values, row, (token, logprob) in zip(logits.double(), rows, Sampler(VOCAB).sample(logits, rows), strict=True):
        if row.params.logprobs is None:
            assert logprob is None
            continue
        assert logprob is not None
        expected = torch.log_softmax(values, 0)
        assert logprob.token == token
        assert logprob.logprob == pytest.approx(float(expected[token]), abs=1e-5)
        order = sorted(range(VOCAB), key=lambda token: (-values[token], token))[: row.params.logprobs]
        assert [token for token, _ in logprob.top] == order
        assert [value for _, value in logprob.top] == pytest.approx(expected[order].tolist(), abs=1e-5)


def test_prompt_logprobs() -> None:
    logits = random_logits(np.random.default_rng(1), 5)
    tokens = [1, 2, 250, 0, 7]
    result = Sampler(VOCAB).prompt_logprobs(logits, tokens, top=3)
    expected = torch.log_softmax(logits.double(), dim=1)
    for index, (token, logprob) in enumerate(zip(tokens, result, strict=True)):
        assert logprob.token == token
        assert logprob.logprob == pytest.approx(float(expected[index, token]), abs=1e-5)
        assert [value for _, value in logprob.top] == pytest.approx(expected[index].topk(3).values.tolist(), abs=1e-5)
    assert [logprob.top for logprob in Sampler(VOCAB).prompt_logprobs(logits, tokens, top=0)] == [()] * 5


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.7, top_p=0.9),
        SamplingParams(temperature=0.8, top_k=7, min_p=0.05),
        SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, logit_bias={4: 2.0}),
    ],
    ids=["plain", "top-p", "top-k-min-p", "penalties"],
)
def test_frequencies_follow_the_distribution(params: SamplingParams) -> None:
    """Chi-square over 4,000 positions of one seed. The draws are fixed, so it passes always or never."""
    logits = torch.from_numpy(np.random.default_rng(3).normal(0, 1.5, 24).astype(np.float32))
    rows = [SamplingRow(params, 42, position, (1, 2), (2, 3)) for position in range(4000)]
    drawn = np.array([token for token, _ in Sampler(24).sample(logits.expand(4000, -1), rows)])
    expected = reference_distribution(logits.double().numpy(), rows[0]) * len(rows)
    observed = np.bincount(drawn, minlength=24)
    assert observed[expected == 0].sum() == 0
    assert chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_rows_do_not_depend_on_their_batch() -> None:
    rng = np.random.default_rng(11)
    logits, rows = random_logits(rng, 24, VOCAB), [random_row(rng) for _ in range(24)]
    sampler = Sampler(VOCAB)
    together = sampler.sample(logits, rows)
    order = rng.permutation(24)
    shuffled = sampler.sample(logits[order], [rows[index] for index in order])
    assert [together[index] for index in order] == shuffled
    assert [sampler.sample(logits[index][None], [rows[index]])[0] for index in range(24)] == together


def test_seeds_reproduce_and_differ() -> None:
    logits = torch.zeros(64, VOCAB)

    def tokens(seed: int, first: int = 0) -> list[int]:
        rows = [SamplingRow(SamplingParams(), seed, first + index) for index in range(64)]
        return [token for token, _ in Sampler(VOCAB).sample(logits, rows)]

    assert tokens(1) == tokens(1)
    assert tokens(1)[8:] == tokens(1, first=8)[:-8]
    assert sum(a == b for a, b in zip(tokens(1), tokens(2), strict=True)) < 8
    assert len(set(tokens(1))) > 40


def test_uniform_numbers_are_pinned() -> None:
    """A change of these would change every seeded answer from one release to the next."""
    assert uniform(0, 0) == 0.011546754286331562
    assert uniform(-1, 7) == uniform(2**64 - 1, 7) == 0.18234351774869728
    assert len({uniform(1, 1), uniform(1, 2), uniform(2, 1), uniform(1, 1, purpose=1)}) == 4
    values = np.array([uniform(5, position) for position in range(2000)])
    assert 0 <= values.min() < values.max() < 1
    assert abs(values.mean() - 0.5) < 0.03


def sample_one(logits: Sequence[float], params: SamplingParams, **row: Any) -> int:
    tensor = torch.tensor([logits], dtype=torch.float32)
    return Sampler(len(logits)).sample(tensor, [SamplingRow(params, 0, 0, **row)])[0][0]


def test_edges() -> None:
    assert sample_one([1, 3, 3], SamplingParams(temperature=0)) == 1, "the smaller id of a tie"
    assert sample_one([1, 3, 3], SamplingParams(top_k=1)) == 1
    assert sample_one([1, 3, 3], SamplingParams(top_p=1e-9)) == 1
    assert sample_one([1, 2, 3], SamplingParams(temperature=1e-300)) == 2
    assert sample_one([1, 2, 3], SamplingParams(top_k=99, top_p=1.0, min_p=1.0)) == 2
    assert sample_one([5, 2, 3], SamplingParams(temperature=0, logit_bias={0: -100, 1: 50})) == 1
    # a user may ask for penalties past float32, and to forbid every token
    tiny_penalty = SamplingParams(repetition_penalty=1e-300, temperature=0.5)
    assert sample_one([5, 2, 3], tiny_penalty, prompt_tokens=(1,)) == 1
    every = SamplingParams(max_tokens=8, min_tokens=4, stop_token_ids=(0, 1, 2, 999, -1), temperature=0)
    assert sample_one([5, 2, 3], every) == 0
    masked = SamplingParams(max_tokens=8, min_tokens=2, stop_token_ids=(0,))
    assert sample_one([50, 2, 3], masked, output_tokens=(1,), eos_token_ids=(2,)) == 1
    assert sample_one([50, 2, 3], masked, output_tokens=(1, 1), eos_token_ids=(2,)) == 0


def test_tokens_may_come_as_arrays() -> None:
    logits = np.arange(8, dtype=np.float32)
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0)
    as_tuples = adjusted_logits(logits, SamplingRow(params, 0, 0, (7, 7, 6), (5, 5)))
    as_arrays = adjusted_logits(logits, SamplingRow(params, 0, 0, np.array([7, 7, 6]), np.array([5, 5])))
    assert as_tuples.tolist() == as_arrays.tolist() == [0, 1, 2, 3, 4, 0.5, 3, 3.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_are_our_bug(bad: float) -> None:
    logits = torch.zeros(4, 8)
    logits[2, 5] = bad
    with pytest.raises(AssertionError, match=r"rows \[2\] are not finite"):
        Sampler(8).sample(logits, [SamplingRow(SamplingParams(temperature=0), 0, 0)] * 4)


def test_bias_outside_the_vocabulary() -> None:
    Sampler(8).check(SamplingParams(logit_bias={7: 1.0}))
    with pytest.raises(RequestError, match=r"token 8, must be in \[0, 8\)"):
        Sampler(8).check(SamplingParams(logit_bias={8: 1.0}))


def test_nucleus_wider_than_the_first_guesses() -> None:
    """Flat distributions take the path that ranks ever more tokens."""
    for vocab in (65, 1500, 20_000):
        logits = np.random.default_rng(vocab).normal(0, 0.01, vocab).astype(np.float32)
        row = SamplingRow(SamplingParams(top_p=0.97), 1, 2)
        cumulative = reference_distribution(logits.astype(np.float64), row).cumsum()
        expected = int(np.searchsorted(cumulative, uniform(1, 2), side="right"))
        token = Sampler(vocab).sample(torch.from_numpy(logits)[None], [row])[0][0]
        assert abs(token - expected) <= 1


def test_cost_at_a_large_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints; asserts only that nothing sorts the vocabulary for every row (a sort takes 17 ms a row)."""
    logits = torch.randn(32, 151_936, generator=torch.Generator().manual_seed(0)) * 3
    sampler = Sampler(151_936)
    for name, params, limit in (
        ("greedy", SamplingParams(temperature=0), 0.05),
        ("temperature", SamplingParams(), 0.3),
        ("top-p 0.9, top-k 50", SamplingParams(top_p=0.9, top_k=50), 0.3),
        ("top-p 0.9", SamplingParams(temperature=0.6, top_p=0.9), 0.5),
        ("greedy, 5 logprobs", SamplingParams(temperature=0, logprobs=5), 0.3),
    ):
        rows = [SamplingRow(params, 1, index) for index in range(32)]
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            sampler.sample(logits, rows)
            seconds.append(time.perf_counter() - start)
        with capsys.disabled():
            print(f"\n  sampler, 32 rows x 151,936, {name}: {min(seconds) * 1e6:.0f} us", end="")
        assert min(seconds) < limit
