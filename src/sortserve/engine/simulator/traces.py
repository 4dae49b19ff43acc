"""Requests to replay: traces of real services, and latency budgets drawn for them. Numpy and the standard library only.

Two formats are read: the Azure LLM inference traces (CSV: TIMESTAMP, ContextTokens, GeneratedTokens) and Mooncake's
(JSON lines: timestamp in milliseconds, input_length, output_length). Neither has budgets, so they are drawn with a seed.
"""

import csv
import json
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Trace:
    """Who asked for how much, when. n requests in order of arrival."""

    arrival: Floats  # [n] seconds from the start of the trace
    num_prompt: Ints  # [n] tokens, at least 1
    num_output: Ints  # [n] tokens, at least 1

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def seconds(self) -> float:
        """From the first arrival to the last one."""
        return float(self.arrival[-1] - self.arrival[0]) if len(self) else 0.0

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self) / self.seconds if self.seconds > 0 else 0.0

    def window(self, start: float, seconds: float) -> "Trace":
        """Arrivals in [start, start + seconds), counted from its start."""
        inside = (self.arrival >= start) & (self.arrival < start + seconds)
        return Trace(self.arrival[inside] - start, self.num_prompt[inside], self.num_output[inside])

    def stretch(self, first: int, count: int, seconds: float) -> "Trace":
        """`count` requests in a row from `first` on (going round at the end), their gaps scaled so that they take `seconds`.

        The rate is then exact, and bursts keep their form. Raises ValueError if there are not so many requests.
        """
        if not 2 <= count <= len(self):
            raise ValueError(f"{count} requests are asked for, the trace has {len(self)} and 2 are the least")
        at = (first + np.arange(count)) % len(self)
        lap = self.seconds + self.seconds / max(len(self) - 1, 1)
        arrival = self.arrival[at] + np.where(at < first % len(self), lap, 0.0)
        span = arrival[-1] - arrival[0]
        return Trace((arrival - arrival[0]) * (seconds / span), self.num_prompt[at], self.num_output[at])

    def scaled_lengths(self, factor: float, most_prompt: int | None = None, most_output: int | None = None) -> "Trace":
        """Lengths times `factor`, rounded, at least 1, and cut off at the limits if given."""

        def scale(lengths: Ints, most: int | None) -> Ints:
            scaled: Ints = np.maximum(np.rint(lengths * factor).astype(np.int64), 1)
            return scaled if most is None else np.minimum(scaled, most)

        return replace(
            self, num_prompt=scale(self.num_prompt, most_prompt), num_output=scale(self.num_output, most_output)
        )

    def scaled_time(self, factor: float) -> "Trace":
        """Times between arrivals times `factor`: below 1 the load rises, and bursts keep their form."""
        return replace(self, arrival=self.arrival * factor)

    def at_rate(self, rate: float) -> "Trace":
        """Time scaled so that `rate` requests arrive a second."""
        return self.scaled_time(self.rate / rate)

    def evened(self, seed: int) -> "Trace":
        """The same requests at the same mean rate without bursts: arrivals independent and uniform (Poisson)."""
        start, end = (float(self.arrival[0]), float(self.arrival[-1])) if len(self) else (0.0, 0.0)
        return replace(self, arrival=np.sort(np.random.default_rng(seed).uniform(start, end, len(self))))


def read_trace(path: Path) -> Trace:
    """Read a trace in either format, told apart by its first character.

    Raises OSError if it cannot be read, ValueError with line and value if it is malformed.
    """
    text = path.read_text(encoding="utf-8-sig")
    rows = _mooncake(path, text) if text.lstrip().startswith("{") else _azure(path, text)
    if not rows:
        raise ValueError(f"{path}: the trace is empty")
    table = np.array(sorted(rows), np.float64)  # [n, 3]
    lengths = np.maximum(table[:, 1:].astype(np.int64), 1)
    return Trace(table[:, 0] - table[0, 0], lengths[:, 0], lengths[:, 1])


