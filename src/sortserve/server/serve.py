"""`sortserve serve`: the app under uvicorn, from listening to drained."""

import argparse
import asyncio
import logging
import signal
import socket
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from sortserve.engine.config import EngineConfig
from sortserve.engine.connection import COMMAND, VLLM_COMMAND
from sortserve.engine.errors import StartupError
from sortserve.engine.logs import configure_logging
from sortserve.engine.model_config import load_model_config
from sortserve.engine.supervisor import ProcessBackend
from sortserve.engine.text import Tokenizer
from sortserve.engine.time_slices import ask_for_short_slices
from sortserve.engine.vllm.compat import check_version
from sortserve.engine.vllm.start import parsed
from sortserve.server.app import create_app
from sortserve.server.bounded_http import BoundedHttpProtocol
from sortserve.server.flags import model_settings
from sortserve.server.state import ServerOptions, ServerState

if TYPE_CHECKING:
    from sortserve.server.tracing import Tracing  # needs the `otel` extra

_LOG = logging.getLogger("sortserve.server")
_FLUSH_SECONDS = 5  # for the last bytes of finished answers, after the back end has drained
_KEEP_ALIVE_SECONDS = 75  # longer than clients and proxies keep idle connections, so that they close them, not we


def serve(folder: Path, args: argparse.Namespace) -> int:
    """Serve until a signal; the exit code. Raises StartupError."""
    configure_logging(args.log_level, args.log_format)
    level = logging.getLogger().level
    logging.getLogger("uvicorn").setLevel(max(level, logging.WARNING))
    tracing = open_tracing(args.otlp_endpoint)
    config = engine_config(folder, args)
    load_model_config(folder)  # a wrong folder is refused here, before anything listens
    if args.backend == "vllm":
        check_version()
    tokenizer = Tokenizer.load(folder)
    options = ServerOptions(
        api_keys=tuple(args.api_key),
        keys_file=args.keys_file,
        default_latency_budget_ms=args.default_latency_budget_ms,
        shutdown_timeout=args.shutdown_timeout,
        allow_origins=tuple(args.allow_origin),
        max_body_bytes=args.max_body,
        trust_proxy_timeouts=args.trust_proxy_timeouts,
        vllm_metrics=args.metrics_compat == "vllm",
        log_prompts=args.log_prompts,
    )
    command = VLLM_COMMAND if args.backend == "vllm" else COMMAND
    ask_for_short_slices()  # the engine's process has them from this one
    backend = ProcessBackend(config, LoadingLog(), hang_seconds=args.engine_timeout, command=command)
    app = create_app(backend, tokenizer, options, lambda: server.stop(), tracing)
    listener = _listen(args.host, args.port)
    state: ServerState = app.state.server
    server = DrainingServer(app, state)
    host = f"[{args.host}]" if ":" in args.host else args.host
    _LOG.info("listening on http://%s:%d, loading %s", host, listener.getsockname()[1], folder)
    server.run(sockets=[listener])
    if isinstance(state.failure, StartupError):
        raise state.failure
    return 0 if state.failure is None else 1


def open_tracing(endpoint: str | None) -> "Tracing | None":
    """Traces to an OTLP collector, None without an endpoint. Raises StartupError if the extra is not installed."""
    if endpoint is None:
        return None
    try:
        from sortserve.server.tracing import Tracing
    except ModuleNotFoundError as error:
        raise StartupError(
            f"--otlp-endpoint needs {error.name}, which is not installed: pip install 'sortserve[otel]'"
        ) from error
    return Tracing.to(endpoint)


def engine_config(folder: Path, args: argparse.Namespace) -> EngineConfig:
    """The engine's settings from the flags. Raises StartupError."""
    if args.fixed_submodel is not None and args.policy != "fixed":
        raise StartupError(f"--fixed-submodel is for --policy fixed, --policy is {args.policy}", param="fixed_submodel")
    return EngineConfig(
        model_folder=folder,
        served_name=args.served_model_name,
        compile_kernels=not args.no_compile,
        max_step_tokens=args.max_batch_tokens,
        max_waiting=args.max_queue,
        policy=args.policy,
        fixed_submodel=args.fixed_submodel,
        prefix_cache=not args.no_prefix_cache,
        profile_cache=not args.no_profile_cache,
        simulates=args.simulates if args.backend == "simulated" else None,
        vllm_args=vllm_arguments(args),
        **model_settings(args),
    )


def vllm_arguments(args: argparse.Namespace) -> tuple[str, ...]:
    """vLLM's engine arguments from the flags; those given by name come last and win. Raises StartupError."""
    parsed(args.vllm_arg)
    sizes = [
        f"{name}={getattr(args, name)}"
        for name in ("tensor_parallel_size", "pipeline_parallel_size")
        if getattr(args, name) > 1
    ]
    if args.backend != "vllm" and (sizes or args.vllm_arg):
        raise StartupError(f"{', '.join((*sizes, *args.vllm_arg))} is for --backend vllm, --backend is {args.backend}")
    return (*sizes, *args.vllm_arg)


class LoadingLog:
    """Says once a second how far loading is; a model that is there in a second needs no word."""

    def __init__(self, every_seconds: float = 1.0) -> None:
        self._every_seconds = every_seconds
        self._said = time.monotonic()

    def __call__(self, layers_loaded: int, num_layers: int) -> None:
        """Progress of the engine's loading."""
        if time.monotonic() - self._said >= self._every_seconds:
            self._said = time.monotonic()
            _LOG.info("loading: layer %d of %d", layers_loaded, num_layers)


class DrainingServer(uvicorn.Server):
    """uvicorn that goes on listening while it drains, so that probes and new requests hear a 503.

    Its own graceful shutdown closes the listening socket first: clients that have not heard yet would be refused.
    """

    def __init__(self, app: object, state: ServerState) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                http=BoundedHttpProtocol,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_FLUSH_SECONDS,
            )
        )
        self._state = state
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Exit without draining: nothing runs."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the loop for signals."""
        self._loop = asyncio.get_running_loop()
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            self._loop.add_signal_handler(signal.SIGHUP, self._state.reload_keys)
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: exit now. Called between two bytecodes of the main thread."""
        if self._loop is None or self._draining is not None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._draining is None:
            _LOG.info("draining: running requests have %.0f s", self._state.options.shutdown_timeout)
            self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await self._state.drain()
        finally:
            self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises StartupError, where uvicorn would exit by itself."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); give another --host or --port"
        ) from error
