"""`sortserve sort` from text to a folder that is served, and what kills, full disks and damage do to it."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sortserve import LLM, SamplingParams
from sortserve.__main__ import main
from sortserve.engine.errors import SortingError
from sortserve.sorting import result, saved_run, training
from sortserve.sorting import trainer as trainer_module
from tests.sorting.test_saved_run import no_room_beyond
from tests.sorting.toy import RECIPE, toy_model, write_books

UPDATES = 8


@pytest.fixture
def books(tmp_path: Path) -> Path:
    return write_books(tmp_path / "books")


def command(tmp_path: Path, out: str, *flags: str, recipe: str = RECIPE) -> list[str]:
    (tmp_path / "recipe.toml").write_text(recipe)
    given = ["--recipe", str(tmp_path / "recipe.toml"), "--data", str(tmp_path / "books"), "--to", str(tmp_path / out)]
    return ["sort", *given, *flags]


def losses(folder: Path) -> list[Any]:
    """The log without what the clock says."""
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("update", "tokens", "rate", "loss")} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return found


# ---- from text to a served model


def test_from_text_to_a_served_model(tmp_path: Path, books: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "out", "--updates", "30")) == 0
    out = tmp_path / "out"
    assert not (out / "unfinished").exists()
    curve = [line["loss"] for line in losses(out)]
    first, last = (curve[place].get("d4-w64", curve[place].get("d4-w32")) for place in (0, -1))
    assert last < first - 0.5, "it learns"
    record = json.loads((out / "training.json").read_text())
    assert record["held_out"]["files"] == ["book3.md"]
    assert set(record["held_out"]["losses"]) == {"d2-w32", "d2-w64", "d4-w32", "d4-w64"}
    assert record["tokens"] == 30 * 256
    assert 0 < record["share_of_machine_flops"] < 1
    assert record["step_memory_bound_bytes"] > 0
    assert "updates = 30" in (out / "recipe.toml").read_text()
    assert "book3" in (out / "README.md").read_text()
    assert "@" not in (out / "README.md").read_text()
    told = capsys.readouterr().err
    assert "tokens/s" in told
    assert "GiB" in told
    llm, params = LLM(out), SamplingParams(max_tokens=8, ignore_eos=True)
    assert [entry.id for entry in llm.engine.info.ladder.entries] == ["d2-w50", "d2", "d4-w50", "d4"]
    assert len({llm.generate(["The king"], params, submodel=name)[0].text for name in ("d2-w50", "d4")}) == 2


def test_seeds(tmp_path: Path, books: Path) -> None:
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(command(tmp_path, out, "--updates", "2", "--seed", seed)) == 0
    a, b, c = (weights(tmp_path / out) for out in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_alone_trains_the_full_model_only(tmp_path: Path, books: Path) -> None:
    assert main(command(tmp_path, "out", "--updates", "2", "--alone")) == 0
    assert [set(line["loss"]) for line in losses(tmp_path / "out")] == [{"d4-w64"}] * 2
    assert "alone = true" in (tmp_path / "out/recipe.toml").read_text()


def test_the_last_update_is_logged(tmp_path: Path, books: Path) -> None:
    recipe = RECIPE.replace("log_every = 1", "log_every = 4")
    for updates, logged in (("2", [2]), ("6", [4, 6])):
        assert main(command(tmp_path, "out", "--updates", updates, recipe=recipe)) == 0
        assert [line["update"] for line in losses(tmp_path / "out")] == logged


def test_minutes_end_annealed(tmp_path: Path, books: Path) -> None:
    """The rate follows the clock: at its end it is the recipe's last one, and the whole took no longer than asked."""
    began = time.monotonic()
    assert main(command(tmp_path, "out", "--minutes", "0.05")) == 0
    assert time.monotonic() - began < 30
    curve = losses(tmp_path / "out")
    assert curve[-1]["rate"] < 0.1
    assert max(line["rate"] for line in curve) > 0.9


# ---- from a model


