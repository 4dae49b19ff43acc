"""A recipe is strict, and what is saved beside a result reads back as the same recipe."""

from pathlib import Path

import pytest

import sortserve
from sortserve.engine.errors import SortingError
from sortserve.sorting.recipe import Lora, Recipe, read_recipe, write_recipe
from tests.sorting.toy import RECIPE

RECIPES = Path(sortserve.__file__).parent / "sorting/recipes"


def read(tmp_path: Path, text: str) -> Recipe:
    (tmp_path / "recipe.toml").write_text(text)
    return read_recipe(tmp_path / "recipe.toml")


@pytest.mark.parametrize("text", ["", RECIPE, *(path.read_text() for path in sorted(RECIPES.glob("*.toml")))])
def test_what_is_written_reads_back(tmp_path: Path, text: str) -> None:
    recipe = read(tmp_path, text)
    assert read(tmp_path, write_recipe(recipe)) == recipe


def test_the_bundled_models_recipe() -> None:
    """What the model that ships must be: 12 or more layers, 6 exits and more, 4 widths, 10 to 20 MB in bfloat16."""
    recipe = read_recipe(RECIPES / "bundled.toml")
    shape = recipe.model
    assert shape is not None
    assert shape.layers >= 12
    assert len({*recipe.grid.exits, shape.layers}) >= 6
    assert len({*recipe.grid.widths, shape.ffn_width}) >= 4
    heads = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    layer = shape.hidden * (heads + 3 * shape.ffn_width + 2)
    num_bytes = 2 * (shape.layers * layer + shape.hidden * (shape.vocab + 1))
    assert 10e6 <= num_bytes <= 20e6
    assert all(width % 128 == 0 for width in recipe.grid.widths)
    assert recipe.data.hold_out_every <= 19, "at least 10 of 190 books"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = 'x'", "seed"),
        ("sed = 1", "sed"),
        ("[train]\nlearning_rate = 1", "learning_rate"),
        ("[train]\noptimizer = 'sgd'", "sgd"),
        ("[method]\ndistill = 1.5", r"method\.distill is 1.5, must be in \[0, 1\]"),
        ("[method]\npasses = 0", r"method\.passes is 0"),
        ("[grid]\nexits = [0, 2]", r"grid\.exits is 0"),
        ("[train]\ntokens_per_pass = 1000", r"1000.*multiple of the window, 256"),
        (RECIPE.replace("context = 64", "context = 63"), r"window is 64 tokens, model\.context 63"),
        (RECIPE + "[lora]\nrank = 4", "lora adapts a model that there is"),
        ("[lora]\nrank = 4\nmerge_rank = 5", r"merge_rank is 5, must be in \[0, 4\]"),
        ("[train", "recipe.toml"),
        ("\xff", "recipe.toml"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SortingError, match=words):
        read(tmp_path, text)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SortingError, match="No such file"):
        read_recipe(tmp_path / "none.toml")


def test_sections_that_are_left_out() -> None:
    assert "[lora]" not in write_recipe(Recipe())
    assert "[lora]" in write_recipe(Recipe(lora=Lora()))
