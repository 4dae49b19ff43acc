"""The command line: help that teaches, exit codes, and serving from loading to drained in a process of its own."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import httpx
import pytest

from sortserve.engine import llm
from sortserve.engine.errors import StartupError
from sortserve.engine.vllm import compat
from sortserve.server import cli, offline
from sortserve.server.flags import size
from sortserve.server.serve import engine_config
from tests.server.fake_backend import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 258,
    "torch_dtype": "float32",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder without weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    byte_tokenizer()._hf.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("command", ["", "serve", "generate", "ladder", "bench"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command.split(), "--help"])
    assert stopped.value.code == 0
    assert "sortserve" in capsys.readouterr().out


def test_other_parts_add_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """Listed in the help, given their arguments, and their errors told like the server's own."""

    def run(args: argparse.Namespace) -> int:
        if args.fail:
            raise StartupError("no such recipe")
        return 7

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--fail", type=int)

    other = cli.Command("knit", "make a scarf", add_arguments, run)
    assert cli.main(["knit"], [other]) == 7
    assert cli.main(["knit", "--fail", "1"], [other]) == 2
    assert "no such recipe" in capsys.readouterr().err
    assert cli.main([], [other]) == 0
    assert "make a scarf" in capsys.readouterr().out


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "sortserve serve" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    assert "X-Latency-Budget-Ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("512MiB", 512 * 2**20), ("2GiB", 2**31), ("1.5 gb", 1_500_000_000), ("100", 100), ("7B", 7), ("1k", 1000)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "MiB", "-1", "0", "1XiB", "1 i", "nan", "1e3"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size(text)


@pytest.mark.parametrize(
    "flags",
    [
        ["--port", "70000"],
        ["--kv-memory", "much"],
        ["--dtype", "int4"],
        ["--policy", "best"],
        ["--backend", "tgi"],
        ["--tensor-parallel-size", "0"],
        ["--default-latency-budget-ms", "0"],
        ["--shutdown-timeout", "nan"],
        ["--max-queue", "0"],
        ["--engine-timeout", "0"],
        ["--api-key", ""],
        ["--api-key", " "],
        ["--api-key", "ключ"],
        ["--max-body", "lots"],
        ["--log-format", "xml"],
        ["--metrics-compat", "tgi"],
        ["--otlp-endpoint", "127.0.0.1:4318"],
        ["--unknown"],
    ],
)
def test_bad_flags_exit_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serve", *flags])
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_flags_reach_the_engine(tmp_path: Path) -> None:
    line = (
        "serve m --device cpu --dtype float32 --max-model-len 99 --kv-memory 1MiB --max-batch-tokens 7 --max-queue 3 "
        "--ladder l.json --policy fixed --fixed-submodel d2 --served-model-name name --threads 2 --no-prefix-cache"
    )
    args = cli.make_parser().parse_args(line.split())
    config = engine_config(args.model, args)
    assert (config.model_folder, config.ladder_path, config.served_name) == (Path("m"), Path("l.json"), "name")
    assert (config.device, config.dtype, config.max_model_len, config.kv_bytes) == ("cpu", "float32", 99, 2**20)
    assert (config.max_step_tokens, config.max_waiting, config.num_threads) == (7, 3, 2)
    assert (config.policy, config.fixed_submodel, config.prefix_cache) == ("fixed", "d2", False)


