"""The runner: executes a plan on the model. Owns the pool of pages; knows nothing of requests or policies."""

import time

import msgspec
import numpy as np
import torch
from torch import Tensor

from sortserve.engine.batch import BatchBuilder, Run, SegmentBatch
from sortserve.engine.depth_head import DepthHead
from sortserve.engine.drawing import Drawing
from sortserve.engine.grammar import Grammars
from sortserve.engine.model import Model
from sortserve.engine.model_config import ModelConfig
from sortserve.engine.pages import KVGeometry
from sortserve.engine.plan import Plan, SequencePlan, SequenceResult, StepResult
from sortserve.engine.protocol import TokenLogprob
from sortserve.engine.sampler import Sampler, confidences
from sortserve.engine.settings import SettingsTable
from sortserve.engine.weights import ModelWeights


class Runner:
    """Runs steps on the CPU. The pool starts as zeros, never as garbage: masked places are read, with weight 0."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        geometry: KVGeometry,
        settings: SettingsTable,
        num_pages: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...] = (),
        grammars: Grammars | None = None,
        depth_head: DepthHead | None = None,
    ) -> None:
        dtype = weights.embedding.dtype
        self._geometry = geometry
        # numpy's zeros take memory page by page as it is written, torch's all at once
        pool = torch.from_numpy(np.zeros(num_pages * geometry.page_bytes, np.uint8)).view(dtype)
        self._pool = pool.view(-1, geometry.block_tokens, geometry.kv_width)
        self._builder = BatchBuilder(geometry, dtype, config.sliding_window)
        self._model = Model(config, weights, geometry, settings, self._builder, max_model_len)
        self._sampler = Sampler(config.shape.vocab_size)
        self._eos = eos_token_ids
        self._grammars = grammars
        self._depth_head = depth_head

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepResult:
        """One step: every segment in turn, then the head and the sampler."""
        began = time.perf_counter()
        batches = self._builder.build(plan)
        exits: dict[str, list[Tensor]] = {}  # by request: rows before the final norm, in order of position
        hidden = self._pool.new_zeros(0, self._geometry.hidden_size)
        for batch in batches:
            hidden = self._embed(batch) if batch.segment == 0 else self._enter(hidden, batch)
            hidden = self._model.run_segment(hidden, batch, self._pool)
            self._leave(hidden, batch, exits)
            hidden = hidden[: batch.num_staying]
        results = self._finish(plan, exits)
        return StepResult(results, time.perf_counter() - began)

    def _embed(self, batch: SegmentBatch) -> Tensor:
        tokens = [token for run in batch.entrants for token in run.part.tokens[run.span.start : run.span.stop]]
        return self._model.embed(torch.tensor(tokens))

    def _enter(self, staying: Tensor, batch: SegmentBatch) -> Tensor:
        """The segment's input: the rows that stay and, in their places, the states of those that enter."""
        if batch.source is None:
            return staying
        states = [self._load_states(run, batch.segment) for run in batch.entrants]
        return torch.cat([staying, *states])[batch.source]

    def _leave(self, hidden: Tensor, batch: SegmentBatch, exits: dict[str, list[Tensor]]) -> None:
        """Keep what leavers need: their states, and the rows that get logits."""
        for run in batch.leaving:
            rows = hidden[run.row : run.row + run.span.num_rows]
            if run.part.keep_states:
                self._store_states(run, rows)
            if run.part.prompt_logprobs is not None:
                exits.setdefault(run.part.request_id, []).append(rows)
            elif run.part.sample is not None and run.span.stop == run.part.stop:  # states may have kept its other rows
                exits.setdefault(run.part.request_id, []).append(rows[-1:])

    # ---- states

    def _state_rows(self, run: Run, exit: int) -> tuple[Tensor, int]:
        """Pool rows that hold the states of a run's tokens at `exit`, [tokens x rows per state], and the row's size."""
        size = self._geometry.block_tokens
        piece, per_page = self._geometry.state_piece, self._geometry.page_pieces
        per_state = self._geometry.hidden_size // piece
        positions = np.arange(run.span.start, run.span.stop)
        rows = np.empty((len(positions), per_state), np.int64)
        for block in np.unique(positions // size):
            pages = np.asarray(run.part.state_pages[int(block), exit], np.int64)
            of_block = positions // size == block
            pieces = (positions[of_block] % size)[:, None] * per_state + np.arange(per_state)
            rows[of_block] = pages[pieces // per_page] * per_page + pieces % per_page
        return torch.from_numpy(rows.reshape(-1)), piece

    def _store_states(self, run: Run, states: Tensor) -> None:
        if run.span.exit == self._geometry.num_segments:
            return
        rows, piece = self._state_rows(run, run.span.exit)
        self._pool.view(-1, piece).index_copy_(0, rows, states.reshape(-1, piece))

    def _load_states(self, run: Run, exit: int) -> Tensor:
        rows, piece = self._state_rows(run, exit)
        return self._pool.view(-1, piece).index_select(0, rows).view(-1, self._geometry.hidden_size)

    # ---- the end of a step

    def _finish(self, plan: Plan, exits: dict[str, list[Tensor]]) -> tuple[SequenceResult, ...]:
        """Logits of all rows that need them in one call of the head, then one token per sequence that wants one."""
        asking = [part for part in plan.sequences if part.request_id in exits]
        if not asking:
            return tuple(SequenceResult(None) for _ in plan.sequences)
        hidden = [torch.cat(exits[part.request_id]) for part in asking]
        counts = [rows.shape[0] for rows in hidden]
        logits = self._model.head(torch.cat(hidden))
        first_rows = np.cumsum([0, *counts])
        sampling = [
            (part, int(first_rows[place + 1]) - 1) for place, part in enumerate(asking) if part.sample is not None
        ]
        results = self._sample(logits, sampling)
        if plan.confidence and sampling:
            rows = [row for _, row in sampling]
            self._note_signals(results, sampling, torch.cat(hidden)[rows], confidences(logits[rows]))
        for place, part in enumerate(asking):
            if part.prompt_logprobs is not None:
                own = logits[first_rows[place] : first_rows[place + 1]]
                result = results.get(part.request_id, SequenceResult(None))
                results[part.request_id] = msgspec.structs.replace(
                    result, prompt_logprobs=self._prompt_logprobs(part, own)
                )
        return tuple(results.get(part.request_id, SequenceResult(None)) for part in plan.sequences)

    def _note_signals(
        self,
        results: dict[str, SequenceResult],
        sampling: list[tuple[SequencePlan, int]],
        states: Tensor,
        sure: list[float],
    ) -> None:
        """Add to the results how sure each drawn token was and, by the depth head, how deep the next one must run.
        `states` [sampling, hidden] are before the final norm."""
        tokens = [results[part.request_id].token for part, _ in sampling]
        within: list[tuple[float, ...] | None] = [None] * len(sampling)
        if self._depth_head is not None:
            weights = self._model.weights
            drawn = self._model.embed(torch.tensor([0 if token is None else token for token in tokens]))
            exits = [part.exit - 1 for part, _ in sampling]
            told = self._depth_head.within(exits, weights.final_norm(states), drawn).tolist()
            within = [None if token is None else tuple(row) for token, row in zip(tokens, told, strict=True)]
        for (part, _), share, row in zip(sampling, sure, within, strict=True):
            result = results[part.request_id]
            results[part.request_id] = msgspec.structs.replace(result, confidence=share, within=row)

    def _sample(self, logits: Tensor, sampling: list[tuple[SequencePlan, int]]) -> dict[str, SequenceResult]:
        """A token for each of the sequences from its row, or why there is none."""
        drawing = Drawing.of(sampling, self._grammars, self._eos)
        results = drawing.failed
        if not drawing.rows:
            return results
        picked = logits if drawing.places == list(range(logits.shape[0])) else logits[drawing.places]
        drawn = self._sampler.sample(picked, drawing.rows)
        for request_id, (token, logprob) in zip(drawing.names, drawn, strict=True):
            results[request_id] = SequenceResult(token, logprob)
        return results

    def _prompt_logprobs(self, part: SequencePlan, logits: Tensor) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of the prompt tokens that follow the rows."""
        assert part.prompt_logprobs is not None
        rows = logits[: len(part.successors)]
        return tuple(self._sampler.prompt_logprobs(rows, part.successors, part.prompt_logprobs))
