"""What the backend refuses at its start: other releases of vLLM, changed methods, and configurations it cannot do."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from sortserve.engine.errors import StartupError
from sortserve.engine.vllm import compat
from sortserve.engine.vllm.architectures import ARCHITECTURES

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("found", ["0.31.2", "0.33.0", "0.33.0rc1", "1.0", "0.3"])
def test_other_releases_are_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda name: found)
    with pytest.raises(StartupError, match=r"vllm>=0\.32,<0\.33"):
        compat.check_version()


@pytest.mark.parametrize("found", ["0.32.0", "0.32.7", "0.32.0+cpu", "0.32.0.post1"])
def test_this_one_is_taken(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda name: found)
    compat.check_version()


def test_everything_that_is_overridden_is_as_it_was_read() -> None:
    """Of both model runners; the second one runs nowhere else in this suite."""
    compat.check_version()
    compat.check_signatures(compat.expected_signatures())
    compat.check_signatures(compat.expected_signatures_v2())
    compat.check_signatures(compat.expected_signatures_of_models())
    import sortserve.engine.vllm.runner_v2  # noqa: F401 - that it can be imported is all that is seen of it here


def test_a_changed_method_is_named() -> None:
    class Changed:
        def schedule(self, other: int) -> None: ...

    with pytest.raises(StartupError, match=r"Changed\.schedule takes self, other, expected self, throttle_prefills"):
        compat.check_signatures([(Changed, "schedule", ("self", "throttle_prefills"))])
    with pytest.raises(StartupError, match="add_request is gone"):
        compat.check_signatures([(Changed, "add_request", ("self", "request"))])


def test_the_mixins_override_nothing_that_is_not_checked() -> None:
    """A method of vLLM's that we begin to override must come into the list."""
    from sortserve.engine.vllm.model.families import SortedLlamaForCausalLM, SortedMixin
    from sortserve.engine.vllm.runner_v1 import SubmodelCPURunner, SubmodelRunnerMixin
    from sortserve.engine.vllm.runner_v2 import SubmodelRunnerV2, SubmodelState
    from sortserve.engine.vllm.sched import SubmodelMixin, SubmodelScheduler
    from sortserve.engine.vllm.worker import SubmodelCPUWorker, SubmodelWorker

    lists = compat.expected_signatures(), compat.expected_signatures_v2(), compat.expected_signatures_of_models()
    checked = {name for expected in lists for _, name, _ in expected}
    stock = {
        SubmodelMixin: SubmodelScheduler.__mro__[2:],
        SubmodelRunnerMixin: SubmodelCPURunner.__mro__[2:],
        SubmodelRunnerV2: SubmodelRunnerV2.__mro__[1:],
        SubmodelState: SubmodelState.__mro__[1:],
        SubmodelWorker: SubmodelWorker.__mro__[1:],
        SubmodelCPUWorker: SubmodelCPUWorker.__mro__[1:],
        SortedMixin: SortedLlamaForCausalLM.__mro__[2:],
    }
    for ours, theirs in stock.items():
        overridden = {
            name
            for name, value in vars(ours).items()
            if callable(value) and not name.startswith("__") and any(hasattr(base, name) for base in theirs)
        }
        assert overridden <= checked, ours.__name__
    assert SortedMixin.forward is not None


def configuration(**changes: Any) -> SimpleNamespace:
    """Of vLLM, as far as it is looked at, all allowed but for `changes`: dotted names with __ for the dot."""
    made = SimpleNamespace(
        parallel_config=SimpleNamespace(
            use_ubatching=False,
            enable_dbo=False,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_expert_parallel=False,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            worker_cls="sortserve.engine.vllm.worker.SubmodelWorker",
        ),
        scheduler_config=SimpleNamespace(scheduler_cls="sortserve.engine.vllm.sched.SubmodelScheduler"),
        compilation_config=SimpleNamespace(
            mode=SimpleNamespace(name="NONE"), cudagraph_mode=SimpleNamespace(name="NONE")
        ),
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(architectures=[ARCHITECTURES["LlamaForCausalLM"]]), is_moe=False
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        lora_config=None,
        speculative_config=None,
        kv_transfer_config=None,
    )
    for name, value in changes.items():
        *parts, last = name.split("__")
        owner = made
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    return made


@pytest.mark.parametrize(
    ("change", "value", "told"),
    [
        ("lora_config", object(), "LoRA"),
        ("parallel_config__enable_dbo", True, "dual batch overlap"),
        ("parallel_config__decode_context_parallel_size", 2, "context parallelism"),
        ("parallel_config__prefill_context_parallel_size", 2, "context parallelism"),
        ("speculative_config", object(), "EAGLE"),
        ("parallel_config__enable_expert_parallel", True, "mixture of experts"),
        ("model_config__is_moe", True, "mixture of experts"),
        ("parallel_config__pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config__data_parallel_size", 2, "data parallelism"),
        ("parallel_config__worker_cls", "auto", "--worker-cls"),
        ("parallel_config__worker_cls", "vllm.v1.worker.gpu_worker.Worker", "--worker-cls"),
        ("scheduler_config__scheduler_cls", None, "--scheduler-cls"),
        ("compilation_config__cudagraph_mode", SimpleNamespace(name="FULL"), "--enforce-eager"),
        ("cache_config__kv_sharing_fast_prefill", True, "kv-sharing-fast-prefill"),
        ("kv_transfer_config", object(), "KV connectors"),
        ("model_config__hf_config__architectures", ["LlamaForCausalLM"], "--hf-overrides"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(change: str, value: object, told: str) -> None:
    assert compat.refusals(configuration()) == []
    (message,) = compat.refusals(configuration(**{change: value}))
    assert told in message


def test_the_fields_that_are_looked_at_exist_in_vllm() -> None:
    """A field that vLLM renames would make a refusal an AttributeError at start, or silence."""
    from vllm.config import CacheConfig, CompilationConfig, ParallelConfig, SchedulerConfig, VllmConfig

    looked_at = configuration()
    for owner, name in (
        (ParallelConfig, "parallel_config"),
        (CompilationConfig, "compilation_config"),
        (SchedulerConfig, "scheduler_config"),
        (CacheConfig, "cache_config"),
    ):
        for field in vars(getattr(looked_at, name)):
            assert field in owner.__dataclass_fields__ or hasattr(owner, field), f"{name}.{field}"
    for field in vars(looked_at):
        assert field in VllmConfig.__dataclass_fields__


def test_a_plugin_that_did_not_run_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import ModelRegistry

    from sortserve.engine.vllm.plugin import register

    register()
    register()  # vLLM calls it several times
    compat.check_registered()
    monkeypatch.setattr(ModelRegistry, "get_supported_archs", lambda: {"LlamaForCausalLM"})
    with pytest.raises(StartupError, match="VLLM_PLUGINS"):
        compat.check_registered()


def test_ours_is_imported_without_vllm() -> None:
    """What the front end needs before an engine starts."""
    before = {name for name in sys.modules if name.startswith("vllm")}
    import sortserve.engine.vllm.configuration
    import sortserve.engine.vllm.deciding
    import sortserve.engine.vllm.launch
    import sortserve.engine.vllm.plugin
    import sortserve.engine.vllm.tracking  # noqa: F401

    assert {name for name in sys.modules if name.startswith("vllm")} == before
