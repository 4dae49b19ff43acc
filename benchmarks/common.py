"""What all benchmarks share: the machine and its ceiling, a driver that steps the real engine, pairs, and the report."""

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.provenance import commit
from sortserve.engine.config import EngineConfig
from sortserve.engine.engine import Engine
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.engine.policies.protocol import SITS_OUT, Decision, Reason, View
from sortserve.engine.protocol import GenerateRequest, KVMode
from sortserve.engine.request import Request
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.submodel import SubModel

DEFAULT_MODEL = Path.home() / ".cache" / "sortserve-models" / "qwen2.5-coder-0.5b-instruct"
CONTEXT = 64
"""Prompt tokens of a request, unless a benchmark says otherwise."""
RESULTS = Path(__file__).parent / "results"


class ScriptedPolicy:
    """Each request runs the place that the benchmark last named for it; the others sit out if `only` is set. It looks at
    the requests themselves, in the scheduler's order, which is the view's."""

    name = "scripted"

    def __init__(self, requests: Mapping[str, Request]) -> None:
        self.places: dict[str, int] = {}
        self.only: frozenset[str] | None = None
        self._requests = requests

    def decide(self, view: View) -> Decision:
        """The named places; the benchmark stays within floors and ceilings."""
        wanted = [
            SITS_OUT if self.only is not None and name not in self.only else self.places[name]
            for name in self._requests
        ]
        reason = np.full(len(view), int(Reason.FIXED))
        return Decision(np.array(wanted, np.int64), reason, np.zeros(len(view), np.bool_), view.step_tokens)


@dataclass
class Driver:
    """The real engine under a scripted policy."""

    engine: Engine
    policy: ScriptedPolicy
    count: int = 0

    @classmethod
    def load(cls, model: Path, ladder: Ladder, **settings: object) -> "Driver":
        """Load `model` with a ladder made by the benchmark."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ladder.json"
            ladder.dump(path)
            config = EngineConfig(model_folder=model, ladder_path=path, warmup=False, **settings)  # type: ignore[arg-type]
            engine = Engine.load(config)
        policy = ScriptedPolicy(engine.scheduler.requests)
        engine.scheduler.policy = policy
        engine.scheduler.decider.ask_every = 1
        return cls(engine, policy)

    def place(self, submodel_id: str) -> int:
        """Place of a ladder entry."""
        return self.engine.info.ladder.place(submodel_id)

    def submit(
        self, num_prompt: int, max_tokens: int, place: int | None = None, *, pinned: bool = False, kv: KVMode = "reuse"
    ) -> str:
        """One request with a random prompt of token ids. `pinned`: to `place`, else it may run any entry."""
        self.count += 1
        request_id = f"bench-{self.count}"
        ladder = self.engine.info.ladder
        place = ladder.full if place is None else place
        prompt = np.random.default_rng(self.count).integers(1000, self.engine.info.vocab_size - 1000, num_prompt)
        self.policy.places[request_id] = place
        request = GenerateRequest(
            request_id,
            tuple(prompt.tolist()),
            SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            time.monotonic(),
            submodel=ladder.entries[place].id if pinned else "auto",
            kv_mode=kv,
        )
        self.engine.scheduler.add(request)
        if not pinned:
            # without a latency budget the floor would be the full model; the benchmark moves the request at will
            self.engine.scheduler.requests[request_id].floor = 0
        return request_id

    def group(self, places: Sequence[int], max_tokens: int, *, num_prompt: int = CONTEXT) -> list[str]:
        """Requests pinned to `places`, their prompts computed."""
        ids = [self.submit(num_prompt, max_tokens, place, pinned=True) for place in places]
        self.catch_up()
        return ids

    def step(self, only: Iterable[str] | None = None) -> float:
        """Seconds of one whole step: plan, rows, head, sampler, bookkeeping. `only`: the others sit out."""
        self.policy.only = None if only is None else frozenset(only)
        began = time.perf_counter()
        self.engine.step()
        seconds = time.perf_counter() - began
        self.policy.only = None
        return seconds

    def catch_up(self) -> None:
        """Step until every request decodes (its prompt is computed)."""
        while any(request.num_output == 0 for request in self.engine.scheduler.requests.values()):
            self.engine.step()

    def clear(self) -> None:
        """End all requests."""
        for request_id in list(self.engine.scheduler.requests):
            self.engine.scheduler.abort(request_id, time.monotonic())
        self.policy.places.clear()


def grid_ladder(model: Path, depths: Sequence[int], shares: Sequence[float]) -> Ladder:
    """Entries for each depth and each share of the FFN's width."""
    shape = load_model_config(model).shape
    entries = []
    for depth in depths:
        for share in shares:
            submodel = SubModel.make(depth, round(shape.ffn_width * share))
            entries.append(Entry(submodel.name(shape) or "", submodel))
    return Ladder.of(shape, entries)


def grid_engine(model: Path, **settings: object) -> Engine:
    """The real engine with three depths at three widths of `model`."""
    layers = load_model_config(model).shape.num_layers
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ladder.json"
        grid_ladder(model, [layers // 2, 3 * layers // 4, layers], [0.5, 0.75, 1.0]).dump(path)
        return Engine.load(EngineConfig(model_folder=model, ladder_path=path, **settings))  # type: ignore[arg-type]


def alternate(runs: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Time A, B, ..., then the same in reverse, and so on, so that drift of the machine meets all alike; the figures of
    each. The shorter the runs, the better the pairs: these machines' bandwidth changes within seconds."""
    figures: list[list[float]] = [[] for _ in runs]
    for number in range(rounds):
        order = range(len(runs)) if number % 2 == 0 else reversed(range(len(runs)))
        for place in order:
            figures[place].append(runs[place]())
    return figures


def median(values: Iterable[float]) -> float:
    """The median."""
    return float(np.median(list(values)))


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over pairs of a / b."""
    return median(x / y for x, y in zip(a, b, strict=True))


class Bandwidth:
    """The memory-bandwidth ceiling: one pass of all threads over a gigabyte. These machines' bandwidth drifts by half
    within a minute, so it is timed in turn with what is held against it."""

    def __init__(self) -> None:
        self._data = torch.randint(0, 100, (128 << 20,), generator=torch.Generator().manual_seed(0))

    def pass_seconds(self) -> float:
        """Seconds of one pass, the median of three."""
        return median(self._one_pass() for _ in range(3))

    def _one_pass(self) -> float:
        began = time.perf_counter()
        self._data.sum()
        return time.perf_counter() - began

    def seconds_for(self, num_bytes: int, pass_seconds: float) -> float:
        """Least time to read so many bytes at the speed of a pass."""
        return num_bytes * pass_seconds / self._data.nbytes

    def rate(self, pass_seconds: float) -> float:
        """Bytes a second."""
        return self._data.nbytes / pass_seconds


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux: platform's word has to do
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def report(name: str, figures: dict[str, object], checks: dict[str, bool]) -> None:
    """Print which targets are reached, write the JSON, and end in one JSON line."""
    for check, reached in checks.items():
        print(f"  {'reached ' if reached else 'MISSED  '} {check}")
    line = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": module_command(),
        "machine": machine(),
        "figures": figures,
        "reached": checks,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line))


def module_command() -> str:
    """The command that was given, as `python -m` takes it."""
    parts = Path(sys.argv[0]).with_suffix("").parts
    names = parts[len(parts) - 1 - parts[::-1].index("benchmarks") :] if "benchmarks" in parts else parts[-1:]
    return " ".join(["python -m", ".".join(name for name in names if name != "__main__"), *sys.argv[1:]])
