"""The split is by file, the tokenizer and the order by seed, and packing takes every block once an epoch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sortserve.engine.errors import SortingError
from sortserve.sorting.data import (
    EOS,
    Packed,
    bos_of,
    encode,
    inputs_and_targets,
    read_texts,
    train_tokenizer,
)
from sortserve.sorting.recipe import Data
from tests.sorting.toy import write_books


def test_the_split_is_by_name(tmp_path: Path) -> None:
    books = write_books(tmp_path / "books", 7)
    texts = read_texts([books], Data(hold_out_every=3))
    assert list(texts.held_out) == ["book2.md", "book5.md"]
    assert list(texts.train) == ["book0.md", "book1.md", "book3.md", "book4.md", "book6.md"]
    assert texts.left_out == ()
    assert texts.digest == read_texts([books], Data(hold_out_every=3)).digest
    assert texts.digest != read_texts([books], Data()).digest
    assert read_texts([books], Data()).held_out == {}


def test_what_repeats_a_held_out_file_is_left_out(tmp_path: Path) -> None:
    """Three long paragraphs, whatever the case and the punctuation; two are a quotation."""
    books = write_books(tmp_path / "books", 3)
    long = [f"{word} " * 30 for word in ("one", "two", "three")]
    (books / "book1.md").write_text("\n\n".join(long))
    (books / "copy.md").write_text("\n\n".join(["Preface.", *(p.upper().replace(" ", ", ") for p in long)]))
    (books / "quote.md").write_text("\n\n".join(["Essay.", *long[:2]]))
    texts = read_texts([books], Data(hold_out_every=2))
    assert set(texts.held_out) == {"book1.md", "copy.md"}
    texts = read_texts([books], Data(hold_out_every=5))
    assert set(texts.held_out) == {"quote.md"}
    assert texts.left_out == ()
    (books / "quote.md").write_text("\n\n".join(["Essay.", *long]))
    texts = read_texts([books], Data(hold_out_every=5))
    assert texts.left_out == ("book1.md", "copy.md")
    assert set(texts.train) == {"book0.md", "book2.md"}


def test_a_title_header_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Title\nby Somebody\n\n-------\nIt was night.")
    assert read_texts([tmp_path], Data()).train == {"a.md": ["It was night."]}


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"q": f"Q{i}", "a": f"A{i}"}) for i in range(3)))
    assert read_texts([path], Data(fields=["q", "a"])).train == {"a.jsonl": [f"Q{i}\n\nA{i}" for i in range(3)]}
    with pytest.raises(SortingError, match=r"a\.jsonl:1: .*'text'"):
        read_texts([path], Data())
    path.write_text('{"text": 5}')
    with pytest.raises(SortingError, match=r"a\.jsonl:1"):
        read_texts([path], Data())


def test_nothing_to_read(tmp_path: Path) -> None:
    for paths in ([], [tmp_path]):
        with pytest.raises(SortingError, match="no text in"):
            read_texts(paths, Data())
    (tmp_path / "a.md").write_bytes(b"\xff\xfe")
    with pytest.raises(SortingError, match=r"a\.md"):
        read_texts([tmp_path], Data())


def test_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    texts = read_texts([write_books(tmp_path / "books")], Data())
    one, again = (train_tokenizer(texts, 300, 10_000, seed=3) for _ in range(2))
    assert one.to_str() == again.to_str()
    assert one.get_vocab_size() == 300
    bos = bos_of(one)
    assert bos is not None
    odd = "\x00 snow ☃ the king"
    assert one.encode(odd).ids[0] == bos
    assert one.decode(one.encode(odd).ids) == odd
    eos = one.token_to_id(EOS)
    assert eos is not None
    ids = encode(one, texts, eos, 0, seed=0)
    assert (ids == eos).sum() == 5
    assert sorted(
        one.decode_batch([part.tolist() for part in np.split(ids, np.flatnonzero(ids == eos) + 1)[:-1]])
    ) == sorted(text for documents in texts.train.values() for text in documents)
    assert not np.array_equal(ids, encode(one, texts, eos, 0, seed=1))


def test_an_epoch_takes_each_block_once() -> None:
    packed = Packed(np.arange(101, dtype=np.int32), 10, seed=5)
    assert packed.num_blocks == 10
    epochs = [torch.cat([packed.windows(n, 20, 5) for n in range(start, start + 5)]) for start in (0, 5)]
    for epoch in epochs:
        assert epoch.shape == (20, 5)
        assert sorted(epoch.flatten().tolist()) == list(range(100))
    assert not torch.equal(*epochs)
    again = Packed(np.arange(101, dtype=np.int32), 10, seed=5)
    assert torch.equal(again.windows(7, 20, 5), packed.windows(7, 20, 5)), "in any order"
    with pytest.raises(SortingError, match=r"9 tokens.*10"):
        Packed(np.arange(9, dtype=np.int32), 10, seed=0)


def test_targets() -> None:
    windows = torch.arange(12).reshape(2, 6)
    inputs, targets = inputs_and_targets(windows, 99)
    assert inputs.tolist() == [[99, 0, 1, 2, 3, 4], [99, 6, 7, 8, 9, 10]]
    assert torch.equal(targets, windows)
    inputs, targets = inputs_and_targets(windows, None)
    assert inputs.tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]
    assert torch.equal(targets, inputs + 1)
