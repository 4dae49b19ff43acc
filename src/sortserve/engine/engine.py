"""The engine: everything that is loaded. Its steps are in stepping.py."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from sortserve.engine.admission import Limits
from sortserve.engine.checkpoint import Checkpoint, DummyCheckpoint
from sortserve.engine.config import EngineConfig
from sortserve.engine.cost import CostTable
from sortserve.engine.cost_model import CostModel
from sortserve.engine.depth_head import DepthHead
from sortserve.engine.errors import NotFoundError, StartupError
from sortserve.engine.estimates import shape_of_parts
from sortserve.engine.grammar import Grammars
from sortserve.engine.kv import KVManager
from sortserve.engine.ladder import Ladder
from sortserve.engine.model_config import ModelConfig, load_model_config
from sortserve.engine.pages import KVGeometry
from sortserve.engine.plan import StepRunner
from sortserve.engine.policies.protocol import Policy
from sortserve.engine.policies.registry import make_policy
from sortserve.engine.profile_cache import fitted
from sortserve.engine.profiling import Profiler
from sortserve.engine.protocol import EngineInfo, EngineStats, Event, Prediction
from sortserve.engine.rungs import Rungs
from sortserve.engine.runner import Runner
from sortserve.engine.scheduler import FEATURES, Scheduler
from sortserve.engine.settings import SettingsTable
from sortserve.engine.settling import settle
from sortserve.engine.simulator.runner import SimulatedRunner
from sortserve.engine.sizing import default_kv_bytes, size_kv
from sortserve.engine.stepping import Stepper
from sortserve.engine.submodel import ModelShape
from sortserve.engine.weights import ModelWeights, Progress, load_weights

if TYPE_CHECKING:
    from sortserve.engine.cuda.start import CudaStart
    from sortserve.engine.cuda.weights import DeviceWeights

logger = logging.getLogger(__name__)

LADDER_FILE = "ladder.json"


@dataclass(frozen=True)
class Engine:
    """A loaded model with its scheduler. Not thread-safe: one thread owns it."""

    config: EngineConfig  # "auto" resolved
    model_config: ModelConfig
    info: EngineInfo
    scheduler: Scheduler
    runner: StepRunner
    steps: Stepper

    @classmethod
    def load(cls, config: EngineConfig, progress: Progress | None = None) -> "Engine":
        """Load, check that memory suffices, and measure step times. Raises StartupError with what to change."""
        began = time.monotonic()
        model_config = load_model_config(config.model_folder)
        settled = settle(config, model_config)
        config, dtype, dispatch, shape = settled.config, settled.dtype, settled.dispatch, settled.shape(model_config)
        path = config.ladder_path or config.model_folder / LADDER_FILE
        has_ladder = config.ladder_path is not None or path.exists()
        ladder = settled.narrowed(Ladder.load(path, shape) if has_ladder else Ladder.default(shape))
        shape = ladder.shape
        geometry = KVGeometry.of(shape, ladder.bounds, config.block_tokens)
        simulated = _simulated(config, shape, ladder, model_config.eos_token_ids)
        cuda = _cuda(config, model_config, dtype) if simulated is None and dispatch.is_cuda else None
        room = default_kv_bytes() if cuda is None else cuda.kv_bytes(ladder.costs[-1].weight_bytes)
        num_pages, max_model_len = size_kv(config, model_config, geometry, room)
        weights: ModelWeights | DeviceWeights | None = None
        if simulated is None:
            source = (DummyCheckpoint if config.dummy_weights else lambda c: Checkpoint.open(config.model_folder, c))(
                model_config
            )
            if cuda is None:
                weights = load_weights(
                    source,
                    model_config,
                    ladder,
                    dtype,
                    sort_ffn=not has_ladder,
                    products=settled.products,
                    wide=settled.wide,
                    progress=progress,
                )
            else:
                weights = cuda.load(
                    source, sort_ffn=not has_ladder, narrow_layers=ladder.shape.narrow_layers, progress=progress
                )
        kv = KVManager(geometry, num_pages, prefix_cache=config.prefix_cache)
        grammars = Grammars(config.model_folder, shape.vocab_size, model_config.eos_token_ids)
        scheduler = Scheduler(
            ladder,
            kv,
            _policy(config, ladder),
            Limits(max_model_len, shape.vocab_size, config.max_waiting),
            eos_token_ids=model_config.eos_token_ids,
            max_step_tokens=config.max_step_tokens,
            max_running=config.max_running,
            unasked=None if config.fixed_submodel is None else ladder.place(config.fixed_submodel),
            on_end=grammars.drop,
        )
        runner: StepRunner
        kernels = dispatch.kernels
        if weights is None:
            assert simulated is not None
            runner = simulated
        elif not isinstance(weights, ModelWeights):
            assert cuda is not None
            runner = cuda.runner(weights, geometry, scheduler.settings, num_pages, max_model_len, grammars)
            kernels = f"{kernels}, {runner.attention.words}"
        else:
            runner = Runner(
                model_config,
                weights,
                geometry,
                scheduler.settings,
                num_pages,
                max_model_len,
                model_config.eos_token_ids,
                grammars,
                _depth_head(path, ladder),
            )
        info = EngineInfo(
            model=config.model_name,
            ladder=ladder,
            max_model_len=max_model_len,
            vocab_size=shape.vocab_size,
            eos_token_ids=model_config.eos_token_ids,
            capabilities=FEATURES,
            weight_bytes=ladder.costs[-1].weight_bytes if weights is None else weights.nbytes,
            kv_bytes=num_pages * geometry.page_bytes,
            block_tokens=geometry.block_tokens,
            kv_blocks=num_pages // geometry.num_columns,
            load_seconds=time.monotonic() - began,
            device="" if simulated is not None else dispatch.device,
            device_name=dispatch.name,
            kernels="" if simulated is not None else kernels,
            weights=settled.weights_words(ladder.shape),
            kv_dtype=config.dtype if config.kv_dtype == "auto" else config.kv_dtype,
        )
        engine = cls(config, model_config, info, scheduler, runner, Stepper(scheduler, runner))
        if simulated is not None:
            scheduler.cost = CostModel(simulated.cost)
        elif config.warmup:
            scheduler.cost = engine.measure()
        _log_start(engine, weights, has_ladder)
        return engine

    def step(self, tell_early: Callable[[list[Event]], None] | None = None) -> list[Event]:
        """One step of `steps`: the events it gave, none if there was nothing to do."""
        return self.steps.step(tell_early)

    @property
    def cost(self) -> CostModel | None:
        """The corrected cost model; None where nothing was measured."""
        cost = self.scheduler.cost
        return cost if isinstance(cost, CostModel) else None

    def stats(self) -> EngineStats:
        """The scheduler's, and how well steps are predicted."""
        if self.cost is not None:
            self.cost.learn()
        errors = {} if self.cost is None else self.cost.errors()
        return msgspec.structs.replace(
            self.scheduler.stats(),
            step_errors={kind: (error.steps, error.median, error.covered) for kind, error in errors.items()},
        )

    def predict(self, prompt_tokens: int) -> dict[str, Prediction]:
        """What one more request of that many prompt tokens would take now, by sub-model id."""
        if self.cost is not None:
            self.cost.learn()
        return self.scheduler.predict(prompt_tokens)

    # ---- warm-up

    def measure(self) -> CostModel:
        """The cost model of this machine: measured now, or at an earlier start and held against one step now."""
        scheduler, config = self.scheduler, self.config
        profiler = Profiler(
            self.runner.run,
            scheduler.kv,
            scheduler.settings,
            scheduler.rungs,
            max_running=config.max_running,
            max_step_tokens=config.max_step_tokens,
            max_model_len=self.info.max_model_len,
            confidence=scheduler.decider.wants_confidence,
        )
        about = {
            "model": config.model_name,
            "config": repr(self.model_config),
            "ladder": repr(self.info.ladder.entries),
            "dtype": config.dtype,
            "device": f"{self.info.device} {self.info.device_name} {self.info.kernels} eager={config.enforce_eager}",
            "weights": f"{config.weights} {self.info.ladder.shape.narrow_layers}",
            "kv_dtype": config.kv_dtype,
            "threads": str(config.num_threads),
            "rows": f"{config.max_running} {config.max_step_tokens} {self.info.max_model_len} {config.block_tokens}",
            "torch": str(torch.__version__),
            "signals": repr(self.info.ladder.depth_head) if profiler.confidence else "",
        }
        quick = shape_of_parts(scheduler.rungs, profiler.quick().sequences)

        def slowness(table: CostTable) -> float:
            return profiler.quick_seconds() / max(float(table.seconds(quick)), 1e-9)

        table, was_cached = fitted(about, profiler.fit, slowness, use_cache=config.profile_cache)
        cost = CostModel(table)
        if was_cached:
            cost.start_at(quick, profiler.quick_seconds())
        return cost


