"""The loaded engine: what it refuses at start, seeds, stops, and the LLM class."""

import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models

from sortserve.engine.budget import Budget
from sortserve.engine.config import EngineConfig
from sortserve.engine.cost import CostTable
from sortserve.engine.engine import Engine
from sortserve.engine.errors import (
    MemoryBudgetError,
    NotFoundError,
    OverloadedError,
    RequestError,
    StartupError,
)
from sortserve.engine.estimates import decode_seconds
from sortserve.engine.llm import LLM, _Answer
from sortserve.engine.plan import Plan, StepResult
from sortserve.engine.profiling import Profiler
from sortserve.engine.protocol import (
    FinishedEvent,
    RequestSummary,
    TokenEvent,
)
from sortserve.engine.runner import Runner
from sortserve.engine.sampler import confidences
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.text import Tokenizer
from sortserve.server.cli import BUNDLED
from tests.bundled import ABOVE_MIDDLE, FLOOR, FULL, MIDDLE
from tests.engine.drive import ask, greedy, load_engine, run
from tests.engine.small import RefusesStrict
from tests.engine.tiny_models import make_tiny

PAGE_BYTES = 2 * 6 * 16 * 2 * 8 * 4  # K and V, layers, tokens, key/value heads, head_dim, float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama without a ladder: full depth at two widths, so that a page has all six layers."""
    made = tmp_path_factory.mktemp("tiny")
    make_tiny(made, "llama", seed=11)
    return made


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(101) for _ in range(count)]


def drawn(seed: int, max_tokens: int = 24) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=1.5, seed=seed)


# ---- what does not start


def test_too_little_kv_memory_is_refused_with_both_numbers(folder: Path) -> None:
    """100 tokens are 7 blocks of a page each, the states of one refill of 256 rows 16 more; one page less is refused."""
    needed = 7 + 16
    engine = load_engine(folder, kv_bytes=needed * PAGE_BYTES, max_model_len=100)
    assert engine.scheduler.kv.geometry.page_bytes == PAGE_BYTES
    assert len(run(engine, [ask("longest", tokens(1, 90), greedy(10))])[0].tokens) == 10
    with pytest.raises(MemoryBudgetError) as refused:
        load_engine(folder, kv_bytes=needed * PAGE_BYTES - 1, max_model_len=100)
    assert refused.value.param == "kv_bytes"
    for part in (f"{needed * PAGE_BYTES - 1} bytes", f"need {needed}", f"{needed * PAGE_BYTES} bytes", "100 tokens"):
        assert part in refused.value.message
    with pytest.raises(MemoryBudgetError, match="--kv-memory"):
        load_engine(folder, kv_bytes=1, max_model_len=None)


def test_the_context_follows_from_the_memory(folder: Path) -> None:
    engine = load_engine(folder, kv_bytes=(3 + 16) * PAGE_BYTES, max_model_len=None)
    assert engine.info.max_model_len == 48
    assert load_engine(folder, max_model_len=None).info.max_model_len == 256, "the model's own"


@pytest.mark.parametrize(
    ("settings", "param", "parts"),
    [
        pytest.param({"max_model_len": 257}, "max_model_len", ("257", "256"), id="context"),
        pytest.param({"device": "cuda:99"}, "device", ("cuda:99", "CUDA", "--device cpu"), id="cuda"),
        pytest.param({"policy": "best"}, "policy", ("'best'", "fixed", "slack"), id="policy"),
        pytest.param({"fixed_submodel": "d3"}, "fixed_submodel", ("'d3'", "d6"), id="fixed"),
    ],
)
def test_a_wrong_setting_is_refused(folder: Path, settings: dict[str, Any], param: str, parts: Sequence[str]) -> None:
    """`fixed`: an unknown sub-model was a NotFoundError, so that the server logged a traceback and exited with 1."""
    with pytest.raises(StartupError) as refused:
        load_engine(folder, **settings)
    assert refused.value.param == param
    for part in parts:
        assert part in refused.value.message


