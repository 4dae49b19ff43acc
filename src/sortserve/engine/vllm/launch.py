"""How vLLM is started with the backend: the arguments that select our model class, scheduler and worker."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sortserve.engine.model_config import load_model_config
from sortserve.engine.vllm.architectures import ARCHITECTURES
from sortserve.engine.vllm.configuration import KEY

_PARTS = "sortserve.engine.vllm"
_FAMILY_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def engine_arguments(
    folder: Path,
    *,
    cpu: bool,
    ladder_path: Path | None = None,
    decider: str = "",
    decider_options: Mapping[str, Any] | None = None,
    stats_address: str = "",
    compile_kernels: bool = True,
    **vllm_arguments: Any,
) -> dict[str, Any]:
    """Keyword arguments of vLLM's EngineArgs, AsyncEngineArgs or LLM. `cpu`: vLLM's CPU build; synchronous scheduling
    there, asynchronous on GPUs. `compile_kernels` False: no C++ of ours is compiled at start. Raises what
    reading the model's configuration raises."""
    family = load_model_config(folder).family
    own: dict[str, Any] = {"decider": decider, "decider_options": dict(decider_options or {})}
    if ladder_path is not None:
        own["ladder"] = str(ladder_path)
    if stats_address:
        own["stats_address"] = stats_address
    if not compile_kernels:
        own["compile_kernels"] = False
    asynchronous = vllm_arguments.get("async_scheduling", not cpu)
    scheduler = "AsyncSubmodelScheduler" if asynchronous else "SubmodelScheduler"
    worker = "SubmodelCPUWorker" if cpu else "SubmodelWorker"
    return {
        "model": str(folder),
        "hf_overrides": {"architectures": [ARCHITECTURES[_FAMILY_ARCHITECTURES[family]]]},
        "scheduler_cls": f"{_PARTS}.sched.{scheduler}",
        "worker_cls": f"{_PARTS}.worker.{worker}",
        "async_scheduling": asynchronous,
        "enforce_eager": True,
        "additional_config": {KEY: own},
        **vllm_arguments,
    }


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """The same as flags of `vllm serve`, without the model."""
    return [
        "--hf-overrides",
        json.dumps(arguments["hf_overrides"]),
        "--scheduler-cls",
        arguments["scheduler_cls"],
        "--worker-cls",
        arguments["worker_cls"],
        "--async-scheduling" if arguments["async_scheduling"] else "--no-async-scheduling",
        "--enforce-eager",
        "--additional-config",
        json.dumps(arguments["additional_config"]),
    ]
