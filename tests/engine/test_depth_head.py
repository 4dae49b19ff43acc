"""The depth head: its arithmetic, its file, and its way from the runner to the policy."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sortserve.engine.depth_head import MOST_SHARE, DepthHead, inner_width
from sortserve.engine.errors import LadderError
from sortserve.engine.ladder import DepthHeadEntry, Ladder
from sortserve.engine.policies.registry import make_policy
from sortserve.engine.request import Request
from sortserve.engine.submodel import ModelShape
from sortserve.server.cli import BUNDLED
from tests.bundled import _FOUND as BUNDLED_LADDER
from tests.engine.drive import ask, greedy, load_engine, run

EXITS, HIDDEN, UNITS = 3, 5, 4


def random_head(seed: int = 0) -> DepthHead:
    torch.manual_seed(seed)
    return DepthHead(
        torch.randn(EXITS, UNITS, 2 * HIDDEN),
        torch.randn(EXITS, UNITS),
        torch.randn(EXITS, EXITS - 1, UNITS),
        torch.randn(EXITS, EXITS - 1),
    )


def test_it_is_the_formula_row_by_row() -> None:
    """Each row by its own exit's weights, whatever rows are beside it; the deepest exit is enough for all."""
    head, exits = random_head(), [2, 0, 1, 0]
    normed, drawn = torch.randn(4, HIDDEN), torch.randn(4, HIDDEN)
    told = head.within(exits, normed, drawn)
    for row, exit in enumerate(exits):
        inner = torch.tanh(head.inner[exit] @ torch.cat([normed[row], drawn[row]]) + head.inner_bias[exit])
        hazards = torch.sigmoid(head.hazard[exit] @ inner + head.hazard_bias[exit]).tolist()
        first, second = hazards
        assert told[row].tolist() == pytest.approx([first, 1 - (1 - first) * (1 - second), 1.0], rel=1e-5)


@pytest.mark.parametrize(
    "shape",
    [ModelShape(12, 192, 512, 6, 2, 32, 4096), ModelShape(24, 896, 4864, 14, 2, 64, 151936)],
    ids=["bundled", "0.5B"],
)
def test_a_row_reads_at_most_a_hundredth_of_a_layer(shape: ModelShape) -> None:
    for exits in (2, 6, 12):
        units = inner_width(shape, exits)
        head = DepthHead(
            torch.zeros(exits, units, 2 * shape.hidden_size),
            torch.zeros(exits, units),
            torch.zeros(exits, exits - 1, units),
            torch.zeros(exits, exits - 1),
        )
        assert 0.003 < head.layer_share(shape) <= MOST_SHARE


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    """In bfloat16, and readable for everybody."""
    head, path = random_head(), tmp_path / "head.safetensors"
    head.save(path)
    loaded = DepthHead.load(path, EXITS, HIDDEN)
    for name, tensor in vars(head).items():
        assert torch.equal(getattr(loaded, name), tensor.bfloat16().float())
    assert path.stat().st_mode & 0o044 == 0o044 & ~_umask()


@pytest.mark.parametrize("wrong", ["missing", "no tensors", "other exits", "other model", "a NaN", "a name too much"])
def test_a_file_that_does_not_belong_here_is_told(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "head.safetensors"
    exits, hidden = EXITS + (wrong == "other exits"), HIDDEN + (wrong == "other model")
    if wrong == "no tensors":
        path.write_bytes(b"nothing")
    elif wrong != "missing":
        head = random_head()
        if wrong == "a NaN":
            head.hazard_bias[0, 0] = float("nan")
        head.save(path)
        if wrong == "a name too much":
            save_file(load_file(path) | {"more": torch.zeros(1)}, path)
    with pytest.raises(LadderError, match=r"head\.safetensors"):
        DepthHead.load(path, exits, hidden)


def test_the_ladder_names_it(tmp_path: Path) -> None:
    """Kept by dump and load; dropped where a ladder is made anew; a name with a folder is refused."""
    entry = BUNDLED_LADDER.depth_head
    assert entry is not None
    assert entry.layer_share <= MOST_SHARE
    assert entry.loss < entry.loss_blind
    path = tmp_path / "ladder.json"
    BUNDLED_LADDER.dump(path)
    assert Ladder.load(path, BUNDLED_LADDER.shape).depth_head == entry
    assert Ladder.of(BUNDLED_LADDER.shape, BUNDLED_LADDER.entries).depth_head is None
    replace(BUNDLED_LADDER, depth_head=_entry("../head.safetensors")).dump(path)
    with pytest.raises(LadderError, match="without a folder"):
        Ladder.load(path, BUNDLED_LADDER.shape)


def test_dearest_place_of_each_exit() -> None:
    depths = [BUNDLED_LADDER.entries[place].submodel.depth for place in BUNDLED_LADDER.dearest]
    assert depths == list(BUNDLED_LADDER.exits)
    for place in BUNDLED_LADDER.dearest:
        depth = BUNDLED_LADDER.entries[place].submodel.depth
        assert all(entry.submodel.depth != depth for entry in BUNDLED_LADDER.entries[place + 1 :])


def test_the_depth_of_the_next_token_follows_the_last_one() -> None:
    """The bundled head in the real engine: asked before every step, each token runs the exit that the token before it
    asked for, as this test works it out of what the runner gave; the tokens take several depths."""
    engine = load_engine(BUNDLED, policy="confidence")
    engine.scheduler.policy = make_policy("confidence", engine.scheduler.rungs, signal="q-exit", q=0.6)
    ladder, wanted = engine.info.ladder, [ladder_full()]
    seen = 0

    def note(_: object) -> None:
        nonlocal seen
        for request in engine.scheduler.requests.values():
            assert isinstance(request, Request)
            if request.num_output > seen:
                seen = request.num_output
                assert request.within is not None
                exit = next(k for k, share in enumerate(request.within) if share > 0.6 or k == len(request.within) - 1)
                wanted.append(ladder.entries[ladder.dearest[exit]].id)

    floor = ladder.entries[0].id
    [outcome] = run(engine, [ask("r", range(5, 25), greedy(24, ignore_eos=True), floor=floor, kv_mode="reuse")], note)
    assert outcome.submodels == wanted[: len(outcome.submodels)]
    assert len(set(outcome.submodels)) > 2
    assert outcome.finished is not None


def test_without_the_policy_nothing_is_read_and_without_the_file_the_start_says_so(tmp_path: Path) -> None:
    engine = load_engine(BUNDLED, policy="fixed")

    def note(_: object) -> None:
        assert all(request.within is None for request in engine.scheduler.requests.values())

    run(engine, [ask("r", range(5, 9), greedy(3))], note)
    shutil.copytree(BUNDLED, tmp_path / "model")
    (tmp_path / "model" / "depth_head.st").unlink()
    with pytest.raises(LadderError, match="depth_head"):
        load_engine(tmp_path / "model")


def ladder_full() -> str:
    return BUNDLED_LADDER.entries[-1].id


def _entry(file: str) -> DepthHeadEntry:
    return DepthHeadEntry(file, 0.01, 1.0, 1.1, 0.01, 100)


def _umask() -> int:
    import os

    found = os.umask(0o022)
    os.umask(found)
    return found
