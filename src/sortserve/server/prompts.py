"""Prompts and messages as token ids, checked to be there and to fit: what is too long is refused before it costs time."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sortserve.engine.errors import ContextLengthError, RequestError
from sortserve.engine.protocol import EngineInfo
from sortserve.engine.text import LONG_TEXT_CHARS
from sortserve.server.state import ServerState

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; `text` as the client wrote it, None where it came as token ids."""

    tokens: tuple[int, ...]
    text: str | None = None


async def read_prompts(
    prompt: str | list[str] | list[int] | list[list[int]], max_tokens: int, state: ServerState
) -> list[Prompt]:
    """One or several prompts as token ids. Raises RequestError for an empty one or ids out of range."""
    if isinstance(prompt, str):
        texts, ids = [prompt], []
    else:
        texts = [item for item in prompt if isinstance(item, str)]
        ids = [item for item in prompt if isinstance(item, list)]
        if not texts and not ids:
            ids = [[item for item in prompt if isinstance(item, int)]]
    if any(not text for text in texts):
        raise RequestError("prompt is empty; give at least one character or token", param="prompt")
    for text in texts:
        _check_chars(text, max_tokens, state, "prompt")
    encoded = await _maybe_in_thread(
        sum(map(len, texts)), lambda: [Prompt(tuple(state.tokenizer.encode(text)), text) for text in texts]
    )
    prompts = [*encoded, *(Prompt(tuple(tokens)) for tokens in ids)]
    for made in prompts:
        _check_prompt(made.tokens, state.backend.info, "prompt")
    return prompts


async def read_messages(
    messages: Sequence[Mapping[str, Any]], shown: Mapping[str, Any], max_tokens: int, state: ServerState
) -> Prompt:
    """What the chat template makes of messages and of what else is `shown` to it. Raises RequestError as `read_prompts`."""
    num_chars = len(str(messages)) + len(str(shown))  # calls and fields of a template's own are rendered too
    tokens = await _maybe_in_thread(num_chars, lambda: _chat_tokens(messages, shown, max_tokens, state))
    _check_prompt(tokens, state.backend.info, "messages")
    return Prompt(tuple(tokens))


async def _maybe_in_thread(num_chars: int, work: Callable[[], T]) -> T:
    """Run `work` here, or in a thread where it would keep the event loop from other requests for too long."""
    return await asyncio.to_thread(work) if num_chars >= LONG_TEXT_CHARS else work()


def _chat_tokens(
    messages: Sequence[Mapping[str, Any]], shown: Mapping[str, Any], max_tokens: int, state: ServerState
) -> list[int]:
    text = state.tokenizer.chat_text(messages, **shown)
    _check_chars(text, max_tokens, state, "messages")
    return state.tokenizer.encode(text, add_special_tokens=False, param="messages")


def _check_chars(text: str, max_tokens: int, state: ServerState, param: str) -> None:
    """Refuse a text that cannot fit, without the 10 s that tokenizing 4 MiB takes."""
    context = state.backend.info.max_model_len
    num_tokens = -(-len(text) // state.tokenizer.max_token_chars)
    if num_tokens > context:
        raise ContextLengthError(
            f"the prompt has {len(text)} characters, at least {num_tokens} tokens, and max_tokens is {max_tokens}; "
            f"this model's context is {context} tokens: shorten the prompt",
            param=param,
        )


def _check_prompt(tokens: Sequence[int], info: EngineInfo, param: str) -> None:
    if not tokens:
        raise RequestError(f"{param}: the prompt is empty; give at least one character or token", param=param)
    if not 0 <= min(tokens) <= max(tokens) < info.vocab_size:
        worst = max(tokens) if max(tokens) >= info.vocab_size else min(tokens)
        raise RequestError(f"{param} holds the token id {worst}, must be in [0, {info.vocab_size})", param=param)


def check_context(num_prompt: int, max_tokens: int, info: EngineInfo, param: str = "prompt") -> None:
    if num_prompt + max_tokens > info.max_model_len:
        raise ContextLengthError(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together {num_prompt + max_tokens}; "
            f"this model's context is {info.max_model_len} tokens: shorten the prompt or lower max_tokens",
            param=param,
        )
