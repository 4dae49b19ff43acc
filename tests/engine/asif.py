"""The as-if harness: random schedules on the real engine, every sampled row's logits against an independent model.

The oracle below shares no code with the engine: plain float64 formulas over the checkpoint's own tensors, the whole
sequence from scratch at every check, each token with the widths and skips recorded for it.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sortserve.engine.admission import Limits
from sortserve.engine.budget import Budget
from sortserve.engine.checkpoint import Checkpoint
from sortserve.engine.kv import KVManager
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.model_config import ModelConfig, load_model_config
from sortserve.engine.pages import KVGeometry
from sortserve.engine.plan import Plan, SequencePlan, SequenceResult, StepResult, StepRunner
from sortserve.engine.protocol import Event, FinishedEvent, GenerateRequest
from sortserve.engine.request import Request, owner_of
from sortserve.engine.runner import Runner
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.scheduler import Scheduler
from sortserve.engine.submodel import SubModel
from sortserve.engine.weights import load_weights
from sortserve.kernels.products import Products
from tests.engine.launching import LateTokens
from tests.engine.small import WantedPolicy
from tests.engine.tiny_models import make_tiny

EXITS = (1, 3, 4, 6)
WIDTHS = (64, 48, 32, 20, 8)  # five: more than there are blocks, so that one is masked
BLOCK_TOKENS = 4
CONTEXT = 48
TOLERANCE = 1e-4


class Oracle:
    """A Llama-family decoder in float64, from the checkpoint's tensors; `int8`: from what is left of its matrices (of the
    layers `narrow`, if they are given; else of all but the embedding), as multiples of a 127th of each row's largest value;
    `fp8_kv`: over K and V rounded to e4m3."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        int8: bool = False,
        fp8_kv: bool = False,
        narrow: frozenset[int] | None = None,
    ) -> None:
        self.config = config
        self.fp8_kv = fp8_kv
        tensors = load_file(folder / "model.safetensors")
        if int8:
            for name, tensor in tensors.items():
                layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
                if tensor.dim() == 2 and "embed" not in name and (narrow is None or layer in narrow):
                    step = tensor.abs().max(1, keepdim=True).values / 127
                    tensors[name] = (tensor / step).round() * step
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.config.rms_eps).rsqrt()
        return x * scale * self.tensors[name]

    def _rotate(self, x: Tensor) -> Tensor:
        """x [tokens, heads, head_dim]."""
        half = x.shape[-1] // 2
        frequency = self.config.rope.theta ** (-torch.arange(half).double() / half)
        angle = torch.arange(x.shape[0]).double()[:, None, None] * frequency
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def logits(self, tokens: list[int], widths: Tensor, attention_on: Tensor) -> Tensor:
        """Logits after the last token; widths and attention_on [layers to run, tokens]."""
        shape = self.config.shape
        t, count = self.tensors, len(tokens)
        x = t["model.embed_tokens.weight"][tokens]
        causal = torch.ones(count, count, dtype=torch.bool).tril()
        if self.config.sliding_window is not None:
            causal = causal.triu(1 - self.config.sliding_window)
        for layer in range(widths.shape[0]):
            p = f"model.layers.{layer}."
            normed = self._norm(x, p + "input_layernorm.weight")
            q, k, v = (
                (
                    normed @ t[f"{p}self_attn.{name}_proj.weight"].T
                    + t.get(f"{p}self_attn.{name}_proj.bias", torch.zeros(1))
                ).view(count, -1, shape.head_dim)
                for name in "qkv"
            )
            q, k = self._rotate(q), self._rotate(k)
            if self.fp8_kv:
                k, v = e4m3(k), e4m3(v)
            share = shape.num_heads // shape.num_kv_heads
            k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
            scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(shape.head_dim)
            weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
            attended = torch.einsum("hqk,khd->qhd", weights, v).reshape(count, -1)
            x = x + (attended @ t[p + "self_attn.o_proj.weight"].T) * attention_on[layer][:, None].double()
            normed = self._norm(x, p + "post_attention_layernorm.weight")
            gate, up = normed @ t[p + "mlp.gate_proj.weight"].T, normed @ t[p + "mlp.up_proj.weight"].T
            inner = gate * gate.sigmoid() * up
            inner = inner * (torch.arange(shape.ffn_width)[None] < widths[layer][:, None])
            x = x + inner @ t[p + "mlp.down_proj.weight"].T
        head = t.get("lm_head.weight", t["model.embed_tokens.weight"])
        return self._norm(x[-1], "model.norm.weight") @ head.T


