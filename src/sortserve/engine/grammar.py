"""Grammars: which tokens may come next, so that an answer parses.

A grammar is text for llguidance: a JSON schema in its wrapper (`json_grammar`), or its dialect of Lark. What may follow
is a function of the grammar and the tokens drawn so far; a matcher that is kept between steps only saves reading those
tokens again, so preemptions, refills and switches of the sub-model need nothing of their own. No torch here.
"""

import json
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from sortserve.engine.errors import ModelFolderError, RequestError
from sortserve.engine.sampling import MAX_GRAMMAR_CHARS
from sortserve.engine.text import Tokenizer

BoolRow = npt.NDArray[np.bool_]

_LOG = logging.getLogger(__name__)
MOST_MATCHERS = 64
"""Kept at once, the latest used; one that was let go is made again from the request's tokens."""

WHITESPACE = r"[ \t\r\n]{1,32}"
"""Between two tokens of JSON. Without an end to it a model may write blanks until max_tokens."""

_MOST_EXACT = 2**53
_SHOWN_CHARS = 300  # of a reason


def schema_with_options(schema: Mapping[str, Any], *, lenient: bool = False) -> dict[str, Any]:
    """The schema as llguidance is to read it; `lenient`: what it cannot enforce is passed over instead of refused.

    Options that the schema brings along are replaced: they belong to the server. Raises RequestError for an integer in
    `enum` or `const` that llguidance, which reads numbers as doubles, would change.
    """
    pending: list[Any] = [schema]
    while pending:
        value = pending.pop()
        pending += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if isinstance(value, dict):
            _check_exact(value.get("const"))
            _check_exact(*value["enum"] if isinstance(value.get("enum"), list) else ())
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": lenient, "coerce_one_of": lenient}}


def _check_exact(*values: Any) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MOST_EXACT:
            raise RequestError(
                f"enum and const hold integers up to 2**53, not one of {value.bit_length()} bits",
                param="response_format",
            )


def json_grammar(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """The grammar of JSON that is valid under a JSON schema. Raises RequestError for one that cannot be written down."""
    try:
        return json.dumps({"grammars": [{"json_schema": schema_with_options(schema, lenient=lenient)}]})
    except RecursionError as error:
        raise RequestError("the schema is nested too deep", param="response_format") from error


def check_grammar(grammar: str) -> None:
    """Raise RequestError, naming the reason, for a grammar that cannot be served.

    Compiles against an alphabet of single bytes, so it needs no model, and takes about 1 ms; at worst 0.5 s, without
    holding the GIL. What only shows with the model's vocabulary ends the request in the engine.
    """
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise RequestError(
            f"it takes {len(grammar)} characters, at most {MAX_GRAMMAR_CHARS}; make it smaller", param="response_format"
        )
    matcher = LLMatcher(_byte_tokenizer(), grammar, log_level=0, limits=_limits())
    matcher.compute_bitmask()  # a schema that only refers to itself is found out here
    if matcher.is_error():
        raise RequestError(_reason(matcher), param="response_format")


@dataclass(slots=True)
class _Held:
    matcher: LLMatcher
    num_read: int  # tokens that it has consumed


class Grammars:
    """What may follow, for all requests of one engine. Reads the model's tokenizer when the first grammar comes."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """`vocab_size` is the model's: ids beyond the tokenizer's are never allowed."""
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._tokenizer: LLTokenizer | None = None
        self._held: OrderedDict[str, _Held] = OrderedDict()  # by request, the latest used last

    def __len__(self) -> int:
        """Number of requests for which something is kept."""
        return len(self._held)

    def allowed(self, request_id: str, grammar: str, output: Sequence[int]) -> BoolRow:
        """True for the tokens [vocab] that may follow `output`; end-of-sequence exactly where the answer is complete.

        Never all False. Raises RequestError, with nothing kept, if the grammar does not compile, costs too much, or does
        not allow `output`.
        """
        held = self._held.pop(request_id, None)
        if held is None or held.num_read > len(output):
            held = _Held(LLMatcher(self._load(), grammar, log_level=0, limits=_limits()), 0)
        held.matcher.consume_tokens(list(output[held.num_read :]))
        held.num_read = len(output)
        bits = np.frombuffer(held.matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        if held.matcher.is_error() or not allowed.any():
            raise RequestError(_reason(held.matcher), param="response_format")
        self._held[request_id] = held
        if len(self._held) > MOST_MATCHERS:
            self._held.popitem(last=False)
        return allowed

    def drop(self, request_id: str) -> None:
        """Forget a request that has ended; does nothing for one without a grammar."""
        self._held.pop(request_id, None)

    def _load(self) -> LLTokenizer:
        """llguidance's view of the vocabulary: 1.5 s for 152k tokens, once."""
        if self._tokenizer is None:
            if not self._eos:
                raise RequestError("the model has no end-of-sequence token to end with", param="response_format")
            try:
                self._tokenizer = LLTokenizer(
                    TokenizerWrapper(_Vocabulary(Tokenizer.load(self._folder), self._vocab_size, self._eos[0])),
                    eos_token=list(self._eos),
                    slices=LLTokenizer.json_slices(),
                )
            except (ModelFolderError, ValueError, RuntimeError) as error:  # it was there when the server started
                _LOG.exception("the tokenizer cannot be read")
                raise RequestError(
                    "the model's tokenizer cannot be read; the server's log says why", param="response_format"
                ) from error
        return self._tokenizer


class _Vocabulary:
    """A tokenizer in the words of `TokenizerWrapper`.

    Tokens are the bytes that `TextStream` makes of them. llguidance's own reading of tokenizer.json takes whatever looks
    like `<tool_call>` for a special token, which then never matches the text that it is.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        num_tokens = max(vocab_size, tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(token) for token in range(num_tokens)]  # empty: never allowed
        self.special_token_ids = [token for token in range(num_tokens) if token in tokenizer.special_ids]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


@cache
def _byte_tokenizer() -> LLTokenizer:
    return LLTokenizer("byte")


@cache
def _limits() -> LLParserLimits:
    """Bounds on what one grammar may cost. The library's own let `((a{1000}){1000}){1000}` take 1.4 s in a step, these
    0.07 s; a schema of 500 properties compiles in 35 ms under both. A tenth of the fuel was too little for a string of
    maxLength 200."""
    return LLParserLimits(
        initial_lexer_fuel=100_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_items_in_row=1_000,
        max_lexer_states=50_000,  # about 0.4 kB each; a string with a maxLength needs 6 for each character
        max_grammar_size=5_000,
        verbose_errors=False,  # the library's are pages long and hold the schema
    )


def _reason(matcher: LLMatcher) -> str:
    """Why a matcher stopped, on one line."""
    text = matcher.get_error().replace("<non-verbose/>", "").partition(". Enable '")[0]  # an option that is ours to set
    known = {"": "no token can follow", "NoExtensionBias": "it matches no text"}
    shown = " ".join(text.split())
    return f"the grammar cannot be used: {known.get(shown, shown)[:_SHOWN_CHARS]}"