def _azure(path: Path, text: str) -> list[tuple[float, int, int]]:
    rows = []
    reader = csv.DictReader(text.splitlines())
    wanted = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    if reader.fieldnames is None or not set(wanted) <= set(reader.fieldnames):
        raise ValueError(f"{path}: columns are {reader.fieldnames}, must include {', '.join(wanted)}")
    for row in reader:
        try:
            # seven decimals: datetime reads six
            moment = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            rows.append((moment, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: line {reader.line_num}: {error}") from error
    return rows


def _mooncake(path: Path, text: str) -> list[tuple[float, int, int]]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"])))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: line {number}: {error!r}") from error
    return rows


@dataclass(frozen=True)
class Unloaded:
    """What a lone request takes on the full model: what budgets are multiples of. Seconds."""

    first: float  # of every request
    prompt_token: float
    token: float  # between two output tokens

    def ttft(self, num_prompt: Ints) -> Floats:
        """[n] to the first token."""
        return np.asarray(self.first + self.prompt_token * num_prompt, np.float64)

    def total(self, num_prompt: Ints, num_output: Ints) -> Floats:
        """[n] to the last token."""
        return self.ttft(num_prompt) + self.token * (num_output - 1)


@dataclass(frozen=True)
class BudgetMix:
    """How budgets are drawn. `tightness` is one factor per request, uniform in its range.

    interactive: TTFT = tightness x (ttft_base + ttft_factor x unloaded TTFT), TPOT = tightness x tpot_factor x unloaded
    time per token. relaxed: total = tightness x (total_base + total_factor x unloaded total). The rest has no budget.
    """

    interactive: float = 0.5  # share of requests
    relaxed: float = 0.4  # share of requests
    strict: float = 1.0  # share of the budgets that may be refused
    ttft_base: float = 0.25  # seconds
    ttft_factor: float = 10.0
    tpot_factor: float = 10.0
    total_base: float = 1.0  # seconds
    total_factor: float = 10.0
    tightness: tuple[float, float] = (0.75, 1.5)


@dataclass(frozen=True)
class Workload:
    """A trace with a latency budget each; seconds, inf where there is none. n requests in order of arrival."""

    arrival: Floats  # [n]
    num_prompt: Ints  # [n]
    num_output: Ints  # [n]
    ttft: Floats  # [n]
    tpot: Floats  # [n]
    total: Floats  # [n]
    strict: Bools  # [n] may be refused
    group: Ints  # [n] which system prompt it begins with; -1: none
    shared: Ints  # [n] tokens of that system prompt

    def __len__(self) -> int:
        return len(self.arrival)

    @cached_property
    def budgeted(self) -> Bools:
        """[n] whether it has a latency budget."""
        return np.isfinite(self.ttft) | np.isfinite(self.tpot) | np.isfinite(self.total)

    @property
    def kind(self) -> list[str]:
        """[n] interactive, relaxed or none."""
        return ["relaxed" if total < np.inf else "interactive" if some else "none" for total, some in self._pairs()]

    def _pairs(self) -> list[tuple[float, bool]]:
        return list(zip(self.total.tolist(), self.budgeted.tolist(), strict=True))

    def sharing(self, tokens: int, share: float, seed: int, groups: int = 1) -> "Workload":
        """The same, where a `share` of the requests begin with one of `groups` system prompts of `tokens` tokens, added
        to their own prompts."""
        rng = np.random.default_rng(seed)
        chosen = rng.random(len(self)) < share
        group = np.where(chosen, rng.integers(0, groups, len(self)), -1)
        shared = np.where(chosen, tokens, 0)
        return replace(self, num_prompt=self.num_prompt + shared, group=group, shared=shared)

    def without_strict(self) -> "Workload":
        """The same budgets, best effort: nobody may be refused."""
        return replace(self, strict=np.zeros(len(self), np.bool_))


def draw_budgets(trace: Trace, unloaded: Unloaded, seed: int, mix: BudgetMix | None = None) -> Workload:
    """Budgets for a trace, from `seed` alone: the same at every load, since none depends on arrival times."""
    mix = mix or BudgetMix()
    count = len(trace)
    rng = np.random.default_rng(seed)
    draw, strict = rng.random(count), rng.random(count)
    tightness = rng.uniform(*mix.tightness, count)
    interactive = draw < mix.interactive
    relaxed = ~interactive & (draw < mix.interactive + mix.relaxed)
    ttft = tightness * (mix.ttft_base + mix.ttft_factor * unloaded.ttft(trace.num_prompt))
    tpot = tightness * mix.tpot_factor * unloaded.token
    total = tightness * (mix.total_base + mix.total_factor * unloaded.total(trace.num_prompt, trace.num_output))
    return Workload(
        trace.arrival,
        trace.num_prompt,
        trace.num_output,
        np.where(interactive, ttft, np.inf),
        np.where(interactive, tpot, np.inf),
        np.where(relaxed, total, np.inf),
        (interactive | relaxed) & (strict < mix.strict),
        np.full(count, -1, np.int64),
        np.zeros(count, np.int64),
    )
