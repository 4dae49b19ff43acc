"""The as-if harness on the runner for CUDA devices, its tensors on the CPU."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sortserve.engine.checkpoint import Checkpoint
from sortserve.engine.cuda.forward import HeadOutput
from sortserve.engine.cuda.runner import CudaOptions, CudaRunner
from sortserve.engine.cuda.weights import load_device_weights
from sortserve.engine.model_config import ModelConfig
from sortserve.engine.plan import SequencePlan, SequenceResult
from sortserve.kernels.quantization import QuantKind
from tests.engine.asif import CONTEXT, Harness
from tests.engine.tiny_models import make_tiny

PADDED = CudaOptions(max_running=5, capture=False)
EAGER = CudaOptions(max_running=5, eager=True)


def make_model(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """Heads of 16, the smallest that the kernels take."""
    make_tiny(folder, family, seed=3, head_dim=16, **overrides)
    return folder


@dataclass
class CudaHarness(Harness):
    """Every sampled row's logits are compared with the oracle's, as for the CPU."""

    block_tokens: int = 16
    options: CudaOptions = field(default_factory=lambda: PADDED)

    def make_runner(self) -> CudaRunner:
        source = Checkpoint.open(self.folder, self.config)
        kind: QuantKind | None = "int8" if self.products.int8 else None
        weights = load_device_weights(
            source, self.config, torch.device("cpu"), self.dtype, kind=kind, narrow_layers=self.narrow
        )
        runner = CudaRunner(
            self.config, weights, self.geometry, self.scheduler.settings, self.num_pages, CONTEXT, self.options
        )
        if self.dtype == torch.float64:
            _exact_rotation(self.config, runner)
        launch = runner._launch_sampling

        def spy(
            output: HeadOutput, sampling: list[tuple[SequencePlan, int]], confidence: bool
        ) -> Callable[[], dict[str, SequenceResult]]:
            self.note_sampled(output.logits, sampling)
            return launch(output, sampling, confidence)

        runner._launch_sampling = spy  # type: ignore[method-assign]
        return runner


def _exact_rotation(config: ModelConfig, runner: CudaRunner) -> None:
    """The tables of the rotation in float64: a K between two numbers of fp8 goes the way that the oracle's goes."""
    half = config.shape.head_dim // 2
    frequency = config.rope.theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(CONTEXT, dtype=torch.float64)[:, None] * frequency
    assert runner.graphs is not None
    for forward in (runner._eager, runner.graphs._forward):
        forward._cos, forward._sin = angle.cos(), angle.sin()
