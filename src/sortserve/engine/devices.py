"""Where a model runs: the CPU, a CUDA GPU, or a simulated device; what of an engine's start depends on that.

A start is `start_on`, then the size of K/V, then `load`, then `runner`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from sortserve.engine.checkpoint import Checkpoint, DummyCheckpoint, WeightSource
from sortserve.engine.depth_head import DepthHead
from sortserve.engine.errors import StartupError
from sortserve.engine.grammar import Grammars
from sortserve.engine.ladder import Ladder
from sortserve.engine.model_config import ModelConfig
from sortserve.engine.pages import KVGeometry
from sortserve.engine.plan import StepRunner
from sortserve.engine.runner import Runner
from sortserve.engine.settings import SettingsTable
from sortserve.engine.settling import Settled
from sortserve.engine.simulator.runner import SimulatedRunner
from sortserve.engine.sizing import default_kv_bytes
from sortserve.engine.weights import ModelWeights, Progress, load_weights

if TYPE_CHECKING:
    from sortserve.engine.cuda.start import CudaStart
    from sortserve.engine.cuda.weights import DeviceWeights


@dataclass(frozen=True)
class Given:
    """What a start is made from."""

    settled: Settled
    model: ModelConfig
    ladder: Ladder
    ladder_path: Path | None  # None: the model has none, so its neurons are sorted as it is loaded

    def source(self) -> WeightSource:
        """The model's weights, or made-up ones of the same sizes."""
        config = self.settled.config
        return DummyCheckpoint(self.model) if config.dummy_weights else Checkpoint.open(config.model_folder, self.model)


@dataclass(frozen=True)
class Room:
    """The K/V of a runner."""

    geometry: KVGeometry
    num_pages: int
    max_model_len: int  # tokens


class Loaded(Protocol):
    """Weights where they run."""

    @property
    def weight_bytes(self) -> int:
        """Bytes resident."""
        ...

    @property
    def head_words(self) -> str:
        """Where the head is, for the log."""
        ...

    def runner(self, room: Room, settings: SettingsTable, grammars: Grammars) -> tuple[StepRunner, str]:
        """What runs steps, and its kernels in words."""
        ...


class Start(Protocol):
    """A start on one device."""

    def kv_bytes(self) -> int:
        """Bytes that K/V may take if nobody says. Raises MemoryBudgetError if none are left."""
        ...

    def load(self, progress: Progress | None) -> Loaded:
        """The weights. Raises StartupError with what to change."""
        ...


def start_on(given: Given) -> Start:
    """The start on the device that was settled on. Raises StartupError for what that cannot run."""
    config = given.settled.config
    if config.simulates is not None:
        try:
            runner = SimulatedRunner.of(config.simulates, given.ladder.shape, given.ladder, given.model.eos_token_ids)
        except ValueError as error:
            raise StartupError(str(error), param="simulates") from error
        return SimulatedStart(given, runner)
    return GpuStart.of(given) if given.settled.dispatch.is_cuda else CpuStart(given)


@dataclass(frozen=True)
class SimulatedStart:
    """Nothing is loaded; also what it "loaded"."""

    given: Given
    simulated: SimulatedRunner
    head_words: str = "simulated"

    @property
    def weight_bytes(self) -> int:
        """What the full model's would be."""
        return self.given.ladder.costs[-1].weight_bytes

    def kv_bytes(self) -> int:
        """As on the CPU."""
        return default_kv_bytes()

    def load(self, progress: Progress | None) -> "SimulatedStart":
        """There is nothing to load."""
        return self

    def runner(self, room: Room, settings: SettingsTable, grammars: Grammars) -> tuple[StepRunner, str]:
        """See Loaded."""
        return self.simulated, ""


@dataclass(frozen=True)
class CpuStart:
    """A start on the CPU."""

    given: Given

    def kv_bytes(self) -> int:
        """See Start."""
        return default_kv_bytes()

    def load(self, progress: Progress | None) -> "OnCpu":
        """See Start."""
        given, settled = self.given, self.given.settled
        weights = load_weights(
            given.source(),
            given.model,
            given.ladder,
            settled.dtype,
            sort_ffn=given.ladder_path is None,
            products=settled.products,
            wide=settled.wide,
            progress=progress,
        )
        return OnCpu(given, weights)


@dataclass(frozen=True)
class OnCpu:
    """Weights packed for the CPU's products."""

    given: Given
    weights: ModelWeights

    @property
    def weight_bytes(self) -> int:
        """See Loaded."""
        return self.weights.nbytes

    @property
    def head_words(self) -> str:
        """See Loaded."""
        head = self.weights.head_bytes
        return f"packed beside the embedding, {head / (1 << 20):.0f} MiB" if head else "unpacked"

    def runner(self, room: Room, settings: SettingsTable, grammars: Grammars) -> tuple[StepRunner, str]:
        """See Loaded."""
        model = self.given.model
        runner = Runner(
            model,
            self.weights,
            room.geometry,
            settings,
            room.num_pages,
            room.max_model_len,
            model.eos_token_ids,
            grammars,
            self._depth_head(),
        )
        return runner, self.given.settled.dispatch.kernels

    def _depth_head(self) -> DepthHead | None:
        """The head that the ladder names, from the file beside it."""
        ladder, path = self.given.ladder, self.given.ladder_path
        if ladder.depth_head is None or path is None:
            return None
        return DepthHead.load(path.with_name(ladder.depth_head.file), ladder.num_segments, ladder.shape.hidden_size)


@dataclass(frozen=True)
class GpuStart:
    """A start on a CUDA GPU."""

    given: Given
    cuda: "CudaStart"

    @classmethod
    def of(cls, given: Given) -> "GpuStart":
        """Imports what needs triton, which need not be installed elsewhere. Raises StartupError for sizes that the kernels
        do not take."""
        from sortserve.engine.cuda.start import CudaStart

        config = given.settled.config
        cuda = CudaStart(config, given.model, torch.device(config.device), given.settled.dtype)
        cuda.check()
        return cls(given, cuda)

    def kv_bytes(self) -> int:
        """See Start."""
        return self.cuda.kv_bytes(self.given.ladder.costs[-1].weight_bytes)

    def load(self, progress: Progress | None) -> "OnGpu":
        """See Start."""
        given = self.given
        narrow = given.ladder.shape.narrow_layers
        weights = self.cuda.load(
            given.source(), sort_ffn=given.ladder_path is None, narrow_layers=narrow, progress=progress
        )
        return OnGpu(given, self.cuda, weights)


@dataclass(frozen=True)
class OnGpu:
    """Weights on a CUDA GPU."""

    given: Given
    cuda: "CudaStart"
    weights: "DeviceWeights"

    @property
    def weight_bytes(self) -> int:
        """See Loaded."""
        return self.weights.nbytes

    @property
    def head_words(self) -> str:
        """See Loaded."""
        return "a matrix of its own" if self.weights.head_bytes else "the embedding"

    def runner(self, room: Room, settings: SettingsTable, grammars: Grammars) -> tuple[StepRunner, str]:
        """See Loaded."""
        runner = self.cuda.runner(self.weights, room.geometry, settings, room.num_pages, room.max_model_len, grammars)
        return runner, f"{self.given.settled.dispatch.kernels}, {runner.attention.words}"
