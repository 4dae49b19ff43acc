"""How vLLM is started: its arguments from our settings, and what is refused before anything is loaded. Without vLLM."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sortserve.engine.config import EngineConfig
from sortserve.engine.errors import NotFoundError, StartupError
from sortserve.engine.vllm import start
from sortserve.engine.vllm.configuration import Configuration
from sortserve.engine.vllm.deciding import Setup
from sortserve.engine.vllm.policy import PolicyDecider
from sortserve.engine.vllm.warm_up import MOST_PLACES, TOKENS, batches
from sortserve.server.cli import BUNDLED

CONFIG = EngineConfig(
    BUNDLED, device="cpu", dtype="float32", max_model_len=512, vllm_args=("gpu-memory-utilization=0.5",)
)


def arguments(config: EngineConfig = CONFIG, *, cpu: bool = True) -> dict[str, Any]:
    return start.arguments(config, start.configuration(config).ladder, cpu=cpu, stats_address="ipc:///nowhere")


def test_our_settings_are_vllms_arguments() -> None:
    given = arguments()
    assert (given["model"], given["dtype"], given["max_model_len"]) == (str(BUNDLED), "float32", 512)
    assert given["gpu_memory_utilization"] == 0.5
    assert 0 < given["kv_cache_memory_bytes"] <= start.MOST_CPU_KV_BYTES, "vLLM would take most of the machine"
    assert "kv_cache_memory_bytes" not in arguments(replace(CONFIG, device="cuda"), cpu=False)
    assert arguments(replace(CONFIG, kv_bytes=1 << 20))["kv_cache_memory_bytes"] == 1 << 20
    assert arguments(replace(CONFIG, vllm_args=("dtype=half",)))["dtype"] == "half", "given by name wins"


@pytest.mark.parametrize("compiles", [True, False])
def test_whether_kernels_are_compiled_reaches_the_model(compiles: bool) -> None:
    given = arguments(replace(CONFIG, compile_kernels=compiles))["additional_config"]
    assert Configuration.of(BUNDLED, given).compile_kernels == compiles


@pytest.mark.parametrize("submodel", [None, 1])
def test_the_scheduler_makes_the_policy_of_the_arguments(submodel: int | None) -> None:
    ladder = start.configuration(CONFIG).ladder
    fixed = None if submodel is None else ladder.entries[submodel].id
    own = Configuration.of(BUNDLED, arguments(replace(CONFIG, fixed_submodel=fixed))["additional_config"])
    assert own.stats_address == "ipc:///nowhere"
    decider = own.make_decider()(Setup(own.ladder, own.settings, own.decider_options, 8, 64, 512, 16, 64))
    assert isinstance(decider, PolicyDecider)
    assert decider._policy.name == ("slack" if submodel is None else "fixed")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vllm_args": ("worker_cls=mine",)}, "worker_cls is set by the back end"),
        ({"vllm_args": ("fast",)}, "must be name=value"),
        ({"num_threads": 2}, "VLLM_CPU_OMP_THREADS_BIND"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES=1"),
        ({"device": "cuda"}, "a build for the CPU"),
        ({"simulates": "h200"}, "--backend simulated"),
        ({"weights": "int8"}, "quantization=fp8"),
    ],
)
def test_settings_that_vllm_has_no_like_of(change: dict[str, Any], says: str) -> None:
    with pytest.raises(StartupError, match=says):
        arguments(replace(CONFIG, **change))


def test_a_fixed_sub_model_that_there_is_not() -> None:
    with pytest.raises(NotFoundError):
        arguments(replace(CONFIG, fixed_submodel="d99"))


def test_the_scheduler_goes_with_the_kind_of_scheduling() -> None:
    for cpu, given, expected in ((True, (), ""), (False, (), "Async"), (False, ("async-scheduling=false",), "")):
        config = replace(CONFIG, device="auto", vllm_args=given)
        made = arguments(config, cpu=cpu)
        assert made["scheduler_cls"].endswith(f".{expected}SubmodelScheduler")
        assert made["async_scheduling"] == bool(expected)


@pytest.mark.parametrize(
    ("ranks", "cache_dtype", "per_token"), [(1, "auto", 256), (4, "auto", 128), (1, "fp8_e4m3", 128)]
)
def test_the_next_start_is_given_the_memory_that_this_one_took(ranks: int, cache_dtype: str, per_token: int) -> None:
    """Bytes of a token, rank and layer: two heads of 32 numbers in bfloat16; of four ranks each has one of them."""
    own = start.configuration(CONFIG)
    settings = SimpleNamespace(
        cache_config=SimpleNamespace(
            block_size=16, num_gpu_blocks=10, cache_dtype=cache_dtype, kv_cache_memory_bytes=None
        ),
        model_config=SimpleNamespace(dtype="torch.bfloat16", max_model_len=512),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )
    assert start._info(CONFIG, own, settings).kv_bytes == 160 * own.model.shape.num_layers * per_token


def test_values_are_json_where_they_are() -> None:
    assert start.parsed(("a=1", "b=x=y", 'c-d={"e": true}', "--f=null")) == {
        "a": 1,
        "b": "x=y",
        "c_d": {"e": True},
        "f": None,
    }


def test_what_the_user_set_in_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_LOGGING_LEVEL", "VLLM_CONFIGURE_LOGGING"):
        monkeypatch.setenv(name, "theirs")
    monkeypatch.delenv("VLLM_NO_USAGE_STATS")
    start.set_environment(20, "json")
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert os.environ["VLLM_CONFIGURE_LOGGING"] == "theirs"


def test_the_socket_of_reports_is_beside_the_other_and_no_longer() -> None:
    assert start.stats_address("ipc:///tmp/sortserve-engine/engine-12") == "ipc:///tmp/sortserve-engine/stats-12"


def test_warm_up_has_batches_and_prompts_of_all_sizes() -> None:
    ladder = start.configuration(CONFIG).ladder
    for max_running, step_tokens, max_model_len in ((8, 64, 512), (256, 2048, 1024), (1, 16, 12)):
        made = list(batches(ladder, max_running, step_tokens, max_model_len))
        places = {place for place, _, _ in made}
        assert {0, ladder.full} <= places
        assert len(places) <= MOST_PLACES
        assert max(rows for _, rows, _ in made) == min(max_running, 64)
        assert all(1 <= tokens <= min(step_tokens, max_model_len - TOKENS) for _, _, tokens in made)
    assert Path(BUNDLED).is_dir()
