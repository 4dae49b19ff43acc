"""The engine process of `--backend vllm`: `python -m sortserve.engine.vllm.process SOCKET`, started by the supervisor.

It speaks the messages of our own engine process, so that the supervisor sees a crash, a hang and a drain alike. vLLM's
engine core is a process below this one; if that dies, this one exits, and the supervisor starts both again.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

import zmq
import zmq.asyncio

from sortserve.engine import messages
from sortserve.engine.admission import Limits
from sortserve.engine.config import DTYPE_BYTES, EngineConfig, load_model_config
from sortserve.engine.errors import StartupError
from sortserve.engine.ladder import Ladder
from sortserve.engine.logs import configure_logging
from sortserve.engine.messages import Abort, Answer, Ask, Happened, Load, Loaded, NotLoaded, Stop, Stopped, Submit
from sortserve.engine.protocol import EngineInfo, Event, GenerateRequest
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.vllm.policy import CAPABILITIES, ENOUGH_STEPS

_LOG = logging.getLogger(__name__)
WARM_UP_TOKENS = 6
WARM_UP_ROWS = (1, 2, 4, 8)
LADDER_FILE = "ladder.json"


async def serve(endpoint: str) -> int:
    """Bind, load what is asked for, and run until told to stop; the exit code."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.linger = 2000
    socket.bind(endpoint)
    command = messages.decode_command(await socket.recv())
    assert isinstance(command, Load), "the first command is what to load"
    configure_logging(command.log_level, command.log_format)
    began = time.monotonic()
    try:
        llm, info, limits = _load(command.config)
    except StartupError as error:
        await socket.send(messages.encode(NotLoaded(type(error).__name__, error.message, error.param)))
        context.destroy(linger=2000)
        return 2
    from sortserve.engine.vllm.front import Front

    dead = asyncio.Event()
    saying: asyncio.Queue[messages.Report] = asyncio.Queue()
    front = Front(llm, info.ladder, limits, lambda events: _put(saying, events), dead.set)
    if command.config.warmup:
        await _warm_up(front, saying, info)
    took = time.monotonic() - began
    _LOG.info("vLLM loaded %s in %.1f s: %d sub-models", info.model, took, len(info.ladder.entries))
    saying.put_nowait(Loaded(info))
    code = await _loop(socket, front, saying, dead)
    llm.shutdown()
    context.destroy(linger=2000)
    return code


def _put(saying: "asyncio.Queue[messages.Report]", events: list[Event]) -> None:
    if events:
        saying.put_nowait(Happened(events))


