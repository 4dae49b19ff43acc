"""Sub-models that change while a request runs: promotion, demotion, reuse, refusals and cuts."""

import random

import pytest
import torch

from sortserve.engine.model_config import load_model_config
from sortserve.engine.submodel import SubModel
from tests.vllm.conftest import BUNDLED
from tests.vllm.engines import BLOCK_TOKENS, Engine
from tests.vllm.test_asif import pinned, prompts

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("clean")]

BUDGET = {"sortserve_budget": [-1, -1, 3_600_000]}  # whose K/V may be reused


def places_by_width(engine: Engine) -> tuple[int, int]:
    """A narrow and a wide place of one depth, without skips."""
    found = [
        place
        for place, entry in enumerate(engine.ladder.entries)
        if entry.submodel == SubModel.make(engine.ladder.shape.num_layers, entry.submodel.widths[0])
    ]
    return found[0], found[-1]


def test_promotion_goes_on_as_the_deeper_submodel_would(engine: Engine) -> None:
    """Alone and amid others, from every entry to the full model: what was computed is dropped and computed again."""
    full = engine.ladder.full
    lengths = tuple(range(35, 35 + 4 * full, 4))
    asked = prompts(engine, lengths)
    for place, length in enumerate(lengths):
        engine.decider.program[length] = [(0, place), (5 + place % 10, full)]
    others = prompts(engine, (50, 90))
    results = engine.generate(
        [*asked, *others], [engine.free] * len(asked) + [pinned(engine, 0), pinned(engine, full)], 20
    )
    for place, (prompt, result) in enumerate(zip(asked, results, strict=False)):
        before = 5 + place % 10
        assert result.tokens[:before] == engine.alone(prompt, place, before)
        rest = engine.alone(prompt + result.tokens[:before], full, 20 - before)
        assert result.tokens[before:] == rest, engine.ladder.entries[place].id
        ids = engine.ladder.entries[place].id, engine.ladder.entries[full].id
        assert result.told["submodels"] == [[ids[0], before], [ids[1], 20 - before]]
        assert result.told["switches"] == 1
        # everything but the token sampled last; more if memory was short in between
        assert result.told["recomputed_tokens"] in (0, len(prompt) + before - 1)


def test_demotion_keeps_its_kv_and_goes_on_as_the_shallower_one(engine: Engine) -> None:
    shallow, deep = (engine.ladder.place(name) for name in _depths_alone(engine))
    prompt = prompts(engine, (45,))[0]
    engine.decider.program[45] = [(0, deep), (7, shallow)]
    result = engine.generate([prompt], [engine.free], 20)[0]
    assert result.told["recomputed_tokens"] == 0
    assert result.tokens[:7] == engine.alone(prompt, deep, 7)
    assert result.tokens[7:] == engine.alone(prompt + result.tokens[:7], shallow, 13)


def test_a_demoted_request_that_comes_back_computes_again(engine: Engine) -> None:
    """Its deep layers lack the tokens in between."""
    shallow, deep = (engine.ladder.place(name) for name in _depths_alone(engine))
    prompt = prompts(engine, (46,))[0]
    engine.decider.program[46] = [(0, deep), (4, shallow), (9, deep)]
    result = engine.generate([prompt], [engine.free], 20)[0]
    assert result.told["recomputed_tokens"] == 46 + 9 - 1
    assert result.tokens[9:] == engine.alone(prompt + result.tokens[:9], deep, 11)


