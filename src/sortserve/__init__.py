"""SortServe: an LLM inference server with budget-switchable sub-models.

    from sortserve import LLM, Budget
    LLM("path/to/model").generate(["def fibonacci(n):"], budget=Budget(total_ms=400))

Names are loaded on first use, so that importing a part does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sortserve.engine.budget import Budget as Budget
    from sortserve.engine.ladder import Ladder as Ladder
    from sortserve.engine.llm import LLM as LLM
    from sortserve.engine.llm import Completion as Completion
    from sortserve.engine.sampling import SamplingParams as SamplingParams
    from sortserve.engine.submodel import SubModel as SubModel

__version__ = "0.1.0"

_HOMES = {
    "LLM": "sortserve.engine.llm",
    "Completion": "sortserve.engine.llm",
    "Budget": "sortserve.engine.budget",
    "Ladder": "sortserve.engine.ladder",
    "SamplingParams": "sortserve.engine.sampling",
    "SubModel": "sortserve.engine.submodel",
}
__all__ = ["LLM", "Budget", "Completion", "Ladder", "SamplingParams", "SubModel", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sortserve' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
