"""`validators.py` for vLLM's model runner V2, which has an interface of its own."""

from typing import Any

from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from sortserve.engine.vllm.validators import check


class SubmodelArguments(LogitsProcessor):
    """Only checks."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """See `check`."""
        check(sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """No request's logits are changed."""
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        """As they are."""
        return logits
