"""From a request body to what the back end is asked: prompts as token ids, sampling, budget, one request per answer."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from starlette.datastructures import Headers

from sortserve.engine.errors import RequestError
from sortserve.engine.protocol import EngineInfo, GenerateRequest
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.text import Tokenizer
from sortserve.server.budget_headers import Terms, read_terms
from sortserve.server.keys import NO_BOUNDS, Bounds
from sortserve.server.prompts import Prompt, check_context, read_messages, read_prompts
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
Endpoint = Literal["completions", "chat"]


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
    prompts = await read_prompts(body.prompt, max_tokens, state)
    if len(prompts) * body.num_choices > MAX_SEQUENCES:
        raise RequestError(
            f"{len(prompts)} prompts x n {body.num_choices} are {len(prompts) * body.num_choices} answers, "
            f"at most {MAX_SEQUENCES} in one request; send several requests",
            param="prompt",
        )
    longest = max(len(prompt.tokens) for prompt in prompts)
    check_context(longest, max_tokens, info)
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
    asked = body.asked_max_tokens()
    prompt = await read_messages(messages, shown, asked or 1, state)
    # one more than fits where nothing is left, so that the error names the prompt's length and the limit
    max_tokens = max(1, info.max_model_len - len(prompt.tokens)) if asked is None else asked
    check_context(len(prompt.tokens), max_tokens, info, "messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = _sampling(body, info, max_tokens, logprobs, None, await _grammar(body, tools, state))
    return _job("chat", body, (prompt,), sampling, terms, arrival, info, False, logprobs is not None, tools)


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
