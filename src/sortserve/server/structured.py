"""What an answer must look like: `response_format`, `tools` and `tool_choice`, as fields and as a grammar.

Tools are served in the Hermes form (`tool_calls.py`), which the model learns from its chat template.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sortserve.engine.errors import RequestError
from sortserve.engine.grammar import check_grammar, json_grammar, schema_with_options
from sortserve.engine.text import Tokenizer
from sortserve.server.tool_calls import CLOSING, OPENING

MAX_TOOLS = 128

Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class JsonSchema(BaseModel):
    """`response_format.json_schema`. `strict` changes nothing: what the schema says always holds."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: Name
    description: str | None = None
    definition: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """`response_format`: any text, any JSON object, or JSON of a schema."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(BaseModel):
    """A function that the model may call. `strict`: its arguments always follow `parameters`."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """One of `tools`."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """What the chat template shows to the model: as it was sent, less `strict`, which is for us."""
        try:
            return self.model_dump(exclude_unset=True, exclude={"function": {"strict"}})
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"tools: function {self.function.name}: its parameters are nested too deep", param="tools"
            ) from error


# Validation ends at the first wrong item: a body of 4 MiB holds a million of them.
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class NamedFunction(BaseModel):
    """The function that must be called."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str


class NamedTool(BaseModel):
    """`tool_choice` that names a function."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Functions that an answer may call, at least one of them if `forced`."""

    functions: tuple[Function, ...]
    forced: bool
    parallel: bool

    @property
    def names(self) -> frozenset[str]:
        """Names of the functions."""
        return frozenset(function.name for function in self.functions)


def tool_use(tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolUse | None:
    """What the three fields ask for together; None where nothing may be called. Raises RequestError."""
    functions = tuple(tool.function for tool in tools or ())
    names = [function.name for function in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"tools has the function {twice!r} twice; give each a name of its own", param="tools")
    for function in functions:
        kind = (function.parameters or {}).get("type", "object")
        if kind != "object":
            raise RequestError(
                f"tools: function {function.name}: its parameters have the type {str(kind)[:64]!r}, must be 'object'",
                param="tools",
            )
    if isinstance(choice, NamedTool):
        named = tuple(function for function in functions if function.name == choice.function.name)
        if not named:
            raise RequestError(
                f"tool_choice names {choice.function.name[:64]!r}, tools has: {', '.join(names)[:200] or 'none'}",
                param="tool_choice",
            )
        return ToolUse(named, forced=True, parallel=False)
    if choice == "required" and not functions:
        raise RequestError(
            "tool_choice is 'required', but tools is empty; name the functions there", param="tool_choice"
        )
    if not functions or choice == "none":
        return None
    return ToolUse(functions, forced=choice == "required", parallel=parallel is not False)


def check_template(tokenizer: Tokenizer) -> None:
    """Raise RequestError unless the model's chat template takes tools and teaches the form that is read here."""
    template = tokenizer.chat_template or ""
    if "tools" not in template:
        raise RequestError("tools: this model's chat template takes none; leave the field out", param="tools")
    special = set(tokenizer.encode(OPENING + CLOSING, add_special_tokens=False)) & tokenizer.special_ids
    if OPENING not in template or special:
        raise RequestError(
            f"tools: this model's chat template does not have calls written as {OPENING}...{CLOSING}, the only form that "
            "is read here; leave the field out",
            param="tools",
        )


def grammar_of(response_format: ResponseFormat | None, tools: ToolUse | None) -> str | None:
    """The grammar that the answer must follow; None: any text. May take 0.5 s at worst, without holding the GIL.

    Raises RequestError, naming the field and the reason, for a schema that cannot be enforced.
    """
    schema = _answer_schema(response_format)
    alone = None
    if schema is not None:
        with _named("response_format"):
            alone = json_grammar(schema)
            check_grammar(alone)
    if tools is None:
        return alone
    enforced = [function for function in tools.functions if function.strict or tools.forced]
    if not enforced and schema is None:
        return None
    for function in enforced:
        with _named("tools", f"function {function.name}: "):
            check_grammar(json_grammar(_arguments(function), lenient=not function.strict))
    with _named("tools"):
        grammar = _tool_grammar(tools, schema)
        check_grammar(grammar)
    return grammar


def _answer_schema(response_format: ResponseFormat | None) -> dict[str, Any] | None:
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return {"type": "object"}
    if response_format.json_schema is None:
        raise RequestError("response_format: json_schema is missing; give its name and schema", param="response_format")
    return response_format.json_schema.definition


def _arguments(function: Function) -> dict[str, Any]:
    return {"type": "object", **(function.parameters or {})}


@contextmanager
def _named(param: str, where: str = "") -> Iterator[None]:
    """Lets a RequestError name the field that is at fault."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{param}: {where}{error.message}", param=param) from error


def _tool_grammar(tools: ToolUse, schema: dict[str, Any] | None) -> str:
    """In llguidance's Lark: calls one after the other, one alone, calls or an answer, or calls amid any text."""
    more = ' ("\\n" call)*' if tools.parallel else ""
    if tools.forced:
        rules = [f"start: call{more}", "call: OPENED body"]
    elif schema is not None:
        rules = [f"start: answer | call{more}", "call: OPENED body", f"answer: {_json_rule(schema)}"]
    else:
        many = "*" if tools.parallel else "?"
        # lazy: a tag ends the text before it, so that no text can hold one
        rules = [f"start: (opened body){many} TEXT", "opened[lazy]: TEXT OPENED", "TEXT: /(.|\\n)*/"]
    either = " | ".join(f"call{place}" for place in range(len(tools.functions)))
    rules += [f"OPENED: {json.dumps(OPENING)}", f'body: "\\n" ({either}) {json.dumps(chr(10) + CLOSING)}']
    for place, function in enumerate(tools.functions):
        before = json.dumps(f'{{"name": "{function.name}", "arguments": ')
        enforced = function.strict or tools.forced
        rule = _json_rule(_arguments(function) if enforced else {"type": "object"}, lenient=not function.strict)
        rules += [f'call{place}: {before} arguments{place} "}}"', f"arguments{place}: {rule}"]
    return "\n".join(rules)


def _json_rule(schema: dict[str, Any], *, lenient: bool = False) -> str:
    return "%json " + json.dumps(schema_with_options(schema, lenient=lenient))