LORA = """\
[data]
hold_out_every = 4
[grid]
exits = [2]
widths = [24]
[method]
kind = "sorted"
distill = 0.5
[train]
tokens_per_pass = 64
window = 32
lr = 0.01
dtype = "float32"
checkpointed = true
log_every = 1
[lora]
rank = 2
sorted_ranks = true
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Qwen2 with a tokenizer that opens nothing with a BOS."""
    folder = tmp_path / "model"
    toy_model("qwen2", vocab_size=300).save_pretrained(folder)
    from tests.server.fake_backend import byte_tokenizer

    byte_tokenizer()._hf.save(str(folder / "tokenizer.json"))
    return folder


def test_adapters_are_trained_and_merged(tmp_path: Path, books: Path, model: Path) -> None:
    given = command(tmp_path, "out", "--updates", "6", recipe=LORA)
    assert main(["sort", str(model), *given[1:]]) == 0
    before, after = weights(model), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].bfloat16(), after[name].bfloat16())}
    assert changed == {name for name in before if "proj.weight" in name}
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert {name for line in losses(tmp_path / "out") for name in line["loss"]} <= {
        "d2-w24",
        "d2-w48",
        "d4-w24",
        "d4-w48",
    }


DAMAGE = {
    "truncated": "model.safetensors",
    "nan": r"layers\.1\.mlp\.up_proj\.weight holds NaN",
    "no weights": "safetensors",
    "no config": r"config\.json",
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.items())
def test_a_damaged_model_is_refused(
    tmp_path: Path, books: Path, model: Path, damage: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "nan":
        broken = toy_model("qwen2", vocab_size=300)
        with torch.no_grad():
            broken.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
        broken.save_pretrained(model)
    else:
        (path if damage == "no weights" else model / "config.json").unlink()
    assert main(["sort", str(model), *command(tmp_path, "out", "--updates", "1", recipe=LORA)[1:]]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out/model.safetensors").exists()


def test_arguments_that_do_not_go_together(
    tmp_path: Path, books: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def of_nothing() -> list[str]:
        return command(tmp_path, "out", recipe=LORA)

    def of_a_model() -> list[str]:
        return ["sort", str(model), *command(tmp_path, "out")[1:]]

    for made in (
        of_nothing,
        of_a_model,
        lambda: ["sort", str(model), "--to", str(tmp_path / "out")],
        lambda: ["sort", "--no-training", "--to", str(tmp_path / "out")],
    ):
        assert main(made()) == 2
        assert re.search("give|needs", capsys.readouterr().err)


# ---- kills, full disks, damage


def test_a_killed_run_goes_on_with_the_same_losses(tmp_path: Path, books: Path) -> None:
    """Killed for good, at whatever moment: the log and the weights are those of the run that was not."""
    assert main(command(tmp_path, "whole", "--updates", str(UPDATES))) == 0
    frequent = RECIPE.replace("log_every = 1", "log_every = 1\nsave_minutes = 0.0")
    slow = "import time; from sortserve.sorting import trainer as t; f = t.train_step\n"
    slow += "t.train_step = lambda *a: (time.sleep(0.2), f(*a))[1]\n"  # so that the kill meets it at work
    start = f"import sys; {slow}from sortserve.__main__ import main; sys.exit(main(sys.argv[1:]))"
    given = command(tmp_path, "killed", "--updates", str(UPDATES), recipe=frequent)
    log = tmp_path / "killed/unfinished/training.jsonl"
    process = subprocess.Popen([sys.executable, "-c", start, *given], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main(given) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def stop_after(updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C at that moment."""
    step = trainer_module.train_step

    def stopping(parts: Any, optimizer: Any, update: int, rate: float) -> Any:
        if update == updates - 1:
            signal.raise_signal(signal.SIGINT)
        return step(parts, optimizer, update, rate)

    monkeypatch.setattr(trainer_module, "train_step", stopping)


@pytest.fixture
def stopped(tmp_path: Path, books: Path) -> Path:
    """The folder of a run that was stopped after 3 updates."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, patch)
        assert main(command(tmp_path, "out", "--updates", str(UPDATES))) == 3
    assert [path.name for path in (tmp_path / "out/unfinished").glob("update-*")] == ["update-000000003"]
    assert not (tmp_path / "out/model.safetensors").exists()
    return tmp_path / "out"


def test_a_stopped_run_goes_on(tmp_path: Path, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its log too, whatever a kill or a full disk left at the end of it."""
    with (stopped / "unfinished/training.jsonl").open("a") as log:
        log.write('{"update": 4, "tokens": 1024, "loss": {"d4-w64": 5.1}\n{"update": 5')
    assert main(command(tmp_path, "out", "--updates", str(UPDATES))) == 0
    assert "going on after update 3" in capsys.readouterr().err
    assert [line["update"] for line in losses(stopped)] == list(range(1, UPDATES + 1))


def test_an_unfinished_run_of_another_recipe_is_refused(
    tmp_path: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = RECIPE.replace("lr = 0.01", "lr = 0.02")
    assert main(command(tmp_path, "out", "--updates", str(UPDATES), recipe=other)) == 2
    assert "--fresh" in capsys.readouterr().err
    assert main(command(tmp_path, "out", "--updates", "2", "--fresh", recipe=other)) == 0
    assert [line["update"] for line in losses(stopped)] == [1, 2]


def test_a_damaged_unfinished_run_is_refused(tmp_path: Path, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stopped / "unfinished/update-000000003/state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert main(command(tmp_path, "out", "--updates", str(UPDATES))) == 2
    assert "truncated" in capsys.readouterr().err
    assert path.exists()


def test_a_full_disk_in_the_middle_of_a_run(
    tmp_path: Path, books: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training goes on; the older save stays; when there is room again, the next one is written."""
    frequent = RECIPE.replace("log_every = 1", "log_every = 1\nsave_minutes = 0.0")
    save, found = saved_run.save, []

    def full_for_a_while(folder: Path, run: saved_run.SavedRun) -> None:
        if run.facts["update"] in (3, 4):
            with no_room_beyond(5000):
                try:
                    save(folder, run)
                finally:
                    found.append(sorted(path.name for path in folder.glob("update-*")))
        else:
            save(folder, run)

    monkeypatch.setattr(saved_run, "save", full_for_a_while)
    assert main(command(tmp_path, "out", "--updates", "5", recipe=frequent)) == 0
    assert found == [["update-000000001", "update-000000002"]] * 2
    assert "not saved" in capsys.readouterr().err
    assert len(losses(tmp_path / "out")) == 5


def test_a_full_disk_at_the_end_keeps_the_run(
    tmp_path: Path, books: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an earlier run left in the folder stays as well; with room again the same command writes the result."""
    assert main(command(tmp_path, "out", "--updates", "1")) == 0
    earlier = (tmp_path / "out/model.safetensors").read_bytes()
    given = command(tmp_path, "out", "--updates", "2")
    write = result.write

    def without_room(*args: Any) -> None:
        with no_room_beyond(10_000):
            write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(result, "write", without_room)
        assert main(given) == 2
    assert "the run is kept" in capsys.readouterr().err
    assert (tmp_path / "out/model.safetensors").read_bytes() == earlier
    assert (tmp_path / "out/unfinished/update-000000002").exists()
    assert not (tmp_path / "out/.writing").exists()
    assert main(given) == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() != earlier
    assert json.loads((tmp_path / "out/training.json").read_text())["updates"] == 2


def test_no_room_for_the_encoded_text(tmp_path: Path, books: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = command(tmp_path, "out", "--updates", "1")
    with no_room_beyond(100):
        assert main(given) == 2
    assert "sortserve: " in capsys.readouterr().err
    assert main(given) == 0


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_pass = trainer_module.run_pass

    def broken(parts: Any, one: Any, windows: Any) -> Any:
        return run_pass(parts, one, windows) * float("nan")

    monkeypatch.setattr(trainer_module, "run_pass", broken)
    with pytest.raises(SortingError, match=r"update 0: the loss of d\d is nan"):
        training.run(None, tmp_path / "out", parse(command(tmp_path, "out", "--updates", "2")))


def parse(given: list[str]) -> Any:
    import argparse

    from sortserve.sorting.cli import add_sort_arguments

    parser = argparse.ArgumentParser()
    add_sort_arguments(parser)
    return parser.parse_args(given[1:])
