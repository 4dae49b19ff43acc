"""The decoder that everything here runs on: against transformers, against the float64 oracle, and against itself."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sortserve.engine.errors import ModelFolderError
from sortserve.engine.model_config import load_model_config
from sortserve.engine.submodel import SubModel
from sortserve.sorting.decoder import Decoder, SharedRun
from tests.engine.asif import Oracle
from tests.engine.tiny_models import FAMILIES, make_tiny

TOKENS = torch.randint(0, 101, (3, 20), generator=torch.Generator().manual_seed(1))


def logits(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    return decoder.logits(hidden.reshape(-1, hidden.shape[-1])).view(*hidden.shape[:2], -1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_full_model_is_that_of_transformers(tmp_path: Path, family: str) -> None:
    reference = make_tiny(tmp_path, family, **({"sliding_window": 8} if family == "mistral" else {}))
    decoder = Decoder.load(tmp_path, torch.float32, 32)
    ours = logits(decoder, decoder.run(TOKENS, SubModel.full(decoder.config.shape)))
    torch.testing.assert_close(ours, reference(TOKENS).logits, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Oracle]:
    folder = tmp_path_factory.mktemp("llama")
    make_tiny(folder, "llama", seed=3)
    return Decoder.load(folder, torch.float32, 32), Oracle(folder, load_model_config(folder))


SUBMODELS = [
    SubModel.make(6, 64),
    SubModel.make(3, 64),
    SubModel.make(6, [64, 32, 8, 0, 48, 1]),
    SubModel.make(5, 40, skip_attention=[1, 4], skip_ffn=[2]),
]


@pytest.mark.parametrize("submodel", SUBMODELS, ids=str)
@torch.inference_mode()
def test_submodels_are_those_of_the_oracle(llama: tuple[Decoder, Oracle], submodel: SubModel) -> None:
    """The oracle computes all neurons and masks; here the rest of them is never computed."""
    decoder, oracle = llama
    ours = logits(decoder, decoder.run(TOKENS, submodel))
    count = TOKENS.shape[1]
    widths = torch.tensor(submodel.widths)[:, None].expand(-1, count)
    on = torch.tensor([layer not in submodel.skip_attention for layer in range(submodel.depth)])
    expected = oracle.logits(TOKENS[1].tolist(), widths, on[:, None].expand(-1, count))
    torch.testing.assert_close(ours[1, -1].double(), expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_pair_runs_each_token_on_its_own_submodel(llama: tuple[Decoder, Oracle]) -> None:
    decoder, oracle = llama
    prompt = SubModel.make(6, [64, 16, 0, 64, 32, 64], skip_attention=[2])
    answer = SubModel.make(6, [64, 64, 64, 8, 32, 64], skip_attention=[4])
    is_prompt = torch.arange(20)[None] < torch.tensor([7, 12, 1])[:, None]
    ours = logits(decoder, decoder.run_pair(TOKENS, is_prompt, prompt, answer))
    for text in range(3):
        widths = torch.where(
            is_prompt[text][None], torch.tensor(prompt.widths)[:, None], torch.tensor(answer.widths)[:, None]
        )
        on = torch.ones(6, 20, dtype=torch.bool)
        on[2, is_prompt[text]] = False
        on[4, ~is_prompt[text]] = False
        expected = oracle.logits(TOKENS[text].tolist(), widths, on)
        torch.testing.assert_close(ours[text, -1].double(), expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_padding_reaches_no_real_token(llama: tuple[Decoder, Oracle]) -> None:
    decoder, _ = llama
    padded = TOKENS.clone()
    padded[:, 11:] = 0
    full = SubModel.full(decoder.config.shape)
    torch.testing.assert_close(decoder.run(padded, full)[:, :11], decoder.run(TOKENS, full)[:, :11])


@torch.inference_mode()
def test_shared_layers_are_computed_once(llama: tuple[Decoder, Oracle], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _ = llama
    shared = SharedRun(decoder, TOKENS)
    ran: list[int] = []
    layer = Decoder.layer

    def counting(self: Decoder, number: int, *rest: object) -> torch.Tensor:
        ran.append(number)
        return layer(self, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "layer", counting)
    order = [SUBMODELS[0], SUBMODELS[2], SUBMODELS[1], SUBMODELS[3], SUBMODELS[0]]
    counts = []
    for place, submodel in enumerate(order):
        ran.clear()
        found = shared.run(submodel, keep=place in (0, 3))
        counts.append(len(ran))
        ran.clear()
        torch.testing.assert_close(found, decoder.run(TOKENS, submodel))
    assert counts == [6, 5, 0, 5, 6]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_checkpoint_with_nan_is_refused(tmp_path: Path, value: float) -> None:
    make_tiny(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.4.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"model\.layers\.4\.mlp\.up_proj\.weight .* in 1 places"):
        Decoder.load(tmp_path, torch.float32, 32)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    make_tiny(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelFolderError, match="truncated"):
        Decoder.load(tmp_path, torch.float32, 32)
