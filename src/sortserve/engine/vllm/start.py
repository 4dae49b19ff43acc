"""How `--backend vllm` starts vLLM: its arguments from our settings, its environment, and what is refused beforehand.

Nothing here imports vLLM before it is known to be installed; the arguments are plain data.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sortserve.engine import container
from sortserve.engine.config import EngineConfig
from sortserve.engine.errors import StartupError
from sortserve.engine.ladder import Ladder
from sortserve.engine.model_config import DTYPE_BYTES, ModelConfig
from sortserve.engine.protocol import EngineInfo
from sortserve.engine.vllm.compat import check_start, check_version
from sortserve.engine.vllm.configuration import KEY, Configuration
from sortserve.engine.vllm.deciding import CAPABILITIES
from sortserve.engine.vllm.launch import engine_arguments
from sortserve.engine.vllm.policy import FACTORY

_LOG = logging.getLogger(__name__)
MOST_CPU_KV_BYTES = 2 << 30
"""K/V memory on the CPU if nobody says, as the native engine's: vLLM itself would take nine tenths of the machine's."""
OURS = ("model", "served_model_name", "hf_overrides", "scheduler_cls", "worker_cls", "additional_config")
"""Engine arguments that make the back end what it is."""


def set_environment(log_level: int, log_format: str) -> None:
    """Before vLLM is imported. What the user has set wins."""
    own = {
        "VLLM_NO_USAGE_STATS": "1",  # a server tells nobody that it runs
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads
        "VLLM_LOGGING_LEVEL": "DEBUG" if log_level <= logging.DEBUG else "WARNING",
    }
    if log_format == "json":
        own["VLLM_CONFIGURE_LOGGING"] = "0"  # its lines are text
    for name, value in own.items():
        os.environ.setdefault(name, value)
    if log_level > logging.DEBUG:
        logging.getLogger("vllm").setLevel(logging.WARNING)  # also before it has set up its own


def configuration(config: EngineConfig) -> Configuration:
    """Model and ladder as vLLM's processes will read them. Raises StartupError."""
    own = {} if config.ladder_path is None else {KEY: {"ladder": str(config.ladder_path.resolve())}}
    return Configuration.of(config.model_folder, own)


def arguments(config: EngineConfig, ladder: Ladder, *, cpu: bool, stats_address: str) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs. What the user gave for vLLM itself wins over what we derive; raises
    StartupError for what only we may set, and for settings that vLLM does not have."""
    check_settings(config, cpu=cpu)
    options: dict[str, Any] = {"policy": config.policy}
    if config.fixed_submodel is not None:
        options = {"policy": "fixed", "submodel": config.fixed_submodel}
        ladder.place(config.fixed_submodel)
    given = parsed(config.vllm_args)
    kept = [name for name in OURS if name in given]
    if kept:
        raise StartupError(f"--vllm-arg {kept[0]} is set by the back end itself; leave it out", param="vllm_args")
    own: dict[str, Any] = {
        "served_model_name": config.model_name,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_batched_tokens": max(config.max_step_tokens, config.max_running),
        "max_num_seqs": config.max_running,
        "enable_prefix_caching": config.prefix_cache,
        "kv_cache_memory_bytes": config.kv_bytes or (_cpu_kv_bytes() if cpu else None),
        "structured_outputs_config": {"backend": "guidance"},  # the grammars of our front end are llguidance's
        "disable_log_stats": True,
        "load_format": "dummy" if config.dummy_weights else None,
    }
    own = {name: value for name, value in own.items() if value is not None} | given
    return engine_arguments(
        config.model_folder,
        cpu=cpu,
        ladder_path=None if config.ladder_path is None else config.ladder_path.resolve(),
        decider=FACTORY,
        decider_options=options,
        stats_address=stats_address,
        compile_kernels=config.compile_kernels,
        **own,
    )


def check_settings(config: EngineConfig, *, cpu: bool) -> None:
    """Raise StartupError for settings of the native engine that vLLM has no like of."""
    if config.simulates is not None:
        raise StartupError("--simulates is for --backend simulated", param="simulates")
    if config.num_threads is not None:
        raise StartupError(
            "--threads is not for --backend vllm; its CPU build takes VLLM_CPU_OMP_THREADS_BIND from the environment",
            param="num_threads",
        )
    if config.weights != "auto":
        raise StartupError("--weights is for the native engine; vLLM's is --vllm-arg quantization=fp8", param="weights")
    if config.kv_dtype != "auto":
        raise StartupError(
            "--kv-dtype is for the native engine; vLLM's is --vllm-arg kv_cache_dtype=fp8", param="kv_dtype"
        )
    kind, _, index = config.device.partition(":")
    if index:
        raise StartupError(
            f"device is {config.device!r}; for --backend vllm give cuda, and CUDA_VISIBLE_DEVICES={index}",
            param="device",
        )
    if kind not in ("auto", "cpu" if cpu else "cuda"):
        raise StartupError(
            f"device is {config.device!r}, and the vLLM that is installed is a build for {'the CPU' if cpu else 'GPUs'}",
            param="device",
        )


def parsed(given: Sequence[str]) -> dict[str, Any]:
    """`name=value` each, dashes as in vLLM's flags allowed, the value as JSON where it is JSON, else as text. Raises
    StartupError."""
    found: dict[str, Any] = {}
    for argument in given:
        name, equals, value = argument.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if not equals or not name.isidentifier():
            raise StartupError(f"--vllm-arg is {argument!r}, must be name=value", param="vllm_args")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def load(config: EngineConfig, stats_address: str) -> tuple[Any, EngineInfo]:
    """Start vLLM's engine; takes a minute. Raises StartupError."""
    check_version()
    own = configuration(config)
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise StartupError(f"vLLM is installed but cannot be imported: {error}", param="backend") from error
    given = arguments(config, own.ladder, cpu=bool(current_platform.is_cpu()), stats_address=stats_address)
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # Triton may be there, but the CPU has the first one
        # else the first request with log-probabilities waits a minute for the C++ compiler
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        settings = AsyncEngineArgs(**given).create_engine_config()
        check_start(settings)
        llm = AsyncLLM.from_vllm_config(settings, disable_log_stats=True)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError, OSError) as error:
        raise StartupError(f"vLLM does not start: {error}", param="backend") from error
    return llm, _info(config, own, settings)


