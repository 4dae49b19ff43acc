"""Attention metadata by segment, for both of vLLM's model runners: layers of one step may have different batches."""

from collections.abc import Callable, Sequence
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index

from sortserve.engine.errors import StartupError
from sortserve.engine.vllm.plan import Segment, StepPlan


def by_segment(plan: StepPlan, every: dict[str, Any], fewer: Callable[[Segment], dict[str, Any]]) -> dict[str, Any]:
    """Metadata by layer name: `every` where all requests are in a layer, `fewer(segment)` from where on some have left.

    Layers behind the last segment keep `every`; nobody reads theirs.
    """
    found = dict(every)
    requests, current = len(plan.places), every
    for segment in plan.segments:
        if segment.num_requests < requests:
            requests, current = segment.num_requests, fewer(segment)
        for name in every:
            if current is not every and segment.start <= extract_layer_index(name) < segment.end:
                found[name] = current[name]
    return found


def check_order(thresholds: Sequence[int | None], bounds: Sequence[int]) -> None:
    """Raise StartupError if an attention backend orders rows itself, decodes first, and the ladder has exits."""
    if len(bounds) > 2 and any(threshold is not None for threshold in thresholds):
        raise StartupError(
            "this attention backend wants decodes first, SortServe the deepest requests first; use another one, for "
            "example --attention-backend FLASH_ATTN"
        )
