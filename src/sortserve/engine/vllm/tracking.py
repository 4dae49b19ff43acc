"""What the scheduler knows of a request beyond vLLM's own: its limits, where it runs, and what its K/V were made by.

Pure: no torch, no vLLM. Nothing here raises on what a client sent; the front end refuses it, and what comes through by
another way is clamped, since an exception in vLLM's scheduler ends the engine.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sortserve.engine.budget import Budget
from sortserve.engine.errors import NotFoundError, RequestError
from sortserve.engine.ladder import Ladder
from sortserve.engine.policies.protocol import NEVER_RAN
from sortserve.engine.settings import SettingsTable
from sortserve.engine.vllm.deciding import Standing


@dataclass
class Tracked:
    """One request. `used`: the places that computed the K/V it holds; empty while it holds none."""

    floor: int
    ceiling: int
    pinned: bool
    exact: bool
    budget: Budget | None
    arrival: float  # seconds on time.monotonic()
    user_salt: str | None  # the client's own prefix-cache salt
    place: int = NEVER_RAN
    wanted: int = NEVER_RAN  # place of the next step, as decided; the salt follows it
    reason: int = 0
    used: set[int] = field(default_factory=set)
    runs: list[list[Any]] = field(default_factory=list)  # [ladder id, output tokens], in order
    switches: int = 0
    promotions: int = 0  # for which it was preempted
    preemptions: int = 0  # for others' memory
    recomputed_tokens: int = 0
    tokens_since_switch: int = 0
    cached: int = 0  # tokens of its prompt that were found in the prefix cache
    foretold: tuple[float, bool] | None = None  # before it began; see deciding.Answer
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    refused: bool = False
    cut: bool = False

    @property
    def num_output(self) -> int:
        """Output tokens that were told."""
        return sum(int(count) for _, count in self.runs)

    def count(self, submodel_id: str, tokens: int) -> None:
        """`tokens` more were made by `submodel_id`."""
        if self.runs and self.runs[-1][0] == submodel_id:
            self.runs[-1][1] += tokens
        elif tokens:
            self.runs.append([submodel_id, tokens])
        self.tokens_since_switch += tokens


def read_request(
    arguments: Mapping[str, Any] | None, ladder: Ladder, arrival: float, now: tuple[float, float], salt: str | None
) -> Tracked:
    """A request from vLLM's `extra_args`; whatever is wrong there is left out.

    `arrival` in seconds on `time.time()`; `now`: time.time() and time.monotonic() at this moment.
    """
    given = arguments or {}
    pinned = _place(given.get("sortserve_submodel"), ladder)
    ceiling = _place(given.get("sortserve_ceiling"), ladder)
    ceiling = ladder.full if ceiling is None else ceiling
    floor = _place(given.get("sortserve_floor"), ladder)
    budget = _budget(given.get("sortserve_budget"), given.get("sortserve_slo"))
    unasked = ceiling if budget is None else ladder.default_floor  # without a budget: the best there is
    floor = min(unasked if floor is None else floor, ceiling)
    if pinned is not None:
        floor = ceiling = pinned
    mode = given.get("sortserve_kv")
    if mode not in ("exact", "reuse"):
        mode = "reuse" if pinned is None and budget is not None else "exact"
    sent = given.get("sortserve_arrival")
    wall = float(sent) if isinstance(sent, int | float) and 0 < sent <= now[0] else min(arrival, now[0])
    return Tracked(floor, ceiling, pinned is not None, mode == "exact", budget, now[1] - (now[0] - wall), salt)


def keeps_kv(tracked: Tracked, place: int, settings: SettingsTable) -> bool:
    """Whether a request can run `place` next with the K/V it has.

    Every place that made them must have run all layers that `place` runs; under `kv: exact` also in the same way.
    """
    target = settings.targets[place]
    for used in tracked.used:
        made = settings.targets[used]
        if len(made) < len(target) or (tracked.exact and made[: len(target)] != target):
            return False
    return True


def salts(ladder: Ladder) -> tuple[str, ...]:
    """The prefix-cache salts of the places of the ladder."""
    return tuple(_digest(repr(entry.submodel)) for entry in ladder.entries)


def salt_of(tracked: Tracked, request_id: str, of_places: Sequence[str], settings: SettingsTable) -> str:
    """The prefix-cache salt of a request for the place it runs next.

    Blocks are shared only among requests whose K/V were all made by one sub-model: a shallow one has garbage in deeper
    layers, and widths and skips change every layer above them. A request that kept K/V of other widths (`reuse`) shares
    its blocks with nobody.
    """
    place = tracked.wanted
    target = settings.targets[place]
    mixed = any(settings.targets[used][: len(target)] != target for used in tracked.used)
    made_by = _digest(f"only {request_id}") if mixed else of_places[place]
    own = "" if tracked.user_salt is None else tracked.user_salt
    return f"{own}|sortserve {made_by}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _place(value: object, ladder: Ladder) -> int | None:
    if not isinstance(value, str) or value == "auto":
        return None
    try:
        return ladder.place(value)
    except NotFoundError:
        return None


def _budget(value: object, policy: object) -> Budget | None:
    """[ttft_ms, tpot_ms, total_ms], -1 where not given."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    if not all(isinstance(limit, int | float) for limit in value):
        return None
    try:
        ttft, tpot, total = (None if limit < 0 else float(limit) for limit in value)
        known = policy if policy in ("best-effort", "strict", "cut") else "best-effort"
        return Budget(total, ttft, tpot, known)  # type: ignore[arg-type]
    except (RequestError, OverflowError):
        return None


def standing(request_id: str, tracked: Tracked, request: Any, running: bool) -> Standing:
    """What a decider is shown of `request`, an object of vLLM's."""
    return Standing(
        request_id,
        tracked.place,
        tracked.floor,
        tracked.ceiling,
        tracked.pinned,
        running,
        tracked.arrival,
        tracked.budget,
        tracked.exact,
        request.num_prompt_tokens,
        request.num_output_tokens,
        request.num_computed_tokens,
        request.max_tokens,
        tracked.first_token,
        tracked.last_token,
        tracked.tokens_since_switch,
        frozenset(tracked.used),
        request.sampling_params is not None and request.sampling_params.ignore_eos,
        tracked.cached,
    )
