"""What a decoded token takes on this machine, alone, for each sub-model."""

import statistics
import time
from collections.abc import Sequence

from sortserve.engine.llm import LLM
from sortserve.engine.sampling import SamplingParams

_PROMPT_TOKENS = 32


def token_milliseconds(llm: LLM, ids: Sequence[str], *, tokens: int = 24, rounds: int = 3) -> dict[str, float]:
    """Median over rounds of the time per token of one request, by sub-model; all take turns in every round, so that a
    machine that slows down slows them alike."""
    found: dict[str, list[float]] = {name: [] for name in ids}
    vocabulary = llm.tokenizer.vocab_size
    for number in range(rounds + 1):
        for place, name in enumerate(ids):
            # prompts of different tokens, so that the prefix cache finds none of them
            prompt = [(7 + 31 * number + 101 * place + token) % vocabulary for token in range(_PROMPT_TOKENS)]
            started = time.monotonic()
            summary = llm.generate(
                [prompt], SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True), submodel=name
            )[0].summary
            decode = time.monotonic() - started - (summary.first_token_seconds or 0.0)
            if number:  # the first round warms up
                found[name].append(1e3 * decode / (tokens - 1))
    return {name: round(statistics.median(values), 3) for name, values in found.items()}
