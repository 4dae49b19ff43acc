"""Checks our arguments in a user's own `vllm serve`, where a mistake is a 400. For model runner V1 (CPU):

    vllm serve MODEL ... --logits-processors sortserve.engine.vllm.validators:SubmodelArguments

and `validators_v2:SubmodelArguments` for V2 (GPUs). By name, not by entry point: a V1 class at vLLM's entry point makes
every engine with V2 refuse to start. The class changes no logits. Ids are looked up by the middleware, which has the
ladder; what is still unknown in the scheduler counts as not asked for.
"""

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessor

from sortserve.engine.errors import RequestError
from sortserve.engine.vllm.translate import check_extra_args


def check(sampling_params: Any) -> None:
    """Raise vLLM's own error, which its front end answers with a 400."""
    try:
        check_extra_args(sampling_params.extra_args or {})
    except RequestError as error:
        raise VLLMValidationError(error.message, parameter=error.param) from error


class SubmodelArguments(LogitsProcessor):
    """Only checks."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        """Nothing is kept."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """See `check`."""
        check(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """It changes nothing."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """There is none."""

    def apply(self, logits: Any) -> Any:
        """As they are."""
        return logits
