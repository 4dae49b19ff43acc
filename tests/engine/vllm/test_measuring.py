"""How long vLLM's steps took, as its scheduler sees them; without vLLM."""

from types import SimpleNamespace
from typing import Any

from sortserve.engine.vllm.measuring import StepClock


def output(**tokens: int) -> Any:
    return SimpleNamespace(num_scheduled_tokens=tokens)


def scheduled(clock: StepClock, step: Any, now: float, place: int = 2, *, prompt: bool = False) -> None:
    requests = {name: SimpleNamespace(num_computed_tokens=40, is_prefill_chunk=prompt) for name in "ab"}
    clock.scheduled(step, {"a": place, "b": place}, requests, now)


def test_what_is_done_between_two_steps_is_told_apart_while_somebody_waits() -> None:
    clock = StepClock()
    first, second, third = output(a=30, b=1), output(a=1, b=1), output(a=1)
    scheduled(clock, first, 10.0)
    step = clock.finished(first, 10.5, goes_on=True)
    assert step is not None
    assert (step.seconds, step.rows, step.had_prompt, step.between) == (
        0.5,
        {2: (31, 2, 80, 30 * (40 - 15))},
        True,
        None,
    )
    scheduled(clock, second, 10.625)
    step = clock.finished(second, 10.75, goes_on=False)
    assert step is not None
    assert (step.seconds, step.had_prompt, step.between) == (0.125, False, 0.125)
    scheduled(clock, third, 60.0)  # nobody was there
    step = clock.finished(third, 60.125, goes_on=True)
    assert step is not None
    assert (step.seconds, step.between) == (0.125, None)


def test_a_step_that_overlaps_its_predecessor_counts_from_the_end_of_that_one() -> None:
    clock = StepClock()
    first, second = output(a=1), output(a=1)
    scheduled(clock, first, 1.0)
    scheduled(clock, second, 1.25)
    for step, now, seconds, between in ((first, 2.0, 1.0, None), (second, 2.5, 0.5, 0.0)):
        found = clock.finished(step, now, goes_on=True)
        assert found is not None
        assert (found.seconds, found.between) == (seconds, between)


def test_steps_without_rows_or_whose_outputs_were_dropped() -> None:
    clock = StepClock()
    empty, dropped, last = output(), output(a=1), output(b=1)
    scheduled(clock, empty, 1.0)
    assert clock.finished(empty, 1.5, goes_on=False) is None
    scheduled(clock, dropped, 2.0)
    scheduled(clock, last, 3.0)
    found = clock.finished(last, 3.5, goes_on=False)
    assert found is not None
    assert found.seconds == 0.5
    assert clock.finished(dropped, 4.0, goes_on=False) is None
