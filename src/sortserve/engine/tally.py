"""What the scheduler counts, for metrics. Counters only grow."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from sortserve.engine.kv import KVManager
from sortserve.engine.protocol import EngineStats
from sortserve.engine.request import Request


@dataclass(slots=True)
class Tally:
    """Counts since the engine's start. Sub-models are named by their ids."""

    steps: int = 0
    prompt_tokens: int = 0
    refilled_tokens: int = 0
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # prompt tokens found
    generated: Counter[str] = field(default_factory=Counter)
    selected: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (sub-model, reason)
    switched: Counter[str] = field(default_factory=Counter)  # up, down
    dropped: Counter[str] = field(default_factory=Counter)  # refused, by reason

    def stats(self, requests: Iterable[Request], kv: KVManager) -> EngineStats:
        """A snapshot."""
        alive = list(requests)
        running = sum(request.running for request in alive)
        cached = kv.prefix.idle_pages
        return EngineStats(
            running=running,
            waiting=len(alive) - running,
            kv_pages_total=kv.pool.num_pages,
            kv_pages_used=kv.pool.num_pages - kv.pool.num_free - cached,
            kv_pages_cached=cached,
            steps=self.steps,
            preemptions=kv.events["preempted"],
            refilled_tokens=self.refilled_tokens,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            prefix_refused_width=kv.events["width_mismatch_refused"],
            prompt_tokens=self.prompt_tokens,
            generated_tokens=dict(self.generated),
            selected=dict(self.selected),
            switches=dict(self.switched),
            dropped=dict(self.dropped),
        )
