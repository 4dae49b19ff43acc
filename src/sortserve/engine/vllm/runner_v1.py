"""vLLM's first model runner (CPU builds, and GPUs where the second one cannot be used), with rows in segments.

All logic is here and none in the worker: Ray's executor calls the runner directly.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from sortserve.engine.vllm.attention import by_segment, check_order
from sortserve.engine.vllm.compat import check_start
from sortserve.engine.vllm.configuration import Configuration
from sortserve.engine.vllm.model.loop import CONTEXT_KEY
from sortserve.engine.vllm.model.rows import RowLayouts, StepRows
from sortserve.engine.vllm.plan import Segment, deepest_first, plan_step, swaps
from sortserve.engine.vllm.side import places_of


class SubmodelRunnerMixin:
    """Stands before vLLM's runner. `_rows` is the step that runs now, kept until the next one begins; None in dummy runs,
    which run everything and come before the first step."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        check_start(vllm_config)
        super().__init__(vllm_config, device)  # type: ignore[call-arg]
        own = Configuration.of_vllm(vllm_config)
        self._exits, self._bounds = own.settings.exits, own.ladder.bounds
        self._layouts: RowLayouts | None = None  # until weights are loaded; before that there are dummy runs only
        self._rows: StepRows | None = None

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's; then the attention backend is known, and whether it leaves the order of rows to us; weights are there."""
        super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        self._layouts = self.get_model().row_layouts(self.device)  # type: ignore[attr-defined]
        check_order([self.reorder_batch_threshold], self._bounds)  # type: ignore[attr-defined]

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        """vLLM's; the last step's rows are forgotten first, so that a dummy run never sees them."""
        self._rows = None
        return super().execute_model(scheduler_output, intermediate_tensors)  # type: ignore[misc]

    def _may_reorder_batch(self, scheduler_output: Any) -> None:
        """Order the persistent batch deepest first, and lay out the step."""
        super()._may_reorder_batch(scheduler_output)  # type: ignore[misc]
        batch = self.input_batch  # type: ignore[attr-defined]
        places = places_of(scheduler_output)
        if places is None or not batch.num_reqs:
            return
        assert self._layouts is not None
        order = deepest_first([self._exits[places[request_id]] for request_id in batch.req_ids])
        for first, second in swaps(order):
            batch.swap_states(first, second)
        plan = plan_step(
            [places[request_id] for request_id in batch.req_ids],
            [scheduler_output.num_scheduled_tokens[request_id] for request_id in batch.req_ids],
            self._exits,
            self._bounds,
        )
        self._rows = self._layouts.of(plan)

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """vLLM's, once for all rows and once more for each segment that fewer requests run."""
        build = super()._build_attention_metadata  # type: ignore[misc]
        metadata, other = build(*args, **kwargs)
        if self._rows is None:
            return metadata, other
        assert not args, "vLLM calls this by keywords"
        tokens = self._rows.plan.tokens

        def fewer(segment: Segment) -> dict[str, Any]:
            changed = {
                "num_tokens": segment.num_tokens,
                "num_reqs": segment.num_requests,
                "num_tokens_padded": None,
                "num_reqs_padded": None,
                "max_query_len": max(tokens[: segment.num_requests]),
                "slot_mappings": {
                    group: mapping[: segment.num_tokens] for group, mapping in kwargs["slot_mappings"].items()
                },
            }
            cut: dict[str, Any] = build(**{**kwargs, **changed})[0]
            return cut

        return by_segment(self._rows.plan, metadata, fewer), other

    def _model_forward(
        self,
        input_ids: Tensor | None = None,
        positions: Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """vLLM's, with the step's rows in its forward context."""
        if self._rows is not None:
            get_forward_context().additional_kwargs[CONTEXT_KEY] = self._rows
        return super()._model_forward(  # type: ignore[misc]
            input_ids=input_ids,
            positions=positions,
            intermediate_tensors=intermediate_tensors,
            inputs_embeds=inputs_embeds,
            **model_kwargs,
        )


class SubmodelGPURunner(SubmodelRunnerMixin, GPUModelRunner):
    """On a GPU."""


class SubmodelCPURunner(SubmodelRunnerMixin, CPUModelRunner):
    """On a CPU."""
