"""vLLM's second model runner (GPUs with Triton), with rows in segments.

Written from vLLM's source and checked by signatures alone: no GPU was there to run it, and vLLM's CPU build cannot (its
second runner wants a Triton that compiles for CPUs). What it shares with the first runner, the plan, the rows and the
model's loop, is what the tests run.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from sortserve.engine.vllm.attention import by_segment, check_order
from sortserve.engine.vllm.compat import check_signatures, check_start, expected_signatures_v2
from sortserve.engine.vllm.configuration import Configuration
from sortserve.engine.vllm.model.rows import RowLayouts, StepRows
from sortserve.engine.vllm.plan import Segment, deepest_first, plan_step
from sortserve.engine.vllm.side import places_of

ROWS_ARGUMENT = "sortserve_rows"
"""Of our model classes' `forward`."""


class SubmodelState(DefaultModelState):
    """vLLM's state of a decoder. `rows` is the step that runs now; None in dummy runs, which run everything."""

    rows: StepRows | None = None

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """vLLM's, and the rows as an argument of the model."""
        return {**super().prepare_inputs(input_batch, req_states), ROWS_ARGUMENT: self.rows}

    def prepare_attn(
        self, input_batch: Any, cudagraph_mode: Any, block_tables: Any, slot_mappings: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """vLLM's, once for all rows and once more for each segment that fewer requests run."""
        prepare = super().prepare_attn
        every: dict[str, Any] = prepare(input_batch, cudagraph_mode, block_tables, slot_mappings, *args, **kwargs)
        if self.rows is None:
            return every

        def fewer(segment: Segment) -> dict[str, Any]:
            requests, tokens = segment.num_requests, segment.num_tokens
            batch = replace(
                input_batch,
                num_reqs=requests,
                num_tokens=tokens,
                num_scheduled_tokens=input_batch.num_scheduled_tokens[:requests],
                is_prefilling_np=input_batch.is_prefilling_np[:requests],
                idx_mapping_np=input_batch.idx_mapping_np[:requests],
                positions=input_batch.positions[:tokens],
            )
            tables = tuple(table[:requests] for table in block_tables)
            cut: dict[str, Any] = prepare(batch, cudagraph_mode, tables, slot_mappings[:, :tokens], *args, **kwargs)
            return cut

        return by_segment(self.rows.plan, every, fewer)


class SubmodelRunnerV2(GPUModelRunner):
    """vLLM's runner; the batch is gathered deepest first."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        check_start(vllm_config)
        check_signatures(expected_signatures_v2())
        super().__init__(vllm_config, device)
        own = Configuration.of_vllm(vllm_config)
        self._exits, self._bounds = own.settings.exits, own.ladder.bounds
        self._layouts: RowLayouts | None = None  # until weights are loaded; before that there are dummy runs only

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's; then the attention backend is known, and whether it leaves the order of rows to us; weights are there."""
        super().initialize_kv_cache(*args, **kwargs)
        self._layouts = self.model.row_layouts(self.device)
        builders = [group.get_metadata_builder(0) for groups in self.attn_groups for group in groups]
        check_order([builder.reorder_batch_threshold for builder in builders], self._bounds)

    def gather_batch_req_state(self, scheduler_output: Any, dummy_run: bool) -> tuple[Any, Any]:
        """vLLM's, whose order is decodes before prompts, in the order of exits."""
        state, uniform = super().gather_batch_req_state(scheduler_output, dummy_run)
        self.model_state.rows = None
        places = places_of(scheduler_output)
        if state is None or dummy_run or places is None:
            return state, uniform
        assert self._layouts is not None
        order = deepest_first([self._exits[places[request_id]] for request_id in state.req_ids])
        changed: dict[str, Any] = {"req_ids": [state.req_ids[row] for row in order]}
        for name, value in state._asdict().items():
            if isinstance(value, np.ndarray):  # all of them are [requests]
                changed[name] = value[order]
        state = state._replace(**changed)
        plan = plan_step(
            [places[request_id] for request_id in state.req_ids],
            [scheduler_output.num_scheduled_tokens[request_id] for request_id in state.req_ids],
            self._exits,
            self._bounds,
        )
        self.model_state.rows = self._layouts.of(plan)
        return state, uniform