def test_random_schedules_are_as_if(engine: Engine) -> None:
    """Nine requests at once, short of memory, each with up to four sub-models at random: every run of tokens is what its
    sub-model alone would say next."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng, places = random.Random(seed), range(len(engine.ladder.entries))
    lengths = tuple(range(33, 33 + 9 * 7, 7))
    for length in lengths:
        changes = [0, *sorted(rng.sample(range(1, 16), rng.randrange(4)))]
        engine.decider.program[length] = [(after, rng.choice(places)) for after in changes]
    asked = prompts(engine, lengths)
    for prompt, result in zip(asked, engine.generate(asked, [engine.free] * len(asked), 16), strict=True):
        made = 0
        for name, count in result.told["submodels"]:
            alone = engine.alone(prompt + result.tokens[:made], engine.ladder.place(name), count)
            assert result.tokens[made : made + count] == alone, f"seed {seed}: {len(prompt)} {result.told['submodels']}"
            made += count
        assert made == 16
    assert engine.decider.ends.count(16) >= len(asked)


def test_exact_computes_again_when_widths_change_and_reuse_does_not(engine: Engine) -> None:
    narrow, wide = places_by_width(engine)
    prompt = prompts(engine, (47,))[0]
    engine.decider.program[47] = [(0, wide), (6, narrow)]
    exact = engine.generate([prompt], [engine.free], 16)[0]
    assert exact.told["recomputed_tokens"] == 47 + 6 - 1
    assert exact.tokens[6:] == engine.alone(prompt + exact.tokens[:6], narrow, 10)
    reused = engine.generate([prompt], [{**engine.free, **BUDGET}], 16)[0]
    assert reused.told["recomputed_tokens"] == 0
    _check_with_recorded_widths(engine, prompt, reused.tokens, [wide] * 52 + [narrow] * 10)


def test_blocks_of_several_widths_are_shared_with_nobody(engine: Engine) -> None:
    """The second request's prompt is all that the first one computed, part of it under other widths."""
    narrow, wide = places_by_width(engine)
    prompt = prompts(engine, (20,))[0]
    engine.decider.program[20] = [(0, wide), (2, narrow)]
    first = engine.generate([prompt], [{**engine.free, **BUDGET}], 4 * BLOCK_TOKENS)[0]
    asked = prompt + first.tokens
    for place in (narrow, wide):
        second = engine.generate([asked], [pinned(engine, place)], 6)[0]
        assert second.cached == 0
        assert second.tokens == engine.alone(asked, place, 6)


def test_refused_and_cut_requests_end_and_say_so(engine: Engine) -> None:
    asked = prompts(engine, (21, 22, 23))
    engine.decider.refuse.add(21)
    engine.decider.cut[22] = 5
    refused, cut, other = engine.generate(asked, [engine.free] * 3, 12)
    assert (refused.tokens, refused.finish_reason, refused.told["refused"]) == ([], "abort", True)
    assert (len(cut.tokens), cut.finish_reason, cut.told["cut"]) == (5, "length", True)
    assert cut.tokens == engine.alone(asked[1], engine.ladder.full, 5)
    assert other.tokens == engine.alone(asked[2], engine.ladder.full, 12)
    assert not engine.scheduler.requests
    engine.generate([asked[2]], [engine.free], 1)
    assert len(engine.scheduler._tracked) <= 1, "ended requests are forgotten"


def test_prompts_have_their_turns_in_the_deciders_order(engine: Engine) -> None:
    """Against vLLM's, which is first come, first served; each is longer than a step, so no two end in one."""
    lengths = [65, 66, 67, 68, 69, 70, 71]
    engine.decider.order.extend([71, 65, 70, 66, 69, 67, 68])
    engine.generate(prompts(engine, tuple(lengths)), [engine.free] * len(lengths), 12)
    begun: list[int] = []
    for standings in engine.decider.seen:
        begun += [each.num_prompt for each in standings if each.num_output and each.num_prompt not in begun]
    assert begun == engine.decider.order


def _depths_alone(engine: Engine) -> tuple[str, str]:
    """Ids of a shallow and a deep entry that differ in depth alone."""
    submodels = {entry.submodel: entry.id for entry in engine.ladder.entries}
    plain = [(submodel, name) for submodel, name in submodels.items() if not submodel.skip_attention]
    for shallow, name in plain:
        for deep, other_name in plain:
            if shallow.depth < deep.depth and deep.widths[: shallow.depth] == shallow.widths:
                return name, other_name
    return pytest.skip("no two entries differ in depth alone")


def _check_with_recorded_widths(engine: Engine, prompt: list[int], tokens: list[int], places: list[int]) -> None:
    """Each output token against formulas in which token i ran `places[i]`."""
    from tests.engine.asif import Oracle

    oracle = Oracle(BUNDLED, load_model_config(BUNDLED))
    known = prompt + tokens
    widths = torch.tensor([engine.ladder.entries[place].submodel.widths for place in places]).T
    for number, token in enumerate(tokens):
        count = len(prompt) + number
        logits = oracle.logits(known[:count], widths[:, :count], torch.ones(widths.shape[0], count, dtype=torch.bool))
        assert logits.max() - logits[token] < 1e-3, f"output token {number}"
