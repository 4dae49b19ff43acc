"""Files as the other tools write them."""

import json
from pathlib import Path

import pytest

from sortserve.engine.errors import SortingError
from sortserve.engine.submodel import ModelShape, SubModel
from sortserve.sorting.importers import import_file

SHAPE = ModelShape(6, 48, 64, 6, 2, 8, 101)
GEMMA = ModelShape(35, 2048, 16384, 8, 2, 256, 1000)


def read(folder: Path, form: str, text: str, shape: ModelShape = SHAPE) -> list[tuple[SubModel, str | None]]:
    path = folder / "file"
    path.write_text(text)
    return [(one.submodel, one.id) for one in import_file(form, path, shape)]


def test_evopress(tmp_path: Path) -> None:
    text = "none\nattn\nmlp\nattn+mlp\nnone\nnone\n"
    assert read(tmp_path, "evopress", text) == [(SubModel.make(6, 64, [1, 3], [2, 3]), None)]


def test_llm_drop(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 6,
        "drop_attn_list": [4, 2],
        "drop_mlp_list": [],
    }
    assert read(tmp_path, "llm-drop", json.dumps(config)) == [(SubModel.make(6, 64, [2, 4]), None)]
    flags = {"drop_mlp_list": [False, True, False, False, False, True]}
    assert read(tmp_path, "llm-drop", json.dumps(flags)) == [(SubModel.make(6, 64, [], [1, 5]), None)]


@pytest.mark.parametrize("text", ["[2, 4, -1]", '{"exit_layers": [2, 4, 6]}', "2,4,6", "2 4\n6\n"])
def test_layerskip(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, "layerskip", text) == [(SubModel.make(depth, 64), None) for depth in (2, 4, 6)]


def test_the_slicing_table_of_gemma_3n(tmp_path: Path) -> None:
    """Rows as google/gemma3n-slicing-configs has them: products, widths of the layers that stay, no skips as null."""
    main = ", ".join(["2_048 * 8"] * 35)
    small = ", ".join(["2_048 * 4"] * 4 + ["2_048 * 8"] + ["2_048 * 4"] * 25)
    text = (
        "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
        f'Main model,35,3.98,62.30%,"[{main}]",\n'
        f'Config for E1.96B (layer-level),30,1.96,53.40%,"[{small}]","[20, 21, 22, 23, 24]"\n'
    )
    (full, full_id), (sliced, sliced_id) = read(tmp_path, "matformer", text, GEMMA)
    assert full == SubModel.full(GEMMA)
    assert (full_id, sliced_id) == ("main-model", "config-for-e1.96b-layer-level")
    assert sliced.skip_attention == (20, 21, 22, 23, 24)
    assert sliced.widths == (8192,) * 4 + (16384,) + (8192,) * 15 + (0,) * 5 + (8192,) * 10


def test_a_slicing_table_as_json(tmp_path: Path) -> None:
    rows = [{"name": "S", "ffn_hidden_dims": 16}, {"name": "M", "FFN Hidden Dims": [16, 32, 64, 64, 32, 16]}]
    expected = [(SubModel.make(6, 16), "s"), (SubModel.make(6, [16, 32, 64, 64, 32, 16]), "m")]
    assert read(tmp_path, "matformer", json.dumps(rows)) == expected
    named = {"S": {"ffn_hidden_dims": 16, "layers_skipped": "null"}}
    assert read(tmp_path, "matformer", json.dumps(named)) == expected[:1]


@pytest.mark.parametrize(
    ("form", "text", "told"),
    [
        ("evopress", "none\n" * 5, "5 lines, the model has 6"),
        ("evopress", "none\nattention\n" + "none\n" * 4, "line 2 is 'attention'"),
        ("llm-drop", "{}", "neither"),
        ("llm-drop", '{"drop_attn_list": [6]}', "6"),
        ("llm-drop", '{"drop_attn_list": [true, false]}', "2 entries"),
        ("llm-drop", '{"drop_attn_list": "1,2"}', "must be a list"),
        ("llm-drop", "not json", "llm-drop"),
        ("layerskip", "[0]", r"exit layer 0, must be in \[1, 6\]"),
        ("layerskip", "[7]", "7"),
        ("layerskip", '{"layers": [1]}', "exit_layers"),
        ("layerskip", "", "no exit"),
        ("matformer", '[{"name": "x", "ffn_hidden_dims": [1, 2]}]', "2 widths"),
        ("matformer", '[{"name": "x", "ffn_hidden_dims": 65}]', "width is 65"),
        ("matformer", '[{"name": "x"}]', "matformer"),
        ("matformer", '[{"name": "x", "ffn_hidden_dims": 8, "layers_skipped": [9]}]', "layer 9"),
        ("matformer", "", "no rows"),
    ],
)
def test_what_is_malformed_or_for_another_model_is_told(tmp_path: Path, form: str, text: str, told: str) -> None:
    with pytest.raises(SortingError, match=told) as raised:
        read(tmp_path, form, text)
    assert str(tmp_path / "file") in raised.value.message


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(SortingError, match="No such file"):
        import_file("evopress", tmp_path / "nowhere", SHAPE)