def e4m3(x: Tensor) -> Tensor:
    """The nearest numbers with 4 bits of exponent and 3 of mantissa, ties to even, none above 448: multiples of an eighth of
    the power of two below, of 2^-9 under 2^-6."""
    step = torch.exp2(x.abs().clamp_min(2.0**-6).log2().floor() - 3)
    return (x / step).round().mul(step).clamp(-448.0, 448.0)


def asif_ladder(config: ModelConfig, narrow: frozenset[int] | None = None) -> Ladder:
    """4 exits of unequal segments, 5 widths, two entries whose settings differ in the middle."""
    entries = [
        Entry(f"d{depth}-x{width}", SubModel.make(depth, width)) for depth in EXITS for width in (*WIDTHS[:4], 8)
    ]
    entries.append(Entry("d6-skip-attention", SubModel.make(6, 64, skip_attention=[1, 4])))
    entries.append(Entry("d6-skip-ffn", SubModel.make(6, [64, 32, 64, 20, 64, 48], skip_ffn=[2])))
    return Ladder.of(replace(config.shape, narrow_layers=narrow), entries)


@dataclass
class Flight:
    """A step that ran, and is not booked."""

    plan: Plan
    result: StepResult
    sampled: list[tuple[SequencePlan, Tensor]]  # with the logits that each draws from


