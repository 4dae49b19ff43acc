"""Tokens to text: whole characters only, no stop string ever, the same text however it is cut into tokens."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors

from sortserve.engine.errors import ModelFolderError, RequestError
from sortserve.engine.text import Tokenizer
from sortserve.engine.text_stream import TextStream
from tests.server.fake_backend import BOS, EOS, byte_alphabet, byte_tokenizer

BYTES = byte_tokenizer(merged=["END", "ünï", "x y"])


def llama_tokenizer() -> Tokenizer:
    """SentencePiece's spelling: U+2581 for a space, `<0xNN>` for bytes, one leading space dropped."""
    pieces = ["<unk>", "▁", "▁the", "▁cat", "s", "▁ü", "<0xZZ>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    hf = tokenizers.Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    hf.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(hf)


LLAMA = llama_tokenizer()


def stream_all(tokenizer: Tokenizer, tokens: list[int], stop: list[str] | None = None) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop or [])
    return [*(stream.push(token) for token in tokens), stream.finish()], stream


@given(st.lists(st.integers(0, 262), max_size=40))
def test_bytes_stream_to_what_a_full_decode_gives(tokens: list[int]) -> None:
    pieces, _ = stream_all(BYTES, tokens)
    assert "".join(pieces) == BYTES.decode(tokens)


@given(st.text(max_size=40), st.data())
def test_text_never_splits_a_character(text: str, data: st.DataObject) -> None:
    pieces, stream = stream_all(BYTES, list(text.encode()))
    assert "".join(pieces) == text
    assert stream.emitted_chars == len(text)
    for piece in pieces:
        piece.encode()


@given(st.text(alphabet="the cats ü▁é中😀", max_size=20))
def test_byte_fallback_streams_to_what_a_full_decode_gives(text: str) -> None:
    tokens = LLAMA.encode(text)
    assert LLAMA.exact_bytes
    pieces, _ = stream_all(LLAMA, tokens)
    assert "".join(pieces) == LLAMA.decode(tokens)


def test_a_continuation_keeps_its_leading_space() -> None:
    the = LLAMA.encode("the")[0]
    assert LLAMA.decode([2]) == "the"
    assert TextStream(LLAMA, context=[the]).push(2) == " the"
    assert TextStream(LLAMA).push(2) == "the"


@given(st.text(alphabet="the cats ü", max_size=20))
def test_a_decoder_of_no_known_kind_streams_too(text: str) -> None:
    hf = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate("▁theca sü")}, []))
    hf.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(hf)
    assert not tokenizer.exact_bytes
    tokens = tokenizer.encode(text)
    pieces, _ = stream_all(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)


def test_a_babbler_costs_the_same_per_token() -> None:
    """tokenizers.DecodeStream decoded all tokens since the last whole character anew: 4,000 took 4 s."""
    stream = TextStream(BYTES)
    texts = [stream.push(0x80) for _ in range(1000)]
    assert texts == ["\ufffd"] * 1000


def test_incomplete_character_is_flushed_as_replacement() -> None:
    pieces, _ = stream_all(BYTES, list("é".encode())[:1])
    assert pieces == ["", "\ufffd"]


# --- stop strings


@settings(max_examples=300)
@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
def test_a_stop_string_never_leaks(text: str, stops: list[str], cuts: list[int]) -> None:
    """Against the plain definition: cut before the stop string that is complete first, the longest if several are."""
    ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    expected = text if not ends else text[: min(ends)[0] + min(ends)[1]]
    vocabulary = sorted({text[i : i + n] for i in range(len(text)) for n in range(1, 5)})
    hf = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}))
    hf.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(hf)
    stream, out, place = TextStream(tokenizer, stops), "", 0
    for cut in cuts:
        word = text[place : place + cut]
        if word:
            out += stream.push(vocabulary.index(word))
            place += cut
            # what is held back could still become a stop string
            held = text[:place][len(out) :]
            assert stream.stopped or any(stop.startswith(held) for stop in stops)
    out += stream.finish()
    assert out == expected
    assert (stream.stopped is None) == (not ends)
    assert stream.stopped is None or stream.stopped == min(ends)[2]


