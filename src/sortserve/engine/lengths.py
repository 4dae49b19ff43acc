"""How long an answer is expected to become, from the answers there were."""

from collections import deque

import numpy as np

from sortserve.engine.request import Request
from sortserve.engine.rungs import Bools, Ints

PRIOR_TOKENS = 256
"""Length expected before any answer has finished: few answers are longer, and max_tokens often is what is left of the
context."""
RENEW_TOKENS = 16
"""An answer that is longer than expected is expected to go on for so many tokens, again and again."""


class AnswerLengths:
    """90th percentile of the last answers' lengths."""

    def __init__(self, keep: int = 256) -> None:
        self._lengths: deque[int] = deque(maxlen=keep)
        self._expected = float(PRIOR_TOKENS)

    def observe(self, num_output: int) -> None:
        """An answer has ended by itself."""
        self._lengths.append(num_output)
        self._expected = float(np.quantile(self._lengths, 0.9))

    def expected_left(self, request: Request) -> int:
        """Output tokens that the request is expected to still produce, at least 1; exact with `ignore_eos`."""
        if request.asked.sampling.ignore_eos:
            return max(1, request.tokens_left)
        left = max(self._expected - request.num_output, RENEW_TOKENS)
        return int(max(1, min(request.tokens_left, left)))

    def expected_left_of(self, num_output: Ints, tokens_left: Ints, ignore_eos: Bools) -> Ints:
        """`expected_left` in arrays, [n]."""
        left = np.maximum(self._expected - num_output, RENEW_TOKENS).astype(np.int64)
        return np.maximum(1, np.where(ignore_eos, tokens_left, np.minimum(tokens_left, left)))
