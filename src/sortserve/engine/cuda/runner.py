"""The runner for one CUDA GPU: the same plans and results as engine/runner.py, launched ahead of the device.

    plan -> arrays (rows.py) -> one copy to the device -> a call per segment (graphs.py, forward.py) -> head -> sampling
    -> `Launched.result` waits once, for the ids

The next step may be launched before that: rows whose token is PENDING take it from the ids that this one leaves behind.

All tensors may as well lie on the CPU, where Triton's interpreter runs the kernels; that is for tests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from torch import Tensor

from sortserve.engine.cuda.attention import choose_attention
from sortserve.engine.cuda.buffers import StepBuffers
from sortserve.engine.cuda.forward import Forward, HeadOutput, new_pool
from sortserve.engine.cuda.graphs import Replay, buckets_for
from sortserve.engine.cuda.rows import RowLayout, StepCounts, StepRows
from sortserve.engine.cuda.sampling import DeviceSampler, Drawn
from sortserve.engine.cuda.stopwatch import stopwatch
from sortserve.engine.cuda.tables import PageTables
from sortserve.engine.cuda.weights import DeviceWeights
from sortserve.engine.drawing import Drawing
from sortserve.engine.model_config import ModelConfig
from sortserve.engine.pages import KVGeometry
from sortserve.engine.plan import PENDING, Plan, SequencePlan, SequenceResult, StepResult
from sortserve.engine.sampler import Sampler
from sortserve.engine.settings import SettingsTable
from sortserve.kernels.gpu.attention import AttentionScratch, rows_per_tile

if TYPE_CHECKING:  # llguidance need not be installed where only steps are measured
    from sortserve.engine.grammar import Grammars


@dataclass(frozen=True)
class CudaOptions:
    """How the device is used."""

    max_running: int  # sequences of a step, at most
    eager: bool = False  # no graphs: every kernel is launched by itself
    capture: bool = True  # False: the graphs' padded calls, but not captured; for tests


@dataclass(frozen=True)
class Launched:
    """A step on its way."""

    wait: Callable[[], StepResult]

    def result(self) -> StepResult:
        """The step's result, once the device has it."""
        return self.wait()


@dataclass(frozen=True)
class Prepared:
    """A step whose rows are sent; `launch` may be called again and again, and samples nothing."""

    buffers: StepBuffers
    launch: Callable[[], HeadOutput | None]


@dataclass(frozen=True, slots=True)
class _Step:
    """A step whose rows are in `buffers`. `padded`: to be run by the graphs' calls."""

    counts: StepCounts
    late: int  # rows whose token the step before draws
    buffers: StepBuffers
    padded: bool
    tile_rows: int


