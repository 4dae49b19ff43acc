"""Text and tokens: the tokenizer of a model folder, and its chat template."""

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sortserve.engine.errors import ModelFolderError, RequestError
from sortserve.engine.model_config import read_json

# what a template's own code may raise over messages it does not expect; OverflowError is the sandbox's for a huge range()
_TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_SHOWN_CHARS = 300  # of a template's complaint, which may quote a message
LONG_TEXT_CHARS = 2048  # from here on encoding takes about a millisecond and is worth a thread


class Tokenizer:
    """The tokenizer of a model folder: Hugging Face's `tokenizer.json`, read as transformers 5 reads it."""

    def __init__(
        self, backend: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None, template: str | None = None
    ) -> None:
        """`config` is the content of tokenizer_config.json, `template` the chat template if there is one."""
        self.config = dict(config or {})
        self.chat_template = template
        self._hf = backend
        self._hf.no_truncation()
        self._hf.no_padding()
        self.bos_token = _token_text(self.config.get("bos_token"))
        self.eos_token = _token_text(self.config.get("eos_token"))
        added = self._hf.get_added_tokens_decoder()
        named = {self._hf.token_to_id(text) for text in (self.bos_token, self.eos_token) if text is not None}
        self.special_ids = frozenset(i for i, token in added.items() if token.special) | (named - {None})
        self._spelling, self.strips_first_space = _spelling(self._hf)
        self.max_token_chars = max(map(len, backend.get_vocab()), default=1)  # of text that one token can stand for
        self._bytes: dict[int, bytes] = {}
        self._template = None if template is None else _compile(template)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja.

        Raises ModelFolderError, saying what to do, where the first is missing or any is broken.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelFolderError(_missing(folder))
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ModelFolderError(f"{path} cannot be read as a tokenizer ({error}); download it again") from error
        config = read_json(folder / "tokenizer_config.json") or {}
        special = read_json(folder / "special_tokens_map.json") or {}
        config = {name: special[name] for name in ("bos_token", "eos_token") if name in special} | config
        template = config.get("chat_template")
        if isinstance(template, list):  # several by name, as Cohere's and Hermes' folders have them
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(backend, config, template)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added ones included. A model's own vocabulary may be padded beyond it."""
        return self._hf.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True, *, param: str = "prompt") -> list[int]:
        """Token ids of `text`, with BOS and EOS if `add_special_tokens` and tokenizer.json's post-processor adds them.

        `add_bos_token` of tokenizer_config.json decides nothing, as in transformers 5, which drops it wherever there is
        a tokenizer.json. Raises RequestError, naming `param`, for text that is not Unicode (lone surrogates).
        """
        try:
            if len(text) < LONG_TEXT_CHARS:
                return self._hf.encode(text, add_special_tokens=add_special_tokens).ids
            # only the batch call releases the GIL: `encode` of 3 MB held up every other thread for 3 s
            return self._hf.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError as error:
            raise RequestError("text holds a lone surrogate, which is not Unicode text", param=param) from error

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole token sequence; bytes that are not UTF-8 become U+FFFD."""
        return self._hf.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt that the chat template makes of `messages`, ending where the answer begins.

        Raises RequestError if the model has no template, or if the template refuses the messages.
        """
        if self._template is None:
            raise RequestError(
                "this model has no chat template: use /v1/completions, or put a chat_template.jinja in its folder",
                param="messages",
            )
        names = {"bos_token": self.bos_token or "", "eos_token": self.eos_token or "", "add_generation_prompt": True}
        try:
            return self._template.render(messages=messages, **(names | variables))
        except (jinja2.TemplateError, *_TEMPLATE_ERRORS) as error:
            shown = str(error)[:_SHOWN_CHARS]
            raise RequestError(f"the chat template refused the messages: {shown}", param="messages") from error

    def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Token ids of `chat_text`; the template writes BOS itself, so none is added."""
        return self.encode(self.chat_text(messages, **variables), add_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for: for special tokens its name, empty for an id without a token."""
        if token not in self._bytes:
            name = self._hf.id_to_token(token)
            if name is None:
                self._bytes[token] = b""
            elif self._spelling is None:
                self._bytes[token] = self.decode([token], skip_special_tokens=False).encode()
            else:
                self._bytes[token] = self._spelling(name)
        return self._bytes[token]

    def piece(self, token: int) -> str:
        r"""The text of one token for log-probabilities: `bytes:\xe4\xbd` where it is not UTF-8 alone, as OpenAI writes
        it (U+FFFD would make different tokens equal)."""
        raw = self.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    @property
    def exact_bytes(self) -> bool:
        """True where text is the tokens' bytes put together, so that it can be decoded token by token."""
        return self._spelling is not None


def _spelling(backend: tokenizers.Tokenizer) -> tuple[Callable[[str], bytes] | None, bool]:
    """The bytes of a token by its name, None where they depend on its neighbours; and whether the very first space of a
    text is dropped."""
    if backend.decoder is None:
        return None, False
    decoder = json.loads(backend.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return functools.partial(_byte_level, _byte_of_char()), False
    if kinds in (["Replace", "ByteFallback", "Fuse", "Strip"], ["Replace", "ByteFallback", "Fuse"]):
        pattern, content = steps[0]["pattern"].get("String"), steps[0]["content"]
        strip: dict[str, Any] = steps[3] if len(steps) == 4 else {"content": " ", "start": 0, "stop": 0}
        if pattern is not None and strip["content"] == " " and strip["start"] <= 1 and strip["stop"] == 0:
            return functools.partial(_byte_fallback, pattern, content), strip["start"] == 1
    return None, False


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable characters stand for their own byte, the other bytes are numbered from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _byte_level(byte_of_char: Mapping[str, int], name: str) -> bytes:
    spelled = [byte_of_char.get(char) for char in name]
    known = bytes(byte for byte in spelled if byte is not None)
    return known if len(known) == len(name) else name.encode()  # an added token may hold any character


def _byte_fallback(pattern: str, content: str, name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        try:
            return bytes([int(name[3:5], 16)])
        except ValueError:
            pass  # a token that only looks like a byte, such as <0xZZ>, is text
    return name.replace(pattern, content).encode()


def _missing(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file():
        return (
            f"{folder} has tokenizer.model but no tokenizer.json; convert it once with "
            f"`from transformers import AutoTokenizer; AutoTokenizer.from_pretrained({str(folder)!r})"
            f".save_pretrained({str(folder)!r})`"
        )
    return f"{folder} has no tokenizer.json; copy it from where the model comes from, beside config.json"


def _token_text(value: Any) -> str | None:
    """`"<s>"`, `{"content": "<s>", ...}` or null."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks answers for training; here its body is taken as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own way to declare it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str) -> jinja2.Template:
    """The template with the settings and functions that transformers gives it. Raises ModelFolderError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    environment.filters["tojson"] = _tojson
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ModelFolderError(f"chat template, line {error.lineno}: {error.message}; correct the template") from error


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """Without the escaping for HTML that jinja2's own filter does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)
