"""The server's commands: `sortserve serve | generate | ladder | bench | simulate`; `sortserve.__main__` adds those of
other parts.

`main` returns the exit code: 0, 1 for a request that was refused or an engine that died, 2 for a server or model that
cannot start with what it was given. What needs torch is imported by the command that needs it.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sortserve
from sortserve.engine.errors import ModelFolderError, SortServeError, StartupError
from sortserve.server.flags import add_model, add_serve, positive

BUNDLED = Path(sortserve.__file__).parent / "bundled"

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
    add_serve(serve)

    generate = commands.add_parser("generate", help="answer prompts here, without a server")
    add_model(generate)
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
    add_model(bench)
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
