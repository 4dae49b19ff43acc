"""The paths of the contract. Each handler reads, asks, and answers; what it asks is elsewhere."""

import asyncio
import logging
import re
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

import sortserve
from sortserve.engine.errors import (
    DrainingError,
    EngineFailedError,
    RequestError,
    UnavailableError,
)
from sortserve.engine.protocol import EngineStats
from sortserve.server.answers_schema import (
    ChatCompletionResponse,
    CompletionResponse,
    Compute,
    DetokenizeResponse,
    Health,
    ModelCard,
    ModelList,
    Readiness,
    StepPrediction,
    SubmodelCard,
    SubmodelList,
    SubmodelQuality,
    SubmodelSkips,
    TokenizeResponse,
    TokenizerInfo,
    Version,
)
from sortserve.server.completions import Generation
from sortserve.server.documented import answered, generated, generation_extra, plain_text
from sortserve.server.errors import LoadingError
from sortserve.server.prepare import Job, prepare_chat, prepare_completion
from sortserve.server.record import REQUEST_ID, Record
from sortserve.server.schemas import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from sortserve.server.state import ServerState

_LOG = logging.getLogger("sortserve.server")
_STATS_SECONDS = 2.0  # a scrape must not hang on an engine that does
_PREDICTED_PROMPT_TOKENS = 256
_MAX_SHOWN_FIELDS = 20
_FIELD = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_EXAMPLES: list[dict[str, Any]] = [
    {"max_tokens": 8, "temperature": 0, "latency_budget_ms": 500},
    {"max_tokens": 8, "seed": 1, "n": 2, "stop": ["."], "stream": True, "stream_options": {"include_usage": True}},
]
_PROMPT_EXAMPLES = [*_EXAMPLES, {"max_tokens": 0, "echo": True, "logprobs": 1}]
_CHAT_EXAMPLES = [*_EXAMPLES, {"max_tokens": 2, "logprobs": True, "top_logprobs": 2}]


def generation_routes(state: ServerState) -> APIRouter:
    """Completions and chat completions."""
    router = APIRouter(responses=answered(400, 401, 404, 408, 413, 429, 431, 500, 503))

    @router.post(
        "/v1/completions",
        response_model=None,
        responses=generated(CompletionResponse, "text_completion"),
        openapi_extra=generation_extra(*({"prompt": "Once upon a time", **fields} for fields in _PROMPT_EXAMPLES)),
    )
    async def completions(request: Request, body: CompletionRequest) -> Response:
        record = _take_up(request, body, state)
        job = await prepare_completion(body, request.headers, record.arrival, state, record.bounds)
        return await _generate(request, record, job)

    @router.post(
        "/v1/chat/completions",
        response_model=None,
        responses=generated(ChatCompletionResponse, "chat.completion.chunk"),
        openapi_extra=generation_extra(
            *({"messages": [{"role": "user", "content": "Hello"}], **fields} for fields in _CHAT_EXAMPLES)
        ),
    )
    async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
        record = _take_up(request, body, state)
        job = await prepare_chat(body, request.headers, record.arrival, state, record.bounds)
        return await _generate(request, record, job)

    async def _generate(request: Request, record: Record, job: Job) -> Response:
        record.generation = Generation(state, job)
        return await record.generation.respond(request)

    return router


def model_routes(state: ServerState) -> APIRouter:
    """What is served: models, sub-models, and the tokenizer."""
    router = APIRouter(responses=answered(401, 431, 500, 503))

    @router.get("/v1/models")
    async def models() -> ModelList:
        state.require_loaded()
        return ModelList(data=_models(state))

    @router.get("/v1/models/{model_id:path}", responses=answered(404))
    async def model(model_id: str) -> ModelCard:
        state.require_loaded()
        state.model_and_pin(model_id)
        return next(model for model in _models(state) if model.id == model_id)

    @router.get("/v1/submodels")
    async def submodels() -> SubmodelList:
        state.require_ready()
        info = state.backend.info
        return SubmodelList(
            data=await _submodels(state),
            compute=Compute(device=info.device, name=info.device_name, kernels=info.kernels),
            weights=info.weights,
            kv_dtype=info.kv_dtype,
            step_predictions=await _step_predictions(state),
        )

    @router.post("/tokenize", responses=answered(400, 408, 413, 429))
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        state.require_loaded()
        tokens = await asyncio.to_thread(state.tokenizer.encode, body.prompt, body.add_special_tokens)
        return TokenizeResponse(tokens=tokens, count=len(tokens), max_model_len=state.backend.info.max_model_len)

    @router.post("/detokenize", responses=answered(400, 408, 413, 429))
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        state.require_loaded()
        limit = state.backend.info.vocab_size
        if body.tokens and max(body.tokens) >= limit:
            raise RequestError(f"tokens holds {max(body.tokens)}, must be in [0, {limit})", param="tokens")
        text = await asyncio.to_thread(state.tokenizer.decode, body.tokens, False)
        return DetokenizeResponse(prompt=text)

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        tokenizer = state.tokenizer
        return TokenizerInfo(
            tokenizer_class=tokenizer.config.get("tokenizer_class"),
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            chat_template=tokenizer.chat_template,
        )

    return router