@dataclass
class Harness:
    """The real engine on a tiny model, driven by hand; `check` compares every sampled row with the oracle."""

    folder: Path
    num_pages: int = 60
    max_step_tokens: int = 7
    seen: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    accepted: list[str] = field(default_factory=list)
    worst: float = 0.0
    products: Products = field(default_factory=Products)  # of the engine; the oracle quantizes where they do
    narrow: frozenset[int] | None = None  # layers whose matrices these make; None: all, and the head
    fp8_kv: bool = False  # K/V of the engine and of the oracle
    dtype: torch.dtype = torch.float32  # of the engine's weights and states
    beside: bool = False  # whether bookkeeping is done while the runner works, else after
    ahead: bool = False  # whether the next step is planned and launched before this one's result is taken
    stops: tuple[int, ...] = ()  # tokens that end an answer
    block_tokens: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        if not (self.folder / "config.json").exists():
            make_tiny(self.folder, "llama", seed=3)
        self.config = load_model_config(self.folder)
        self.ladder = asif_ladder(self.config, self.narrow)
        kv_bytes = 1 if self.fp8_kv else None
        shape = replace(self.config.shape, dtype_bytes=self.dtype.itemsize, kv_value_bytes=kv_bytes)
        self.geometry = KVGeometry.of(shape, self.ladder.bounds, self.block_tokens)
        self.kv = KVManager(self.geometry, self.num_pages)
        self.policy = WantedPolicy(self.ladder.full)
        self.scheduler = Scheduler(
            self.ladder,
            self.kv,
            self.policy,
            Limits(CONTEXT, self.config.shape.vocab_size, 1000),
            max_step_tokens=self.max_step_tokens,
            max_running=5,
            ask_every=1,
        )
        self.policy.requests = self.scheduler.requests
        self.oracle = Oracle(self.folder, self.config, self.products.int8, self.fp8_kv, self.narrow)
        self._last_exit: dict[str, int] = {}
        self._released: dict[str, int] = {}
        self._number = 0
        self._sampled: list[tuple[SequencePlan, Tensor]] = []
        self._flight: Flight | None = None
        self._takings: list[Callable[[], None]] = []
        self.runner = self.make_runner()

    def make_runner(self) -> StepRunner:
        """The CPU's runner, which tells `note_sampled` before it samples; it takes plans made ahead."""
        source = Checkpoint.open(self.folder, self.config)
        weights = load_weights(source, self.config, self.ladder, self.dtype, products=self.products, wide=Products())
        runner = Runner(self.config, weights, self.geometry, self.scheduler.settings, self.num_pages, CONTEXT)
        sample = runner._sample

        def spy(logits: Tensor, sampling: list[tuple[SequencePlan, int]]) -> dict[str, SequenceResult]:
            self.note_sampled(logits, sampling)
            return sample(logits, sampling)

        runner._sample = spy  # type: ignore[method-assign]
        return LateTokens(runner)

    def note_sampled(self, logits: Tensor, sampling: list[tuple[SequencePlan, int]]) -> None:
        """What the step's sequences draw from, for `check`."""
        self._sampled = [(part, logits[row]) for part, row in sampling]

    # ---- actions

    def submit(self, prompt: list[int], max_tokens: int, *, place: int, exact: bool, floor: int = 0) -> str:
        request_id = f"r{self._number}"
        self._number += 1
        self.policy.wanted[request_id] = place
        budget = Budget(total_ms=3_600_000.0)
        self.scheduler.add(
            GenerateRequest(
                request_id,
                tuple(prompt),
                SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, stop_token_ids=self.stops),
                time.monotonic(),
                budget,
                floor=self.ladder.entries[floor].id,
                kv_mode="exact" if exact else "reuse",
            )
        )
        self.accepted.append(request_id)
        return request_id

    def abort(self, request_id: str) -> None:
        request = self.scheduler.requests.get(request_id)
        if request is not None and self._deepening(request) and request.kv.cells[0][0].key is not None:
            self.seen["deepening aborted half-way"] += 1
        event = self.scheduler.abort(request_id, time.monotonic())
        if event is not None:
            self.ended[event.request_id] += 1

    def release(self, request_id: str, exit: int) -> None:
        """Memory is taken by the next plan; nothing runs then that is not booked."""
        self._takings.append(lambda: self._release(request_id, exit))

    def preempt(self, request_id: str) -> None:
        self._takings.append(lambda: self._preempt(request_id))

    def _release(self, request_id: str, exit: int) -> None:
        request = self.scheduler.requests.get(request_id)
        if request is not None and exit < self.geometry.num_segments and any(request.kv.cells[exit:]):
            self.kv.release_deep(request.kv, exit)
            self._released[request_id] = exit

    def _preempt(self, request_id: str) -> None:
        request = self.scheduler.requests.get(request_id)
        if request is not None and request.running:
            self._note_preemption(request)
            self.scheduler._planner.reclaimer._preempt(request)

    def _deepening(self, request: Request) -> bool:
        exit = self._last_exit.get(request.id, 0)
        return exit > 0 and 0 < request.kv.watermark[exit - 1] < request.kv.watermark[0]

    def deepening(self) -> list[str]:
        """Requests that are half-way through a refill."""
        return [request.id for request in self.scheduler.requests.values() if self._deepening(request)]

    def _note_preemption(self, request: Request) -> None:
        if self._deepening(request):
            self.seen["preempt during refill"] += 1

    # ---- steps

    def checked_step(self) -> list[Event]:
        """One step, every sampled row of it compared with the oracle before anything is booked."""
        flight, self._flight = self._flight, None
        flight = flight or self._launch(self._planned(self.scheduler.schedule))
        if flight is None:
            events = self.scheduler.take_events()
        else:
            self.check(flight)
            if self.beside or self.ahead:
                self.scheduler.beside(flight.plan, time.monotonic())
            if self.ahead:
                self._flight = self._launch(self._planned(partial(self.scheduler.ahead, flight.plan)))
                self.seen["planned ahead"] += self._flight is not None
            events = self.scheduler.update(flight.plan, flight.result, time.monotonic())
        for event in events:
            if isinstance(event, FinishedEvent):
                self.ended[event.request_id] += 1
        self.scheduler.check_integrity()
        return events

    def _planned(self, planning: Callable[[float], Plan | None]) -> Plan | None:
        """A plan, with whatever memory is to be taken before it."""
        for take in self._takings:
            take()
        self._takings = []
        return planning(time.monotonic())

    def _launch(self, plan: Plan | None) -> Flight | None:
        if plan is None:
            return None
        self._look_at(plan)
        self._sampled = []
        result = self.runner.run(plan)
        return Flight(plan, result, self._sampled)

    def check(self, flight: Flight) -> None:
        """The step's logits against the oracle, before anything is booked."""
        parts = {part.request_id: part for part in flight.plan.sequences}
        for drawing, logits in flight.sampled:
            part = parts[drawing.request_id]
            request = owner_of(part, self.scheduler.requests)
            if request is None:  # it ended with the step before
                self.seen["surplus row"] += 1
                continue
            expected = self._expected(request, part)
            error = float((logits.double() - expected).norm() / expected.norm())
            self.worst = max(self.worst, error)
            assert error <= TOLERANCE, f"{part.request_id} at exit {part.exit}: relative error {error:.2e}"

    def _expected(self, request: Request, part: SequencePlan) -> Tensor:
        count, bounds = part.stop, self.ladder.bounds
        recorded = request.kv.settings[:, :count].copy()
        for span in part.spans:
            recorded[: part.exit, span.start : span.stop] = np.asarray(span.settings)[:, None]
        assert (recorded[: part.exit] >= 0).all(), "a token below the last has no recorded settings"
        if request.kv_mode == "exact":
            target = np.asarray(self.scheduler.settings.targets[part.submodel])
            assert (recorded[: part.exit] == target[:, None]).all(), "exact K/V has one kind of settings"
        widths = torch.zeros(bounds[part.exit], count, dtype=torch.long)
        on = torch.ones(bounds[part.exit], count, dtype=torch.bool)
        for segment in range(part.exit):
            for token in range(count):
                settings = self.scheduler.settings.settings(segment, int(recorded[segment, token]))
                for offset, (width, attention) in enumerate(settings):
                    widths[bounds[segment] + offset, token] = width
                    on[bounds[segment] + offset, token] = attention
        return self.oracle.logits(request.tokens[:count], widths, on)

    def _look_at(self, plan: Plan) -> None:
        """Count the situations that a run must have met."""
        refills = [(part, span) for part in plan.sequences for span in part.spans if span.start < part.watermark[0]]
        for part, span in refills:
            if part.exit < self.geometry.num_segments and part.watermark[part.exit - 1] < span.stop:
                self.seen["partial refill"] += 1
            if span.first_segment == 0:
                self.seen["refill from layer 0"] += 1
            else:
                self.seen["refill from a state"] += 1
            if any(
                other.request_id != part.request_id
                and other.exit > span.first_segment
                and other.start >= other.watermark[0]
                for other in plan.sequences
            ):
                self.seen["refill and decode in one segment call"] += 1
        for part in plan.sequences:
            request = self.scheduler.requests[part.request_id]
            before = self._last_exit.get(part.request_id, part.exit)
            if 0 < part.start < request.num_prompt and before != part.exit:
                self.seen["depth change inside a prompt"] += 1
            if part.exit > self._released.get(part.request_id, 99):
                self.seen["release then promote"] += 1
                del self._released[part.request_id]
            self._last_exit[part.request_id] = part.exit

    def finish(self) -> None:
        """Let everything run to its end; every accepted request must have ended exactly once."""
        for request_id in self.policy.wanted:
            if self.policy.wanted[request_id] is None:
                self.policy.wanted[request_id] = 0
        for _ in range(2000):
            if not self.scheduler.has_work:
                break
            self.checked_step()
        assert not self.scheduler.has_work, "a request hangs"
        assert self.ended == Counter(self.accepted), "one terminal event each"
        self.seen["shared block deepened"] += self.kv.events["shared_block_deepened"]
        self.seen["prefix hit on a mixed-width chain refused"] += (
            self.kv.events["mixed_chain_refused"] + self.kv.events["width_mismatch_refused"]
        )
        self.seen["prefix hit"] += self.kv.events["prefix_hit"]
        self.seen["states adopted"] += self.kv.events["states_adopted"]
        self.seen["preempted"] += self.kv.events["preempted"]