def test_threads_of_small_models(folder: Path) -> None:
    """A model of such a size runs on one thread unless told otherwise, and says so in its configuration."""
    torch.set_num_threads(2)
    assert load_engine(folder).config.num_threads == 1
    assert torch.get_num_threads() == 1
    assert load_engine(folder, num_threads=2).config.num_threads == 2
    assert torch.get_num_threads() == 2


def test_the_defaults_stay_within_a_container(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were a quarter of the machine's memory and all its processors: the kernel ended pods, or stopped their steps."""
    pages = 40
    monkeypatch.setattr("sortserve.engine.container.free_bytes", lambda: 4 * pages * PAGE_BYTES)
    monkeypatch.setattr("sortserve.engine.container.cpus", lambda: 2.5)
    monkeypatch.setattr("sortserve.engine.settling.SMALL_LAYER", 0)
    torch.set_num_threads(4)
    engine = load_engine(folder, kv_bytes=None, max_model_len=None)
    assert engine.info.kv_bytes == pages * PAGE_BYTES
    assert engine.config.num_threads == 2
    assert torch.get_num_threads() == 2
    monkeypatch.setattr("sortserve.engine.container.cpus", lambda: 0.5)
    assert load_engine(folder).config.num_threads == 1
    monkeypatch.setattr("sortserve.engine.container.cpus", lambda: None)
    torch.set_num_threads(3)
    assert load_engine(folder).config.num_threads == 3, "no limit: PyTorch's own number"


# ---- sampling in batches


def test_a_seed_gives_the_same_tokens_whoever_runs_beside(folder: Path) -> None:
    """Alone, in a batch, in chunks beside prompts, and at another request id. The logits differ in the last bits, so a
    draw that falls within about 4e-7 of a boundary between two tokens goes the other way (seed 5 has one): a chance of
    one in 10,000 on a machine that sums in yet another order."""
    prompt = tokens(2, 30)
    alone = run(load_engine(folder), [ask("a", prompt, drawn(15))])[0].tokens
    assert len(alone) == 24
    mates = [ask(f"m{n}", tokens(n, 3 + 7 * n), drawn(n)) for n in range(6)]
    beside = run(load_engine(folder, max_step_tokens=9), [*mates[:3], ask("b", prompt, drawn(15)), *mates[3:]])
    assert beside[3].tokens == alone
    assert run(load_engine(folder), [ask("c", prompt, drawn(16))])[0].tokens != alone, "another seed"
    # a hit in the prefix cache changes nothing either
    engine = load_engine(folder)
    again = [run(engine, [ask(str(n), prompt, drawn(15))])[0] for n in range(2)]
    assert [outcome.tokens for outcome in again] == [alone, alone]
    assert again[1].finished is not None
    assert again[1].finished.summary.cached_tokens == 16


def test_a_preempted_request_draws_the_same_tokens(folder: Path) -> None:
    """Memory for about two of five: preemption must happen, and show in nothing but the summary."""
    requests = [ask(str(n), tokens(n, 40), drawn(n, 60)) for n in range(5)]
    reference = load_engine(folder, prefix_cache=False)
    expected = [run(reference, [request])[0].tokens for request in requests]
    tight = load_engine(folder, kv_bytes=(7 + 4) * PAGE_BYTES, max_model_len=100, max_step_tokens=50)
    outcomes = run(tight, requests)
    assert [outcome.tokens for outcome in outcomes] == expected
    preempted = sum(outcome.finished.summary.preemptions for outcome in outcomes if outcome.finished)
    assert preempted == tight.scheduler.stats().preemptions > 0


def test_stop_tokens(folder: Path) -> None:
    """The answer ends with the stop token, at its first appearance."""
    prompt = tokens(3, 12)
    plain = run(load_engine(folder), [ask("plain", prompt, greedy(30))])[0]
    stop = plain.tokens[11]
    first = plain.tokens.index(stop)
    stopped = run(load_engine(folder), [ask("stop", prompt, greedy(30, stop_token_ids=(stop,)))])[0]
    assert stopped.tokens == plain.tokens[: first + 1]
    assert plain.finished is not None
    assert stopped.finished is not None
    assert (plain.finished.reason, stopped.finished.reason) == ("length", "stop")


def test_end_of_sequence(folder: Path, tmp_path: Path) -> None:
    """`ignore_eos` goes past it, `min_tokens` keeps it from being drawn."""
    plain = run(load_engine(folder), [ask("plain", tokens(3, 12), greedy(30))])[0].tokens
    make_tiny(tmp_path, "llama", seed=11, eos_token_id=plain[5])
    engine = load_engine(tmp_path)
    assert engine.info.eos_token_ids == (plain[5],)
    first = plain.index(plain[5])
    ended, ignored, later = run(
        engine,
        [
            ask("ended", tokens(3, 12), greedy(30)),
            ask("ignored", tokens(3, 12), greedy(30, ignore_eos=True)),
            ask("later", tokens(3, 12), greedy(30, min_tokens=15)),
        ],
    )
    assert ended.tokens == plain[: first + 1]
    assert ignored.tokens == plain
    assert later.tokens[:first] == plain[:first]
    assert len(later.tokens) >= 15
    assert plain[5] not in later.tokens[:15]


# ---- predictions


def test_warm_up_survives_a_busy_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions of the bundled model were 20 to 100 times too long when something else ran while it was measured: one
    slow row bucket counted for all larger ones. Here the measurements of one bucket are 50 times too slow."""
    run_plan = Runner.run

    def disturbed(runner: Runner, plan: Plan) -> StepResult:
        result = run_plan(runner, plan)
        return StepResult(result.sequences, result.seconds * (50 if plan.num_rows == 4 else 1))

    monkeypatch.setattr(Runner, "run", disturbed)
    engine = load_engine(folder, warmup=True, profile_cache=False)
    assert engine.cost is not None
    scheduler = engine.scheduler
    profiler = Profiler(
        engine.runner.run,
        scheduler.kv,
        scheduler.settings,
        scheduler.rungs,
        max_running=64,
        max_step_tokens=256,
        max_model_len=engine.info.max_model_len,
    )
    sixteen = next(plan for plan in profiler.plans() if plan.num_rows == 16)
    taken = min(engine.runner.run(sixteen).seconds for _ in range(5))
    for rows in (4, 16):
        assert decode_seconds(engine.cost.table, scheduler.rungs, {engine.info.ladder.full: rows}) <= 3 * taken
    engine.scheduler.check_integrity()
    assert engine.scheduler.stats().kv_pages_used == 0, "the warm-up gives its pages back"


def test_warm_up_ends_on_a_machine_that_is_far_too_slow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile of a 0.5B model took two minutes beside ten other processes. Large steps are left out then, and their
    times go in proportion."""
    clock = 0.0
    run_plan = Runner.run

    def slow(runner: Runner, plan: Plan) -> StepResult:
        nonlocal clock
        clock += 0.1 * plan.num_rows
        return StepResult(run_plan(runner, plan).sequences, 0.1 * plan.num_rows)

    monkeypatch.setattr(Runner, "run", slow)
    monkeypatch.setattr("sortserve.engine.profiling.time.perf_counter", lambda: clock)
    engine = load_engine(folder, warmup=True, profile_cache=False)
    assert clock < 12 + 3 * 12.8 + 2.6
    assert engine.cost is not None
    full = engine.info.ladder.full
    assert decode_seconds(engine.cost.table, engine.scheduler.rungs, {full: 200}) == pytest.approx(20.0, rel=0.1)


def test_the_prediction_of_an_idle_engine() -> None:
    """One millisecond a layer, whatever the rows: 50 prompt tokens are one step of the full model, 31 more follow.

    It was 20 times that and more when a busy machine spoilt the smallest row count at warm-up.
    """
    engine = Engine.load(EngineConfig(BUNDLED, dtype="float32", kv_bytes=32 << 20, warmup=False))
    ladder = engine.info.ladder
    buckets, nothing = np.array([1.0, 256.0]), np.zeros(2)
    engine.scheduler.cost = CostTable(engine.scheduler.rungs.layers, buckets, np.full(2, 1e-3), nothing, nothing)
    seconds = 32e-3 * ladder.entries[ladder.full].submodel.depth
    request = ask("r", list(range(50)), greedy(32, ignore_eos=True), budget=Budget(60_000.0))
    [outcome] = run(engine, [request])
    assert outcome.accepted is not None
    assert outcome.accepted.predicted_seconds is not None
    waited = time.monotonic() - request.arrival  # the prediction counts from arrival
    assert seconds - 1e-6 <= outcome.accepted.predicted_seconds <= seconds + waited


def test_the_fixed_policy_is_for_requests_without_a_budget_too(folder: Path) -> None:
    """Their floor was the full model, which the policy may not go below."""
    engine = load_engine(folder, policy="fixed", fixed_submodel="d6-w75")
    for fields in ({}, {"budget": Budget(total_ms=60_000)}):
        [outcome] = run(engine, [ask("r", tokens(1, 5), greedy(3), **fields)])
        assert set(outcome.submodels) == {"d6-w75"}
    [outcome] = run(engine, [ask("r", tokens(1, 5), greedy(3), floor="d6")])
    assert set(outcome.submodels) == {"d6"}


def test_a_policy_that_asks_for_confidence_gets_it(folder: Path) -> None:
    """The probability of the most probable token, whatever is drawn; nothing is computed where nobody asks."""
    for policy, asks in (("confidence", True), ("fixed", False)):
        engine = load_engine(folder, policy=policy)
        seen: list[tuple[float, float]] = []

        def note(engine: Engine, seen: list[tuple[float, float]] = seen) -> None:
            seen.extend(
                (request.confidence, float(request.num_output)) for request in engine.scheduler.requests.values()
            )

        [outcome] = run(engine, [ask("r", tokens(1, 5), drawn(3, 6), floor="d6")], note)
        assert len(outcome.tokens) == 6
        assert all(0.0 < sure <= 1.0 for sure, _ in seen) if asks else all(math.isnan(sure) for sure, _ in seen)
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]])
    assert confidences(logits) == pytest.approx([float(logits[0].softmax(0)[1]), 1 / 3])


