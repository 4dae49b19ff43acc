"""How the next token is drawn: the parameters of one request, validated at construction."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sortserve.engine.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_GRAMMAR_CHARS = 64 * 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one request, with OpenAI's names and ranges; `top_k` 0 and `min_p` 0 are off.

    `logprobs`: None for none, else how many alternatives to report beside the chosen token. `prompt_logprobs` likewise
    for the prompt's own tokens. `seed` None draws one. `grammar`: what the answer must parse as, in llguidance's
    words (`grammar.py` makes it of a JSON schema); None: anything. Raises RequestError naming field, value and range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 0 if self.prompt_logprobs is not None else 1, 2**31 - 1)
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("top_k", self.top_k, 0, 2**31 - 1)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _within(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**63 - 1)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} tokens, at most {MAX_LOGIT_BIAS}", param="logit_bias"
            )
        for bias in self.logit_bias.values():
            _within("logit_bias", bias, -100.0, 100.0)
        if len(self.stop) > MAX_STOP_STRINGS or any(not 1 <= len(text) <= MAX_STOP_CHARS for text in self.stop):
            raise RequestError(
                f"stop takes at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARS} characters", param="stop"
            )
        if any("\ud800" <= char <= "\udfff" for text in self.stop for char in text):
            raise RequestError("stop holds a lone surrogate, which is not Unicode text", param="stop")
        if self.grammar is not None:
            self._check_grammar(self.grammar)

    def _check_grammar(self, grammar: str) -> None:
        if self.ignore_eos:
            raise RequestError(
                "ignore_eos does not go with response_format or forced tool calls: the answer ends where it is complete",
                param="ignore_eos",
            )
        if len(grammar) > MAX_GRAMMAR_CHARS:
            raise RequestError(
                f"the schema takes {len(grammar)} characters, at most {MAX_GRAMMAR_CHARS}; make it smaller",
                param="response_format",
            )

    @property
    def greedy(self) -> bool:
        """True where the most probable token is taken."""
        return self.temperature == 0.0

    @property
    def plain(self) -> bool:
        """True where the logits are used as they are: no penalty, bias, minimum length or grammar."""
        return (
            self.frequency_penalty == 0.0
            and self.presence_penalty == 0.0
            and self.repetition_penalty == 1.0
            and not self.logit_bias
            and self.min_tokens == 0
            and self.grammar is None
        )


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise RequestError unless `value` is finite and in [low, high] (or (low, high])."""
    if not ((low < value if open_low else low <= value) and value <= high):  # NaN is not
        bracket = "(" if open_low else "["
        huge = isinstance(value, int) and value.bit_length() > 128  # Python refuses to print integers of 4,300 digits
        shown = f"a number of {value.bit_length()} bits" if huge else value  # type: ignore[attr-defined]
        raise RequestError(f"{name} is {shown}, must be in {bracket}{low}, {high}]", param=name)
