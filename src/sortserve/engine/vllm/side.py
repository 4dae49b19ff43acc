"""The side dict on vLLM's SchedulerOutput: each scheduled request's place of the ladder, by request id.

SchedulerOutput is pickled whole on its way to the workers, so an attribute of our own arrives. It is the only thing that
the runners go by, so all tensor-parallel ranks lay out a step alike.
"""

from typing import Any

_ATTRIBUTE = "sortserve_places"


def set_places(output: Any, places: dict[str, int]) -> None:
    """Put the dict on a SchedulerOutput."""
    setattr(output, _ATTRIBUTE, places)


def places_of(output: Any) -> dict[str, int] | None:
    """The dict; None on an output that no scheduler of ours has made."""
    places: dict[str, int] | None = getattr(output, _ATTRIBUTE, None)
    return places