def test_stop_string_across_token_borders_and_in_a_character() -> None:
    pieces, stream = stream_all(BYTES, list("aé\n\nUser: x".encode()), ["\n\nUser:"])
    assert "".join(pieces) == "aé"
    assert stream.stopped == "\n\nUser:"
    assert stream.push(ord("z")) == stream.finish() == ""


def test_half_a_stop_string_leaves_at_the_end() -> None:
    pieces, stream = stream_all(BYTES, list(b"ab\n"), ["\n\n"])
    assert pieces == ["a", "b", "", "\n"]
    assert stream.stopped is None


# --- tokens


def test_pieces_of_broken_characters_are_told_apart() -> None:
    first, second = "é".encode()
    assert BYTES.piece(first) == "bytes:\\xc3"
    assert BYTES.piece(second) == "bytes:\\xa9"
    assert BYTES.piece(ord(" ")) == " "
    assert BYTES.piece(EOS) == "<eos>"
    assert BYTES.token_bytes(99_999) == b""
    assert BYTES.token_bytes(BYTES._hf.token_to_id("x y") or 0) == b"x y"
    assert LLAMA.token_bytes(6) == b"<0xZZ>"
    assert [LLAMA.token_bytes(7 + byte) for byte in (0, 255)] == [b"\x00", b"\xff"]


def test_alphabet() -> None:
    tokenizer = byte_tokenizer()
    assert [tokenizer.token_bytes(byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert len(set(byte_alphabet())) == 256


def test_special_tokens_as_the_post_processor_says() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("a") == [ord("a")]
    tokenizer._hf.post_processor = processors.TemplateProcessing(
        "<bos> $A <eos>", None, [("<bos>", BOS), ("<eos>", EOS)]
    )
    assert tokenizer.encode("a") == [BOS, ord("a"), EOS]
    assert tokenizer.encode("a", add_special_tokens=False) == [ord("a")]


def test_long_text_encodes_the_same() -> None:
    text = "é word " * 1000
    assert BYTES.encode(text) == list(text.encode())


def test_surrogate_is_the_clients_mistake() -> None:
    for text in ("\ud800", "\ud800" * 3000):
        with pytest.raises(RequestError, match="surrogate"):
            BYTES.encode(text)


# --- chat


def test_chat_template_functions() -> None:
    template = (
        "{%- for m in messages -%}\n  {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{{ m.content | tojson }}{% generation %};{% endgeneration %}{%- endfor -%}{{ strftime_now('%Y') | length }}"
        "{% if add_generation_prompt %}!{% endif %}"
    )
    text = byte_tokenizer(template).chat_text([{"role": "user", "content": "<é>"}] * 3)
    assert text.replace("\n", "").replace(" ", "") == '"<é>";"<é>";4!'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "refused"),
        ("{{ ''.__class__.__mro__ }}", "refused"),
        ("{{ messages[0].content + 1 }}", "refused"),
    ],
)
def test_chat_template_refusals(template: str | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        byte_tokenizer(template).chat([{"role": "user", "content": "x"}])


def test_broken_template_is_found_at_load() -> None:
    with pytest.raises(ModelFolderError, match="line 2"):
        byte_tokenizer("\n{% if %}")


# --- folders


def write_folder(folder: Path, config: object = None) -> Path:
    byte_tokenizer()._hf.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_load(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    folder = write_folder(tmp_path, {"eos_token": "<eos>", "chat_template": named})
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.chat_template) == ("<eos>", None, "d")
    (folder / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.load(folder).chat_text([]) == "from the file"


def test_load_failures_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"no tokenizer\.json; copy"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ModelFolderError, match="AutoTokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFolderError, match="download it again"):
        Tokenizer.load(tmp_path)
    write_folder(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(ModelFolderError, match="tokenizer_config"):
            Tokenizer.load(tmp_path)


def test_agrees_with_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    template = "{{ bos_token }}{% for m in messages %}\n[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
    for config in ({"add_bos_token": True}, {"add_bos_token": False}, {}):
        content = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": template, **config}
        folder = write_folder(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast", **content})
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
        ours = Tokenizer.load(folder)
        for text in ("", "héllo <eos> wörld", " a  b "):
            assert ours.encode(text) == theirs.encode(text), config
            assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
        messages = [{"role": "user", "content": " hi "}]
        chat = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert ours.chat(messages) == chat
