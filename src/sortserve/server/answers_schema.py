"""Bodies of answers, for /openapi.json.

What generates is written by answer.py and formats.py without these models, for speed; the compatibility suite holds
them to what is really sent. The catalogue and the tokenizer's paths answer through them.
"""

from typing import Literal

from pydantic import BaseModel


class ErrorObject(BaseModel):
    """What went wrong; `code` is a stable word, `param` the field or header."""

    message: str
    type: Literal[
        "invalid_request_error", "authentication_error", "not_found_error", "rate_limit_error", "server_error"
    ]
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Body of every answer that is not 2xx."""

    error: ErrorObject


# --- completions and chat completions ---------------------------------------------------------------------------------


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens, those found in the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens in and out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class Told(BaseModel):
    """The `sortserve` object: which sub-models made the answer, and whether the budget was met.

    `submodels` counts output tokens by sub-model id.
    """

    submodels: dict[str, int]
    switches: int
    refilled_tokens: int
    budget_ms: float | None
    elapsed_ms: float
    ttft_ms: float | None
    tpot_ms: float | None
    met: bool | None
    kv: Literal["exact", "reuse"]
    cut: bool


class AnswerFields(BaseModel):
    """What both kinds of answer have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    sortserve: Told


class CompletionLogprobs(BaseModel):
    """Four parallel lists, a token each. The first token of a prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionResponse(AnswerFields):
    """Answer of /v1/completions when it is not streamed."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TokenLogprob(BaseModel):
    """One token; `bytes` because it need not be text alone."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TokenLogprob):
    """A token of the answer with the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Of each token of the answer."""

    content: list[ChatTokenLogprob]
    refusal: None


class CalledFunction(BaseModel):
    """A function's name, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """One call that the model asks for."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """What the model says, or what it wants called."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One message."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletionResponse(AnswerFields):
    """Answer of /v1/chat/completions when it is not streamed."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


# --- the catalogue ----------------------------------------------------------------------------------------------------


class ModelCard(BaseModel):
    """A name for the `model` field. `parent` is null for the model itself and its name for a sub-model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["sortserve"] = "sortserve"
    max_model_len: int
    root: str
    parent: str | None


class ModelList(BaseModel):
    """Answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class SubmodelQuality(BaseModel):
    """Share of the full model's quality, by the metric named; `low` and `high` bound it at 95 %."""

    metric: str | None
    value: float
    low: float | None
    high: float | None


class SubmodelSkips(BaseModel):
    """Layers, from 0, whose attention or FFN is left out."""

    attention: list[int]
    ffn: list[int]


class SubmodelCard(BaseModel):
    """One rung of the ladder. `width` is the FFN's, a list where layers differ. `degraded`: too poor for `auto`.

    The predictions are for one more request of 256 prompt tokens now, medians and what nine of ten stay under; null where
    there is none.
    """

    id: str
    object: Literal["submodel"] = "submodel"
    depth: int
    width: int | list[int]
    skips: SubmodelSkips
    parameters: int
    degraded: bool
    quality: SubmodelQuality | None
    predicted_ttft_ms: float | None
    predicted_tpot_ms: float | None
    predicted_ttft_p90_ms: float | None
    predicted_tpot_p90_ms: float | None


class StepPrediction(BaseModel):
    """How well the last steps of one kind were predicted: single rows only, with chunks of prompts, or with refills.

    `median_error`: of |measured / predicted - 1|. `p90_coverage`: share that took no longer than their predicted p90.
    """

    kind: Literal["decode", "mixed", "refill"]
    steps: int
    median_error: float
    p90_coverage: float


class Compute(BaseModel):
    """What runs the sub-models: cpu or cuda:<index>, the GPU's name, and the kernels, in words. All empty where steps are
    simulated."""

    device: str
    name: str
    kernels: str


class SubmodelList(BaseModel):
    """Answer of /v1/submodels, from the cheapest to the full model; and how good its predictions were until now.

    `weights`: how they are kept in memory: a dtype, int8 or fp8, and in how many layers where not in all; empty where the
    back end does not tell. `kv_dtype`: the same of K/V, a dtype or fp8."""

    object: Literal["list"] = "list"
    data: list[SubmodelCard]
    compute: Compute
    weights: str = ""
    kv_dtype: str = ""
    step_predictions: list[StepPrediction]


# --- the tokenizer, probes, version -----------------------------------------------------------------------------------


class TokenizeResponse(BaseModel):
    """Answer of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeResponse(BaseModel):
    """Answer of /detokenize."""

    prompt: str


class TokenizerInfo(BaseModel):
    """Answer of /tokenizer_info; null where the model folder names none."""

    tokenizer_class: str | None
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


class Health(BaseModel):
    """Answer of /health."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Answer of /ready."""

    status: Literal["ready"] = "ready"


class Version(BaseModel):
    """Answer of /version."""

    version: str