async def _loop(
    socket: zmq.asyncio.Socket, front: Any, saying: "asyncio.Queue[messages.Report]", dead: asyncio.Event
) -> int:
    """Obey and report until told to stop, or until vLLM's engine core is dead."""

    async def report() -> None:
        while True:
            await socket.send(messages.encode(await saying.get()))

    reporter = asyncio.create_task(report())
    died = asyncio.create_task(dead.wait())
    hearing = asyncio.create_task(_hear(socket))
    try:
        while True:
            await asyncio.wait({hearing, died}, return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                _LOG.error("vLLM's engine core is dead")
                return 1
            command = messages.decode_command(hearing.result())
            if isinstance(command, Stop):
                await front.finish()
                while not saying.empty():
                    await asyncio.sleep(0)
                saying.put_nowait(Stopped())
                await asyncio.sleep(0.05)
                return 0
            _obey(command, front, saying)
            hearing = asyncio.create_task(_hear(socket))
    finally:
        for task in (reporter, died, hearing):
            task.cancel()


async def _hear(socket: zmq.asyncio.Socket) -> bytes:
    content: bytes = await socket.recv()
    return content


def _obey(command: messages.Command, front: Any, saying: "asyncio.Queue[messages.Report]") -> None:
    if isinstance(command, Submit):
        front.submit(command.request)
    elif isinstance(command, Abort):
        front.abort(command.request_id)
    elif isinstance(command, Ask):
        if command.subject == "stats":
            saying.put_nowait(Answer(command.number, stats=front.stats()))
        elif command.subject == "predictions":
            saying.put_nowait(Answer(command.number, predictions=front.predict(command.prompt_tokens)))
        else:
            saying.put_nowait(Answer(command.number))


def engine_arguments(config: EngineConfig) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs. What the user gave for vLLM itself wins over what we derive."""
    from sortserve.engine.vllm.plugin import engine_overrides

    ladder = config.ladder_path or config.model_folder / LADDER_FILE
    given: dict[str, Any] = {
        "model": str(config.model_folder),
        "served_model_name": config.model_name,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_batched_tokens": max(config.max_step_tokens, config.max_running),
        "max_num_seqs": config.max_running,
        "enable_prefix_caching": config.prefix_cache,
        "disable_log_stats": True,
        "kv_cache_memory_bytes": config.kv_bytes,
    }
    given |= engine_overrides(config.model_folder, ladder if ladder.exists() else None, config.policy)
    given |= parsed(config.vllm_args)
    return {name: value for name, value in given.items() if value is not None}


def parsed(arguments: tuple[str, ...]) -> dict[str, Any]:
    """`name=value` each, the value as JSON where it is JSON, else as text. Raises StartupError."""
    found: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise StartupError(f"--vllm-arg is {argument!r}, must be name=value", param="vllm_args")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _load(config: EngineConfig) -> tuple[Any, EngineInfo, Limits]:
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
    except ModuleNotFoundError as error:
        raise StartupError(
            f"--backend vllm needs {error.name}, which is not installed: pip install 'sortserve[vllm]'", param="backend"
        ) from error
    model = load_model_config(config.model_folder)
    path = config.ladder_path or config.model_folder / LADDER_FILE
    ladder = Ladder.load(path, model.shape) if path.exists() else Ladder.of(model.shape, [])
    try:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(config)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise StartupError(f"vLLM does not start: {error}", param="backend") from error
    settings = llm.vllm_config
    max_model_len = int(settings.model_config.max_model_len)
    info = EngineInfo(
        model=config.model_name,
        ladder=ladder,
        max_model_len=max_model_len,
        vocab_size=model.shape.vocab_size,
        eos_token_ids=model.eos_token_ids,
        capabilities=CAPABILITIES,
        weight_bytes=ladder.costs[-1].weight_bytes * DTYPE_BYTES.get(config.dtype, 2) // model.shape.dtype_bytes,
        kv_bytes=int(settings.cache_config.kv_cache_memory_bytes or 0),
        block_tokens=int(settings.cache_config.block_size or 0),
        kv_blocks=int(settings.cache_config.num_gpu_blocks or 0),
    )
    return llm, info, Limits(max_model_len, model.shape.vocab_size, config.max_waiting)


async def _warm_up(front: Any, saying: "asyncio.Queue[messages.Report]", info: EngineInfo) -> None:
    """Short requests on a few sub-models, alone and together: the scheduler fits its first cost table to their steps."""
    ladder, number, steps = info.ladder, 0, 0
    places = sorted({0, len(ladder.entries) // 2, len(ladder.entries) - 1})
    while steps < ENOUGH_STEPS:
        for rows in WARM_UP_ROWS:
            for place in places:
                size = 8 if rows > 1 else min(128, info.max_model_len // 2)
                for _ in range(rows):
                    prompt = tuple((7 * number + at) % info.vocab_size for at in range(size))
                    sampling = SamplingParams(max_tokens=WARM_UP_TOKENS, temperature=0.0, ignore_eos=True)
                    name = ladder.entries[place].id
                    front.submit(
                        GenerateRequest(f"warm-up-{number}", prompt, sampling, time.monotonic(), submodel=name)
                    )
                    number += 1
                await front.idle()
                steps += WARM_UP_TOKENS
    while not saying.empty():
        saying.get_nowait()
    front.forget()


def _end_with_parent() -> None:
    """Wait for the end of standard input, and end this process's whole group: whoever holds its other end is gone."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> int:
    """Run as a process of its own; the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return asyncio.run(serve(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
