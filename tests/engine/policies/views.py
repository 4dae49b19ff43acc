"""Views by hand: a ladder, a synthetic machine, and requests in any state."""

from dataclasses import replace
from typing import Any

import numpy as np

from sortserve.engine.cost import CostTable
from sortserve.engine.policies.protocol import NEVER_RAN, View
from sortserve.engine.rungs import Rungs
from sortserve.engine.settings import SettingsTable
from tests.engine.small import LADDER, small_ladder

DEPTHS = Rungs.of(small_ladder((64,)), SettingsTable(small_ladder((64,))))
"""Four depths at full width: 1, 3, 4, 6 layers, quality 1/6, 1/2, 2/3, 1."""
WIDTHS = Rungs.of(LADDER, SettingsTable(LADDER))
"""The same depths at two widths each."""


def machine(rungs: Rungs, *, row: float = 1e-4, weights: float = 1e-3, base: float = 1e-3) -> CostTable:
    """Seconds: `base` a step, and per layer the longer of `weights` and `row` x rows."""
    knee = weights / row
    buckets = np.array(sorted({1.0, knee, 4096.0}))
    layer = np.maximum(weights, row * buckets)
    return CostTable(rungs.layers, buckets, layer, 0 * layer, 0 * layer, base=base)


def view_of(
    *requests: dict[str, Any],
    rungs: Rungs = DEPTHS,
    cost: CostTable | None = None,
    now: float = 0.0,
    step_tokens: int = 64,
    max_running: int = 64,
    capabilities: frozenset[str] = frozenset({"refill", "sit_out", "reuse"}),
) -> View:
    """A view of requests, each given by what differs from `request`'s defaults."""
    full = [request(rungs, **fields) for fields in requests]

    def column(name: str, kind: type) -> Any:
        return np.array([fields[name] for fields in full], kind).reshape(len(full), *np.shape(_EMPTY(rungs)[name]))

    whole = ("place", "floor", "ceiling", "num_prompt", "num_output", "expected_left", "computed", "cached")
    return View(
        now=now,
        rungs=rungs,
        cost=cost or machine(rungs),
        step_tokens=step_tokens,
        max_running=max_running,
        capabilities=capabilities,
        **{name: column(name, np.int64) for name in (*whole, "tokens_since_switch")},
        **{name: column(name, np.bool_) for name in ("running", "resumable", "exact", "strict", "budgeted")},
        **{name: column(name, np.float64) for name in ("arrival", "first_due", "last_due", "next_due", "confidence")},
    )


def _EMPTY(rungs: Rungs) -> dict[str, Any]:  # noqa: N802
    return request(rungs)


def request(rungs: Rungs, **fields: Any) -> dict[str, Any]:
    """A request that just came: 32 tokens, 16 expected, any place, no deadline. `total` and `ttft` are seconds from its
    arrival; `ran` puts it at a place with all but its last token computed there."""
    values: dict[str, Any] = {
        "arrival": 0.0,
        "running": False,
        "place": NEVER_RAN,
        "floor": 0,
        "ceiling": rungs.full,
        "num_prompt": 32,
        "num_output": 0,
        "expected_left": 16,
        "computed": np.zeros(rungs.num_segments, np.int64),
        "cached": np.zeros(len(rungs.exits), np.int64),
        "resumable": True,
        "exact": False,
        "strict": False,
        "first_due": np.inf,
        "last_due": np.inf,
        "tokens_since_switch": 100,
        "confidence": np.nan,
    }
    arrival = fields.get("arrival", 0.0)
    if "total" in fields:
        values["last_due"] = arrival + fields.pop("total")
    if "ttft" in fields:
        values["first_due"] = arrival + fields.pop("ttft")
    if "ran" in fields:
        place = fields.pop("ran")
        known = fields.get("num_prompt", 32) + fields.get("num_output", 1)
        values |= {"place": place, "running": True, "num_output": 1}
        values["computed"] = np.where(np.arange(rungs.num_segments) < rungs.exits[place], known - 1, 0)
    values |= fields
    nearest = min(values["last_due"], values["first_due"] if values["num_output"] == 0 else np.inf)
    values.setdefault("next_due", nearest)
    values.setdefault("budgeted", bool(np.isfinite(nearest)))
    return values


def dealt(view: View, **columns: Any) -> View:
    """The same with other columns."""
    return replace(view, **columns)
