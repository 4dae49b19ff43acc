"""The flags of the server's commands, and how their words are read. A malformed one ends the program with exit code 2.

Imports nothing of a model or of torch.
"""

import argparse
import math
import re
from pathlib import Path
from typing import Any

from sortserve.engine.errors import SortServeError
from sortserve.engine.logs import LOG_FORMATS
from sortserve.engine.policies.registry import POLICY_NAMES
from sortserve.server.keys import can_be_sent

_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def size(text: str) -> int:
    """`512MiB`, `2GiB`, `1.5gb` or plain bytes, as a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", text.strip().lower(), re.ASCII)
    num_bytes = 0
    if match is not None:
        num_bytes = int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS.get(match[2], 0))
    if num_bytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, or 512MiB, 2GiB")
    return num_bytes


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"\d{1,12}", text, re.ASCII) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _milliseconds(text: str) -> float:
    from sortserve.server.budget_headers import parse_milliseconds

    try:
        return parse_milliseconds(text, "budget")
    except SortServeError as error:
        raise argparse.ArgumentTypeError(error.message) from error


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be seconds, 0 or more")
    return seconds


def _pause(text: str) -> float:
    if (seconds := _seconds(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be seconds, more than 0")
    return seconds


def _api_key(text: str) -> str:
    if not can_be_sent(text):  # it is not told: standard error is often kept
        raise argparse.ArgumentTypeError("a key must be printable ASCII without spaces around it, and not empty")
    return text


def _port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} must be a port in [0, 65535]; 0 takes a free one")
    return int(text)


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be an address like http://127.0.0.1:4318")
    return text


def add_model(parser: argparse.ArgumentParser) -> None:
    """What every command that loads a model takes."""
    parser.add_argument(
        "model", nargs="?", type=Path, metavar="MODEL", help="Hugging Face model folder; default: the bundled one"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>; default: auto")
    parser.add_argument(
        "--enforce-eager",
        action="store_true",
        help="on a GPU: no CUDA graphs, every kernel is launched by itself; slower",
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument(
        "--weights",
        default="auto",
        choices=("auto", "int8", "fp8"),
        help="how weights are kept: auto as --dtype says, int8 at half the bytes, fp8 on a GPU; default: auto",
    )
    parser.add_argument(
        "--weights-share",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the layers that are kept as --weights says, the least important first; the others and the head then stay "
        "in --dtype. Needs a ladder that `sortserve sort` or `ladder measure` made. Default: 1, all and the head",
    )
    parser.add_argument(
        "--kv-dtype",
        default="auto",
        choices=("auto", "fp8"),
        help="how K/V is kept: auto as --dtype says, fp8 (e4m3, on a GPU) at half the bytes; default: auto",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        help="CPU threads; default: what PyTorch takes or the container has, 1 for small models",
    )
    parser.add_argument(
        "--max-model-len", type=positive, help="tokens, prompt + output; default: what model and memory allow"
    )
    parser.add_argument(
        "--kv-memory",
        type=size,
        metavar="SIZE",
        help="for K/V, like 512MiB or 2GiB; default: a quarter of what is free, at most 2GiB",
    )
    parser.add_argument(
        "--ladder", type=Path, metavar="FILE", help="default: ladder.json in the model folder, or built in"
    )


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `EngineConfig` from the flags of `add_model`."""
    return {
        "device": args.device,
        "dtype": args.dtype,
        "enforce_eager": args.enforce_eager,
        "weights": args.weights,
        "weights_share": args.weights_share,
        "kv_dtype": args.kv_dtype,
        "num_threads": args.threads,
        "max_model_len": args.max_model_len,
        "kv_bytes": args.kv_memory,
        "ladder_path": args.ladder,
    }


def add_serve(serve: argparse.ArgumentParser) -> None:
    """What `serve` takes."""
    add_model(serve)
    add = serve.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all; default: 127.0.0.1")
    add("--port", type=_port, default=8000, help="default: 8000; 0 takes a free one")
    add("--served-model-name", default="", metavar="NAME", help="`model` in the API; default: the folder's name")
    add(
        "--api-key",
        type=_api_key,
        action="append",
        default=[],
        metavar="KEY",
        help="may repeat; without one everybody may ask",
    )
    add(
        "--keys-file",
        type=Path,
        metavar="FILE",
        help="TOML with further keys, their budgets, floors and rates (docs/operating.md); SIGHUP reads it again",
    )
    add("--default-latency-budget-ms", type=_milliseconds, metavar="MS", help="for requests without a budget")
    add(
        "--policy",
        default="slack",
        choices=POLICY_NAMES,
        help="how sub-models are chosen (docs/policy.md); default: slack",
    )
    add("--fixed-submodel", metavar="ID", help="what `auto` requests run under --policy fixed")
    add("--max-batch-tokens", type=positive, default=256, help="rows of one step; default: 256")
    add("--max-queue", type=positive, default=1024, help="requests that may wait; one more gets 429; default: 1024")
    add("--max-body", type=size, default=4 * 2**20, metavar="SIZE", help="of one request's body; default: 4MiB")
    add(
        "--trust-proxy-timeouts",
        action="store_true",
        help="x-envoy-expected-rq-timeout-ms caps the budgets of requests; only behind a proxy that sets it",
    )
    add(
        "--no-profile-cache",
        action="store_true",
        help="measure step times at every start; else they are kept in $XDG_CACHE_HOME/sortserve or ~/.cache/sortserve",
    )
    add(
        "--no-compile",
        action="store_true",
        help="on the CPU, take oneDNN's products, not those in C++ that the first start compiles into the same folder",
    )
    add("--no-prefix-cache", action="store_true", help="forget K/V of prompts once they are answered")
    add(
        "--backend",
        default="native",
        choices=("native", "simulated", "vllm"),
        help="vllm: the same sub-models on vLLM, for several GPUs (docs/vllm.md). simulated: waits as long as --simulates "
        "would take and makes up tokens; loads no weights. Default: native",
    )
    add(
        "--tensor-parallel-size",
        type=positive,
        default=1,
        metavar="N",
        help="for --backend vllm: GPUs a model is split over",
    )
    add("--pipeline-parallel-size", type=positive, default=1, metavar="N", help="for --backend vllm: refused if over 1")
    add(
        "--vllm-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for --backend vllm: an engine argument of vLLM, such as gpu_memory_utilization=0.8; may repeat",
    )
    add("--simulates", default="h200", metavar="GPU", help="for --backend simulated: h100, h200, h200x4; default: h200")
    add("--allow-origin", action="append", default=[], metavar="URL", help="site whose pages may call; may repeat")
    add("--shutdown-timeout", type=_seconds, default=55.0, help="seconds to finish in on SIGTERM; default: 55")
    add(
        "--engine-timeout",
        type=_pause,
        default=60.0,
        help="seconds without the end of a step after which the engine is replaced; default: 60",
    )
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    add("--log-format", default="text", choices=LOG_FORMATS, help="json: an object per line; default: text")
    add("--log-prompts", action="store_true", help="log the first 1,000 characters of each prompt; answers never")
    add("--metrics-compat", choices=("vllm",), help="/metrics tells the main series under vLLM's names too")
    add(
        "--otlp-endpoint",
        type=_url,
        metavar="URL",
        help="OTLP collector that gets traces over HTTP, like http://127.0.0.1:4318; needs sortserve[otel]",
    )