def _cuda(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> "CudaStart":
    """The start on a GPU. Imported only here: triton need not be installed elsewhere."""
    from sortserve.engine.cuda.start import CudaStart

    start = CudaStart(config, model, torch.device(config.device), dtype)
    start.check()
    return start


def _depth_head(ladder_path: Path, ladder: Ladder) -> DepthHead | None:
    """The head that the ladder names, from the file beside it."""
    if ladder.depth_head is None:
        return None
    path = ladder_path.with_name(ladder.depth_head.file)
    return DepthHead.load(path, ladder.num_segments, ladder.shape.hidden_size)


def _policy(config: EngineConfig, ladder: Ladder) -> Policy:
    rungs = Rungs.of(ladder, SettingsTable(ladder))
    try:
        if config.fixed_submodel is not None:
            return make_policy("fixed", rungs, place=ladder.place(config.fixed_submodel))
        return make_policy(config.policy, rungs)
    except NotFoundError as error:
        raise StartupError(error.message, param="fixed_submodel") from error
    except ValueError as error:
        raise StartupError(str(error), param="policy") from error


def _simulated(
    config: EngineConfig, shape: ModelShape, ladder: Ladder, eos_token_ids: tuple[int, ...]
) -> SimulatedRunner | None:
    """What stands in for the model, if something does."""
    if config.simulates is None:
        return None
    try:
        return SimulatedRunner.of(config.simulates, shape, ladder, eos_token_ids)
    except ValueError as error:
        raise StartupError(str(error), param="simulates") from error


def _head_words(weights: "ModelWeights | DeviceWeights | None") -> str:
    if weights is None:
        return "simulated"
    if not isinstance(weights, ModelWeights):
        return "a matrix of its own" if weights.head_bytes else "the embedding"
    return (
        f"packed beside the embedding, {weights.head_bytes / (1 << 20):.0f} MiB" if weights.head_bytes else "unpacked"
    )


def _log_start(engine: Engine, weights: "ModelWeights | DeviceWeights | None", has_ladder: bool) -> None:
    info, mib = engine.info, 1 << 20
    kernels = f"({info.kernels})" if info.kernels else ""
    device = " ".join(word for word in (info.device or "no device", info.device_name, kernels) if word)
    logger.info(
        "loaded %s on %s in %.1f s: %d sub-models, exits %s, %s; %s weights %.0f MiB (head %s), %s K/V %.0f MiB, context %d",
        info.model,
        device,
        info.load_seconds,
        len(info.ladder.entries),
        "/".join(map(str, info.ladder.exits)),
        engine.config.dtype,
        info.weights,
        info.weight_bytes / mib,
        _head_words(weights),
        info.kv_dtype,
        info.kv_bytes / mib,
        info.max_model_len,
    )
    if not has_ladder:
        logger.warning(
            "%s has no ladder: FFN widths are sorted by weight norms, their quality is not known", info.model
        )
    elif info.ladder.measured is None:
        logger.warning("the ladder of %s is not measured: the quality of its sub-models is not known", info.model)
