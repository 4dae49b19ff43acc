"""The as-if harness on the runner for CUDA devices, its tensors on the CPU."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sortserve.engine.checkpoint import Checkpoint
from sortserve.engine.cuda.forward import HeadOutput
from sortserve.engine.cuda.runner import CudaOptions, CudaRunner
from sortserve.engine.cuda.weights import load_device_weights
from sortserve.engine.plan import SequencePlan, SequenceResult
from sortserve.kernels.quantization import QuantKind
from tests.engine.asif import CONTEXT, Harness
from tests.engine.tiny_models import make_tiny

PADDED = CudaOptions(max_running=5, capture=False)
EAGER = CudaOptions(max_running=5, eager=True)


def make_model(folder: Path) -> Path:
    """Heads of 16, the smallest that the kernels take."""
    make_tiny(folder, "llama", seed=3, head_dim=16)
    return folder


@dataclass
class CudaHarness(Harness):
    """Every sampled row's logits are compared with the oracle's, as for the CPU."""

    block_tokens: int = 16
    options: CudaOptions = field(default_factory=lambda: PADDED)

    def make_runner(self) -> CudaRunner:
        source = Checkpoint.open(self.folder, self.config)
        kind: QuantKind | None = "int8" if self.products.int8 else None
        weights = load_device_weights(source, self.config, torch.device("cpu"), torch.float32, kind=kind)
        runner = CudaRunner(
            self.config, weights, self.geometry, self.scheduler.settings, self.num_pages, CONTEXT, self.options
        )
        launch = runner._launch_sampling

        def spy(
            output: HeadOutput, sampling: list[tuple[SequencePlan, int]], confidence: bool
        ) -> Callable[[], dict[str, SequenceResult]]:
            self.note_sampled(output.logits, sampling)
            return launch(output, sampling, confidence)

        runner._launch_sampling = spy  # type: ignore[method-assign]
        return runner