# ---- offline


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(BUNDLED, dtype="float32", kv_bytes=32 << 20)


def test_llm_answers_in_order(llm: LLM) -> None:
    """Text or ids, together or alone; text is the decoding of the tokens."""
    texts = ["Once upon a time", "The king", "It was a dark night and"]
    ids = [llm.tokenizer.encode(text) for text in texts]
    together = llm.generate(texts, greedy(20))
    assert [one.token_ids for one in llm.generate(ids, greedy(20))] == [one.token_ids for one in together]
    for text, one in zip(texts, together, strict=True):
        assert llm.generate([text], greedy(20))[0].text == one.text
        assert one.text == llm.tokenizer.decode(one.token_ids)
        assert one.submodels == (FULL,) * len(one.token_ids)
        assert one.finish_reason in ("length", "stop")
    assert len({one.text for one in together}) == 3
    llm.engine.scheduler.check_integrity()


def test_llm_stop_strings(llm: LLM) -> None:
    """The answer ends before the stop string, even one that begins and ends inside tokens; others go on."""
    [plain] = llm.generate(["Once upon a time"], greedy(40, ignore_eos=True))
    stop = plain.text[9:15]
    stopped = llm.generate(["Once upon a time"] * 2, greedy(40, ignore_eos=True, stop=(stop,)))
    for one in stopped:
        assert one.text == plain.text[: plain.text.index(stop)]
        assert one.finish_reason == "stop"
        assert len(one.token_ids) < 40
    [other] = llm.generate(["Once upon a time"], greedy(40, ignore_eos=True, stop=("\x00never",)))
    assert (other.text, other.finish_reason) == (plain.text, "length")
    assert llm.engine.scheduler.stats().kv_pages_used == 0