def operation_routes(state: ServerState) -> APIRouter:
    """Probes, metrics, version."""
    router = APIRouter(responses=answered(431, 500))

    @router.get("/health", responses=answered(503))
    async def health() -> Health:
        if state.phase == "failed" or (state.phase == "ready" and not state.backend.alive):
            raise EngineFailedError("the engine is dead; the server must be restarted")
        return Health()

    @router.get("/ready", responses=answered(503))
    async def ready() -> Readiness:
        state.require_ready()
        return Readiness()

    @router.get("/version")
    async def version() -> Version:
        return Version(version=sortserve.__version__)

    @router.get(
        "/metrics",
        response_class=Response,
        response_model=None,
        responses=plain_text("text/plain", "application/openmetrics-text"),
    )
    async def metrics(request: Request) -> Response:
        stats = await _stats(state) if state.phase in ("ready", "draining") else None
        state.metrics.take(stats, ready=state.phase == "ready" and state.backend.ready, restarts=state.backend.restarts)
        content, content_type = state.metrics.render(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": content_type})

    return router


def _take_up(request: Request, body: CompletionRequest | ChatCompletionRequest, state: ServerState) -> Record:
    """The record of a request that generates. Raises UnavailableError, counted, if none can be taken now."""
    record: Record = request.state.record
    if body.request_id is not None:
        if REQUEST_ID.fullmatch(body.request_id) is None:  # it goes into a header and into the log
            raise RequestError("request_id must be 1 to 128 of A-Z a-z 0-9 . _ : / + = @ -", param="request_id")
        if not record.id_was_given:
            record.rename(body.request_id)
    try:
        state.require_ready()
    except UnavailableError as error:
        state.metrics.drop(_drop_reason(error))
        raise
    if body.model_extra:
        names = [name if _FIELD.fullmatch(name) else "?" for name in list(body.model_extra)[:_MAX_SHOWN_FIELDS]]
        _LOG.info("ignored unknown fields: %s", ", ".join(names))
    return record


def _drop_reason(error: UnavailableError) -> str:
    reasons: dict[type, str] = {LoadingError: "loading", DrainingError: "draining"}
    return reasons.get(type(error), "engine_failed")


def _models(state: ServerState) -> list[ModelCard]:
    info = state.backend.info

    def card(name: str, parent: str | None) -> ModelCard:
        return ModelCard(
            id=name, created=state.created, max_model_len=info.max_model_len, root=info.model, parent=parent
        )

    submodels = [card(f"{info.model}:{entry.id}", info.model) for entry in info.ladder.entries]
    return [card(info.model, None), *submodels]


async def _submodels(state: ServerState) -> list[SubmodelCard]:
    """The ladder with what each sub-model would take for one more request of 256 prompt tokens now."""
    ladder = state.backend.info.ladder
    predictions = await state.backend.predict(_PREDICTED_PROMPT_TOKENS)
    metric = ladder.measured.metric if ladder.measured is not None else None
    cards = []
    for entry in ladder.entries:
        quality, submodel, prediction = entry.quality, entry.submodel, predictions.get(entry.id)
        cards.append(
            SubmodelCard(
                id=entry.id,
                depth=submodel.depth,
                width=submodel.widths[0] if len(set(submodel.widths)) == 1 else list(submodel.widths),
                skips=SubmodelSkips(
                    attention=list(submodel.skip_attention),
                    ffn=[layer for layer, width in enumerate(submodel.widths) if width == 0],
                ),
                parameters=submodel.parameters(ladder.shape),
                degraded=entry.degraded,
                quality=None
                if quality is None
                else SubmodelQuality(metric=metric, value=quality.value, low=quality.low, high=quality.high),
                predicted_ttft_ms=None if prediction is None else prediction.ttft_seconds * 1e3,
                predicted_tpot_ms=None if prediction is None else prediction.tpot_seconds * 1e3,
                predicted_ttft_p90_ms=None if prediction is None else prediction.ttft_p90_seconds * 1e3,
                predicted_tpot_p90_ms=None if prediction is None else prediction.tpot_p90_seconds * 1e3,
            )
        )
    return cards


async def _step_predictions(state: ServerState) -> list[StepPrediction]:
    """Errors by kind of step; empty before any step, or where the engine is too busy to tell."""
    stats = await _stats(state)
    errors = {} if stats is None else stats.step_errors
    return [
        StepPrediction(kind=kind, steps=steps, median_error=median, p90_coverage=coverage)
        for kind, (steps, median, coverage) in errors.items()
    ]


async def _stats(state: ServerState) -> EngineStats | None:
    try:
        async with asyncio.timeout(_STATS_SECONDS):
            return await state.backend.stats()
    except EngineFailedError:  # it died or stopped while it was asked
        return None
    except TimeoutError:
        _LOG.warning("the engine did not answer with its counters within %.0f s", _STATS_SECONDS)
        return None
