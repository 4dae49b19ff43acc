"""Toy models on one thread."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sortserve.sorting.decoder import Decoder
from sortserve.sorting.texts import Domain, Text
from tests.engine.tiny_models import make_tiny


@pytest.fixture(autouse=True, scope="module")
def _on_one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread costs more than it gives, and fixtures of modules compute, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of 6 layers and 64 FFN neurons: with biases, two K/V heads, untied."""
    folder = tmp_path_factory.mktemp("toy")
    make_tiny(folder, "qwen2", seed=5)
    return folder


@pytest.fixture
def toy(toy_folder: Path) -> Decoder:
    """Its own copy in each test, since some permute it."""
    return Decoder.load(toy_folder, torch.float32, 64)


@pytest.fixture
def toy_domains() -> list[Domain]:
    """Random tokens of unequal lengths; the second domain has prompts."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int, num_prompt: int) -> Text:
        return Text(tuple(torch.randint(0, 101, (length,), generator=generator).tolist()), num_prompt)

    return [
        Domain("plain", tuple(text(length, 1) for length in (24, 17, 9, 30))),
        Domain("asked", (text(20, 8), text(15, 3))),
    ]