def test_llm_budgets(llm: LLM) -> None:
    """A generous budget gets the full model, an impossible one the floor and an honest summary, none no judgement."""
    params = greedy(24, ignore_eos=True)
    [free] = llm.generate(["The king"], params)
    [ample] = llm.generate(["The king"], params, budget=Budget(total_ms=600_000.0))
    [tight] = llm.generate(["The king"], params, budget=Budget(total_ms=0.5))
    [floored] = llm.generate(["The king"], params, budget=Budget(total_ms=0.5), floor=ABOVE_MIDDLE)
    [pinned] = llm.generate(["The king"], params, submodel=MIDDLE)
    assert (free.summary.met, ample.summary.met, tight.summary.met) == (None, True, False)
    assert Counter(ample.submodels) == {FULL: 24}
    assert ample.token_ids == free.token_ids
    assert Counter(tight.submodels) == {FLOOR: 24}
    assert Counter(floored.submodels) == {ABOVE_MIDDLE: 24}
    assert Counter(pinned.submodels) == {MIDDLE: 24}
    assert tight.summary.submodels == {FLOOR: 24}


def test_llm_refuses_all_or_nothing(llm: LLM) -> None:
    """One bad prompt: an error, and no request of the others is left behind."""
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["fine", []], greedy(4))
    with pytest.raises(NotFoundError, match=FLOOR):
        llm.generate(["fine"], greedy(4), submodel="d3")
    with pytest.raises(RequestError, match="smallest feasible"):
        llm.generate(["fine"], greedy(4, ignore_eos=True), budget=Budget(total_ms=0.001, policy="strict"))
    assert not llm.engine.scheduler.has_work
    assert llm.engine.scheduler.stats().kv_pages_used == 0


