"""Checkpoints: what is read equals what transformers wrote, and a wrong folder is refused with the tensor's name."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sortserve.engine.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, DummyCheckpoint, ModelNames
from sortserve.engine.errors import ModelFolderError
from sortserve.engine.model_config import load_model_config
from tests.engine.tiny_models import FAMILIES, edit_json, make_tiny


def open_folder(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, load_model_config(folder))


def rewrite(folder: Path, remove: str | None = None, **tensors: torch.Tensor) -> None:
    """Change tensors of a single-file checkpoint; `__` in a keyword stands for a dot."""
    stored = load_file(folder / SINGLE_FILE)
    stored |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in stored.items() if name != remove}, folder / SINGLE_FILE)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_equal_those_of_transformers(tmp_path: Path, family: str, tied: bool, shards: int) -> None:
    """Every parameter of the reference is read under its own name, and nothing else is asked for."""
    model = make_tiny(tmp_path, family, shards=shards, tie_word_embeddings=tied)
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    checkpoint = open_folder(tmp_path)
    names = checkpoint.names
    read = {name for layer in names.layers for name in layer.present().values()}
    read |= {names.embed, names.final_norm, names.lm_head}
    parameters = dict(model.named_parameters())  # a tied head is not listed
    assert read == set(parameters)
    for name, parameter in parameters.items():
        assert torch.equal(checkpoint.read(name, torch.float32), parameter)
    assert (names.lm_head == names.embed) == tied


def test_all_biases(tmp_path: Path) -> None:
    model = make_tiny(tmp_path, "llama", attention_bias=True, mlp_bias=True)
    layer = open_folder(tmp_path).names.layers[5]
    assert set(layer.present().values()) == {name for name, _ in model.named_parameters() if ".layers.5." in name}


def test_read_converts_and_owns_its_memory(tmp_path: Path) -> None:
    model = make_tiny(tmp_path, "llama")
    checkpoint = open_folder(tmp_path)
    before = (tmp_path / SINGLE_FILE).read_bytes()
    tensor = checkpoint.read("model.norm.weight", torch.bfloat16)
    assert torch.equal(tensor, dict(model.named_parameters())["model.norm.weight"].bfloat16())
    tensor.zero_()
    assert (tmp_path / SINGLE_FILE).read_bytes() == before
    kept = checkpoint.read("model.embed_tokens.weight", torch.float32)
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(tmp_path) not in mapped.read_text()
    assert kept.is_contiguous()


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    make_tiny(tmp_path, "llama", tie_word_embeddings=True)
    frequencies = torch.ones(4)
    rewrite(
        tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=frequencies, lm_head__weight=torch.ones(101, 48)
    )
    checkpoint = open_folder(tmp_path)
    assert not torch.equal(checkpoint.read(checkpoint.names.lm_head, torch.float32), torch.ones(101, 48))


def test_wrong_tensors_are_named(tmp_path: Path) -> None:
    make_tiny(tmp_path, "llama")
    rewrite(tmp_path, model__norm__weight=torch.ones(47))
    with pytest.raises(ModelFolderError, match=r"model\.norm\.weight is \[47\], must be \[48\]"):
        open_folder(tmp_path)
    rewrite(tmp_path, model__norm__weight=torch.ones(48, dtype=torch.int8))
    with pytest.raises(ModelFolderError, match=r"quantized.*model\.norm\.weight \(I8\)"):
        open_folder(tmp_path)
    rewrite(tmp_path, model__norm__weight=torch.ones(48), model__layers__0__mlp__gate_proj__bias=torch.ones(64))
    with pytest.raises(ModelFolderError, match=r"has model\.layers\.0\.mlp\.gate_proj\.bias that"):
        open_folder(tmp_path)
    rewrite(tmp_path, remove="model.layers.0.mlp.gate_proj.bias")
    open_folder(tmp_path)
    rewrite(tmp_path, remove="model.layers.3.mlp.up_proj.weight")
    with pytest.raises(ModelFolderError, match=r"lacks model\.layers\.3\.mlp\.up_proj\.weight that"):
        open_folder(tmp_path)


def test_config_of_another_depth(tmp_path: Path) -> None:
    make_tiny(tmp_path, "llama")
    edit_json(tmp_path / "config.json", num_hidden_layers=7)
    with pytest.raises(ModelFolderError, match=r"lacks model\.layers\.6\.input_layernorm.* and 4 more"):
        open_folder(tmp_path)
    edit_json(tmp_path / "config.json", num_hidden_layers=5)
    with pytest.raises(ModelFolderError, match=r"has .*model\.layers\.5\..* and 4 more that"):
        open_folder(tmp_path)


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    make_tiny(tmp_path, "llama")
    path = tmp_path / SINGLE_FILE
    content = path.read_bytes()
    for size in (len(content) - 1, 1000, 4, 0):
        path.write_bytes(content[:size])
        with pytest.raises(ModelFolderError, match=re.escape(str(path)) + " is truncated.*download it again"):
            open_folder(tmp_path)
    path.write_bytes(b"not a checkpoint" * 100)
    with pytest.raises(ModelFolderError, match="not a safetensors file"):
        open_folder(tmp_path)
    path.unlink()
    with pytest.raises(ModelFolderError, match="neither"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelFolderError, match="convert"):
        open_folder(tmp_path)


def test_bad_indexes(tmp_path: Path) -> None:
    make_tiny(tmp_path, "llama", shards=3)
    shards = sorted(tmp_path.glob("*.safetensors"))
    (tmp_path / "elsewhere").mkdir()
    for weight_map, message in (
        ({"a": "../model.safetensors"}, "not a file of the folder"),
        ({"a": 5}, "not a file of the folder"),
        ({"a": "gone.safetensors"}, r"lacks gone\.safetensors"),
        ({"a": shards[0].name}, r"lacks .*weight.* that config\.json asks for"),
        (["a"], "not an index"),
    ):
        edit_json(tmp_path / INDEX_FILE, weight_map=weight_map)
        with pytest.raises(ModelFolderError, match=message):
            open_folder(tmp_path)
    (tmp_path / "twice.safetensors").write_bytes(shards[0].read_bytes())
    edit_json(tmp_path / INDEX_FILE, weight_map={"a": shards[0].name, "b": "twice.safetensors"})
    with pytest.raises(ModelFolderError, match=r"is both in .* and in"):
        open_folder(tmp_path)
    (tmp_path / INDEX_FILE).write_text("{")
    with pytest.raises(ModelFolderError, match="not an index"):
        open_folder(tmp_path)


def test_file_that_changes_while_loading(tmp_path: Path) -> None:
    make_tiny(tmp_path, "llama")
    checkpoint = open_folder(tmp_path)
    (tmp_path / SINGLE_FILE).write_bytes(b"")
    with pytest.raises(ModelFolderError, match="replaced while loading"):
        checkpoint.read("model.norm.weight", torch.float32)


def test_dummy_weights(tmp_path: Path) -> None:
    make_tiny(tmp_path, "qwen3")
    config = load_model_config(tmp_path)
    dummy, again, other = (DummyCheckpoint(config, seed) for seed in (5, 5, 6))
    for name, shape in ModelNames.of(config).shapes(config).items():
        tensor = dummy.read(name, torch.float32)
        assert tensor.shape == shape
        assert torch.equal(tensor, again.read(name, torch.float32))
        target = 1.0 if "norm" in name else 0.0
        assert abs(float(tensor.mean()) - target) < 0.1
    gate, up = (dummy.read(f"model.layers.0.mlp.{part}_proj.weight", torch.float32) for part in ("gate", "up"))
    assert not torch.equal(gate, up)
    assert float(gate.std()) == pytest.approx(48**-0.5, rel=0.1)
    assert not torch.equal(gate, other.read("model.layers.0.mlp.gate_proj.weight", torch.float32))
