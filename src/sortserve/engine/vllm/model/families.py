"""The four families as vLLM model classes: stock ones whose layers run in segments and whose FFNs have widths."""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from sortserve.engine.vllm.compat import check_signatures, expected_signatures_of_models
from sortserve.engine.vllm.configuration import Configuration
from sortserve.engine.vllm.model.loop import replace_ffns, row_layouts, rows_of_step, run_segments
from sortserve.engine.vllm.model.rows import RowLayouts, StepRows


class SortedMixin:
    """Stands before a stock class. `forward` is told which rows run what by vLLM's forward context."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_signatures(expected_signatures_of_models())
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        own = Configuration.of_vllm(vllm_config)
        self._ladder, self._dtype = own.ladder, vllm_config.model_config.dtype
        replace_ffns(self.model, own.ladder, sort=own.sort_ffn, compile=own.compile_kernels)  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        sortserve_rows: StepRows | None = None,
    ) -> Tensor:
        """Normed hidden states [rows, hidden]. The second runner gives the rows as an argument."""
        assert intermediate_tensors is None, "pipeline parallelism is refused at start"
        rows = rows_of_step() if sortserve_rows is None else sortserve_rows
        return run_segments(self.model, input_ids, positions, inputs_embeds, rows)  # type: ignore[attr-defined]

    def row_layouts(self, device: torch.device) -> RowLayouts:
        """What the runner lays out steps with, once weights are loaded."""
        return row_layouts(self.model, self._ladder, self._dtype, device)  # type: ignore[attr-defined]

    def get_model_state_cls(self) -> Any:
        """Asked for by vLLM's second runner."""
        from sortserve.engine.vllm.runner_v2 import SubmodelState

        return SubmodelState


class SortedLlamaForCausalLM(SortedMixin, LlamaForCausalLM):
    """Llama."""


class SortedMistralForCausalLM(SortedMixin, MistralForCausalLM):
    """Mistral."""


class SortedQwen2ForCausalLM(SortedMixin, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class SortedQwen3ForCausalLM(SortedMixin, Qwen3ForCausalLM):
    """Qwen3."""
