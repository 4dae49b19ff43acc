"""Text that is cut out of a stream of tokens: whole characters only, and nothing of a stop string.

A token is a run of bytes. Where the tokenizer's decoder says which (byte-level BPE, and SentencePiece with byte
fallback), the bytes go through an incremental UTF-8 decoder: 10 us per token, and exact. `tokenizers.DecodeStream` was
not used: it decodes anew every token since the last whole character, so 4,000 stray continuation bytes took it 4 s.
"""

import codecs
from collections.abc import Sequence

from sortserve.engine.text import Tokenizer

_HELD_TOKENS = 8  # a character has at most four bytes; more undecodable tokens than this are given up on


class TextStream:
    """Text of one answer as its tokens come: whole characters only, and nothing that may become a stop string.

    What has been returned so far, put together, is the decoding of all tokens (special ones left out) up to the first
    stop string. Cost per token does not depend on how many came before.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        """`context` are the tokens before the first one: with some, a leading space belongs to the answer and stays."""
        self._tokenizer = tokenizer
        self._matcher = _StopMatcher(stop)
        make = _ByteText if tokenizer.exact_bytes else _WindowText
        self._decoder = make(tokenizer, context)
        self.decoded_chars = 0  # out of the decoder, returned or held back
        self.emitted_chars = 0  # returned

    @property
    def stopped(self) -> str | None:
        """The stop string that was hit; from then on nothing is returned."""
        return self._matcher.hit

    def push(self, token: int) -> str:
        """The text that this token makes certain; may be empty."""
        if self.stopped is not None or token in self._tokenizer.special_ids:
            return ""
        return self._emit(self._decoder.push(token))

    def finish(self) -> str:
        """What was held back: an incomplete character as U+FFFD, and the beginning of a stop string that never came."""
        if self.stopped is not None:
            return ""
        text = self._emit(self._decoder.finish())
        rest = self._matcher.finish()
        self.emitted_chars += len(rest)
        return text + rest

    def _emit(self, text: str) -> str:
        self.decoded_chars += len(text)
        certain = self._matcher.push(text)
        self.emitted_chars += len(certain)
        return certain


class _StopMatcher:
    """Finds the first stop string in a text that comes in pieces, holding back only what could still become one.

    Knuth-Morris-Pratt: per stop string the length of its longest prefix that the text ends in, so that a character
    costs O(1) amortized, whatever the strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.hit: str | None = None
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """The part of the text so far that is now certain and was not returned before."""
        for position, char in enumerate(text if self._stops else ""):
            for place, (stop, borders) in enumerate(self._stops):
                length = self._matched[place]
                while length and stop[length] != char:
                    length = borders[length - 1]
                self._matched[place] = length + (stop[length] == char)
            hits = [s for (s, _), length in zip(self._stops, self._matched, strict=True) if length == len(s)]
            if hits:
                self.hit = max(hits, key=len)  # of two that end here the longer one began first
                return (self._held + text[: position + 1])[: -len(self.hit)]
        pending = self._held + text
        certain = len(pending) - max(self._matched, default=0)
        self._held = pending[certain:]
        return pending[:certain]

    def finish(self) -> str:
        """What is held back when the text ends."""
        held, self._held = self._held, ""
        return held


def _borders(stop: str) -> list[int]:
    """Per prefix of `stop` the length of its longest proper border (KMP's failure function)."""
    borders = [0] * len(stop)
    length = 0
    for place in range(1, len(stop)):
        while length and stop[length] != stop[place]:
            length = borders[length - 1]
        length += stop[length] == stop[place]
        borders[place] = length
    return borders


class _ByteText:
    """Incremental decoding where every token has bytes of its own."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.strips_first_space and not context

    def push(self, token: int) -> str:
        raw = self._tokenizer.token_bytes(token)
        if self._strip and raw:
            raw = raw.removeprefix(b" ")
            self._strip = False
        return self._utf8.decode(raw)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowText:
    """Incremental decoding for any other decoder: what a short window of tokens decodes to, less what it did before."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(context[-_HELD_TOKENS:])
        self._num_read = len(self._tokens)
        self._before = tokenizer.decode(self._tokens)

    def push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith("\ufffd") and len(self._tokens) - self._num_read < _HELD_TOKENS:
            return ""
        return self._advance(text)

    def finish(self) -> str:
        return self._advance(self._tokenizer.decode(self._tokens))

    def _advance(self, text: str) -> str:
        new = text[len(self._before) :]
        self._tokens = self._tokens[self._num_read :]
        self._num_read = len(self._tokens)
        self._before = self._tokenizer.decode(self._tokens)
        return new
