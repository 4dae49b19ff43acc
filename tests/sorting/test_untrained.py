"""`sort --no-training`, `ladder measure` and `ladder import` from folder to folder, on the bundled model."""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest

from sortserve.__main__ import main
from sortserve.engine.errors import SortingError
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.llm import LLM
from sortserve.engine.model_config import load_model_config
from sortserve.engine.sampling import SamplingParams
from sortserve.engine.submodel import SubModel
from sortserve.server.cli import BUNDLED
from sortserve.sorting import untrained
from sortserve.sorting.quality import not_monotone
from sortserve.sorting.untrained_run import exits_of
from tests.bundled import CONFIG, FULL

LAYERS = CONFIG.shape.num_layers
SHORT = ["--minutes", "0.05", "--calibration-tokens", "120", "--tokens", "60", "--window", "96"]
METHODS = ["--methods", "widths,evopress,uls,llm-drop,lim,zd", "--drop", "25", "--budgets", "70"]


def sort(model: Path, out: Path, *arguments: str) -> int:
    """What `sortserve sort MODEL --no-training --to OUT ...` calls."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int)
    untrained.add_arguments(parser)
    return untrained.run(model, out, parser.parse_args(arguments))


@pytest.fixture(scope="module")
def sorted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sorted") / "model"
    assert sort(BUNDLED, out, *SHORT, *METHODS) == 0
    return out


def answers(folder: Path) -> list[tuple[int, ...]]:
    llm = LLM(folder, dtype="float32", kv_bytes=1 << 24)
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    full = llm.engine.info.ladder.entries[-1].id
    return [one.token_ids for one in llm.generate(["Once upon a time", "It was", "“No!”"], params, submodel=full)]


def test_the_full_models_tokens_do_not_change(sorted_folder: Path) -> None:
    assert answers(sorted_folder) == answers(BUNDLED)
    files = {path.name for path in BUNDLED.iterdir()} | {"ladder.svg"}
    assert {path.name for path in sorted_folder.iterdir()} == files
    assert (sorted_folder / "model.safetensors").read_bytes() != (BUNDLED / "model.safetensors").read_bytes()


def test_the_ladder_is_measured_and_rises(sorted_folder: Path) -> None:
    ladder = Ladder.load(sorted_folder / "ladder.json", load_model_config(BUNDLED).shape)
    assert not_monotone(ladder) == []
    measured = ladder.measured
    assert measured is not None
    assert set(measured.data_sha256) == {"dialogue", "maths", "prose", "code"}
    assert measured.versions["sortserve"]
    assert len(ladder.layer_importance) == LAYERS
    assert all(-1 <= value <= 1 for value in ladder.layer_importance)  # LIM's: minus a cosine
    assert len(set(ladder.layer_importance)) == LAYERS
    assert all(set(entry.domains) == set(measured.data_sha256) for entry in ladder.entries)
    assert ladder.pairs == () or {pair.answer for pair in ladder.pairs} <= {entry.id for entry in ladder.entries}


def test_trained_exits_stay_candidates(tmp_path: Path) -> None:
    """Not the narrow entries: they meant the first neurons of an order that is no more."""
    shape = load_model_config(BUNDLED).shape
    entries = [Entry("d2", SubModel.make(2, 512)), Entry("d4-w50", SubModel.make(4, 256))]
    entries.append(Entry("mine", SubModel.make(8, 512, [3], [5])))
    Ladder.of(shape, entries).dump(tmp_path / "ladder.json")
    assert [one.id for one in exits_of(tmp_path, shape)] == ["d2", "mine", FULL]
    assert exits_of(tmp_path / "nowhere", shape) == []


def test_serving_takes_the_folder(sorted_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ladder", str(sorted_folder)]) == 0
    assert "exp(loss_full - loss)" in capsys.readouterr().out
    llm = LLM(sorted_folder, kv_bytes=1 << 24)
    cheapest = llm.engine.info.ladder.entries[0].id
    [one] = llm.generate(["Once"], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True), submodel=cheapest)
    assert set(one.submodels) == {cheapest}


def test_nothing_is_written_where_something_is(sorted_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(SortingError, match="not empty"):
        sort(BUNDLED, tmp_path, *SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--methods", "magic"], "no method magic; there are widths"),
        (["--budgets", "abc"], "--budgets is 'abc'"),
        (["--levels", "120"], r"must be in \[0, 100\)"),
        (["--held-out", "x=/nowhere"], "/nowhere is neither"),
        (["--budgets", "10"], "narrowest level"),
        (["--drop", "99"], "sub-layers"),
        (["--calibration", "a=TEXT", "--held-out", "b=TEXT"], "held-out text is among the calibration"),
    ],
)
def test_arguments_that_cannot_be(tmp_path: Path, arguments: list[str], told: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A few plain words that go on for a while, so that there is enough of them to count.")
    given = [argument.replace("TEXT", str(text)) for argument in arguments]
    with pytest.raises(SortingError, match=told):
        sort(BUNDLED, tmp_path / "out", *SHORT, *given)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


# ---- ladder measure and ladder import

HARNESS = """\
import json, re, sys, urllib.request
arguments = dict(part.split("=", 1) for part in sys.argv[sys.argv.index("--model_args") + 1].split(","))
body = json.dumps({"model": arguments["model"], "prompt": "Once", "max_tokens": 1}).encode()
request = urllib.request.Request(arguments["base_url"], body, {"Content-Type": "application/json"})
answer = json.load(urllib.request.urlopen(request))
(name, count), = answer["sortserve"]["submodels"].items()
assert arguments["model"] == f"sorted:{name}" and count == 1
value = {"acc,none": 0.5 if name == "FULL_ID" else 0.2, "acc_stderr,none": 0.1, "sample_len": 7}
out = sys.argv[sys.argv.index("--output_path") + 1]
open(f"{out}/results_x.json", "w").write(json.dumps({"results": {"arc": value}}))
"""


def test_measuring_with_tasks_times_and_a_harness(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness is a stand-in that asks the real server; the real one is met in tests/compat."""
    ladder = tmp_path / "in.json"
    shape = {"format": "sortserve-ladder", "version": 1, "num_layers": LAYERS, "ffn_width": 512}
    ladder.write_text(json.dumps({**shape, "entries": [{"depth": 2, "width": 128}, {"depth": LAYERS, "width": 256}]}))
    (tmp_path / "modules" / "lm_eval").mkdir(parents=True)
    (tmp_path / "modules" / "lm_eval" / "__main__.py").write_text(HARNESS.replace("FULL_ID", FULL))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/modules exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "How many?", "answer": "#### 7"}\n' * 2)
    source = str(Path(__file__).parents[2] / "src")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]))
    arguments = ["--ladder", str(ladder), "--to", str(tmp_path / "out.json"), "--tokens", "60", "--window", "96"]
    arguments += ["--task", f"gsm8k={questions}", "--questions", "2", "--time", "--dtype", "float32"]
    arguments += ["--lm-eval", "arc", "--lm-eval-python", str(python), "--keep-dominated"]
    assert main(["ladder", "measure", str(BUNDLED), *arguments]) == 0, capsys.readouterr().err
    found = Ladder.load(tmp_path / "out.json", load_model_config(BUNDLED).shape)
    assert [entry.id for entry in found.entries] == ["d2-w25", f"{FULL}-w50", FULL]
    for entry in found.entries:
        assert entry.scores["gsm8k"].questions == 2
        assert entry.scores["arc"].value == (0.5 if entry.id == FULL else 0.2)
        assert entry.token_ms is not None
    assert {(pair.prompt, pair.answer) for pair in found.pairs} == {(f"{FULL}-w50", FULL), (FULL, f"{FULL}-w50")}
    assert all(pair.scores["gsm8k"].questions == 2 for pair in found.pairs)
    assert found.entries[0].degraded, "0.2 is under half of 0.5"
    assert not found.entries[-1].degraded
    assert "arc 0.200 [0.046, 0.567]" in capsys.readouterr().out
    assert (tmp_path / "out.svg").is_file()
    assert not (tmp_path / "out.unfinished.json").exists()