def _info(config: EngineConfig, own: Configuration, settings: Any) -> EngineInfo:
    shape, cache = own.model.shape, settings.cache_config
    block_tokens, kv_blocks = int(cache.block_size or 0), int(cache.num_gpu_blocks or 0)
    dtype_bytes = DTYPE_BYTES.get(str(settings.model_config.dtype).removeprefix("torch."), shape.dtype_bytes)
    value_bytes = 1 if str(cache.cache_dtype).startswith("fp8") else dtype_bytes
    ranks = int(settings.parallel_config.tensor_parallel_size)
    # of one rank: where there are fewer heads than ranks, they are repeated
    share = replace(shape, num_kv_heads=max(1, shape.num_kv_heads // ranks), kv_value_bytes=value_bytes)
    each = kv_blocks * block_tokens * shape.num_layers * share.kv_bytes_per_token_layer
    return EngineInfo(
        model=config.model_name,
        ladder=own.ladder,
        max_model_len=int(settings.model_config.max_model_len),
        vocab_size=shape.vocab_size,
        eos_token_ids=own.model.eos_token_ids,
        capabilities=CAPABILITIES,
        weight_bytes=_weight_bytes(own.model, own.ladder) * dtype_bytes // shape.dtype_bytes,
        kv_bytes=int(cache.kv_cache_memory_bytes or each or 1),  # of one GPU: what the next start is given
        block_tokens=block_tokens,
        kv_blocks=kv_blocks,
    )


def _weight_bytes(model: ModelConfig, ladder: Ladder) -> int:
    embedding = (
        0 if model.tie_embeddings else model.shape.vocab_size * model.shape.hidden_size * model.shape.dtype_bytes
    )
    return ladder.costs[-1].weight_bytes + embedding


def _cpu_kv_bytes() -> int:
    free = container.free_bytes()
    try:
        physical = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        physical = 4 * MOST_CPU_KV_BYTES
    return min(MOST_CPU_KV_BYTES, (physical if free is None else min(physical, free)) // 4)


def stats_address(endpoint: str) -> str:
    """Where the scheduler's reports go: a socket beside the one of the messages, in a folder that is ours alone."""
    path = Path(endpoint.removeprefix("ipc://"))
    return f"ipc://{path.with_name(path.name.replace('engine', 'stats'))}"
