"""Grammars: answers that parse, whatever the schema, the seed, the batch and the preemptions; and what they may cost."""

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sortserve
from sortserve.engine.engine import Engine
from sortserve.engine.errors import RequestError
from sortserve.engine.grammar import MOST_MATCHERS, Grammars, check_grammar, json_grammar
from sortserve.engine.llm import LLM
from sortserve.engine.messages import Submit, decode_command, encode
from sortserve.engine.protocol import Event, FailedEvent, FinishedEvent, TokenEvent
from sortserve.engine.runner import Runner
from sortserve.engine.sampler import Sampler, SamplingRow
from sortserve.engine.sampling import MAX_GRAMMAR_CHARS, SamplingParams
from sortserve.engine.text import Tokenizer
from tests.bundled import VOCAB
from tests.engine.drive import Outcome, ask, load_engine, run
from tests.engine.small import WantedPolicy
from tests.engine.tiny_models import make_tiny

BUNDLED = Path(sortserve.__file__).parent / "bundled"
TOKENIZER = Tokenizer.load(BUNDLED)
EOS = 1
PADDED = VOCAB + 40  # ids of the model; the last 40 have no token
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SMALL = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "minItems": 1, "maxItems": 3}
MOST_TOKENS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the bundled tokenizer, with ids beyond it."""
    made = tmp_path_factory.mktemp("tiny")
    make_tiny(made, "llama", vocab_size=PADDED, eos_token_id=EOS)
    shutil.copy(BUNDLED / "tokenizer.json", made)
    shutil.copy(BUNDLED / "tokenizer_config.json", made)
    return made


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return load_engine(folder)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(BUNDLED, PADDED, (EOS,))


def constrained(schema: dict[str, Any], **fields: Any) -> SamplingParams:
    given: dict[str, Any] = {"max_tokens": MOST_TOKENS, "grammar": json_grammar(schema)}
    return SamplingParams(**given | fields)


def check_answer(tokens: list[int], schema: dict[str, Any]) -> None:
    """A finished answer: ends in EOS, and its text is JSON of the schema."""
    assert tokens[-1] == EOS
    assert EOS not in tokens[:-1]
    text = TOKENIZER.decode(tokens)
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def draw_answer(grammars: Grammars, params: SamplingParams, rng: np.random.Generator) -> list[int]:
    """An answer out of random logits, up to its end or the limit."""
    assert params.grammar is not None
    sampler, output = Sampler(PADDED), list[int]()
    while len(output) < params.max_tokens and EOS not in output:
        allowed = grammars.allowed("r", params.grammar, output)
        row = SamplingRow(params, 7, len(output), (), tuple(output), (EOS,), allowed)
        logits = torch.from_numpy(rng.normal(size=(1, PADDED)).astype(np.float32) * 3)
        [(token, _)] = sampler.sample(logits, [row])
        output.append(token)
    grammars.drop("r")
    return output


# --- random schemas


def objects(values: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    @st.composite
    def build(draw: st.DrawFn) -> dict[str, Any]:
        properties = draw(st.dictionaries(st.text('abc"\\é€ _', min_size=1, max_size=4), values, max_size=4))
        required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return build()


def arrays(values: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build(items: dict[str, Any], least: int, more: int) -> dict[str, Any]:
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + more}

    return st.builds(build, values, st.integers(0, 2), st.integers(0, 2))


def integers(low: int, more: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": low + more}


def strings(least: int, more: int) -> dict[str, Any]:
    return {"type": "string", "minLength": least, "maxLength": least + more}


VALUES = st.one_of(st.integers(-(2**53), 2**53), st.text(max_size=6), st.none(), st.booleans())
LEAVES = st.one_of(
    st.sampled_from(({"type": "boolean"}, {"type": ["integer", "null"], "minimum": -5, "maximum": 5})),
    st.builds(integers, st.integers(-(10**6), 10**6), st.integers(0, 10**6)),
    st.builds(strings, st.integers(0, 4), st.integers(0, 4)),
    st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    VALUES.map(lambda value: {"const": value}),
    st.sampled_from(("^[a-c]{2,5}$", "^(x|yy)+z$")).map(lambda p: {"type": "string", "pattern": p, "maxLength": 12}),
    st.sampled_from(("date", "uuid", "ipv4")).map(lambda name: {"type": "string", "format": name}),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner), arrays(inner), st.lists(inner, min_size=1, max_size=3).map(lambda several: {"anyOf": several})
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS, temperature=st.sampled_from((0.0, 1.0)), seed=st.integers(0, 2**31))
def test_finished_answers_are_valid_under_random_schemas(
    grammars: Grammars, schema: dict[str, Any], temperature: float, seed: int
) -> None:
    check_grammar(json_grammar(schema))
    tokens = draw_answer(grammars, constrained(schema, temperature=temperature), np.random.default_rng(seed))
    if tokens[-1] == EOS:
        check_answer(tokens, schema)
    else:
        assert len(tokens) == MOST_TOKENS


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_of_a_model(engine: Engine, temperature: float) -> None:
    """Batches of several schemas at once, beside a request without one."""
    schemas: list[dict[str, Any]] = [
        PERSON,
        {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False},
        {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 5},
        {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {
            "leaf": {"const": 1}, "below": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1}},
            "required": ["leaf"], "additionalProperties": False}}},
    ]  # fmt: skip
    asked = [
        ask(f"{number}-{place}", [5, 9 + number], constrained(schema, temperature=temperature, seed=number))
        for number in range(4)
        for place, schema in enumerate(schemas)
    ]
    free = ask("free", [3, 4], SamplingParams(max_tokens=20, temperature=temperature, seed=1))
    outcomes = run(engine, [*asked, free])
    finished = 0
    for request, outcome in zip(asked, outcomes, strict=False):
        assert outcome.finished is not None
        if outcome.finished.reason == "stop":
            check_answer(outcome.tokens, schemas[int(request.request_id[-1])])
            finished += 1
    assert finished >= 12, "most answers fit into the limit"
    assert outcomes[-1].tokens == run(engine, [free])[0].tokens, "others' grammars show in a free answer"


def test_too_few_tokens_cut_the_text(engine: Engine) -> None:
    [outcome] = run(engine, [ask("cut", [5], constrained(PERSON, max_tokens=3))])
    assert outcome.finished is not None
    assert (outcome.finished.reason, len(outcome.tokens)) == ("length", 3)


# --- what may follow


def test_the_end_is_allowed_exactly_when_the_answer_is_complete(grammars: Grammars) -> None:
    grammar = json_grammar({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}})
    tokens = TOKENIZER.encode("[1, 2]", add_special_tokens=False)
    for count in range(len(tokens) + 1):
        allowed = grammars.allowed("end", grammar, tokens[:count])
        assert allowed.shape == (PADDED,)
        assert allowed[EOS] == (count == len(tokens))
        assert count == len(tokens) or allowed[tokens[count]]
    assert np.flatnonzero(allowed).tolist() == [EOS], "nothing but the end is left"
    grammars.drop("end")


def test_padded_and_special_ids_are_never_allowed(grammars: Grammars) -> None:
    opened = TOKENIZER.encode('{"a": "b', add_special_tokens=False)  # inside a string, where nearly all may follow
    allowed = grammars.allowed("pad", json_grammar({"type": "object"}), opened)
    assert allowed.sum() > 1500
    assert not allowed[TOKENIZER.vocab_size :].any()
    assert not allowed[sorted(token for token in TOKENIZER.special_ids if token is not None)].any()
    grammars.drop("pad")


ORDINARY: dict[str, tuple[dict[str, Any], Any]] = {
    "long strings": (
        {"properties": {f"p{most}": {"type": "string", "maxLength": most} for most in (200, 4000, 20_000)}},
        {f"p{most}": "The quick brown fox jumps, é€ 日本 over. " * min(most // 45, 60) for most in (200, 4000, 20_000)},
    ),
    "formats": (
        {"properties": {
            "id": {"type": "string", "format": "uuid"}, "mail": {"type": "string", "format": "email"},
            "when": {"type": "string", "format": "date-time"},
            "code": {"type": "string", "pattern": "^[A-Z]{2,4}-\\d{3,8}$"},
            "note": {"type": "string", "pattern": "^.{10,300}$"}}},
        {"id": "123e4567-e89b-12d3-a456-426614174000", "mail": "ada.lovelace@example.co.uk",
         "when": "2026-11-22T06:00:00Z", "code": "ABC-12345", "note": "some longer note of more than ten, " * 8},
    ),
    "many properties": (
        {"properties": {f"p{i}": {"type": "object", "properties": {f"q{j}": {"type": ["string", "null"]} for j in range(8)}}
                        for i in range(40)}},
        {f"p{i}": {f"q{j}": "x" for j in range(8)} for i in range(40)},
    ),
    "a tree": ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {
        "value": {"type": "number"}, "below": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}}},
        {"value": -1.5e3, "below": [{"value": 2, "below": []}] * 30}),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "value"), ORDINARY.values(), ids=ORDINARY)
@pytest.mark.parametrize("indent", [None, 2])
def test_ordinary_schemas_are_within_the_limits(
    grammars: Grammars, schema: dict[str, Any], value: Any, indent: int | None
) -> None:
    """The limits on cost once were so low that a string of maxLength 200 broke off after 6 tokens."""
    grammar = json_grammar({"type": "object", **schema} if "$ref" not in schema else schema)
    check_grammar(grammar)
    tokens = TOKENIZER.encode(json.dumps(value, indent=indent, ensure_ascii=False), add_special_tokens=False)
    for count in range(len(tokens) + 1):
        allowed = grammars.allowed("ordinary", grammar, tokens[:count])
        assert allowed[[*tokens, EOS][count]], count
    grammars.drop("ordinary")


def test_what_may_follow_does_not_depend_on_what_was_kept(grammars: Grammars) -> None:
    """Shorter, longer and unknown outputs in any order give what a new matcher gives."""
    rng = random.Random(3)
    grammar = json_grammar(PERSON)
    tokens = TOKENIZER.encode('{"name": "Ada", "age": 36, "tags": ["a"]}', add_special_tokens=False)
    expected = [Grammars(BUNDLED, PADDED, (EOS,)).allowed("new", grammar, tokens[:k]) for k in range(len(tokens) + 1)]
    for _ in range(60):
        count = rng.randrange(len(tokens) + 1)
        assert (grammars.allowed("any", grammar, tokens[:count]) == expected[count]).all(), count
        if rng.random() < 0.2:
            grammars.drop("any")
    grammars.drop("any")


@pytest.mark.parametrize(
    "fields",
    [
        {"min_tokens": 30},
        {"logit_bias": dict.fromkeys(range(1000), -100.0)},
        {"repetition_penalty": 1e-30},
        {"repetition_penalty": 10.0, "frequency_penalty": 2.0, "presence_penalty": 2.0},
        {"top_k": 1, "top_p": 0.1, "min_p": 1.0},
        {"stop_token_ids": (EOS,), "min_tokens": 30},
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_other_parameters_never_leave_the_grammar(
    grammars: Grammars, fields: dict[str, Any], temperature: float
) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    rng = np.random.default_rng(5)
    tokens = draw_answer(grammars, constrained(schema, temperature=temperature, **fields), rng)
    check_answer(tokens, schema)  # with min_tokens too: nothing but the end is left long before


def test_min_tokens_put_off_the_end_where_more_may_follow(grammars: Grammars) -> None:
    schema = {"type": "integer", "minimum": 0, "maximum": 10**12}
    logits = np.zeros(PADDED, np.float32)
    logits[EOS] = 50.0
    for least, ends in ((1, True), (9, False)):
        params = constrained(schema, temperature=0.0, min_tokens=least)
        [digit] = TOKENIZER.encode("7", add_special_tokens=False)[-1:]
        allowed = grammars.allowed("min", str(params.grammar), [digit])
        row = SamplingRow(params, 0, 1, (), (digit,), (EOS,), allowed)
        [(token, _)] = Sampler(PADDED).sample(torch.from_numpy(logits[None]), [row])
        assert (token == EOS) == ends
        assert allowed[token]
    grammars.drop("min")


def test_log_probabilities_are_of_the_raw_logits(engine: Engine) -> None:
    free = ask("free", [5], SamplingParams(max_tokens=1, temperature=0.0, logprobs=3))
    bound = ask("bound", [5], constrained(PERSON, max_tokens=1, temperature=0.0, logprobs=3))
    tops = []
    for request in (free, bound):
        engine.scheduler.add(request)
        events = engine.step()
        [logprob] = [event.logprob for event in events if isinstance(event, TokenEvent)]
        assert logprob is not None
        tops.append(logprob.top)
    assert tops[0] == tops[1]


# --- as if nothing had happened


def test_a_seed_gives_the_same_answer_whatever_the_batch(folder: Path, engine: Engine) -> None:
    """Alone with room for all, and together in memory for a few: preemptions must happen and must not show."""
    asked = [ask(f"p{n}", [7, n + 2], constrained(PERSON, seed=n, max_tokens=60)) for n in range(8)]
    alone = [run(engine, [request])[0] for request in asked]
    needed = engine.scheduler.kv.geometry
    few = (needed.pages_for(96) + 16 * needed.state_pages + 2) * needed.page_bytes
    tight = load_engine(folder, kv_bytes=few, max_model_len=80, max_step_tokens=16, prefix_cache=False)
    together = run(tight, asked)
    assert tight.scheduler.stats().preemptions > 0
    assert [outcome.tokens for outcome in together] == [outcome.tokens for outcome in alone]
    assert held(tight) == 0


@pytest.mark.parametrize("seed", range(3))
def test_masks_under_switches_preemptions_and_aborts(folder: Path, seed: int) -> None:
    """Each mask that a step used is that of a matcher made anew, and every finished answer is valid."""
    rng, engine = random.Random(seed), load_engine(folder)
    policy = WantedPolicy(engine.info.ladder.full)
    policy.requests = engine.scheduler.requests
    engine.scheduler.policy = policy
    engine.scheduler.decider.ask_every = 1
    grammars = grammars_of(engine)
    fresh, used, allowed = Grammars(folder, PADDED, (EOS,)), 0, grammars.allowed

    def checking(request_id: str, grammar: str, output: tuple[int, ...]) -> Any:
        nonlocal used
        used += 1
        mask = allowed(request_id, grammar, output)
        assert (mask == fresh.allowed("new", grammar, output)).all()
        fresh.drop("new")
        return mask

    grammars.allowed = checking  # type: ignore[method-assign,assignment]
    outcomes: dict[str, Outcome] = {}
    places = range(len(engine.info.ladder.entries))
    for number in range(500):
        action = rng.choice(("submit", "switch", "preempt", "abort", "step", "step", "step", "step", "step", "step"))
        alive = list(engine.scheduler.requests.values())
        if action == "submit" and len(alive) < 6:
            params = constrained(SMALL, temperature=rng.choice((0.0, 1.0)), seed=number)
            fields = {"floor": engine.info.ladder.entries[0].id, "kv_mode": "reuse"}
            engine.scheduler.add(ask(f"r{number}", [5, number % 50], params, **fields))
            outcomes[f"r{number}"] = Outcome()
        elif action == "switch" and alive:
            policy.wanted[rng.choice(alive).id] = rng.choice(places)
        elif action == "preempt" and alive and (victim := rng.choice(alive)).running:
            engine.scheduler._planner.reclaimer._preempt(victim)
        elif action == "abort" and alive and rng.random() < 0.3:
            ended = rng.choice(alive).id
            engine.scheduler.abort(ended, time.monotonic())
            del outcomes[ended]
        elif action == "step":
            take_all(engine.step(), outcomes)
        assert held(engine) <= len(engine.scheduler.requests)
    while engine.scheduler.has_work:
        take_all(engine.step(), outcomes)
    finished = [outcome for outcome in outcomes.values() if outcome.tokens[-1] == EOS]
    assert len(finished) >= 5
    for outcome in finished:
        check_answer(outcome.tokens, SMALL)
    switched = [outcome for outcome in finished if len(set(outcome.submodels)) > 1]
    assert switched, "no finished answer was made by several sub-models"
    assert used > 100
    assert held(engine) == 0


def take_all(events: list[Event], outcomes: dict[str, Outcome]) -> None:
    for event in events:
        if isinstance(event, TokenEvent):
            outcomes[event.request_id].tokens.append(event.token)
            outcomes[event.request_id].submodels.append(event.submodel)


def grammars_of(engine: Engine) -> Grammars:
    assert isinstance(engine.runner, Runner)
    assert engine.runner._grammars is not None
    return engine.runner._grammars


def held(engine: Engine) -> int:
    return len(grammars_of(engine))


# --- nothing is kept, and little is spent


def test_nothing_is_kept_of_requests_that_ended(folder: Path) -> None:
    engine = load_engine(folder)
    run(engine, [ask("free", [5], SamplingParams(max_tokens=3))])
    assert grammars_of(engine)._tokenizer is None, "the vocabulary is read although nobody needs it"
    for number in range(5):
        engine.scheduler.add(ask(f"r{number}", [5], constrained(PERSON)))
    for _ in range(3):
        engine.step()
    assert held(engine) == 5
    for number in range(5):
        engine.scheduler.abort(f"r{number}", time.monotonic())
    assert held(engine) == 0


def test_the_number_of_matchers_is_bounded(grammars: Grammars) -> None:
    grammar = json_grammar({"type": "object"})
    brace = TOKENIZER.encode("{", add_special_tokens=False)[-1:]
    first = grammars.allowed("many-0", grammar, brace)
    for number in range(MOST_MATCHERS + 3):
        grammars.allowed(f"many-{number}", grammar, brace)
    assert len(grammars) == MOST_MATCHERS
    assert (grammars.allowed("many-0", grammar, brace) == first).all()
    for number in range(MOST_MATCHERS + 3):
        grammars.drop(f"many-{number}")
    assert len(grammars) == 0


def deep(count: int, wrap: str = '{"type":"array","items":%s}') -> Any:
    text = "true"
    for _ in range(count):
        text = wrap % text
    return json.loads(text)


def bombs() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "deep", deep(900)
    yield "only itself", {"$ref": "#"}
    yield "a loop", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    yield "wide", {"properties": {f"p{number}": {"type": "string"} for number in range(2000)}}
    yield (
        "all of any of",
        {"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {}}} for j in range(4)]} for i in range(12)]},
    )
    yield "another file", {"$ref": "file:///etc/passwd"}
    yield "another site", {"$ref": "http://127.0.0.1:1/schema.json"}
    yield "look around", {"type": "string", "pattern": "^(?=a)b$"}
    yield "not supported", {"not": {"type": "string"}}
    yield "nothing", {"type": "integer", "minimum": 3, "maximum": 2}


@pytest.mark.parametrize(("name", "schema"), list(bombs()))
def test_a_schema_that_cannot_be_served_is_refused(grammars: Grammars, name: str, schema: dict[str, Any]) -> None:
    """By the check without a model, and by the engine if it came that far."""
    with pytest.raises(RequestError) as refused:
        check_grammar(json_grammar(schema))
    assert refused.value.param == "response_format"
    assert 10 < len(refused.value.message) < 400
    with pytest.raises(RequestError):
        grammars.allowed("bomb", json.dumps({"grammars": [{"json_schema": schema}]}), ())
    assert len(grammars) == 0


@pytest.mark.parametrize("schema", [{"enum": [1, 2**53 + 1]}, {"items": {"const": -(2**60)}}, {"const": 10**5000}])
def test_integers_that_doubles_do_not_have_are_refused(schema: dict[str, Any]) -> None:
    """llguidance reads numbers as doubles: an enum of 2**53 + 1 gave answers of 2**53."""
    with pytest.raises(RequestError, match=r"2\*\*53"):
        json_grammar(schema)
    json_grammar({"properties": {"const": {"maximum": 2**63 - 1}}, "enum": [2**53, 1.5e300]})


def test_the_reason_names_the_keyword() -> None:
    with pytest.raises(RequestError, match='"not"'):
        check_grammar(json_grammar({"properties": {"a": {"not": {}}}}))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^((a{1000}){1000}){1000}$"},
        {"type": "string", "pattern": "^" + "(a|b)?" * 5000 + "$"},
        {"type": "array", "items": {"$ref": "#"}, "maxItems": 10**9},
        {"type": "string", "minLength": 10**8},
    ],
    ids=["counts", "options", "array", "string"],
)
def test_a_bomb_that_compiles_ends_in_a_step(engine: Engine, schema: dict[str, Any]) -> None:
    """Either it goes on, or this one request fails and the others do not notice."""
    free = ask("free", [3, 4], SamplingParams(max_tokens=30, temperature=0.0))
    engine.scheduler.add(ask("bomb", [5], constrained(schema, max_tokens=40)))
    engine.scheduler.add(free)
    outcome, ends = Outcome(), dict[str, Event]()
    while engine.scheduler.has_work:
        for event in engine.step():
            if isinstance(event, FinishedEvent | FailedEvent):
                assert event.request_id not in ends
                ends[event.request_id] = event
            elif event.request_id == "free" and isinstance(event, TokenEvent):
                outcome.tokens.append(event.token)
        engine.scheduler.check_integrity()
    assert set(ends) == {"bomb", "free"}
    assert len(outcome.tokens) == 30
    assert held(engine) == 0


def test_a_failure_in_the_engine_ends_one_request_with_its_reason(engine: Engine) -> None:
    """A grammar that no check has seen. Its pages come back, its terminal event names field and reason."""
    broken = SamplingParams(max_tokens=5, grammar="start: missing_rule")
    engine.scheduler.add(ask("broken", [5], broken))
    engine.scheduler.add(ask("well", [5], constrained(PERSON, seed=1)))
    ends = {}
    while engine.scheduler.has_work:
        for event in engine.step():
            if isinstance(event, FinishedEvent | FailedEvent):
                ends[event.request_id] = event
        engine.scheduler.check_integrity()
    failed = ends["broken"]
    assert isinstance(failed, FailedEvent)
    assert (failed.error, failed.param) == ("RequestError", "response_format")
    assert "missing_rule" in failed.message
    assert isinstance(ends["well"], FinishedEvent)
    assert engine.scheduler.stats().kv_pages_used == 0


def test_llm_raises_what_failed(folder: Path) -> None:
    llm = LLM(folder, dtype="float32", kv_bytes=8 << 20, max_model_len=160, warmup=False)
    with pytest.raises(RequestError, match="missing_rule"):
        llm.generate([[5], [6]], SamplingParams(max_tokens=5, grammar="start: missing_rule"))
    assert not llm.engine.scheduler.has_work
    [answer] = llm.generate([[5]], constrained(PERSON, seed=1))
    assert answer.text.startswith("{")


def test_a_model_that_cannot_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="end-of-sequence"):
        Grammars(BUNDLED, PADDED, ()).allowed("r", json_grammar({}), ())
    with pytest.raises(RequestError, match="tokenizer cannot be read"):  # and no path: clients read it
        Grammars(tmp_path, PADDED, (EOS,)).allowed("r", json_grammar({}), ())


def test_a_grammar_crosses_to_the_engine_process() -> None:
    command = Submit(ask("r", [5], constrained(PERSON)))
    assert decode_command(encode(command)) == command


def test_parameters_that_do_not_go_together() -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(grammar="start: /a/", ignore_eos=True)
    assert refused.value.param == "ignore_eos"
    with pytest.raises(RequestError) as refused:
        SamplingParams(grammar="x" * (MAX_GRAMMAR_CHARS + 1))
    assert refused.value.param == "response_format"
