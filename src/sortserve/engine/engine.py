"""The engine: everything that is loaded. Its steps are in stepping.py."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from sortserve.engine.admission import Limits
from sortserve.engine.config import EngineConfig
from sortserve.engine.cost import CostTable
from sortserve.engine.cost_model import CostModel
from sortserve.engine.devices import Given, Room, Start, start_on
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
from sortserve.engine.rehearsal import rehearse
from sortserve.engine.rungs import Rungs
from sortserve.engine.scheduler import FEATURES, Scheduler
from sortserve.engine.settings import SettingsTable
from sortserve.engine.settling import Settled, settle
from sortserve.engine.simulator.runner import SimulatedRunner
from sortserve.engine.sizing import size_kv
from sortserve.engine.stepping import Stepper
from sortserve.engine.weights import Progress

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
        config = settled.config
        ladder, ladder_path = _ladder(settled, model_config)
        start = start_on(Given(settled, model_config, ladder, ladder_path))
        room = _room(config, model_config, ladder, start)
        loaded = start.load(progress)
        grammars = Grammars(config.model_folder, ladder.shape.vocab_size, model_config.eos_token_ids)
        scheduler = _scheduler(config, model_config, ladder, room, grammars)
        runner, kernels = loaded.runner(room, scheduler.settings, grammars)
        info = EngineInfo(
            model=config.model_name,
            ladder=ladder,
            max_model_len=room.max_model_len,
            vocab_size=ladder.shape.vocab_size,
            eos_token_ids=model_config.eos_token_ids,
            capabilities=FEATURES,
            weight_bytes=loaded.weight_bytes,
            kv_bytes=room.num_pages * room.geometry.page_bytes,
            block_tokens=room.geometry.block_tokens,
            kv_blocks=room.num_pages // room.geometry.num_columns,
            load_seconds=time.monotonic() - began,
            device="" if config.simulates is not None else settled.dispatch.device,
            device_name=settled.dispatch.name,
            kernels=kernels,
            weights=settled.weights_words(ladder.shape),
            kv_dtype=config.dtype if config.kv_dtype == "auto" else config.kv_dtype,
        )
        engine = cls(config, model_config, info, scheduler, runner, Stepper(scheduler, runner))
        if isinstance(runner, SimulatedRunner):
            scheduler.cost = CostModel(runner.cost)
        elif config.warmup:
            scheduler.cost = engine.measure()
            rehearse(_scheduler(config, model_config, ladder, room, grammars), runner, scheduler.cost)
        _log_start(engine, loaded.head_words, has_ladder=ladder_path is not None)
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


def _ladder(settled: Settled, model: ModelConfig) -> tuple[Ladder, Path | None]:
    """The ladder, and its file; None if the model has none."""
    config, shape = settled.config, settled.shape(model)
    path = config.ladder_path or config.model_folder / LADDER_FILE
    if config.ladder_path is None and not path.exists():
        return settled.narrowed(Ladder.default(shape)), None
    return settled.narrowed(Ladder.load(path, shape)), path


def _room(config: EngineConfig, model: ModelConfig, ladder: Ladder, start: Start) -> Room:
    """The size of K/V. Raises MemoryBudgetError if the device has none for it."""
    geometry = KVGeometry.of(ladder.shape, ladder.bounds, config.block_tokens)
    return Room(geometry, *size_kv(config, model, geometry, start.kv_bytes()))


def _scheduler(config: EngineConfig, model: ModelConfig, ladder: Ladder, room: Room, grammars: Grammars) -> Scheduler:
    """A scheduler without requests, on K/V of its own."""
    return Scheduler(
        ladder,
        KVManager(room.geometry, room.num_pages, prefix_cache=config.prefix_cache),
        _policy(config, ladder),
        Limits(room.max_model_len, ladder.shape.vocab_size, config.max_waiting),
        eos_token_ids=model.eos_token_ids,
        max_step_tokens=config.max_step_tokens,
        max_running=config.max_running,
        unasked=None if config.fixed_submodel is None else ladder.place(config.fixed_submodel),
        on_end=grammars.drop,
    )


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


def _log_start(engine: Engine, head: str, *, has_ladder: bool) -> None:
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
        head,
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
