"""What crosses the engine's boundary: requests in, events out, and the protocol every back end speaks.

Plain frozen data, which `messages.py` carries from one process to the other. Times are seconds on `time.monotonic()`,
which all processes of a machine share.
"""

from collections.abc import AsyncIterator
from typing import Literal, Protocol

import msgspec

from sortserve.engine.budget import Budget
from sortserve.engine.cost import StepKind
from sortserve.engine.errors import SortServeError, UnavailableError, error_named
from sortserve.engine.ladder import Ladder
from sortserve.engine.sampling import SamplingParams

KVMode = Literal["exact", "reuse"]
FinishReason = Literal["stop", "length", "abort"]


class Data(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of what crosses: in MessagePack an array that begins with the class's name, so that unions can be read."""


class GenerateRequest(Data, frozen=True):
    """One sequence to generate. `submodel` is `auto` or an id of the ladder (then it is floor and ceiling)."""

    request_id: str
    prompt: tuple[int, ...]  # token ids
    sampling: SamplingParams
    arrival: float
    budget: Budget | None = None
    submodel: str = "auto"
    floor: str | None = None  # an id of the ladder; None: the default floor
    quality_floor: float | None = None  # share of the full model's quality, [0, 1]
    kv_mode: KVMode | None = None  # None: reuse for `auto` with a budget, else exact


class TokenLogprob(Data, frozen=True):
    """Log-probability of one token and of the most probable alternatives, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class AcceptedEvent(Data, frozen=True):
    """First event of a request, when its first row is planned: what it starts with and is predicted to take."""

    request_id: str
    submodel: str
    predicted_seconds: float | None  # end to end; None without a budget
    predicted_met: bool
    queue_seconds: float = 0.0  # from arrival until now
    cached_tokens: int = 0  # prompt tokens found in the prefix cache


class PromptLogprobsEvent(Data, frozen=True):
    """Log-probabilities of the prompt's tokens; the first one has none."""

    request_id: str
    logprobs: tuple[TokenLogprob | None, ...]


class TokenEvent(Data, frozen=True):
    """One output token, the id of the sub-model that made it, and when."""

    request_id: str
    token: int
    submodel: str
    time: float
    logprob: TokenLogprob | None = None
    refilled_tokens: int = 0  # of the request until now


class RequestSummary(Data, frozen=True):
    """What is told at the end of a request. Times in seconds from arrival; None where it did not happen."""

    submodels: dict[str, int] = {}  # output tokens by sub-model id
    switches: int = 0
    refilled_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    preemptions: int = 0
    kv_mode: KVMode = "exact"
    queue_seconds: float | None = None  # until its first row ran
    first_token_seconds: float | None = None
    total_seconds: float = 0.0
    met: bool | None = None  # None without a budget
    cut: bool = False  # stopped in time by the `cut` policy


class FinishedEvent(Data, frozen=True):
    """Terminal: the request ended by itself (`stop`, `length`) or was aborted (`abort`)."""

    request_id: str
    reason: FinishReason
    summary: RequestSummary


class FailedEvent(Data, frozen=True):
    """Terminal: the request was refused or the engine failed; the fields are those of an error of `errors.py`."""

    request_id: str
    error: str  # class name in errors.py
    message: str
    param: str | None = None
    retry_after: float | None = None  # seconds; None where trying again does not help or nothing is known

    @classmethod
    def of(cls, request_id: str, error: SortServeError) -> "FailedEvent":
        """The event that carries `error`."""
        retry_after = error.retry_after if isinstance(error, UnavailableError) else None
        return cls(request_id, type(error).__name__, error.message, error.param, retry_after)

    def as_error(self) -> SortServeError:
        """The error that it carries; an unknown name is our own bug and becomes a SortServeError, a 500."""
        error = error_named(self.error)(self.message, param=self.param)
        if isinstance(error, UnavailableError) and self.retry_after is not None:
            error.retry_after = self.retry_after
        return error


Event = AcceptedEvent | PromptLogprobsEvent | TokenEvent | FinishedEvent | FailedEvent


class EngineStats(Data, frozen=True):
    """A snapshot for metrics and the console. Counters run from the engine's start."""

    running: int = 0
    waiting: int = 0
    kv_pages_total: int = 0
    kv_pages_used: int = 0
    kv_pages_cached: int = 0
    steps: int = 0
    preemptions: int = 0
    refilled_tokens: int = 0
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # prompt tokens found
    prefix_refused_width: int = 0  # blocks whose tokens were cached, but under other widths
    prompt_tokens: int = 0
    generated_tokens: dict[str, int] = {}  # by sub-model id
    selected: dict[tuple[str, str], int] = {}  # by (sub-model id, reason)
    switches: dict[str, int] = {}  # by direction: up, down
    dropped: dict[str, int] = {}  # by reason
    step_errors: dict[StepKind, tuple[int, float, float]] = {}
    """Of the last steps by kind (decode, mixed, refill): how many, the median of |measured / predicted - 1|, and the share
    that took no longer than their predicted p90."""


class Prediction(Data, frozen=True):
    """What a sub-model would take for one more request now, in seconds: medians, and what nine of ten stay under."""

    ttft_seconds: float
    tpot_seconds: float
    ttft_p90_seconds: float = 0.0
    tpot_p90_seconds: float = 0.0


class EngineInfo(Data, frozen=True):
    """What a back end serves; fixed after start."""

    model: str
    ladder: Ladder
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    capabilities: frozenset[str]  # of refill, sit_out, reuse
    weight_bytes: int = 0
    kv_bytes: int = 0
    load_seconds: float = 0.0
    block_tokens: int = 0  # tokens of one block of K/V
    kv_blocks: int = 0  # blocks of all layers that fit into `kv_bytes`
    weights: str = ""  # format of the matrices in memory: a dtype, int8 or fp8; "": not told
    kv_dtype: str = ""  # format of K/V in memory: a dtype or fp8; "": not told
    device: str = ""  # cpu or cuda:<index>; "": none, steps are simulated
    device_name: str = ""  # of the GPU
    kernels: str = ""  # what computes there, in words


class Backend(Protocol):
    """The async protocol between the server and whatever computes (native, vllm, simulated)."""

    @property
    def info(self) -> EngineInfo:
        """What is served. Valid once `start` has returned."""
        ...

    @property
    def alive(self) -> bool:
        """False once the engine has died and is not coming back."""
        ...

    @property
    def ready(self) -> bool:
        """Whether requests are taken now: False while the engine is loaded, for the first time or again."""
        ...

    @property
    def restarts(self) -> int:
        """How many times the engine was started again."""
        ...

    async def start(self) -> None:
        """Load and warm up. Raises StartupError."""
        ...

    def expect(self) -> None:
        """A request is being read and may be submitted in a moment; a hint, which may be ignored."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """Submit, and stream the request's events, ending with exactly one terminal event.

        Leaving the iterator early (closing it, cancellation) aborts the request within one step. A refusal is a
        FailedEvent, never an exception.
        """
        ...

    async def stats(self) -> EngineStats:
        """A snapshot, at most one step old."""
        ...

    async def predict(self, prompt_tokens: int) -> dict[str, Prediction]:
        """Predicted latency now by sub-model id, for a prompt of that many tokens."""
        ...

    async def drain(self, timeout: float) -> None:
        """Accept nothing more, finish what runs within `timeout` seconds, abort the rest, and stop."""
        ...