def test_flags_reach_a_model_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--enforce-eager` did not: what loads a model was listed twice."""
    given: dict[str, object] = {}
    monkeypatch.setattr(llm, "LLM", lambda folder, **settings: given.update(settings))
    line = "--enforce-eager --dtype float32 --weights int8 --weights-share 0.5 --kv-dtype fp8 --max-model-len 99"
    for command in ("generate --prompt x", "bench"):
        given.clear()
        args = cli.make_parser().parse_args([*command.split(), *line.split()])
        offline._load(Path("m"), args)
        served = cli.make_parser().parse_args(["serve", "m", *line.split()])
        config = engine_config(Path("m"), served)
        assert given["enforce_eager"] is True
        assert given == {name: getattr(config, name) for name in given}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--fixed-submodel", "d2"], "--fixed-submodel is for --policy fixed, --policy is slack"),
        (["--vllm-arg", "seed=3"], "seed=3 is for --backend vllm, --backend is native"),
        (["--backend", "simulated", "--tensor-parallel-size", "2"], "tensor_parallel_size=2 is for --backend vllm"),
    ],
)
def test_flags_without_effect_are_refused(flags: list[str], told: str) -> None:
    args = cli.make_parser().parse_args(["serve", "m", *flags])
    with pytest.raises(StartupError, match=told):
        engine_config(args.model, args)


def test_flags_reach_vllm(tmp_path: Path) -> None:
    line = "serve m --backend vllm --tensor-parallel-size 2 --vllm-arg swap_space=0 --vllm-arg seed=3"
    args = cli.make_parser().parse_args(line.split())
    assert engine_config(args.model, args).vllm_args == ("tensor_parallel_size=2", "swap_space=0", "seed=3")
    native = cli.make_parser().parse_args(["serve", "m"])
    assert engine_config(native.model, native).vllm_args == ()


def test_vllm_that_is_not_installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(compat, "version", version)
    assert cli.main(["serve", str(folder), "--backend", "vllm"]) == 2
    assert "pip install 'sortserve[vllm]'" in capsys.readouterr().err


def test_an_argument_for_vllm_that_is_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(folder), "--backend", "vllm", "--vllm-arg", "fast"]) == 2
    assert "--vllm-arg is 'fast', must be name=value" in capsys.readouterr().err


def test_no_model_and_none_bundled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "BUNDLED", tmp_path)
    with pytest.raises(StartupError, match="give a model folder"):
        cli.model_folder(None)
    assert cli.model_folder(Path("x")) == Path("x")


@pytest.mark.parametrize("command", ["serve", "ladder"])
def test_missing_folder_exits_2(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, str(tmp_path / "none"), *(["--port", "0"] if command == "serve" else [])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sortserve: ")
    assert "Traceback" not in error


def test_busy_port_exits_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", str(folder), "--port", str(taken.getsockname()[1])]) == 2
    assert "give another --host or --port" in capsys.readouterr().err


def test_ladder_without_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ladder", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["id", "depth", "width", "quality"]
    assert [line.split()[0] for line in lines[1:-1]] == ["d4-w75", "d4"]
    assert lines[-2].endswith("100%")
    entries = [{"depth": 2, "width": 128, "quality": {"value": 0.5}, "degraded": True}]
    file = {"format": "sortserve-ladder", "version": 1, "num_layers": 4, "ffn_width": 128, "entries": entries}
    (folder / "ladder.json").write_text(json.dumps(file))
    assert cli.main(["ladder", str(folder)]) == 0
    assert "0.500 (degraded)" in capsys.readouterr().out
    (folder / "ladder.json").write_text("{}")
    assert cli.main(["ladder", str(folder)]) == 2


# --- serving, with the fake back end in the native one's place

SERVE = """
import sys, types
sys.path[:0] = [{root!r}, {src!r}]
from sortserve.engine.errors import StartupError
from tests.server.fake_backend import FakeBackend
from sortserve.server.cli import main
backend = FakeBackend(answer=tuple(b"x" * 100), delay={delay}, load_error={error})
import sortserve.server.serve as server
server.ProcessBackend = lambda config, progress, **settings: backend
sys.exit(main(["serve", {folder!r}, "--port", {port!r}, "--shutdown-timeout", "10", *{flags!r}]))
"""


def start(
    folder: Path, delay: float = 0.0, error: str = "None", flags: Sequence[str] = ()
) -> tuple[subprocess.Popen[str], str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    code = SERVE.format(
        root=str(ROOT), src=str(ROOT / "src"), folder=str(folder), port=port, delay=delay, error=error, flags=[*flags]
    )
    # under nohup SIGHUP comes ignored, and the server leaves it so; the tests mean one that was started without
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    return process, f"http://127.0.0.1:{port}"


def wait_ready(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("not ready within 90 s")


def test_sigterm_drains_and_exits_0(folder: Path) -> None:
    """New requests hear a 503 on a new connection while a running stream is completed."""
    process, url = start(folder, delay=0.1)
    try:
        wait_ready(url, process)
        ask = {"prompt": "x", "max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=ask, timeout=60) as running:
            lines = running.iter_lines()
            next(lines)
            os.kill(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + 60
            while (refused := httpx.get(f"{url}/ready")).status_code == 200:
                assert time.monotonic() < deadline
            assert refused.json()["error"]["code"] == "draining"
            assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 503
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert sum('"text":"x"' in line for line in rest) >= 59
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()


def test_startup_failure_prints_and_exits_2(folder: Path) -> None:
    process, _ = start(folder, error="StartupError('the weights are missing; download them')")
    try:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "sortserve: the weights are missing; download them" in errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()


def test_malformed_keys_file_exits_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "keys.toml").write_text('[[keys]]\nname = "a"\n')
    assert cli.main(["serve", str(folder), "--port", "0", "--keys-file", str(folder / "keys.toml")]) == 2
    assert "keys[0]" in capsys.readouterr().err


def test_hangup_reads_the_keys_again(folder: Path) -> None:
    """An answer under way is completed, a broken file changes nothing, and the log is JSON throughout."""
    keys = folder / "keys.toml"
    keys.write_text('[[keys]]\nname = "old"\nkey = "one"\n')
    flags = ["--keys-file", str(keys), "--log-format", "json", "--metrics-compat", "vllm", "--max-body", "1KiB"]
    process, url = start(folder, delay=0.05, flags=flags)

    def status(key: str) -> int:
        return httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

    try:
        wait_ready(url, process)
        assert (status("one"), status("two")) == (200, 401)
        ask, headers = {"prompt": "x", "max_tokens": 60, "stream": True}, {"Authorization": "Bearer one"}
        with httpx.stream("POST", f"{url}/v1/completions", json=ask, headers=headers, timeout=60) as running:
            lines = running.iter_lines()
            next(lines)
            keys.write_text('[[keys]]\nname = "new"\nkey = "two"\n')
            os.kill(process.pid, signal.SIGHUP)
            deadline = time.monotonic() + 60
            while status("two") != 200:
                assert time.monotonic() < deadline, "the signal was not heard"
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert status("one") == 401
        keys.write_text("[[keys]")
        os.kill(process.pid, signal.SIGHUP)
        assert status("two") == 200
        answer = httpx.post(
            f"{url}/v1/completions", json={"prompt": "x" * 2000}, headers={"Authorization": "Bearer two"}
        )
        assert answer.status_code == 413
        assert "vllm:num_requests_waiting" in httpx.get(f"{url}/metrics").text
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        told = [json.loads(line) for line in errors.splitlines()]
        assert any(line["level"] == "error" and "line 1" in line["message"] for line in told)
        assert {line["key"] for line in told if "key" in line} == {"old", "new"}
    finally:
        process.kill()
        process.communicate()
