"""A model folder from somewhere is data: nothing in it runs, nothing outside it is read, and a forged file is refused.

Symbolic links are followed: Hugging Face's cache consists of them, and who makes the folder may read what they name.
"""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch

from sortserve.engine.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from sortserve.engine.errors import ModelFolderError, RequestError
from sortserve.engine.model_config import load_model_config
from sortserve.engine.text import Tokenizer
from tests.engine.tiny_models import edit_json, make_tiny
from tests.server.fake_backend import byte_tokenizer


def open_folder(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, load_model_config(folder))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickles_are_not_opened(tmp_path: Path, name: str) -> None:
    make_tiny(tmp_path, "llama")
    (tmp_path / SINGLE_FILE).unlink()
    went_off = tmp_path / "went_off"
    with (tmp_path / name).open("wb") as file:
        torch.save(Bomb(went_off), file)
    with pytest.raises(ModelFolderError, match=r"convert it with transformers.*save_pretrained"):
        open_folder(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ModelFolderError, match="not a safetensors file"):
        open_folder(tmp_path)
    (tmp_path / SINGLE_FILE).write_bytes(pickle.dumps(Bomb(went_off)))
    with pytest.raises(ModelFolderError, match="not a safetensors file"):
        open_folder(tmp_path)
    assert not went_off.exists()


def test_code_in_the_folder_does_not_run(tmp_path: Path) -> None:
    """`auto_map` is how a folder asks transformers for `trust_remote_code`; here it is a key like any unknown one."""
    make_tiny(tmp_path, "llama")
    went_off = tmp_path / "went_off"
    for module in ("configuration_own", "modeling_own", "tokenization_own"):
        (tmp_path / f"{module}.py").write_text(f"open({str(went_off)!r}, 'w')\n")
    mapped = {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    edit_json(tmp_path / "config.json", auto_map=mapped, trust_remote_code=True)
    byte_tokenizer()._hf.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}, "tokenizer_class": "T"})
    )
    open_folder(tmp_path)
    Tokenizer.load(tmp_path)
    assert not went_off.exists()


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "..", "", "\0"]
)
def test_an_index_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    make_tiny(folder, "llama")
    (folder / SINGLE_FILE).rename(tmp_path / "outside.safetensors")
    weight_map = dict.fromkeys(("model.norm.weight", "model.embed_tokens.weight"), name)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelFolderError, match=r"not a file of the folder|lacks"):
        open_folder(folder)


TENSOR = {"dtype": "F32", "shape": [48], "data_offsets": [0, 192]}


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"{}", 2**63),
        (b"{}", 10**9),
        (b"{}", 3),
        (json.dumps({"a": TENSOR, "b": TENSOR}).encode(), None),  # both in the same bytes
        (json.dumps({"a": TENSOR, "b": TENSOR | {"data_offsets": [96, 288]}}).encode(), None),
        (json.dumps({"a": TENSOR | {"data_offsets": [0, 19_200]}}).encode(), None),
        (json.dumps({"a": TENSOR | {"data_offsets": [192, 0]}}).encode(), None),
        (json.dumps({"a": TENSOR | {"shape": [4800]}}).encode(), None),
        (json.dumps({"a": TENSOR | {"shape": [2**62, 8]}}).encode(), None),
        (json.dumps({"a": TENSOR | {"shape": [-48]}}).encode(), None),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        (b"\xff" * 100, None),
    ],
)
def test_forged_headers_are_refused(tmp_path: Path, header: bytes, length: int | None) -> None:
    make_tiny(tmp_path, "llama")
    size = struct.pack("<Q", len(header) if length is None else length)
    (tmp_path / SINGLE_FILE).write_bytes(size + header + bytes(192))
    with pytest.raises(ModelFolderError, match="not a safetensors file"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", INDEX_FILE])
def test_deep_json_is_refused(tmp_path: Path, name: str) -> None:
    """Python's parser raises RecursionError, which is no ValueError: it ended the server with a trace."""
    make_tiny(tmp_path, "llama")
    byte_tokenizer()._hf.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / SINGLE_FILE).unlink()
    (tmp_path / name).write_text('{"weight_map":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ModelFolderError, match=name):
        (Tokenizer.load if "tokenizer" in name else open_folder)(tmp_path)


# --- chat templates: the operator's, run in jinja2's sandbox on what clients send


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ ('{0.__class__.__mro__}').format(messages) }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 1 // 0 }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ raise_exception('x' * 100000) }}",
    ],
)
def test_a_template_gets_no_further_than_its_messages(template: str) -> None:
    """All end as the client's error, which says no more than the template's own words, and briefly."""
    with pytest.raises(RequestError, match="the chat template refused the messages") as caught:
        byte_tokenizer(template).chat_text([{"role": "user", "content": "x"}])
    assert len(caught.value.message) < 500
    assert "/" not in caught.value.message.replace("/etc/passwd", "")


@pytest.mark.parametrize("name", ["raise_exception.__globals__", "strftime_now.__code__", "messages.__class__"])
def test_a_templates_functions_show_nothing_of_themselves(name: str) -> None:
    assert byte_tokenizer("{{ " + name + " }}").chat_text([]) == ""


def test_what_a_client_writes_is_no_template() -> None:
    told = "{{ 7 * 7 }}{% for i in range(9) %}x{% endfor %}"
    assert told in byte_tokenizer().chat_text([{"role": told, "content": told}])
