"""The parser of tool calls: every way to cut a text gives the same text and the same calls."""

import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.server.tool_calls import CLOSING, OPENING, ToolCallParser

NAMES = frozenset({"f", "get_weather"})


def call(name: str = "f", arguments: str = '{"a": 1}') -> str:
    return f'{OPENING}\n{{"name": "{name}", "arguments": {arguments}}}\n{CLOSING}'


def parse(pieces: list[str], parallel: bool = True) -> tuple[str, list[tuple[int, str, str]]]:
    """Text and (index, name, arguments) of the calls."""
    parser, text, calls = ToolCallParser(NAMES, parallel=parallel), "", []
    for piece in pieces:
        said, found = parser.push(piece)
        text += said
        calls += [(one.index, one.name, one.arguments) for one in found]
    return text + parser.finish(), calls


ONE = (0, "f", '{"a": 1}')
TWO = (1, "get_weather", '{"city": "Zürich </tool_call>"}')
WEATHER = call("get_weather", '{"city": "Zürich </tool_call>"}')
CASES = {
    "only text": ("just <b>text</b>, a < b", "just <b>text</b>, a < b", []),
    "one": (call(), "", [ONE]),
    "text before": ("Let me see.\n\n" + call(), "Let me see.", [ONE]),
    "text after": ("Now:\n" + call() + " done", "Now: done", [ONE]),
    "two": (call() + "\n" + WEATHER + "\n", "", [ONE, TWO]),
    "two without a line between": (call() + WEATHER, "", [ONE, TWO]),
    "tag in a string": (call("f", '{"a": "<tool_call> \\" \\\\"}'), "", [(0, "f", '{"a": "<tool_call> \\" \\\\"}')]),
    "no arguments": (f'{OPENING}{{"name": "f"}}{CLOSING}', "", [(0, "f", "{}")]),
    "no JSON": (f"a {OPENING}oops{CLOSING} b", f"a {OPENING}oops{CLOSING} b", []),
    "unknown function": (call("g"), call("g"), []),
    "arguments that are a list": (call("f", "[1]"), call("f", "[1]"), []),
    "a number that is none": (call("f", '{"a": NaN}'), call("f", '{"a": NaN}'), []),
    "half a character": (call("f", '{"a": "\\ud800"}'), call("f", '{"a": "\\ud800"}'), []),
    "a name that is a list": (f'{OPENING}{{"name": [1]}}{CLOSING}', f'{OPENING}{{"name": [1]}}{CLOSING}', []),
    "broken, then good": (
        f'{OPENING}\n{{"name": "f\n{CLOSING}\n' + call(),
        f'{OPENING}\n{{"name": "f\n{CLOSING}',
        [ONE],
    ),
    "a tag that is talked of": (f"The {OPENING} tag:\n" + call(), f"The {OPENING} tag:\n", [ONE]),
    "cut off": ("x \n" + call()[:30], "x \n" + call()[:30], []),
    "the beginning of a tag": ("a <tool_cal", "a <tool_cal", []),
    "closing alone": (f"a {CLOSING} b", f"a {CLOSING} b", []),
    "blanks": (" \n ", " \n ", []),
    "nothing": ("", "", []),
}


@pytest.mark.parametrize(("text", "said", "calls"), CASES.values(), ids=CASES)
def test_every_way_to_cut_in_two_and_char_by_char(text: str, said: str, calls: list[tuple[int, str, str]]) -> None:
    for cut in range(len(text) + 1):
        assert parse([text[:cut], text[cut:]]) == (said, calls), cut
    assert parse(list(text)) == (said, calls)


FRAGMENTS = st.sampled_from(
    (OPENING, CLOSING, call(), WEATHER, '{"name": "f"}', '"', "\\", "\n", " ", "a", "<", "ü", "</")
)


@given(st.lists(FRAGMENTS, max_size=12).map("".join), st.randoms(use_true_random=False))
def test_random_texts_cut_at_random(text: str, rng: random.Random) -> None:
    expected = parse([text])
    pieces, start = [], 0
    while start < len(text):
        stop = start + rng.randint(1, 7)
        pieces.append(text[start:stop])
        start = stop
    assert parse(pieces) == expected
    for _, name, arguments in expected[1]:
        assert name in NAMES
        assert isinstance(json.loads(arguments), dict)


def test_text_leaves_as_soon_as_it_is_certain() -> None:
    parser = ToolCallParser(NAMES)
    assert [parser.push(piece)[0] for piece in ("Hello", " wor", "ld <", "3", " <tool", "s> x")] == [
        "Hello",
        " wor",
        "ld",
        " <3",
        "",
        " <tools> x",
    ]


def test_one_call_is_all_that_is_wanted() -> None:
    assert parse(list("a " + call() + "\n" + WEATHER + " b"), parallel=False) == ("a", [ONE])


def test_ids_differ() -> None:
    _, calls = ToolCallParser(NAMES).push(call() + call())
    assert len({one.id for one in calls}) == 2
    assert all(one.id.startswith("call_") for one in calls)


@pytest.mark.parametrize(
    "text", [OPENING * 20_000, (OPENING + '"') * 20_000, call("f", '{"a": "' + "<" * 200_000 + '"}')]
)
def test_cost_is_linear(text: str) -> None:
    """Not timed: an answer that took quadratic time here would run into the test's time limit of minutes."""
    started = time.process_time()
    parser = ToolCallParser(NAMES)
    for place in range(0, len(text), 11):
        parser.push(text[place : place + 11])
    parser.finish()
    print(f"{len(text)} characters in {time.process_time() - started:.2f} s")