def random_run(harness: Harness, rng: random.Random, num_actions: int) -> None:
    """A random schedule of submit, switch, abort, release, preempt and steps; ends when all have finished."""
    base = [rng.randrange(101) for _ in range(CONTEXT)]
    places = range(len(harness.ladder.entries))
    for _ in range(num_actions):
        alive = list(harness.scheduler.requests)
        action = rng.choices(
            ["submit", "switch", "depth", "step", "abort", "release", "preempt", "sit out"],
            [4, 4, 6, 14, 1, 2, 1, 0.5],
        )[0]
        if action == "submit" and len(alive) < 7:
            shared = rng.choice([0, 8, 12, 17, 21])
            prompt = base[:shared] + [rng.randrange(101) for _ in range(rng.randrange(1, 9))]
            place = rng.choice([0, harness.ladder.full, rng.choice(places)])
            harness.submit(prompt, rng.randrange(1, 14), place=place, exact=rng.random() < 0.3)
        elif action in ("switch", "depth") and alive:
            request_id = rng.choice(alive)
            now = harness.policy.wanted[request_id]
            candidates = list(places)
            if action == "depth" and now is not None:  # the same settings at another depth
                candidates = harness.scheduler.settings.compatible(now)
            harness.policy.wanted[request_id] = rng.choice(candidates)
        elif action == "step":
            harness.checked_step()
        elif action == "abort" and alive:
            harness.abort(rng.choice(harness.deepening() or alive))
        elif action == "release" and alive:
            request_id = rng.choice(alive)
            harness.release(request_id, rng.randrange(1, harness.geometry.num_segments))
        elif action == "preempt" and alive:
            harness.preempt(rng.choice(harness.deepening() or alive))
        elif action == "sit out" and alive:
            harness.policy.wanted[rng.choice(alive)] = None
        harness.scheduler.check_integrity()
    harness.finish()
