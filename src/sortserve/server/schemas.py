"""Bodies of requests, with OpenAI's names. Types are strict: `"5"` is no number and 1 is no boolean.

Ranges that SamplingParams or Budget check are left to them, so that the same words answer for HTTP and Python.
Unknown fields are kept aside (`model_extra`) for a log line; `unsupported` names known ones that are not served.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sortserve.engine.errors import RequestError
from sortserve.engine.sampling import MAX_LOGIT_BIAS
from sortserve.server.budget_headers import BodyTerms
from sortserve.server.documented import add_limits
from sortserve.server.structured import MAX_TOOLS, ResponseFormat, ToolChoice, Tools

MAX_CHOICES = 16
MAX_SEQUENCES = 1024  # prompts x n of one request
MAX_MESSAGES = 4096

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]  # a larger one would overflow a float where it is compared
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]

# Validation ends at the first wrong item: an error for each of a million took 16 s, in which nobody else was served.
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
PromptTexts = Annotated[list[str], Field(max_length=MAX_SEQUENCES, fail_fast=True)]
PromptTokens = Annotated[list[TokenIds], Field(max_length=MAX_SEQUENCES, fail_fast=True)]


def _few_biases(value: object) -> object:
    """Raise RequestError for more than any request may have, before each is looked at."""
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias has {len(value)} tokens, at most {MAX_LOGIT_BIAS}", param="logit_bias")
    return value


class StreamOptions(BaseModel):
    """`stream_options`: usage in a chunk of its own at the end, or in every chunk."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationFields(BodyTerms):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra=add_limits)

    model: str | None = None
    max_tokens: Int64 | None = None
    max_completion_tokens: Int64 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    n: Int64 | None = None
    best_of: Int64 | None = None
    stop: str | Texts | None = None
    seed: Int64 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_tokens: Int64 | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_few_biases)] = None
    user: str | None = None
    priority: Int64 | None = None
    request_id: str | None = Field(default=None, min_length=1, max_length=128)
    echo: bool | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None

    def unsupported(self) -> Iterator[tuple[str, str]]:
        """(field, why) of each known field whose value is not served."""
        if self.functions:
            yield "functions", "is not supported any more; use tools"
        if self.best_of not in (None, 1, self.n):
            yield "best_of", f"is {self.best_of}, only the value of n is supported"
        if self.priority not in (None, 0):
            yield "priority", f"is {self.priority}, only 0 is supported"
        if self.stream_options is not None and not self.stream:
            yield "stream_options", "is only allowed when stream is true"

    def check(self) -> None:
        """Raise RequestError for the first thing that is not served."""
        for field, why in self.unsupported():
            raise RequestError(f"{field}: {why}", param=field)
        if not 1 <= self.num_choices <= MAX_CHOICES:
            raise RequestError(f"n is {self.num_choices}, must be in [1, {MAX_CHOICES}]", param="n")

    @property
    def num_choices(self) -> int:
        """`n` with its default."""
        return 1 if self.n is None else self.n

    def asked_max_tokens(self) -> int | None:
        """The output limit under whichever name it came. Raises RequestError if the two names disagree."""
        given = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(given) > 1:
            raise RequestError(
                f"max_tokens is {self.max_tokens}, max_completion_tokens is {self.max_completion_tokens}; "
                "give one of them",
                param="max_completion_tokens",
            )
        return given.pop() if given else None


class CompletionRequest(GenerationFields):
    """Body of POST /v1/completions."""

    prompt: str | PromptTexts | TokenIds | PromptTokens
    logprobs: Int64 | None = None
    suffix: str | None = None

    def unsupported(self) -> Iterator[tuple[str, str]]:
        """Also `suffix`: these models continue, they do not fill in."""
        yield from super().unsupported()
        for field in ("tools", "tool_choice"):
            if getattr(self, field) not in (None, [], "none", "auto"):
                yield field, "is only supported by /v1/chat/completions"
        if self.suffix:
            yield "suffix", "is not supported; leave it out"


class ContentPart(BaseModel):
    """One part of a message's content; only text is served."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: str | None = None


class MessageFunction(BaseModel):
    """The function of an earlier call; `arguments` is the text of a JSON object."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str
    arguments: str

    def for_template(self) -> dict[str, Any]:
        """The arguments as an object: templates write JSON themselves. Raises RequestError if they are none."""
        try:
            arguments = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"messages: the arguments of a call of {self.name[:64]!r} are not JSON: {error}", param="messages"
            ) from error
        if not isinstance(arguments, dict):
            raise RequestError(
                f"messages: the arguments of a call of {self.name[:64]!r} are no JSON object", param="messages"
            )
        return {"name": self.name, "arguments": arguments}


class MessageToolCall(BaseModel):
    """A call that an earlier answer made."""

    model_config = ConfigDict(strict=True, extra="allow")

    id: str | None = None
    type: Literal["function"] = "function"
    function: MessageFunction


class ChatMessage(BaseModel):
    """One message; further fields are handed to the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message with its content as one string. Raises RequestError for parts that are not text."""
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.type != "text" or part.text is None:
                    raise RequestError(
                        f"message content of type {part.type[:64]!r} is not supported, only text is", param="messages"
                    )
            content = "".join(part.text or "" for part in content)
        message = {**(self.model_extra or {}), "role": self.role, "content": "" if content is None else content}
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": call.type, "function": call.function.for_template()} for call in self.tool_calls
            ]
        return message


class ChatCompletionRequest(GenerationFields):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Int64 | None = None
    modalities: Texts | None = None
    audio: Any = None

    def unsupported(self) -> Iterator[tuple[str, str]]:
        """Also what only completions have, and other media."""
        yield from super().unsupported()
        if self.echo:
            yield "echo", "is only supported by /v1/completions"
        if self.top_logprobs is not None and not self.logprobs:
            yield "top_logprobs", "needs logprobs to be true"
        if self.modalities not in (None, ["text"]):
            yield "modalities", "only text is supported"
        if self.audio is not None:
            yield "audio", "is not supported"


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize."""

    model_config = ConfigDict(strict=True, extra="allow")

    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="allow")

    tokens: TokenIds
