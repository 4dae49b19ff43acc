"""Policies by name."""

from collections.abc import Callable, Mapping
from typing import Any

from sortserve.engine.policies.baselines import AdmissionOnly, GlobalCap, RejectOnly
from sortserve.engine.policies.confidence import Confidence
from sortserve.engine.policies.fixed import FixedPolicy
from sortserve.engine.policies.protocol import Policy
from sortserve.engine.policies.slack import Slack
from sortserve.engine.policies.slackfit import SlackFit
from sortserve.engine.rungs import Rungs


def _fixed(rungs: Rungs, place: int | None = None) -> FixedPolicy:
    return FixedPolicy(rungs.full if place is None else place)


_MAKERS: Mapping[str, Callable[..., Policy]] = {
    "fixed": _fixed,
    "reject-only": lambda rungs, **options: RejectOnly(**options),
    "admission-only": lambda rungs, **options: AdmissionOnly(**options),
    "global-cap": lambda rungs, **options: GlobalCap(**options),
    "slackfit": lambda rungs, **options: SlackFit(**options),
    "confidence": lambda rungs, **options: Confidence(**options),
    "slack": lambda rungs, **options: Slack(**options),
}
POLICY_NAMES = tuple(_MAKERS)


def make_policy(name: str, rungs: Rungs, **options: Any) -> Policy:
    """A policy by name; `options` are its constructor's. Raises ValueError listing the names, or saying what is wrong."""
    if name not in _MAKERS:
        raise ValueError(f"no policy {name!r}; there are: {', '.join(POLICY_NAMES)}")
    try:
        return _MAKERS[name](rungs, **options)
    except TypeError as error:
        raise ValueError(f"policy {name!r}: {error}") from error
