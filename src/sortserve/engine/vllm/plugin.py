"""vLLM's entry point `vllm.general_plugins`: registers our model classes by name, in every process of an engine.

vLLM calls it several times in a tree of processes, and only logs if it fails, so it is light and may be called again;
`compat.check_start` finds out if it did not run.
"""

from sortserve.engine.vllm.architectures import ARCHITECTURES, MODULE


def register() -> None:
    """Register the classes; they are imported when a model is loaded."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES.values():
        if name not in known:
            ModelRegistry.register_model(name, f"{MODULE}:{name}")
