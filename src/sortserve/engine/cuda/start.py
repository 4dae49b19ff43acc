"""Starting on a CUDA GPU: how much memory K/V may take, the weights, the runner; errors that say what to change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch

from sortserve.engine.checkpoint import WeightSource
from sortserve.engine.config import EngineConfig
from sortserve.engine.cuda.runner import CudaOptions, CudaRunner
from sortserve.engine.cuda.weights import DeviceWeights, load_device_weights
from sortserve.engine.errors import MemoryBudgetError, StartupError
from sortserve.engine.grammar import Grammars
from sortserve.engine.model_config import ModelConfig
from sortserve.engine.pages import KVGeometry
from sortserve.engine.settings import SettingsTable
from sortserve.engine.weights import Progress
from sortserve.kernels.quantization import QuantKind

T = TypeVar("T")

BLOCK_TOKENS = (16, 32, 64)
"""What the attention kernels take."""
KV_SHARE = 0.9
"""K/V memory if nobody says, as a share of what weights and working memory leave."""
WORKING_BYTES = 1 << 30
"""For graphs, cuBLAS and the allocator's slack, beside what the rows of a step take."""


@dataclass(frozen=True)
class CudaStart:
    """One start on `device`."""

    config: EngineConfig
    model: ModelConfig
    device: torch.device
    dtype: torch.dtype

    def check(self) -> None:
        """Raise StartupError for sizes that the kernels do not take."""
        head_dim = self.model.shape.head_dim
        if self.config.block_tokens not in BLOCK_TOKENS:
            sizes = ", ".join(map(str, BLOCK_TOKENS))
            raise StartupError(
                f"block_tokens is {self.config.block_tokens}, on a GPU it must be one of {sizes}", param="block_tokens"
            )
        if head_dim % 8 or not 16 <= head_dim <= 256:
            raise StartupError(
                f"heads of {head_dim} elements; the GPU kernels take multiples of 8 from 16 to 256; use --device cpu",
                param="device",
            )
        if self.config.kv_dtype == "fp8":
            self._check_fp8("K/V", "kv_dtype", "start without --kv-dtype fp8")

    def _check_fp8(self, what: str, param: str, way_out: str) -> None:
        if torch.cuda.get_device_capability(self.device) < (8, 9):
            raise StartupError(f"fp8 {what} needs compute capability 8.9 or newer; {way_out}", param=param)

    def kv_bytes(self, weight_bytes: int) -> int:
        """Bytes for K/V: a share of the memory that is free now less the weights to come. Raises MemoryBudgetError."""
        free, total = torch.cuda.mem_get_info(self.device)
        left = free - weight_bytes - self._working_bytes()
        if left <= 0:
            raise MemoryBudgetError(
                f"{self.device} has {free} of {total} bytes free; the weights take about {weight_bytes} and a step "
                f"{self._working_bytes()}, which leaves nothing for K/V. Free memory there, or lower --max-batch-tokens",
                param="device",
            )
        return int(left * KV_SHARE)

    def _kind(self) -> QuantKind | None:
        if self.config.weights == "fp8":
            self._check_fp8("weights", "weights", "use --weights int8")
        return None if self.config.weights == "auto" else cast(QuantKind, self.config.weights)

    def _working_bytes(self) -> int:
        shape, config = self.model.shape, self.config
        each_row = 4 * shape.ffn_width + 8 * shape.hidden_size + 4 * shape.num_heads * shape.head_dim
        logits = config.max_running * shape.vocab_size * 4
        return WORKING_BYTES + (2 * config.max_step_tokens * each_row) * self.dtype.itemsize + 4 * logits

    def load(
        self,
        source: WeightSource,
        *,
        sort_ffn: bool,
        narrow_layers: frozenset[int] | None,
        progress: Progress | None,
    ) -> DeviceWeights:
        """The weights on the device."""
        return self._guarded(
            "the weights",
            lambda: load_device_weights(
                source,
                self.model,
                self.device,
                self.dtype,
                sort_ffn=sort_ffn,
                kind=self._kind(),
                narrow_layers=narrow_layers,
                progress=progress,
            ),
        )

    def runner(
        self,
        weights: DeviceWeights,
        geometry: KVGeometry,
        settings: SettingsTable,
        num_pages: int,
        max_model_len: int,
        grammars: Grammars,
    ) -> CudaRunner:
        """The runner, its graphs captured unless the configuration wants none."""
        options = CudaOptions(self.config.max_running, eager=self.config.enforce_eager)
        return self._guarded(
            f"K/V of {num_pages * geometry.page_bytes} bytes and the graphs",
            lambda: CudaRunner(
                self.model,
                weights,
                geometry,
                settings,
                num_pages,
                max_model_len,
                options,
                self.model.eos_token_ids,
                grammars,
            ),
        )

    def _guarded(self, what: str, make: Callable[[], T]) -> T:
        try:
            return make()
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.device)
            raise MemoryBudgetError(
                f"{self.device} ({total} bytes, {free} free) has no room for {what}: {error}. Give less K/V with "
                "--kv-memory, or free memory there",
                param="kv_bytes",
            ) from error
