"""Fitting and calibrating the depth head."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sortserve.__main__ import main
from sortserve.engine.depth_head import DepthHead, within
from sortserve.engine.errors import SortingError
from sortserve.engine.ladder import Entry, Ladder
from sortserve.engine.model_config import load_model_config
from sortserve.engine.submodel import SubModel
from sortserve.server.cli import BUNDLED
from sortserve.sorting import depth_head
from sortserve.sorting.decoder import Decoder
from sortserve.sorting.depth_head import Samples
from sortserve.sorting.head_cli import HEAD_FILE
from sortserve.sorting.texts import Domain

DEPTHS = (2, 4)  # and all six


@pytest.fixture
def ladder(toy: Decoder) -> Ladder:
    """Two widths at the second exit: the dearer one is what runs there."""
    entries = [Entry(f"d{depth}", SubModel.make(depth, 64)) for depth in DEPTHS]
    return Ladder.of(toy.config.shape, [*entries, Entry("d4-w50", SubModel.make(4, 32))])


def test_needed_is_the_shallowest_exit_from_which_all_agree() -> None:
    best = torch.tensor([[7, 7, 1, 7], [7, 2, 2, 5], [7, 7, 3, 7]])  # [exits, tokens]
    assert depth_head.needed_exit(best).tolist() == [0, 2, 2, 2]


def test_the_loss_is_the_likelihood_of_the_exit() -> None:
    """Probabilities of all exits add up to one, and `within` is their running sum."""
    torch.manual_seed(0)
    logits = torch.randn(1, 4)
    shares = [float(torch.exp(-depth_head.loss_of(logits, torch.tensor([exit])))) for exit in range(5)]
    assert sum(shares) == pytest.approx(1.0, abs=1e-6)
    running = torch.tensor(shares).cumsum(0)[:4].tolist()
    assert within(logits)[0].tolist() == pytest.approx(running, abs=1e-6)


@torch.inference_mode()
def test_samples_are_rows_and_what_the_next_one_needs(toy: Decoder, ladder: Ladder, toy_domains: list[Domain]) -> None:
    """Text by text, without padding or batches: the same states, drawn tokens and exits."""
    found = depth_head.collect(toy, ladder, toy_domains)
    states: list[torch.Tensor] = []
    drawn: list[int] = []
    needed: list[int] = []
    for domain in toy_domains:
        for text in sorted(domain.texts, key=lambda text: -len(text.tokens)):
            tokens = torch.tensor([text.tokens])
            exits = [toy.run(tokens, ladder.entries[place].submodel)[0] for place in ladder.dearest]
            best = torch.stack([toy.logits(each).argmax(-1) for each in exits])
            states.append(torch.stack(exits)[:, :-1])
            drawn += text.tokens[1:]
            needed += depth_head.needed_exit(best)[1:].tolist()
    normed = torch.nn.functional.rms_norm(torch.cat(states, 1), (48,), toy.final_norm, toy.config.rms_eps)
    assert found.drawn.tolist() == drawn
    assert found.needed.tolist() == needed
    assert torch.allclose(found.normed.float(), normed, rtol=0.01, atol=0.01)
    assert len(set(needed)) == 3, "the toy's exits never differ, so nothing is tested"


def test_it_learns_what_there_is_and_tells_true_probabilities(toy: Decoder, ladder: Ladder) -> None:
    """Exits needed that hang on one number of the state: nearly the entropy that is left. A head whose hazards are all
    off by a factor is put right by calibration."""
    fitted, held_out = (_made_up(count, seed) for count, seed in ((6000, 1), (4000, 2)))
    head = depth_head.fit(toy, ladder, fitted, epochs=200)
    judged = depth_head.judge(head, toy, held_out)
    assert judged.loss < 0.75 * judged.loss_blind
    assert judged.calibration_error < 0.04
    off = DepthHead(head.inner, head.inner_bias, 3 * head.hazard, 3 * head.hazard_bias + 1)
    bad, mended = (depth_head.judge(each, toy, held_out) for each in (off, depth_head.calibrate(off, toy, fitted)))
    assert bad.calibration_error > 0.08
    assert mended.calibration_error < 0.04
    assert mended.loss == pytest.approx(judged.loss, abs=0.02)


def test_calibration_error_is_the_distance_of_told_and_true() -> None:
    told = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    came = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) < told
    assert depth_head.calibration_error(told, came) < 0.02
    assert depth_head.calibration_error(told * 0.5, came) == pytest.approx(0.25, abs=0.02)


def test_the_command_writes_the_head_beside_the_ladder(tmp_path: Path) -> None:
    """And names it with its figures; a ladder of one exit is refused."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in BUNDLED.iterdir():
        if file.name != HEAD_FILE:
            shutil.copy(file, folder)
    ladder = replace(Ladder.load(folder / "ladder.json", load_model_config(folder).shape), depth_head=None)
    ladder.dump(folder / "ladder.json")
    (tmp_path / "text.txt").write_text("\n\n".join("the ship lay at anchor in the bay" * 3 for _ in range(60)))
    arguments = ["ladder", "head", str(folder), "--fit", str(tmp_path / "text.txt")]
    arguments += ["--held-out", str(tmp_path / "text.txt"), "--tokens", "400", "--window", "32"]
    assert main(arguments) == 0
    assert [file.name for file in folder.glob("*.safetensors")] == [
        "model.safetensors"
    ]  # vLLM loads them all as weights
    written = Ladder.load(folder / "ladder.json", load_model_config(folder).shape)
    assert written.entries == ladder.entries
    assert written.depth_head is not None
    assert written.depth_head.tokens > 300
    head = DepthHead.load(folder / written.depth_head.file, ladder.num_segments, ladder.shape.hidden_size)
    assert head.layer_share(ladder.shape) == pytest.approx(written.depth_head.layer_share, abs=1e-4)
    one = Ladder.default(ladder.shape)
    with pytest.raises(SortingError, match="one exit only"):
        depth_head.collect(Decoder.load(folder, torch.float32, 64), one, [])


def _made_up(count: int, seed: int) -> Samples:
    """Random states; a token needs the first exit more often the larger the state's first number is, else any deeper."""
    generator = torch.Generator().manual_seed(seed)
    normed = torch.randn(3, count, 48, generator=generator)
    normed[:, :, 0] = normed[0, :, 0]
    easy = torch.rand(count, generator=generator) < torch.sigmoid(4 * normed[0, :, 0])
    deeper = 1 + (torch.rand(count, generator=generator) < 0.2).long()
    drawn = torch.randint(0, 97, (count,), generator=generator)
    return Samples(normed.bfloat16(), drawn, torch.where(easy, 0, deeper))