def test_code_is_only_run_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "HumanEval.jsonl"
    path.write_text('{"prompt": "def f():\\n", "test": "", "entry_point": "f"}\n')
    assert main(["ladder", "measure", str(BUNDLED), "--task", f"humaneval={path}"]) == 2
    assert "--run-generated-code" in capsys.readouterr().err


def test_importing_adds_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ladder.json"
    drops, exits = tmp_path / "layer_drop_config.txt", tmp_path / "exits.json"
    drops.write_text("none\nattn\nmlp\nattn+mlp\n" + "none\n" * (LAYERS - 4))
    exits.write_text(f"[4, {LAYERS}]")
    assert main(["ladder", "import", str(BUNDLED), str(drops), "--from", "evopress", "--to", str(out)]) == 0
    assert main(["ladder", "import", str(BUNDLED), str(exits), "--from", "layerskip", "--to", str(out)]) == 0
    shape = load_model_config(BUNDLED).shape
    found = Ladder.load(out, shape)
    assert {entry.id: entry.method for entry in found.entries} == {
        "evopress-layer_drop_config": "evopress",
        "d4": "layerskip",
        FULL: "",
    }
    assert found.measured is None
    assert "2 entries added" not in capsys.readouterr().out.splitlines()[-1], "the full model was there already"
    assert (
        main(["ladder", "import", str(BUNDLED), str(exits), "--from", "layerskip", "--to", str(out), "--replace"]) == 0
    )
    assert [entry.id for entry in Ladder.load(out, shape).entries] == ["d4", FULL]
    assert main(["ladder", "import", str(BUNDLED), str(exits), "--from", "evopress", "--to", str(out)]) == 2
    assert "exits.json is no evopress file" in capsys.readouterr().err
