"""The real scheduler over the simulated runner: it waits as long as the cost model says, and answers."""

import numpy as np
import pytest

from sortserve.engine.plan import Plan, SampleSpec, SequencePlan, Span
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.simulator.runner import SimulatedRunner
from tests.engine.simulator.little import little_config, table
from tests.engine.small import LADDER, SHAPE


def _plan(params: SamplingParams, rows: int = 1) -> Plan:
    part = SequencePlan(
        request_id="a",
        submodel=LADDER.full,
        exit=4,
        spans=(Span(0, rows, 0, 4, (1, 1, 1, 1)),),
        tokens=(1,) * rows,
        watermark=(0, 0, 0, 0),
        pages=np.zeros((1, 4), np.int32),
        state_pages={},
        keep_states=False,
        sample=SampleSpec(params, 7, rows, (1,) * rows, ()),
    )
    return Plan(1, (part,), confidence=True)


def test_it_waits_and_makes_up_tokens_that_follow_the_seed() -> None:
    waited: list[float] = []
    config = little_config((32, 64))
    runner = SimulatedRunner(table(config), config.rungs, 3, (0, 2), waited.append)
    result = runner.run(_plan(SamplingParams(max_tokens=4), 9))
    assert result.sequences[0].token == 1, "the only one that does not end the answer"
    assert result.seconds == pytest.approx(waited[0], abs=0.01)
    assert result.seconds > 6 * 2 * 0.5e-3
    again = runner.run(_plan(SamplingParams(max_tokens=4), 9))
    assert again == result
    assert result.sequences[0].confidence is not None


def test_what_it_cannot_do_ends_the_request_with_words() -> None:
    runner = SimulatedRunner.of("h200", SHAPE, LADDER, ())
    (result,) = runner.run(_plan(SamplingParams(max_tokens=4, logprobs=2))).sequences
    assert result.token is None
    assert result.error is not None
    with pytest.raises(ValueError, match="no device 'abacus'"):
        SimulatedRunner.of("abacus", SHAPE, LADDER, ())
