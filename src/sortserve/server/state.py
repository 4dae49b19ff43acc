"""What the routes share: back end, tokenizer, options, metrics, and the phase the server is in."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sortserve.engine.errors import DrainingError, EngineFailedError, KeysFileError, NotFoundError, StartupError
from sortserve.engine.protocol import Backend
from sortserve.engine.text import Tokenizer
from sortserve.server.errors import LoadingError
from sortserve.server.keys import KeyRing
from sortserve.server.metrics import Metrics

_LOG = logging.getLogger("sortserve.server")

_DRAIN_MARGIN_SECONDS = 15.0  # over what the back end takes to end an engine that does not end by itself

Phase = Literal["loading", "ready", "draining", "failed"]


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Settings of the HTTP side."""

    api_keys: tuple[str, ...] = ()  # any one of them opens; none, here or in `keys_file`: no key is asked for
    keys_file: Path | None = None  # further keys, with bounds; see keys.py
    default_latency_budget_ms: float | None = None  # total, for requests without a budget of their own
    max_body_bytes: int = 4 * 1024 * 1024
    body_timeout: float = 60.0  # seconds that a client may pause within its body
    shutdown_timeout: float = 55.0  # seconds that running requests have to finish in
    allow_origins: tuple[str, ...] = ()  # of browsers that may call from other sites; none: no CORS headers
    trust_proxy_timeouts: bool = False  # x-envoy-expected-rq-timeout-ms caps total budgets
    vllm_metrics: bool = False  # /metrics has vLLM's names too
    log_prompts: bool = False


@dataclass
class ServerState:
    """One per app. `phase` only ever moves from loading to ready or failed, and to draining."""

    backend: Backend
    tokenizer: Tokenizer
    options: ServerOptions
    on_startup_failure: Callable[[], None] | None = None
    metrics: Metrics = field(init=False)
    keys: KeyRing = field(init=False)
    phase: Phase = "loading"
    failure: BaseException | None = None  # why `phase` is failed
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970, `created` of the models
    _loaded: bool = False
    _drained: bool = False

    def __post_init__(self) -> None:
        """Raises KeysFileError."""
        self.metrics = Metrics(vllm=self.options.vllm_metrics)
        self.keys = KeyRing(self.options.api_keys, self.options.keys_file)

    async def load(self) -> None:
        """Start the back end; a failure is kept for whoever runs the server, and told to it."""
        try:
            await self.backend.start()
            self.keys.check_floors(self.backend.info.ladder)
        except DrainingError:
            return
        except StartupError as error:
            self.failure = error
        except Exception as error:
            _LOG.exception("the back end failed to start")
            self.failure = error
        if self.failure is None:
            self._loaded = True
            self.phase = "ready" if self.phase == "loading" else self.phase
            self.metrics.describe(self.backend.info)
            _LOG.info("ready: model=%s", self.backend.info.model)
            return
        self.phase = "failed" if self.phase == "loading" else self.phase
        if self.on_startup_failure is not None:
            self.on_startup_failure()

    async def drain(self) -> None:
        """Accept nothing more; return when what runs has finished or had its time. Does nothing the second time."""
        self.phase = "draining"
        if not self._drained:
            self._drained = True
            try:
                # the back end keeps the time; the margin is for one that does not
                async with asyncio.timeout(self.options.shutdown_timeout + _DRAIN_MARGIN_SECONDS):
                    await self.backend.drain(self.options.shutdown_timeout)
            except TimeoutError:
                _LOG.warning("the back end did not drain within %.0f s", self.options.shutdown_timeout)

    def reload_keys(self) -> None:
        """Read the keys file again, once the model is loaded. A broken one leaves the keys as they are."""
        if self.options.keys_file is None or self.phase == "loading":
            _LOG.info("SIGHUP: %s", "no keys file" if self.options.keys_file is None else "still loading")
            return
        try:
            _LOG.info("keys file read again", extra={"fields": {"keys": self.keys.reload()}})
        except KeysFileError as error:
            _LOG.error("keys stay as they were: %s", error.message)

    def require_loaded(self) -> None:
        """Raise UnavailableError unless the model is there to be asked about."""
        if self.phase == "failed":
            raise EngineFailedError("the model could not be loaded; the server's log says why")
        if not self._loaded and self.phase == "draining":
            raise DrainingError("the server was stopped while it was loading")
        if not self._loaded:
            raise LoadingError("the model is still loading; /ready tells when it is there")

    def require_ready(self) -> None:
        """Raise UnavailableError unless requests can be taken now."""
        self.require_loaded()
        if self.phase == "draining":
            raise DrainingError("the server is shutting down and takes no new requests; ask another replica")
        if not self.backend.alive:
            raise EngineFailedError("the engine has died and is not coming back; the server must be restarted")
        if not self.backend.ready:
            raise EngineFailedError("the engine is being restarted; try again in a moment")

    def model_and_pin(self, name: str | None) -> str | None:
        """The sub-model that a `model` field names (`<model>:<id>`), None for the model itself.

        Raises NotFoundError, listing what there is.
        """
        info = self.backend.info
        if name is None or name == info.model:
            return None
        ids = [entry.id for entry in info.ladder.entries]
        for submodel in ids:
            if name == f"{info.model}:{submodel}":
                return submodel
        known = ", ".join([info.model, *(f"{info.model}:{submodel}" for submodel in ids)])
        raise NotFoundError(f"no model {name[:200]!r}; this server has: {known}", param="model")
