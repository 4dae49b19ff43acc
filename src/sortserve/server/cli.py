"""The server's commands: `sortserve serve | generate | ladder | bench | simulate`; `sortserve.__main__` adds those of
other parts.

`main` returns the exit code: 0, 1 for a request that was refused or an engine that died, 2 for a server or model that
cannot start with what it was given. What needs torch is imported by the command that needs it.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sortserve
from sortserve.engine.errors import ModelFolderError, SortServeError, StartupError
from sortserve.engine.logs import LOG_FORMATS

BUNDLED = Path(sortserve.__file__).parent / "bundled"
POLICIES = ("slack", "fixed", "reject-only", "global-cap", "admission-only", "slackfit", "confidence")
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}

_TOP = """\
Serve one set of sorted weights as many sub-models; each request says how long it may take.

  sortserve serve                               the bundled model at http://127.0.0.1:8000
  sortserve serve ./Qwen2.5-0.5B --port 9000    a Hugging Face folder
  sortserve generate --prompt 'Once upon' --budget-ms 300
  sortserve ladder ./Qwen2.5-0.5B               the sub-models it offers, and what they cost
  sortserve bench ./Qwen2.5-0.5B                how fast each of them is here
  sortserve simulate --trace trace.csv --load 2 what a policy would keep of the budgets on a GPU
"""
_SERVE = """\
examples:
  sortserve serve
  sortserve serve ./model --host 0.0.0.0 --api-key "$KEY" --kv-memory 2GiB
  sortserve serve ./model --keys-file ./keys.toml --log-format json
  sortserve serve ./model --ladder ./ladder.json --default-latency-budget-ms 800
  sortserve serve ./model --policy fixed --fixed-submodel d12     one sub-model for every request

then:
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
       -H 'X-Latency-Budget-Ms: 500' -d '{"prompt": "Once upon a time", "max_tokens": 32}'

It listens at once; /ready is 503 until the model is loaded. SIGTERM or Ctrl-C: new requests get 503, running ones
have --shutdown-timeout seconds to finish; a second one ends it at once.
"""


@dataclass(frozen=True)
class Command:
    """A command of a part that the server may not import: what `help` lists, its arguments, and what runs it."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None, others: Sequence[Command] = ()) -> int:
    """Run one command and return its exit code; errors are one line on stderr."""
    parser = make_parser(others)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        for other in others:
            if args.command == other.name:
                return other.run(args)
        return _run(args)
    except SortServeError as error:
        print(f"sortserve: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, StartupError) else 1


def make_parser(others: Sequence[Command] = ()) -> argparse.ArgumentParser:
    """The parser of all commands, `others` among them."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sortserve", description=_TOP, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"sortserve {sortserve.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")

    serve = commands.add_parser("serve", help="serve over HTTP", epilog=_SERVE, formatter_class=raw)
    _add_serve(serve)

    generate = commands.add_parser("generate", help="answer prompts here, without a server")
    _add_model(generate)
    generate.add_argument("--prompt", action="append", required=True, help="may repeat; - reads it from stdin")
    generate.add_argument("--budget-ms", type=float, help="milliseconds for all of it; the sub-model is chosen to fit")
    generate.add_argument("--submodel", default="auto", help="an id of `sortserve ladder`; default: auto")
    generate.add_argument("--max-tokens", type=int, default=64, help="output tokens per prompt; default: 64")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token; default: 0")
    generate.add_argument("--seed", type=int, help="for a temperature above 0")

    ladder = commands.add_parser("ladder", help="list the sub-models of a model folder; loads no weights")
    ladder.add_argument("model", nargs="?", type=Path, help="model folder; default: the bundled one")
    ladder.add_argument("--ladder", type=Path, metavar="FILE", help="instead of ladder.json in the model folder")

    bench = commands.add_parser("bench", help="measure each sub-model: latency alone, throughput in a batch")
    _add_model(bench)
    bench.add_argument("--prompt-tokens", type=positive, default=64, help="default: 64")
    bench.add_argument("--max-tokens", type=positive, default=32, help="output tokens per prompt; default: 32")
    bench.add_argument("--batch", type=positive, default=8, help="prompts at a time for the throughput; default: 8")
    bench.add_argument("--repeats", type=positive, default=3, help="runs to take the median of; default: 3")

    simulate = commands.add_parser("simulate", help="replay a trace against simulated GPUs, policies side by side")
    from sortserve.engine.simulator.command import add_arguments

    add_arguments(simulate.add_argument, positive)

    for other in others:
        other.add_arguments(commands.add_parser(other.name, help=other.help, formatter_class=raw))
    return parser


def model_folder(given: Path | None) -> Path:
    """The folder to load. Raises ModelFolderError if none was given and none is bundled."""
    if given is not None:
        return given
    if not (BUNDLED / "config.json").is_file():
        raise ModelFolderError(f"no MODEL is given and no model is bundled in {BUNDLED}; give a model folder")
    return BUNDLED


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


def _port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} must be a port in [0, 65535]; 0 takes a free one")
    return int(text)


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be an address like http://127.0.0.1:4318")
    return text


def _add_model(parser: argparse.ArgumentParser) -> None:
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


def _add_serve(serve: argparse.ArgumentParser) -> None:
    _add_model(serve)
    add = serve.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all; default: 127.0.0.1")
    add("--port", type=_port, default=8000, help="default: 8000; 0 takes a free one")
    add("--served-model-name", default="", metavar="NAME", help="`model` in the API; default: the folder's name")
    add("--api-key", action="append", default=[], metavar="KEY", help="may repeat; without one everybody may ask")
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
        choices=POLICIES,
        help="how sub-models are chosen (docs/policies.md); default: slack",
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
        type=_seconds,
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


def _run(args: argparse.Namespace) -> int:
    if args.command == "simulate":
        from sortserve.engine.simulator.command import run

        return run(args)
    folder = model_folder(args.model)
    if args.command == "serve":
        from sortserve.server.serve import serve

        return serve(folder, args)
    from sortserve.server import offline

    commands = {"generate": offline.generate, "ladder": offline.ladder, "bench": offline.bench}
    return commands[args.command](folder, args)


if __name__ == "__main__":
    sys.exit(main())
