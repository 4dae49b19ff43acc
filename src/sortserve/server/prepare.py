"""From a request body to what the back end is asked: prompts as token ids, sampling, budget, one request per answer."""

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from starlette.datastructures import Headers

from sortserve.engine.errors import ContextLengthError, RequestError
from sortserve.engine.protocol import EngineInfo, GenerateRequest
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.text import LONG_TEXT_CHARS, Tokenizer
from sortserve.server.budget_headers import Terms, read_terms
from sortserve.server.keys import NO_BOUNDS, Bounds
from sortserve.server.schemas import (
    MAX_SEQUENCES,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationFields,
)
from sortserve.server.state import ServerState
from sortserve.server.structured import ToolUse, check_template, grammar_of, tool_use

DEFAULT_COMPLETION_TOKENS = 16
_SEED_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: answers to seeds 7 and 8 share none
T = TypeVar("T")
Endpoint = Literal["completions", "chat"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; `text` as the client wrote it, None where it came as token ids."""

    tokens: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request for text, checked. Answer i belongs to prompt i // num_choices."""

    endpoint: Endpoint
    id: str
    created: int  # seconds since 1970
    model: str
    prompts: tuple[Prompt, ...]
    num_choices: int
    sampling: SamplingParams
    terms: Terms
    arrival: float
    stream: bool
    include_usage: bool = False
    usage_in_every_chunk: bool = False
    echo: bool = False
    tell_logprobs: bool = False
    tools: ToolUse | None = None  # None: calls are not looked for

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts; several answers to one count it once."""
        return sum(len(prompt.tokens) for prompt in self.prompts)

    def prompt_of(self, place: int) -> Prompt:
        """The prompt that answer `place` continues."""
        return self.prompts[place // self.num_choices]

    def requests(self) -> list[GenerateRequest]:
        """One per answer. The budget covers all; seeds differ between answers to one prompt."""
        terms, made = self.terms, []
        for place in range(len(self.prompts) * self.num_choices):
            sampling, choice = self.sampling, place % self.num_choices
            if sampling.seed is not None and choice:
                sampling = replace(sampling, seed=(sampling.seed + choice * _SEED_STEP + 2**63) % 2**64 - 2**63)
            made.append(
                GenerateRequest(
                    f"{self.id}-{place}",  # made here: what a client calls its request need not be unique
                    self.prompt_of(place).tokens,
                    sampling,
                    self.arrival,
                    terms.budget,
                    terms.submodel,
                    terms.floor,
                    terms.quality_floor,
                    terms.kv_mode,
                )
            )
        return made


async def prepare_completion(
    body: CompletionRequest, headers: Headers, arrival: float, state: ServerState, bounds: Bounds = NO_BOUNDS
) -> Job:
    """The job of POST /v1/completions. Raises RequestError for whatever cannot be served."""
    body.check()
    pinned, info = state.model_and_pin(body.model), state.backend.info
    terms = _terms(body, headers, state, pinned, bounds)
    asked = body.asked_max_tokens()
    max_tokens = DEFAULT_COMPLETION_TOKENS if asked is None else asked
    prompts = await _prompts(body.prompt, max_tokens, state)
    if len(prompts) * body.num_choices > MAX_SEQUENCES:
        raise RequestError(
            f"{len(prompts)} prompts x n {body.num_choices} are {len(prompts) * body.num_choices} answers, "
            f"at most {MAX_SEQUENCES} in one request; send several requests",
            param="prompt",
        )
    longest = max(len(prompt.tokens) for prompt in prompts)
    _check_context(longest, max_tokens, info)
    echo = bool(body.echo)
    wants_prompt_logprobs = echo and (body.logprobs is not None or max_tokens == 0)
    grammar = await _grammar(body, None, state)
    sampling = _sampling(
        body, info, max_tokens, body.logprobs, (body.logprobs or 0) if wants_prompt_logprobs else None, grammar
    )
    return _job("completions", body, prompts, sampling, terms, arrival, info, echo, body.logprobs is not None)


async def prepare_chat(
    body: ChatCompletionRequest, headers: Headers, arrival: float, state: ServerState, bounds: Bounds = NO_BOUNDS
) -> Job:
    """The job of POST /v1/chat/completions. Raises RequestError for whatever cannot be served."""
    body.check()
    pinned, info = state.model_and_pin(body.model), state.backend.info
    terms = _terms(body, headers, state, pinned, bounds)
    messages = [message.for_template() for message in body.messages]
    tools = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls)
    _check_tools(tools, messages, state.tokenizer)
    shown = {} if tools is None else {"tools": [tool.for_template() for tool in body.tools or ()]}
    num_chars = len(str(messages)) + len(str(shown))  # calls and fields of a template's own are rendered too
    asked = body.asked_max_tokens()
    tokens = await _maybe_in_thread(num_chars, lambda: _chat_tokens(messages, shown, asked or 1, state))
    # one more than fits where nothing is left, so that the error names the prompt's length and the limit
    max_tokens = max(1, info.max_model_len - len(tokens)) if asked is None else asked
    _check_prompt(tokens, info, "messages")
    _check_context(len(tokens), max_tokens, info, "messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = _sampling(body, info, max_tokens, logprobs, None, await _grammar(body, tools, state))
    prompts = (Prompt(tuple(tokens)),)
    return _job("chat", body, prompts, sampling, terms, arrival, info, False, logprobs is not None, tools)


def _job(
    endpoint: Endpoint,
    body: GenerationFields,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    terms: Terms,
    arrival: float,
    info: EngineInfo,
    echo: bool,
    tell_logprobs: bool,
    tools: ToolUse | None = None,
) -> Job:
    options = body.stream_options
    return Job(
        endpoint,
        f"{'chatcmpl' if endpoint == 'chat' else 'cmpl'}-{uuid.uuid4().hex}",
        int(time.time()),
        body.model or info.model,
        tuple(prompts),
        body.num_choices,
        sampling,
        terms,
        arrival,
        bool(body.stream),
        options is not None and options.include_usage,
        options is not None and options.continuous_usage_stats,
        echo,
        tell_logprobs,
        tools,
    )


def _check_tools(tools: ToolUse | None, messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> None:
    """Raise RequestError for tools, or messages about them, that the chat template would not show to the model."""
    if tools is not None:
        check_template(tokenizer)
    elif "tools" not in (tokenizer.chat_template or ""):
        for message in messages:
            if message["role"] == "tool" or "tool_calls" in message:
                raise RequestError(
                    "messages: this model's chat template takes no tools; leave messages of role tool and tool_calls out",
                    param="messages",
                )


async def _grammar(body: GenerationFields, tools: ToolUse | None, state: ServerState) -> str | None:
    """What the answer must parse as. Raises RequestError where that cannot be had, with the field and the reason."""
    wanted = body.response_format
    if tools is None and (wanted is None or wanted.type == "text"):
        return None
    grammar = await asyncio.to_thread(grammar_of, wanted, tools)
    if grammar is not None and not (state.tokenizer.exact_bytes and state.backend.info.eos_token_ids):
        raise RequestError(
            "this model's tokenizer has no bytes of its own for each token, or no end of sequence, and cannot be kept to a "
            "grammar; leave response_format and forced tool calls out",
            param="response_format" if tools is None else "tools",
        )
    return grammar


def _terms(body: GenerationFields, headers: Headers, state: ServerState, pinned: str | None, bounds: Bounds) -> Terms:
    info = state.backend.info
    return read_terms(
        headers,
        body,
        info.ladder,
        pinned=pinned,
        default_budget_ms=state.options.default_latency_budget_ms,
        bounds=bounds,
        trust_proxy_timeouts=state.options.trust_proxy_timeouts,
        capabilities=info.capabilities,
    )


def _sampling(
    body: GenerationFields,
    info: EngineInfo,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: str | None,
) -> SamplingParams:
    """SamplingParams from the fields given; the rest keeps its defaults. Raises RequestError."""
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": 0 if body.top_k == -1 else body.top_k,  # -1 is how vLLM's clients say off
        "min_p": body.min_p,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "repetition_penalty": body.repetition_penalty,
        "seed": body.seed,
        "ignore_eos": body.ignore_eos,
        "min_tokens": body.min_tokens,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "grammar": grammar,
        "logit_bias": None if body.logit_bias is None else _logit_bias(body.logit_bias, info.vocab_size),
        "stop": (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
    }
    return SamplingParams(max_tokens=max_tokens, **{name: value for name, value in given.items() if value is not None})


def _logit_bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
            raise RequestError(
                f"logit_bias has the key {key[:32]!r}, must be a token id in [0, {vocab_size})", param="logit_bias"
            )
        bias[int(key)] = value
    return bias


async def _prompts(
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


def _check_context(num_prompt: int, max_tokens: int, info: EngineInfo, param: str = "prompt") -> None:
    if num_prompt + max_tokens > info.max_model_len:
        raise ContextLengthError(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together {num_prompt + max_tokens}; "
            f"this model's context is {info.max_model_len} tokens: shorten the prompt or lower max_tokens",
            param=param,
        )
