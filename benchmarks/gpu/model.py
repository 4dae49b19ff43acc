"""Models of known shapes with dummy weights, on the real runner, and the plans that are measured on it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sortserve.engine.checkpoint import DummyCheckpoint
from sortserve.engine.cuda.runner import CudaOptions, CudaRunner
from sortserve.engine.cuda.weights import load_device_weights
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.model_config import ModelConfig, RopeConfig
from sortserve.engine.pages import KVGeometry
from sortserve.engine.plan import Plan, SampleSpec, SequencePlan, Span
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.settings import SettingsTable
from sortserve.engine.submodel import ModelShape, SubModel

BLOCK_TOKENS = 16
SPEC = SampleSpec(SamplingParams(temperature=0.0), 0, 1, (), ())


@dataclass(frozen=True)
class Setup:
    """What is built: a shape, the exits and FFN widths of its ladder, and how much runs at once."""

    name: str
    shape: ModelShape
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    max_running: int
    context: int  # tokens that a sequence may have
    tied: bool


LLAMA_1B = Setup(
    "Llama-3.2-1B", ModelShape(16, 2048, 8192, 32, 8, 64, 128256, 2), (8, 12, 16), (4096, 6144, 8192), 64, 4096, True
)
LLAMA_8B = Setup(
    "Llama-3.1-8B",
    ModelShape(32, 4096, 14336, 32, 8, 128, 128256, 2),
    (16, 24, 32),
    (7168, 10752, 14336),
    64,
    4096,
    False,
)
TINY = Setup("tiny", ModelShape(2, 32, 64, 2, 1, 16, 32, 4), (1, 2), (32, 64), 2, 32, False)


def model_config(setup: Setup, dtype: torch.dtype) -> ModelConfig:
    """A Llama of the setup's shape."""
    return ModelConfig(
        family="llama",
        shape=setup.shape,
        rms_eps=1e-5,
        rope=RopeConfig(theta=500_000.0),
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_embeddings=setup.tied,
        max_position=setup.context,
        sliding_window=None,
        bos_token_id=None,
        eos_token_ids=(),
        dtype=str(dtype).removeprefix("torch."),
    )


class DeviceDummy(DummyCheckpoint):
    """Dummy weights made on the device: 16 GB through the host would take longer than all else."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__(config)
        self._device = device
        self._on_device = self._pool.to(device)

    def _fill(self, name: str, shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
        pool = (self._on_device * scale).to(dtype)
        count = int(np.prod(shape))
        start = sum(name.encode()) * 7919 % len(pool)
        return pool.repeat(-(-(count + start) // len(pool)))[start : start + count].view(shape).clone()


@dataclass
class Bench:
    """A runner and the pages it may use; makes plans."""

    setup: Setup
    config: ModelConfig
    ladder: Ladder
    geometry: KVGeometry
    settings: SettingsTable
    runner: CudaRunner
    num_pages: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def build(cls, setup: Setup, device: torch.device, dtype: torch.dtype, *, eager: bool = False) -> "Bench":
        """Weights, pool and graphs. On the CPU the graphs' padded calls run uncaptured."""
        config = model_config(setup, dtype)
        submodels = [SubModel.make(depth, width) for depth in setup.depths for width in setup.widths]
        ladder = Ladder.of(setup.shape, [Entry(f"d{s.depth}-x{s.widths[0]}", s) for s in submodels])
        geometry = KVGeometry.of(setup.shape, ladder.bounds, BLOCK_TOKENS)
        settings = SettingsTable(ladder)
        weights = load_device_weights(DeviceDummy(config, device), config, device, dtype)
        blocks = setup.max_running * geometry.num_blocks(setup.context)
        num_pages = blocks * geometry.num_columns + 64 * geometry.state_pages
        options = CudaOptions(setup.max_running, eager=eager, capture=device.type == "cuda")
        runner = CudaRunner(config, weights, geometry, settings, num_pages, setup.context, options)
        return cls(setup, config, ladder, geometry, settings, runner, num_pages, device, dtype)

    def place(self, depth: int, width: int) -> int:
        """Place in the ladder."""
        return self.ladder.place(f"d{depth}-x{width}")

    @property
    def full(self) -> int:
        """Place of the full model."""
        return self.ladder.full

    # ---- plans

    def decode(self, places: Sequence[int], context: int) -> Plan:
        """One row for each place, at position `context` - 1."""
        parts = [self.part(number, place, context - 1, context) for number, place in enumerate(places)]
        return self.plan(parts)

    def plan(self, parts: Sequence[SequencePlan]) -> Plan:
        """A step of these parts, deepest first."""
        return Plan(0, tuple(sorted(parts, key=lambda part: (-part.exit, part.widest))))

    def part(
        self,
        number: int,
        place: int,
        start: int,
        stop: int,
        *,
        first_segment: int = 0,
        watermark: tuple[int, ...] | None = None,
        states: bool = False,
    ) -> SequencePlan:
        """Rows [start, stop) of a sequence that owns the `number`-th share of the pages."""
        geometry, exit = self.geometry, self.settings.exits[place]
        blocks, columns = geometry.num_blocks(stop), geometry.num_columns
        each = geometry.num_blocks(self.setup.context) * columns
        pages = np.arange(blocks * columns, dtype=np.int32).reshape(blocks, columns) + number * each
        reserve = self.num_pages - 64 * geometry.state_pages
        state_pages = {
            (block, level): tuple(range(at, at + geometry.state_pages))
            for level in range(1, geometry.num_segments)
            for block in range(blocks)
            if (at := reserve + block % 64 * geometry.state_pages) >= 0
        }
        return SequencePlan(
            request_id=f"s{number}",
            submodel=place,
            exit=exit,
            spans=(Span(start, stop, first_segment, exit, self.settings.targets[place]),),
            tokens=[(7 * at + number) % (self.setup.shape.vocab_size - 1) for at in range(stop)],
            watermark=(start,) * exit if watermark is None else watermark,
            pages=pages,
            state_pages=state_pages if first_segment or states else {},
            keep_states=states,
            sample=SPEC,
        )

    # ---- what a step must move

    def decode_bytes(self, places: Sequence[int], context: int) -> int:
        """Weights that some row needs, each once, and the K/V of every row, of a decode step."""
        shape, size = self.setup.shape, self.setup.shape.dtype_bytes
        submodels = [self.ladder.entries[place].submodel for place in places]
        total = shape.head_parameters * size
        for layer in range(max(submodel.depth for submodel in submodels)):
            running = [submodel for submodel in submodels if submodel.depth > layer]
            width = max(submodel.widths[layer] for submodel in running)
            total += (shape.attention_parameters + 3 * shape.hidden_size * width) * size
            total += len(running) * context * shape.kv_bytes_per_token_layer
        return total

    def decode_flops(self, places: Sequence[int], context: int) -> int:
        """FLOPs of the same step."""
        shape, total = self.setup.shape, 0
        for place in places:
            submodel = self.ladder.entries[place].submodel
            weights = shape.head_parameters + sum(
                shape.attention_parameters + 3 * shape.hidden_size * width for width in submodel.widths
            )
            total += 2 * weights + 4 * submodel.depth * context * shape.num_heads * shape.head_dim
        return total
