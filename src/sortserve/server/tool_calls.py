"""Tool calls in the text of an answer, in the Hermes form: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

Text comes in pieces and leaves in pieces; tags and what is between them never do, unless what they enclose is no call
of a known function: then all of it is text after all.
"""

import json
import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field

OPENING = "<tool_call>"
CLOSING = "</tool_call>"

_BLANKS = " \t\r\n"
_OUTSIDE = re.compile(r'"|</?tool_call>')  # of strings: what ends a call, or opens a string
_IN_STRING = re.compile(r'["\r\n]|\\[^\r\n]')  # JSON strings hold no raw line ends: a broken one stops there


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One complete call. `arguments` is the text of a JSON object."""

    index: int  # among the calls of its answer
    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


class ToolCallParser:
    """Splits an answer into text and calls as it comes, reading each character once.

    Blanks before a call, and at the end of an answer with calls, are dropped: they only lay the calls out.
    """

    def __init__(self, names: Collection[str], *, parallel: bool = True) -> None:
        """`names` of the functions that may be called; not `parallel`: what follows the first call is thrown away."""
        self._names = names
        self._parallel = parallel
        self._held = ""  # blanks and the beginning of a tag; in a call, all of it from its tag on
        self._blanks = ""  # before the call under way
        self._in_call = False
        self._in_string = False  # at `_scanned`
        self._scanned = 0  # characters of `_held`
        self.num_calls = 0

    @property
    def complete(self) -> bool:
        """True once nothing that follows counts."""
        return self.num_calls > 0 and not self._parallel

    def push(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """The text that is certain now, and the calls that `text` completes."""
        self._held += text
        said, calls = "", list[ToolCall]()
        while not self.complete and (found := self._in_a_call() if self._in_call else self._outside()) is not None:
            if isinstance(found, ToolCall):
                calls.append(found)
            else:
                said += found
        return said, tuple(calls)

    def finish(self) -> str:
        """What was held back, when the answer ends."""
        rest = self._blanks + self._held
        self._held = self._blanks = ""
        return "" if self.complete or (self.num_calls and not rest.strip(_BLANKS)) else rest

    def _outside(self) -> str | None:
        """The text before the next call, or that certainly belongs to none; None: wait for more."""
        at = self._held.find(OPENING)
        if at >= 0:
            text = self._held[:at].rstrip(_BLANKS)
            self._blanks = self._held[len(text) : at]
            self._held = self._held[at:]
            self._in_call, self._in_string, self._scanned = True, False, len(OPENING)
            return text
        tag = next((size for size in range(len(OPENING) - 1, 0, -1) if self._held.endswith(OPENING[:size])), 0)
        text = self._held[: len(self._held) - tag].rstrip(_BLANKS)
        self._held = self._held[len(text) :]
        return text or None

    def _in_a_call(self) -> ToolCall | str | None:
        """The call once it is complete, or its text if it is none; None: wait for more."""
        while (found := (_IN_STRING if self._in_string else _OUTSIDE).search(self._held, self._scanned)) is not None:
            self._scanned = found.end()
            if len(found[0]) == 1:
                self._in_string = not self._in_string
            elif found[0] == CLOSING:
                return self._leave(found.end(), self._read(self._held[len(OPENING) : found.start()]))
            elif found[0] == OPENING:  # the one before it was no call's
                return self._leave(found.start(), None)
        self._scanned = max(self._scanned, len(self._held) - len(CLOSING) + 1)  # a tag or an escape may be cut in two
        return None

    def _leave(self, end: int, call: ToolCall | None) -> ToolCall | str:
        text = self._blanks + self._held[:end]
        self._held, self._blanks, self._in_call = self._held[end:], "", False
        self.num_calls += call is not None
        return text if call is None else call

    def _read(self, body: str) -> ToolCall | None:
        """The call that `body` is; None if it is not one."""
        try:
            value = json.loads(body)
            if not isinstance(value, dict) or value.get("name") not in self._names:
                return None
            arguments = value.get("arguments", {})
            if not isinstance(arguments, dict):
                return None
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            text.encode()  # an escaped lone surrogate is JSON, but no text that can be sent
        except (ValueError, TypeError, RecursionError):
            return None
        return ToolCall(self.num_calls, value["name"], text)
