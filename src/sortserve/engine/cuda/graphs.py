"""How segments and the head are run: call by call, or by CUDA graphs of padded row counts.

One graph for each (segment, bucket of rows), and for the head one for each bucket of logit rows. A graph reads what its
rows are from static buffers, so it serves every mix of depths, widths, contexts and refills: a switch of sub-models
replays the same graphs. `Replay` without capture runs the same padded calls on any device, which is how the padding is
tested where there is no GPU.
"""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from sortserve.engine.cuda.buffers import StepBuffers
from sortserve.engine.cuda.forward import Forward, HeadOutput

T = TypeVar("T")

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Row counts that graphs are made for. Up to 64 rows a layer is bound by its weights, so padding costs next to nothing."""
LONGEST_RUN = 16
"""Rows of one sequence that a graph takes: there each row reads the context for itself, which for a chunk of a prompt
is what its tiles are for. A step with a longer run has hundreds of rows and milliseconds a layer; launches hide in it."""


def buckets_for(max_rows: int) -> tuple[int, ...]:
    """Buckets up to the first that holds so many rows, at least 16 and as far as there are any."""
    wanted = max(max_rows, LONGEST_RUN)
    enough = [bucket for bucket in BUCKETS if bucket >= wanted]
    return tuple(bucket for bucket in BUCKETS if bucket <= (enough[0] if enough else BUCKETS[-1]))


class Replay:
    """Padded calls over one set of static buffers; captured as CUDA graphs if `capture`."""

    def __init__(self, forward: Forward, buffers: StepBuffers, buckets: Sequence[int], *, capture: bool) -> None:
        assert buckets[-1] == buffers.rows
        self.buffers = buffers
        self.buckets = tuple(buckets)
        self.capture_seconds = 0.0
        self.capture_bytes = 0
        self._forward = forward
        self._segments: dict[tuple[int, int], Callable[[], object]] = {}
        self._heads: dict[int, tuple[Callable[[], object], HeadOutput]] = {}
        self._capture = capture

    def capture_all(self, num_segments: int) -> None:
        """Make every graph, the largest first, so that the others fit into its memory; say what it took."""
        device = self.buffers.hidden.device
        began, free = time.monotonic(), torch.cuda.mem_get_info(device)[0]
        pool = torch.cuda.graph_pool_handle()  # one: graphs never run at the same time
        for bucket in reversed(self.buckets):
            for segment in range(num_segments):
                call = self._segment_call(segment, bucket)
                call()  # compiles what is not compiled yet; padding rows only, so nothing is written
                self._segments[segment, bucket] = _captured(call, pool)[0]
            self._forward.head(bucket, self.buffers)
            self._heads[bucket] = _captured(partial(self._forward.head, bucket, self.buffers), pool)
        torch.cuda.synchronize(device)
        self.capture_seconds = time.monotonic() - began
        self.capture_bytes = max(0, free - torch.cuda.mem_get_info(device)[0])
        logger.info(
            "captured %d CUDA graphs (%d segments and the head at %s rows) in %.1f s, %.0f MiB",
            len(self._segments) + len(self._heads),
            num_segments,
            "/".join(map(str, self.buckets)),
            self.capture_seconds,
            self.capture_bytes / (1 << 20),
        )

    def fits(self, rows: int, longest_run: int) -> bool:
        """Whether a step of so many rows can be run by these calls."""
        return rows <= self.buckets[-1] and longest_run <= LONGEST_RUN

    def segment(self, segment: int, rows: int) -> None:
        """Run a segment for the first `rows` rows, and padding."""
        bucket = self._bucket(rows)
        if self._capture:
            self._segments[segment, bucket]()
        else:
            self._segment_call(segment, bucket)()

    def head(self, rows: int) -> HeadOutput:
        """Logits of so many rows; those of padding are cut off."""
        bucket = self._bucket(rows)
        if self._capture:
            replay, output = self._heads[bucket]
            replay()
        else:
            output = self._forward.head(bucket, self.buffers)
        return HeadOutput(output.logits[:rows], output.ids[:rows], output.logprobs[:rows])

    def _bucket(self, rows: int) -> int:
        return next(bucket for bucket in self.buckets if bucket >= rows)

    def _segment_call(self, segment: int, bucket: int) -> Callable[[], None]:
        return partial(self._forward.segment, segment, bucket, self.buffers)


def _captured(call: Callable[[], T], pool: Any) -> tuple[Callable[[], object], T]:
    """The call as a graph, and the tensors that it returns, which every replay fills anew."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = call()
    return graph.replay, output