def test_llm_tells_what_a_policy_refused(llm: LLM) -> None:
    """It was told as a mistake of the request, which it is not: the same one may be served later."""
    scheduler = llm.engine.scheduler
    before, scheduler.policy = scheduler.policy, RefusesStrict(0)
    try:
        with pytest.raises(OverloadedError, match="cannot be kept"):
            llm.generate(["fine"], greedy(4), budget=Budget(total_ms=600_000.0, policy="strict"))
    finally:
        scheduler.policy = before
    assert not scheduler.has_work


def test_llm_keeps_the_first_space() -> None:
    """An answer of a SentencePiece model continues a prompt, so its first space is text; without the prompt as context
    it was stripped, and `LLM` gave none."""
    backend = tokenizers.Tokenizer(
        models.BPE({"<unk>": 0, "▁a": 1, "▁b": 2}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(backend)
    for prompt, expected in (([1], " b"), ([], "b")):
        answer = _Answer(tokenizer, (), prompt)
        answer.add(TokenEvent("r", 2, "d6", 0.0))
        answer.end(FinishedEvent("r", "length", RequestSummary()), "length")
        assert answer.completion().text == expected


@pytest.mark.parametrize("step_tokens", [1, 64])
def test_a_start_with_the_smallest_of_everything(step_tokens: int) -> None:
    """A context shorter than the chunks that are measured was an IndexError; a queue of one takes our own requests too."""
    small: dict[str, Any] = {
        "max_model_len": 16,
        "max_running": 1,
        "max_waiting": 1,
        "max_step_tokens": step_tokens,
        "kv_bytes": 4 << 20,
    }
    engine = Engine.load(EngineConfig(BUNDLED, dtype="float32", profile_cache=False, **small))
    assert engine.cost is not None


def test_the_first_requests_are_nobodys_and_leave_no_trace() -> None:
    """But for what they teach: what is between steps."""
    engine = Engine.load(EngineConfig(BUNDLED, dtype="float32", kv_bytes=32 << 20, profile_cache=False))
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.steps, stats.prompt_tokens, stats.kv_pages_used) == (0, 0, 0, 0, 0)
    assert not stats.generated_tokens
    assert not stats.selected
    engine.scheduler.check_integrity()
    assert engine.cost is not None
    assert engine.cost.between > 0.0
    assert engine.cost.errors()["decode"].steps >= 2, "steps were learned from"
