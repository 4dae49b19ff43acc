"""Texts: what files mean, and what is refused."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from sortserve.engine.errors import SortingError
from sortserve.engine.text import Tokenizer
from sortserve.server.cli import BUNDLED
from sortserve.sorting.texts import Domain, Text, batches, built_in, load_domains, mixed_batches


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED)


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load_one(source: str, tokenizer: Tokenizer, tokens: int = 200, window: int = 64) -> Domain:
    [domain] = load_domains([source], tokenizer, window=window, tokens=tokens)
    return domain


def test_questions_go_through_the_chat_template_and_only_answers_count(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = lines(
        tmp_path / "q.jsonl", {"question": "How many?", "answer": "There are 2+2=<<2+2=4>>4 of them.\n#### 4"}
    )
    [text] = load_one(source, tokenizer).texts
    prompt = tokenizer.chat([{"role": "user", "content": "How many?"}])
    assert list(text.tokens[: text.num_prompt]) == prompt
    assert tokenizer.decode(text.tokens[text.num_prompt :]) == "There are 2+2=4 of them.\n#### 4"


def test_kinds_of_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Good day to you, old man."},
        ]
    }
    code = {"prompt": "def twice(x):\n", "canonical_solution": "    return x + x\n", "test": "", "entry_point": "twice"}
    [text] = load_one(lines(tmp_path / "chat.jsonl", chat), tokenizer).texts
    assert tokenizer.decode(text.tokens[text.num_prompt :]) == "Good day to you, old man."
    packed = tmp_path / "HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(code).encode()))
    domain = load_one(f"code={packed}", tokenizer)
    assert domain.name == "code"
    assert domain.texts[0].num_prompt == 1, "all but the first token counts"
    assert tokenizer.decode(domain.texts[0].tokens) == "def twice(x):\n    return x + x\n"


def test_folders_give_pieces_of_their_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("a.md", "b.txt", "c.py", "d.png"):
        (tmp_path / name).write_text(f"{name}\n\n" + f"some words of file {name[0]} and so on. " * 200)
    domain = load_one(str(tmp_path), tokenizer, tokens=10_000)
    assert len(domain.texts) == 3
    assert all(len(text.tokens) == 64 for text in domain.texts)
    alone = load_one(str(tmp_path / "a.md"), tokenizer, tokens=10_000)
    assert len(alone.texts) > 3, "a file by itself gives several pieces"
    assert load_one(str(tmp_path), tokenizer, tokens=70).num_scored < 200


def test_the_same_call_gives_the_same_texts(tokenizer: Tokenizer) -> None:
    first, again = (load_domains(built_in("held_out"), tokenizer, window=64, tokens=100) for _ in range(2))
    assert [domain.digest for domain in first] == [domain.digest for domain in again]
    other = load_domains(built_in("held_out"), tokenizer, window=64, tokens=100, seed=1)
    assert [domain.digest for domain in other] != [domain.digest for domain in first]


def test_built_in_texts_are_there_and_apart(tokenizer: Tokenizer) -> None:
    kinds = [load_domains(built_in(kind), tokenizer, window=256, tokens=10**6) for kind in ("calibration", "held_out")]
    assert [[domain.name for domain in kind] for kind in kinds] == [["dialogue", "maths", "prose", "code"]] * 2
    for calibration, held_out in zip(*kinds, strict=True):
        assert not {text.tokens for text in calibration.texts} & {text.tokens for text in held_out.texts}
        assert held_out.num_scored > 300


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.jsonl", b"{", "line 1 is not JSON"),
        ("x.jsonl", b"[1]", "line 1 is no object"),
        ("x.jsonl", b'{"text": "a"}\n{"txet": "b"}', "line 2 is no sample"),
        ("x.txt", b"\xff\xfe\x00", "UTF-8"),
        ("x.jsonl.gz", b"not gzip", "cannot be read"),
        ("x.txt", b"few", "no text of at least 8"),
    ],
)
def test_malformed_sources_are_told(tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SortingError, match=told):
        load_one(str(tmp_path / name), tokenizer)


def test_missing_and_doubled_sources_are_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(SortingError, match="neither a file nor a folder"):
        load_one(str(tmp_path / "nowhere"), tokenizer)
    source = lines(tmp_path / "a.jsonl", {"text": "some words that are long enough to be counted as a text"})
    with pytest.raises(SortingError, match="two sources of one name"):
        load_domains([source, f"a={source}"], tokenizer, window=64, tokens=10)


def test_batches_hold_every_scored_token_once(toy_domains: list[Domain]) -> None:
    for domain in toy_domains:
        for most in (1, 40, 1000):
            found = list(batches(domain, most))
            assert sorted(place for batch in found for place in batch.places) == list(range(len(domain.texts)))
            assert sum(int(batch.scored.sum()) for batch in found) == domain.num_scored
            for batch in found:
                assert batch.tokens.numel() <= max(most, batch.tokens.shape[1])
                for row, place in enumerate(batch.places):
                    text = domain.texts[place]
                    assert tuple(batch.tokens[row, : len(text.tokens)].tolist()) == text.tokens
                    assert batch.scored[row].nonzero()[:, 0].tolist() == list(range(text.num_prompt, len(text.tokens)))


def test_mixed_batches_take_one_text_of_each_domain() -> None:
    domains = [Domain("a", (Text((1,) * 5, 1), Text((2,) * 9, 4))), Domain("b", (Text((3,) * 7, 1),))]
    first, second = mixed_batches(domains, 6, 5)
    assert sorted(map(tuple, first.tokens.tolist())) == [(2,) * 6, (3,) * 6]
    assert second.tokens.tolist() == [[1] * 5]
    assert first.scored.tolist() == [[False] + [True] * 5] * 2, "prompts count, too"
    assert torch.equal(first.is_prompt.sum(1), torch.tensor([1, 1]))
