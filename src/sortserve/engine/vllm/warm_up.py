"""The first requests of a vLLM engine: short ones on a few sub-models, alone and together, which its costs are fitted to."""

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any

from sortserve.engine.ladder import Ladder
from sortserve.engine.protocol import EngineInfo, GenerateRequest
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.vllm.learned import ENOUGH_STEPS

_LOG = logging.getLogger(__name__)
TOKENS = 5  # of each answer
SHORT = 8  # tokens of a prompt that is only there to decode after it
MOST_ROWS = 64
MOST_PLACES = 4
REPORT_SECONDS = 0.3  # a little more than there are between two reports
GIVE_UP_SECONDS = 5.0


def batches(ladder: Ladder, max_running: int, step_tokens: int, max_model_len: int) -> Iterator[tuple[int, int, int]]:
    """(place, requests, prompt tokens) to run one after another: prompts of all sizes, answers in batches of all sizes.
    The last fit does not have the last of these steps, so what comes last is what lies between others: prompts come first,
    then batches from the largest down."""
    last = len(ladder.entries) - 1
    count = min(MOST_PLACES, last + 1)
    places = sorted({round(number * last / max(1, count - 1)) for number in range(count)})
    most_rows = min(MOST_ROWS, max_running)
    rows = [1 << power for power in reversed(range(most_rows.bit_length()))]
    longest = min(step_tokens, max_model_len - TOKENS)
    prompts = [size for size in (longest // 8, longest // 3, longest) if size > SHORT]
    for size in prompts:
        yield from ((place, 1, size) for place in places)
    for requests in rows:
        yield from ((place, requests, min(SHORT, longest)) for place in places)


async def warm_up(front: Any, info: EngineInfo, max_running: int, step_tokens: int) -> None:
    """Run them until the scheduler has enough to fit its costs to, then count from nothing."""
    began, number = time.monotonic(), 0
    ladder, outlook = info.ladder, front.outlook
    sizes = list(batches(ladder, max_running, step_tokens, info.max_model_len))
    expected = 0
    while expected < 2 * ENOUGH_STEPS:
        for place, requests, tokens in sizes:
            for _ in range(requests):
                front.submit(_request(number, tokens, info, ladder.entries[place].id))
                number += 1
            await front.idle()
            expected += TOKENS
    told = SamplingParams(max_tokens=TOKENS, logprobs=1, prompt_logprobs=1)  # vLLM compiles what only these need
    front.submit(_request(number, SHORT, info, ladder.entries[-1].id, told))
    await front.idle()
    await _reported(front, info, number + 1)
    front.forget()
    _LOG.info(
        "step times learned from %d steps in %.1f s%s",
        outlook.measured_steps,
        time.monotonic() - began,
        "" if outlook.cost is not None else "; not enough of them to predict with",
    )


def _request(
    number: int, tokens: int, info: EngineInfo, submodel: str, sampling: SamplingParams | None = None
) -> GenerateRequest:
    prompt = tuple((7 * number + 13 * at) % info.vocab_size for at in range(tokens))
    plain = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    return GenerateRequest(f"warm-up-{number}", prompt, sampling or plain, time.monotonic(), submodel=submodel)


async def _reported(front: Any, info: EngineInfo, number: int) -> None:
    """Have the scheduler report all that ran: it does so after a step, if the last report was some time ago."""
    await asyncio.sleep(REPORT_SECONDS)
    steps = front.outlook.steps
    front.submit(_request(number, min(SHORT, info.max_model_len - TOKENS), info, info.ladder.entries[-1].id))
    await front.idle()
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while front.outlook.steps == steps and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