class CudaRunner:
    """Runs steps on one device, in the order of their launches."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DeviceWeights,
        geometry: KVGeometry,
        settings: SettingsTable,
        num_pages: int,
        max_model_len: int,
        options: CudaOptions,
        eos_token_ids: tuple[int, ...] = (),
        grammars: "Grammars | None" = None,
    ) -> None:
        embedding, shape = weights.embedding, config.shape
        self._device, self._dtype = embedding.device, embedding.dtype
        self._geometry = geometry
        self._layout = RowLayout(geometry, settings)
        self._tables = PageTables(
            geometry.num_columns, options.max_running, geometry.num_blocks(max_model_len), self._device
        )
        buckets = buckets_for(options.max_running)
        scratch = AttentionScratch.allocate(
            self._device, buckets[-1], shape.num_heads, shape.num_kv_heads, shape.head_dim, max_model_len
        )
        pool = new_pool(geometry, num_pages, self._dtype, self._device)
        tables = self._tables.device
        self.attention = choose_attention(config, geometry, pool, self._dtype, options.max_running, max_model_len)
        call = self.attention.call
        # the scratch is for padded calls; a step of other sizes takes what it needs
        self._eager = Forward(config, weights, geometry, settings, pool, tables, max_model_len, call)
        padded = Forward(config, weights, geometry, settings, pool, tables, max_model_len, call, scratch)
        self._tile_rows = rows_per_tile(shape.num_heads, shape.num_kv_heads, shape.head_dim)
        self._sampler = DeviceSampler(shape.vocab_size)
        self._host_sampler = Sampler(shape.vocab_size)
        self._eos = eos_token_ids
        self._grammars = grammars
        self._grown = self._buffers(256)
        self._ids = torch.empty(0, dtype=torch.int64, device=self._device)  # that the last step leaves behind
        self._id_of: dict[str, int] = {}  # by request
        self.graphs: Replay | None = None
        if not options.eager:
            self.graphs = Replay(padded, self._buffers(buckets[-1]), buckets, capture=options.capture)
            if options.capture:
                self.graphs.capture_all(geometry.num_segments)

    def _buffers(self, rows: int) -> StepBuffers:
        return StepBuffers(self._geometry, rows, self._layout.state_pieces, self._dtype, self._device)

    def run(self, plan: Plan) -> StepResult:
        """One step, waited for."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Start a step. Returns when everything is launched; the device may still be at it."""
        seconds = stopwatch(self._device)
        rows, step = self._prepare(plan)
        self._run_segments(step)
        self._id_of = {}
        finish = self._launch_head(rows, step, plan.confidence)
        taken = seconds()

        def wait() -> StepResult:
            step_seconds = taken()  # waits
            return StepResult(finish(), step_seconds)

        return Launched(wait)

    def prepared(self, plan: Plan) -> Prepared:
        """The device's work of a step, for who measures it."""
        _, step = self._prepare(plan)

        @torch.inference_mode()
        def launch() -> HeadOutput | None:
            self._run_segments(step)
            return self._head(step) if step.counts.logits else None

        return Prepared(step.buffers, launch)

    def _prepare(self, plan: Plan) -> tuple[StepRows, _Step]:
        """Say everything about a step's rows in buffers, and send it."""
        rows = StepRows.of(plan, self._geometry)
        padded = self.graphs is not None and self.graphs.fits(len(rows), rows.longest_run)
        if self.graphs is not None and padded:
            buffers, tile_rows = self.graphs.buffers, 1
        else:
            buffers, tile_rows = self._enough(len(rows)), self._tile_rows if rows.longest_run > 1 else 1
        buffers.clear()
        counts = self._layout.fill(buffers.host, buffers.rows, rows, self._tables, tile_rows)
        late = self._find_late(buffers, rows)
        buffers.upload()
        return rows, _Step(counts, late, buffers, padded, tile_rows)

    def _find_late(self, buffers: StepBuffers, rows: StepRows) -> int:
        """Say where rows find their token that the step before draws; how many there are."""
        host, starting = buffers.host, np.flatnonzero(rows.first == 0)
        late = np.flatnonzero(host["tokens"][: len(starting)] == PENDING)
        host["late_row"][: len(late)] = late
        owners = rows.part[starting[late]].tolist()
        host["late_from"][: len(late)] = [self._id_of[rows.parts[owner].request_id] for owner in owners]
        host["tokens"][late] = 0
        return len(late)

    def _enough(self, rows: int) -> StepBuffers:
        """Buffers for that many rows; larger ones in place of the old where they do not do."""
        if rows > self._grown.rows:
            self._grown = self._buffers(1 << (rows - 1).bit_length())
        return self._grown

    def _run_segments(self, step: _Step) -> None:
        counts, buffers = step.counts, step.buffers
        if step.late:
            index = buffers.device
            ids = self._ids.index_select(0, index["late_from"][: step.late])
            index["tokens"].index_copy_(0, index["late_row"][: step.late], ids)
        if counts.entrants:
            self._eager.load_states(counts.entrants, self._layout.state_pieces, buffers)
        for segment, (rows, tiles) in enumerate(zip(counts.segments, counts.tiles, strict=True)):
            if rows and step.padded:
                assert self.graphs is not None
                self.graphs.segment(segment, rows)
            elif rows:
                self._eager.segment(segment, rows, buffers, tiles, step.tile_rows)
        if counts.kept_states:
            self._eager.store_states(counts.kept_states, self._layout.state_pieces, buffers)

    def _head(self, step: _Step) -> HeadOutput:
        if not step.padded:
            return self._eager.head(step.counts.logits, step.buffers)
        assert self.graphs is not None
        return self.graphs.head(step.counts.logits)

    # ---- the end of a step

    def _launch_head(self, rows: StepRows, step: _Step, confidence: bool) -> Callable[[], tuple[SequenceResult, ...]]:
        """Logits of all rows that need them in one call, then one token per sequence that wants one."""
        if not step.counts.logits:
            return lambda: tuple(SequenceResult(None) for _ in rows.parts)
        output = self._head(step)
        spans, first = {}, 0
        for part in rows.parts:
            asked = part.stop - part.start if part.prompt_logprobs is not None else int(part.sample is not None)
            spans[part.request_id] = (first, first + asked)
            first += asked
        assert first == step.counts.logits, (first, step.counts.logits)
        sampling = [(part, spans[part.request_id][1] - 1) for part in rows.parts if part.sample is not None]
        sampled = self._launch_sampling(output, sampling, confidence)
        prompts = [
            (part, output.logits[slice(*spans[part.request_id])].float().to("cpu"))  # rare, and waited for
            for part in rows.parts
            if part.prompt_logprobs is not None
        ]

        def finish() -> tuple[SequenceResult, ...]:
            results = sampled()
            for part, logits in prompts:
                assert part.prompt_logprobs is not None
                found = self._host_sampler.prompt_logprobs(
                    logits[: len(part.successors)], part.successors, part.prompt_logprobs
                )
                result = results.get(part.request_id, SequenceResult(None))
                results[part.request_id] = msgspec.structs.replace(result, prompt_logprobs=tuple(found))
            return tuple(results.get(part.request_id, SequenceResult(None)) for part in rows.parts)

        return finish

    def _launch_sampling(
        self, output: HeadOutput, sampling: list[tuple[SequencePlan, int]], confidence: bool
    ) -> Callable[[], dict[str, SequenceResult]]:
        """A token for each of the sequences from its row of `output`, or why there is none."""
        drawing = Drawing.of(sampling, self._grammars, self._eos)
        drawn: Drawn = self._sampler.launch(output, drawing.places, drawing.rows)
        self._ids = drawn.ids
        there = zip(drawing.names, drawing.places, drawn.known, strict=True)
        self._id_of = {name: place for name, place, known in there if known}
        sure = _host_copy(output.logprobs) if confidence else None

        def finish() -> dict[str, SequenceResult]:
            results = dict(drawing.failed)
            shares = None if sure is None else sure.exp().tolist()
            for name, place, (token, logprob) in zip(drawing.names, drawing.places, drawn.tokens(), strict=True):
                share = None if shares is None else shares[place]
                results[name] = SequenceResult(token, logprob, confidence=share)
            return results

        return finish


def _host_copy(tensor: Tensor) -> Tensor:
    target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return target.copy_(tensor, non_blocking=True)
