"""`sortserve simulate` from a trace file to tables, JSON and plots."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sortserve.engine.cost_file import write_cost
from sortserve.engine.ladder import Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.engine.policies.registry import make_policy
from sortserve.engine.simulator.command import maker
from sortserve.engine.simulator.experiment import Scenario, bound_of, find_replicas, run_policy
from sortserve.engine.simulator.hardware import BACKENDS, replica_config, unloaded
from sortserve.engine.simulator.records import Records
from sortserve.engine.simulator.replica import Replica
from sortserve.engine.simulator.summary import interval
from sortserve.engine.simulator.traces import draw_budgets, read_trace
from sortserve.server.cli import BUNDLED, main
from tests.engine.small import step_cost

pytest.importorskip("scipy")


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    """Eighty requests of the conversation kind."""
    rng = np.random.default_rng(0)
    rows = zip(
        np.cumsum(rng.exponential(100, 80)).astype(int).tolist(),
        rng.integers(50, 3000, 80).tolist(),
        rng.integers(2, 80, 80).tolist(),
        strict=True,
    )
    lines = [json.dumps({"timestamp": at, "input_length": into, "output_length": out}) for at, into, out in rows]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_policies_side_by_side(trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    asked = [
        "simulate",
        "--trace",
        str(trace_file),
        "--policy",
        "slack,fixed,fixed:2",
        "--load",
        "0.5,2",
        "--seeds",
        "1,2",
    ]
    asked += ["--seconds", "1", "--out", str(tmp_path / "out")]
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert told.index("capacity, closed loop: full model") < told.index("load 0.50 of full-size capacity")
    for words in ("at most possible: goodput", "attained %", "switches by reason", "fixed:2"):
        assert words in told
    content = json.loads((tmp_path / "out" / "simulate.json").read_text())
    runs = [run for load in content["loads"].values() for run in load["runs"]]
    assert len(runs) == 2 * 2 * 3
    for run in runs:
        assert 0 <= run["attainment"] <= 1
        assert run["of_bound"] <= 1 + 1e-6
        assert run["attainment"] + run["refused"] + run["late"] == pytest.approx(1)
    for suffix, begins in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        assert (tmp_path / "out" / f"simulate{suffix}").read_bytes().startswith(begins)
    digests = [run["digest"] for run in runs]
    assert main([*asked, "--no-plots"]) == 0
    again = json.loads((tmp_path / "out" / "simulate.json").read_text())
    assert [run["digest"] for load in again["loads"].values() for run in load["runs"]] == digests


def test_more_replicas_keep_more_budgets_and_the_fewest_are_found(trace_file: Path) -> None:
    trace, config = read_trace(trace_file), replica_config("llama-3.1-8b", "h200")
    make = maker("fixed", config.rungs)
    scenario = Scenario(rate=200.0, seconds=0.4)
    found = find_replicas(make, trace, config, scenario, [0, 1], 0.9)
    assert found is not None
    fewest, reached = found
    assert fewest > 1
    assert reached >= 0.9

    def attainment(replicas: int) -> float:
        at = Scenario(rate=200.0, seconds=0.4, replicas=replicas)
        return float(np.mean([run_policy("", make, trace, config, at, seed).summary.attainment for seed in (0, 1)]))

    assert attainment(fewest) == reached
    assert attainment(fewest - 1) < 0.9
    assert find_replicas(make, trace, config, scenario, [0], 0.9, most=1) is None
    assert bound_of(trace, config, scenario, 0).met >= attainment(1)


def test_costs_that_a_server_has_measured(trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On vLLM going deeper means computing again: fewer budgets are kept than natively, with the same step times."""
    shape = load_model_config(BUNDLED).shape
    ladder = Ladder.load(BUNDLED / "ladder.json", shape)
    table = step_cost(ladder)
    write_cost(tmp_path / "cost.json", table)
    asked = ["simulate", "--trace", str(trace_file), "--model", str(BUNDLED), "--cost", str(tmp_path / "cost.json")]
    asked += ["--policy", "slack", "--load", "3", "--seconds", "10", "--seeds", "1", "--no-bound", "--out"]
    runs = {}
    for backend in ("native", "vllm"):
        assert main([*asked, str(tmp_path / backend), "--no-plots", "--backend", backend]) == 0
        content = json.loads((tmp_path / backend / "simulate.json").read_text())
        [[runs[backend]]] = [load["runs"] for load in content["loads"].values()]
    assert runs["native"]["digest"] != runs["vllm"]["digest"]
    write_cost(tmp_path / "cost.json", replace(table, layers=table.layers + 1))
    capsys.readouterr()
    assert main([*asked, str(tmp_path / "other")]) == 2
    assert "made for segments of" in capsys.readouterr().err


def test_lengths_are_scaled(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = read_trace(trace_file).scaled_lengths(0.125)
    asked = ["simulate", "--trace", str(trace_file), "--lengths", "0.125", "--policy", "fixed", "--seconds", "0.1"]
    assert main([*asked, "--seeds", "0", "--no-bound"]) == 0
    wanted = f"{trace.num_prompt.mean():.0f} tokens in, {trace.num_output.mean():.0f} out"
    assert wanted in capsys.readouterr().out


def test_no_state_is_kept_to_refill_from_on_vllm(trace_file: Path) -> None:
    trace = read_trace(trace_file)
    for backend, ever in (("native", True), ("vllm", False)):
        config = replace(replica_config("llama-3.1-8b", "h200"), capabilities=BACKENDS[backend])
        workload = draw_budgets(trace, unloaded(config), 0)
        records = Records(workload, len(config.rungs.exits))
        replica = Replica(config, make_policy("fixed", config.rungs), workload, records)
        for number in range(8):
            replica.submit(number)
        replica.advance(0.5)
        assert bool(replica.live.resumable.any()) is ever


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policy", "best"], "no policy 'best'; there are: fixed, "),
        (["--policy", "fixed:9"], "fixed:PLACE takes a place from 0 to 7"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--model", "gpt"], "no model 'gpt'"),
        (["--seconds", "1000", "--no-bound"], "the trace has 80 and 2 are the least; take fewer --seconds"),
    ],
)
def test_what_cannot_be_done_is_told(
    trace_file: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--trace", str(trace_file), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_trace_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--trace", str(tmp_path / "no.csv")]) == 2
    assert "no.csv: No such file" in capsys.readouterr().err


def test_intervals_are_students() -> None:
    mean, width = interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert mean == 3
    assert width == pytest.approx(2.776 * np.sqrt(2.5 / 5))
    assert interval(np.array([7.0])) == (7.0, 0.0)
