"""From a trace to requests on the wire: lengths scaled, arrivals at a rate, budgets drawn, prompts made of real text."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.slo.wire import Ask
from sortserve.engine.budget import Budget
from sortserve.engine.simulator.traces import BudgetMix, Ints, Trace, Unloaded, Workload, draw_budgets

_OPENING_TOKENS = 4  # drawn at random: no two prompts share a first block, so the prefix cache has nothing to find


@dataclass(frozen=True)
class Texts:
    """Where prompts are cut from: the token ids of some text."""

    tokens: Sequence[int]

    def prompt(self, num_tokens: int, rng: np.random.Generator) -> list[int]:
        """A prompt of so many tokens: a few drawn ones, then text from somewhere on, round and round."""
        opening = [int(rng.choice(self.tokens)) for _ in range(min(_OPENING_TOKENS, num_tokens))]
        start = int(rng.integers(len(self.tokens)))
        rest = num_tokens - len(opening)
        return opening + [self.tokens[(start + place) % len(self.tokens)] for place in range(rest)]


def fitted(trace: Trace, factor: float, max_model_len: int) -> Trace:
    """Lengths times `factor`, and cut so that prompt and answer fit into the context; answers take at most half of it."""
    return trace.scaled_lengths(factor, max_model_len - max_model_len // 2, max_model_len // 2)


def arrivals(trace: Trace, start: int, rate: float, seconds: float) -> Trace:
    """The requests from number `start` on, as many as `rate` makes in `seconds`, spread over just that time: the mean
    rate is exact, bursts keep their form. Raises ValueError if the trace is too short."""
    count = round(rate * seconds)
    if count < 2 or start + count > len(trace):
        raise ValueError(f"{count} requests from number {start} on are wanted, the trace has {len(trace)}")
    chosen = slice(start, start + count)
    arrival = trace.arrival[chosen] - trace.arrival[start]
    scale = (count - 1) / rate / arrival[-1]
    return Trace(arrival * scale, trace.num_prompt[chosen], trace.num_output[chosen])


def drawn(trace: Trace, start: int, count: int, seed: int) -> Trace:
    """The `count` requests from number `start` on in a drawn order: a closed loop gets through a part of them only, and
    the first of a trace may be shorter than the rest (by 20 % in the conversation trace)."""
    inside = np.arange(start, min(start + count, len(trace)))
    order = np.random.default_rng(seed).permutation(inside)
    return Trace(np.zeros(len(order)), trace.num_prompt[order], trace.num_output[order])


def workload(trace: Trace, unloaded: Unloaded, seed: int, mix: BudgetMix) -> Workload:
    """Budgets for each request."""
    return draw_budgets(trace, unloaded, seed, mix)


def budget_of(work: Workload, number: int) -> Budget | None:
    """The budget of one request, to a thousandth of a millisecond as the header has it."""

    def milliseconds(seconds: float) -> float | None:
        return round(1e3 * seconds, 3) if np.isfinite(seconds) else None

    if not work.budgeted[number]:
        return None
    return Budget(
        milliseconds(float(work.total[number])),
        milliseconds(float(work.ttft[number])),
        milliseconds(float(work.tpot[number])),
        "strict" if work.strict[number] else "best-effort",
    )


def latest_due(work: Workload) -> float:
    """Seconds from the start until no budget can be kept any more; 0 without budgets."""
    tokens = np.maximum(work.num_output - 1, 0)
    paced = work.ttft + np.where(np.isfinite(work.tpot), work.tpot, 0.0) * tokens
    due = work.arrival + np.minimum(paced, work.total)
    return float(due[work.budgeted & np.isfinite(due)].max(initial=0.0))


def asks(work: Workload, texts: Texts, seed: int) -> list[Ask]:
    """The requests of a workload, due when they arrive."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(len(work)):
        prompt = texts.prompt(int(work.num_prompt[number]), rng)
        headers = budget_headers(budget_of(work, number))
        payload = request(prompt, int(work.num_output[number]), headers)
        made.append(Ask(number, float(work.arrival[number]), payload))
    return made


def pinned_asks(num_prompt: Ints, num_output: Ints, submodel: str, texts: Texts, seed: int) -> list[Ask]:
    """Requests for one sub-model, without budgets: for a closed loop."""
    rng = np.random.default_rng(seed)
    pairs = enumerate(zip(num_prompt.tolist(), num_output.tolist(), strict=True))
    pin = {"X-Submodel": submodel}
    return [Ask(number, 0.0, request(texts.prompt(prompt, rng), output, pin)) for number, (prompt, output) in pairs]


def budget_headers(budget: Budget | None) -> dict[str, str]:
    """A budget as a client sends it."""
    if budget is None:
        return {}
    given = {"": budget.total_ms, "-TTFT": budget.ttft_ms, "-TPOT": budget.tpot_ms}
    headers = {f"X-Latency-Budget{part}-Ms": f"{ms:.3f}" for part, ms in given.items() if ms is not None}
    return headers | {"X-Latency-Budget-Policy": budget.policy}


def request(prompt: Sequence[int], max_tokens: int, headers: Mapping[str, str]) -> bytes:
    """One streamed completion of exactly `max_tokens` tokens, as the bytes that go out."""
    body = json.dumps(
        {
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = ["POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    head += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body


def read_text(path: Path) -> str:
    """Text of a file, or of JSON lines with a field `text`."""
    content = path.read_text()
    if path.suffix == ".jsonl":
        return "\n\n".join(json.loads(line)["text"] for line in content.splitlines() if line.strip())
    return content
