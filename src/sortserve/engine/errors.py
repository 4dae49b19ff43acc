"""Every error a user can meet, in one tree.

    SortServeError
    +-- StartupError              the server cannot start with what it was given (exit code 2, never HTTP)
    |   +-- ModelFolderError        missing, truncated or unsupported checkpoint
    |   +-- LadderError             malformed ladder.json, or one for another model
    |   +-- MemoryBudgetError       the KV memory cannot hold one sequence of the context length
    |   +-- KeysFileError           missing or malformed keys file, or one for another ladder
    |   +-- SortingError            recipe, data, model or unfinished run that `sortserve sort` cannot take
    +-- RequestError              400  this one request cannot be served as it was asked
    |   +-- ContextLengthError      400  prompt + max_tokens over the context
    |   +-- BudgetInfeasibleError   400  strict budget that even an idle server would miss
    |   +-- AuthenticationError     401  missing or wrong API key
    |   +-- NotFoundError           404  unknown model, sub-model or path
    |   +-- PayloadTooLargeError    413  body over the limit
    +-- UnavailableError          503  the same request may succeed later
        +-- OverloadedError         429  queue full, or strict budget impossible under the present load
        +-- RateLimitedError        429  the key has made its requests of this minute
        +-- DrainingError           503  shutting down
        +-- EngineFailedError       503  the engine died under the request

Our own bugs are `assert`; what a user did is one of these, with the value, the limit and the way out in its message.
"""

from typing import ClassVar


class SortServeError(Exception):
    """Root of the tree.

    `status` is the HTTP status, `kind` the `type` and `code` the stable `code` of the error body.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class StartupError(SortServeError):
    """The server cannot start; the message says what to change."""

    code = "startup_failed"


class ModelFolderError(StartupError):
    """The model folder is missing, truncated, or of a family that is not supported."""


class LadderError(StartupError):
    """`ladder.json` is malformed or does not belong to this model."""


class MemoryBudgetError(StartupError):
    """The memory given cannot hold what must fit; the message names both numbers."""


class KeysFileError(StartupError):
    """The keys file is missing, malformed, or names a sub-model that there is not; read anew it changes nothing then."""


class SortingError(StartupError):
    """A recipe, data, a model or an unfinished run that the sorting toolkit cannot take; nothing was overwritten."""


class RequestError(SortServeError):
    """The request is wrong; sending it again unchanged cannot help. `param` names the field or header."""

    status = 400
    kind = "invalid_request_error"
    code = "invalid_value"


class ContextLengthError(RequestError):
    """Prompt plus `max_tokens` exceed the context length."""

    code = "context_length_exceeded"


class BudgetInfeasibleError(RequestError):
    """A strict budget that even an idle server cannot meet; the message names the smallest feasible one."""

    code = "latency_budget_infeasible"


class AuthenticationError(RequestError):
    """No API key, or an unknown one."""

    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class NotFoundError(RequestError):
    """Unknown model, sub-model or path; the message lists what there is."""

    status = 404
    kind = "not_found_error"
    code = "model_not_found"


class PayloadTooLargeError(RequestError):
    """The request body is over the server's limit."""

    status = 413
    code = "payload_too_large"


class UnavailableError(SortServeError):
    """The request was right and may succeed later. `retry_after` is in seconds."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class OverloadedError(UnavailableError):
    """The queue is full, or a strict budget is impossible under the present load."""

    status = 429
    kind = "rate_limit_error"
    code = "overloaded"


class RateLimitedError(UnavailableError):
    """The key has made more requests than the keys file grants it; `retry_after` says when the next one is due."""

    status = 429
    kind = "rate_limit_error"
    code = "rate_limited"


class DrainingError(UnavailableError):
    """The server is shutting down and accepts nothing new."""

    code = "draining"


class EngineFailedError(UnavailableError):
    """The engine died while the request was in it."""

    code = "engine_failed"


def error_named(name: str) -> type[SortServeError]:
    """The class of that name; SortServeError itself for a name that is none, which is a bug of ours."""
    pending: list[type[SortServeError]] = [SortServeError]
    while pending:
        kind = pending.pop()
        if kind.__name__ == name:
            return kind
        pending.extend(kind.__subclasses__())
    return SortServeError
