"""The JSON of answers and of stream chunks: OpenAI's legacy completions, and chat completions."""

from collections.abc import Sequence
from typing import Any, Protocol

from sortserve.engine.text import Tokenizer
from sortserve.server.answer import Entry
from sortserve.server.prepare import Job
from sortserve.server.tool_calls import ToolCall

Entries = Sequence[Entry] | None  # None: no log-probabilities were asked for
_LOWEST = -9999.0  # JSON has no minus infinity


class Format(Protocol):
    """How one endpoint spells its choices."""

    whole_object: str
    chunk_object: str

    def opening(self, place: int) -> dict[str, Any] | None:
        """The choice of a first chunk without text; None if there is none."""
        ...

    def delta(
        self, place: int, text: str, entries: Entries, finish_reason: str | None, calls: Sequence[ToolCall] = ()
    ) -> dict[str, Any]:
        """The choice of a chunk."""
        ...

    def choice(
        self, place: int, text: str, entries: Entries, finish_reason: str, calls: Sequence[ToolCall] = ()
    ) -> dict[str, Any]:
        """The choice of a whole answer."""
        ...


class CompletionFormat:
    """`text_completion`, with `logprobs` as four parallel lists."""

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def opening(self, place: int) -> None:
        """Completions begin with text."""
        return None

    def delta(
        self, place: int, text: str, entries: Entries, finish_reason: str | None, calls: Sequence[ToolCall] = ()
    ) -> dict[str, Any]:
        """Chunks and whole answers have the same shape. There are no `calls` here."""
        logprobs = self._logprobs(entries) if entries else None
        return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def choice(
        self, place: int, text: str, entries: Entries, finish_reason: str, calls: Sequence[ToolCall] = ()
    ) -> dict[str, Any]:
        """The same with empty lists where nothing was generated."""
        logprobs = None if entries is None else self._logprobs(entries)
        return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        piece = self._tokenizer.piece
        return {
            "tokens": [piece(entry.token) for entry in entries],
            "token_logprobs": [None if entry.logprob is None else _finite(entry.logprob.logprob) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": [entry.start for entry in entries],
        }

    def _top(self, entry: Entry) -> dict[str, float] | None:
        """Alternatives best first, the token itself always among them."""
        if entry.logprob is None:
            return None
        top: dict[str, float] = {}
        for token, logprob in (*entry.logprob.top, (entry.token, entry.logprob.logprob)):
            top.setdefault(self._tokenizer.piece(token), _finite(logprob))
        return top


class ChatFormat:
    """`chat.completion`, with `logprobs` as a list of objects."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def opening(self, place: int) -> dict[str, Any] | None:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        return {"index": place, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(
        self, place: int, text: str, entries: Entries, finish_reason: str | None, calls: Sequence[ToolCall] = ()
    ) -> dict[str, Any]:
        """The choice of a chunk."""
        logprobs = self._logprobs(entries) if entries else None
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{"index": call.index, **_call(call)} for call in calls]
        return {"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def choice(
        self, place: int, text: str, entries: Entries, finish_reason: str, calls: Sequence[ToolCall] = ()
    ) -> dict[str, Any]:
        """The choice of a whole answer."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text or None
            message["tool_calls"] = [_call(call) for call in calls]
        logprobs = None if entries is None else self._logprobs(entries)
        return {"index": place, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        content = []
        for entry in entries:
            assert entry.logprob is not None, "only a prompt's first token has no log-probability"
            top = [self._token(token, logprob) for token, logprob in entry.logprob.top]
            content.append({**self._token(entry.token, entry.logprob.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        return {"token": self._tokenizer.piece(token), "logprob": _finite(logprob), "bytes": list(raw)}


def format_of(job: Job, tokenizer: Tokenizer) -> Format:
    """The format of the job's endpoint."""
    return ChatFormat(tokenizer) if job.endpoint == "chat" else CompletionFormat(tokenizer)


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
