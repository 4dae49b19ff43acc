"""`response_format` and `tools` over HTTP: what reaches the engine, what is refused, and what the answers look like."""

import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import msgspec
import openai
import pytest

from sortserve.engine.grammar import Grammars
from sortserve.engine.protocol import FailedEvent
from sortserve.engine.text import Tokenizer
from sortserve.server.app import create_app
from tests.server.fake_backend import EOS, TEMPLATE, FakeBackend, byte_tokenizer, open_client, served

TOOL_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}"
    "<tool_call>{}</tool_call>{{ '\\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}{{ '\\n' }}{% endfor %}assistant:"
)
PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "now", "parameters": PLACE}}
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
CLOCK = {"type": "function", "function": {"name": "clock"}}
ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'


@pytest.fixture
async def chat(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a model whose template takes tools."""
    backend.info = msgspec.structs.replace(backend.info, max_model_len=4096)
    async with open_client(backend, template=TOOL_TEMPLATE) as client:
        yield client


async def post(client: httpx.AsyncClient, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    return await client.post(path, json={**ASK, **body})


def schema_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **fields}}


class Follows:
    """Whether a text, byte by byte, follows a grammar to a place where it may end."""

    def __init__(self, folder: Path) -> None:
        byte_tokenizer()._hf.save(str(folder / "tokenizer.json"))
        self._grammars = Grammars(folder, 258, (EOS,))

    def __call__(self, grammar: str | None, text: str) -> bool:
        assert grammar is not None
        self._grammars.drop("x")
        tokens = list(text.encode())
        for count in range(len(tokens)):
            if not self._grammars.allowed("x", grammar, tokens[:count])[tokens[count]]:
                return False
        return bool(self._grammars.allowed("x", grammar, tokens)[EOS])


@pytest.fixture(scope="module")
def follows(tmp_path_factory: pytest.TempPathFactory) -> Follows:
    return Follows(tmp_path_factory.mktemp("bytes"))


# --- response_format


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_the_grammar_reaches_the_engine(
    client: httpx.AsyncClient, backend: FakeBackend, follows: Follows, path: str
) -> None:
    for wanted in (None, {"type": "text"}, {"type": "json_object"}, schema_format(PLACE, strict=True)):
        answer = await post(client, path, prompt="x", response_format=wanted)
        assert answer.status_code == 200, answer.text
    free, text, anything, place = [request.sampling.grammar for request in backend.requests]
    assert free is None
    assert text is None
    assert follows(anything, '{"a": [1, {}]}')
    assert not follows(anything, "[1]")
    assert follows(place, '{"city":\n "x"}')
    assert not follows(place, '{"town": "x"}')
    assert not follows(place, "{}")


BAD = [
    ({"response_format": {"type": "yaml"}}, "response_format", "type"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format", "name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format", "schema"),
    ({"response_format": schema_format({}, name="a b")}, "response_format", "name"),
    ({"response_format": schema_format([])}, "response_format", "schema"),
    ({"response_format": schema_format({"type": "strin"})}, "response_format", "strin"),
    ({"response_format": schema_format({"properties": {"a": {"not": {}}}})}, "response_format", '"not"'),
    ({"response_format": schema_format({"if": {}, "then": {}})}, "response_format", '"if"'),
    ({"response_format": schema_format({"oneOf": [{"type": "number"}, {"minimum": 1}]})}, "response_format", "oneOf"),
    ({"response_format": schema_format({"pattern": "(a)\\1", "type": "string"})}, "response_format", "backref"),
    ({"response_format": schema_format({"$ref": "http://127.0.0.1:1/x"})}, "response_format", "127.0.0.1"),
    ({"response_format": schema_format({"enum": ["x" * 70_000]})}, "response_format", "65536"),
    ({"response_format": schema_format({"x-guidance": {"lenient": True}, "not": {}})}, "response_format", '"not"'),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "ignore_eos"),
    ({"tools": [{}]}, "tools", "type"),
    ({"tools": [{"type": "retrieval"}]}, "tools", "type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "name"),
    ({"tools": [WEATHER, WEATHER]}, "tools", "twice"),
    ({"tools": [WEATHER] * 129}, "tools", "128"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools", "object"),
    ({"tools": [STRICT, CLOCK], "tool_choice": "maybe"}, "tool_choice", "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice", "tools"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice", "tools"),
    (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
        "get_weather",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
        "tools",
        "function f",
    ),
    ({"functions": [{"name": "f"}]}, "functions", "tools"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "messages",
        "f",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "1"}}]}]},
        "messages",
        "f",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages", "function"),
]


@pytest.mark.parametrize(("change", "param", "part"), BAD, ids=[f"{param}-{part}" for _, param, part in BAD])
async def test_what_cannot_be_served_is_refused(
    chat: httpx.AsyncClient, backend: FakeBackend, change: dict[str, Any], param: str, part: str
) -> None:
    answer = await post(chat, **change)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert part in error["message"]
    assert len(error["message"]) < 800
    assert backend.requests == []


@pytest.mark.parametrize("depth", [100, 300, 700, 900])
@pytest.mark.parametrize("strict", [True, False])
async def test_deep_schemas_are_served_or_refused(chat: httpx.AsyncClient, depth: int, strict: bool) -> None:
    text = '{"a":' * depth + "1" + "}" * depth
    tool = f'{{"type":"function","function":{{"name":"f","strict":{json.dumps(strict)},"parameters":{text}}}}}'
    wanted = f'{{"type":"json_schema","json_schema":{{"name":"n","schema":{text}}}}}'
    for extra in (f'"tools":[{tool}]', f'"response_format":{wanted}'):
        content = f'{{"messages":[{{"role":"user","content":"x"}}],"max_tokens":2,{extra}}}'
        answer = await chat.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400), answer.text


async def test_a_grammar_that_fails_in_the_engine_is_a_400(chat: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.refuse = FailedEvent("", "RequestError", "the grammar cannot be used: too many states", "response_format")
    answer = await post(chat, response_format={"type": "json_object"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format"


async def test_a_tokenizer_without_bytes_is_refused(backend: FakeBackend) -> None:
    async with open_client(backend) as client:
        app = client._transport.app  # type: ignore[attr-defined]
        app.state.server.tokenizer._spelling = None
        answer = await post(client, response_format={"type": "json_object"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "response_format"


# --- tools: what reaches the model


async def test_templates_that_do_not_take_tools(backend: FakeBackend) -> None:
    async with open_client(backend, template=TEMPLATE) as client:
        answer = await post(client, tools=[WEATHER])
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
        answer = await post(client, messages=[{"role": "tool", "content": "x"}])
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
        assert (await post(client, tools=[WEATHER], tool_choice="none")).status_code == 200
    async with open_client(backend, template=TEMPLATE + "{% if tools %}[TOOL_CALLS]{% endif %}") as client:
        answer = await post(client, tools=[WEATHER])
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
        assert "<tool_call>" in answer.json()["error"]["message"]


async def test_tools_are_not_for_completions(client: httpx.AsyncClient) -> None:
    answer = await post(client, "/v1/completions", prompt="x", tools=[WEATHER])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    answer = await post(client, "/v1/completions", prompt="x", tool_choice="required")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice")
    assert (await post(client, "/v1/completions", prompt="x", tools=[], tool_choice="auto")).status_code == 200


async def test_the_template_sees_tools_and_calls(chat: httpx.AsyncClient, backend: FakeBackend) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Köln"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    await post(chat, messages=messages, tools=[STRICT])
    text = bytes(backend.requests[0].prompt).decode()
    assert text.splitlines() == [
        json.dumps(WEATHER),
        "<tool_call>{}</tool_call>",
        "user: hi",
        'assistant: get_weather({"city": "Köln"})',
        "tool: rain",
        "assistant:",
    ]
    await post(chat, messages=messages, tools=[WEATHER], tool_choice="none")
    assert "<tool_call>" not in bytes(backend.requests[1].prompt).decode()


async def test_long_calls_are_rendered_in_a_thread(
    chat: httpx.AsyncClient, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the content was counted: calls of 4 MiB were rendered and tokenized while nobody else was served."""
    in_main: list[bool] = []
    render = Tokenizer.chat_text

    def noted(self: Tokenizer, *args: Any, **variables: Any) -> str:
        in_main.append(threading.current_thread() is threading.main_thread())
        return render(self, *args, **variables)

    monkeypatch.setattr(Tokenizer, "chat_text", noted)
    function = {"name": "get_weather", "arguments": json.dumps({"city": "x" * 4000})}
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}]
    await post(chat, messages=messages)
    await post(chat, messages=[{"role": "user", "content": "hi"}])
    assert in_main == [False, True]


CHOICES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "auto": ({"tools": [WEATHER]}, [], []),
    "required": (
        {"tools": [WEATHER, CLOCK], "tool_choice": "required"},
        [CALL, CALL + "\n" + CALL, CALL.replace("get_weather", "clock")],
        ["", "hello", "hi " + CALL, CALL + CALL, CALL.replace("city", "town"), CALL.replace("get_weather", "other")],
    ),
    "one": (
        {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False},
        [CALL],
        [CALL + "\n" + CALL],
    ),
    "named": (
        {"tools": [WEATHER, CLOCK], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        [CALL],
        [CALL.replace("get_weather", "clock"), CALL + "\n" + CALL],
    ),
    "strict": (
        {"tools": [STRICT, CLOCK]},
        ["", "hello <tool", "hi " + CALL, CALL + " and\n" + CALL + " bye", CALL.replace("get_weather", "clock")],
        [CALL.replace("city", "town"), "x <tool_call>", "<tool_call>x", CALL + CALL.replace("city", "town")],
    ),
    "a schema or calls": (
        {"tools": [WEATHER], "response_format": {"type": "json_object"}},
        [CALL, '{"a": 1}'],
        ["", "hello", '{"a": 1}' + CALL],
    ),
    "what cannot be enforced, not strict": (
        {"tools": [{"type": "function", "function": {"name": "clock", "parameters": {"not": {}}}}],
         "tool_choice": "required"},
        [CALL.replace("get_weather", "clock")],
        ["", "hello"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
async def test_forced_calls_are_a_grammar(
    chat: httpx.AsyncClient, backend: FakeBackend, follows: Follows, choice: str
) -> None:
    body, good, bad = CHOICES[choice]
    answer = await post(chat, **body)
    assert answer.status_code == 200, answer.text
    grammar = backend.requests[0].sampling.grammar
    assert (grammar is None) == (not good)
    for text in good:
        assert follows(grammar, text), text
    for text in bad:
        assert not follows(grammar, text), text


# --- tools: what is answered


async def test_a_call_whole(chat: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.answer = tuple(CALL.encode())
    body = (await post(chat, tools=[WEATHER], max_tokens=200)).json()
    [choice] = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert (call["type"], call["function"]) == (
        "function",
        {"name": "get_weather", "arguments": '{"city": "Köln"}'},
    )
    jsonschema.validate(json.loads(call["function"]["arguments"]), PLACE)


@pytest.mark.parametrize(
    ("text", "content", "num_calls", "reason"),
    [
        ("Let me see.\n" + CALL + "\n" + CALL, "Let me see.", 2, "tool_calls"),
        ("no call", "no call", 0, "stop"),
        (CALL.replace("get_weather", "other"), CALL.replace("get_weather", "other"), 0, "stop"),
        (CALL[:-20], CALL[:-20], 0, "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_answers_with_tools(
    chat: httpx.AsyncClient, backend: FakeBackend, stream: bool, text: str, content: str, num_calls: int, reason: str
) -> None:
    """The same whole and streamed; tags of calls are in neither."""
    backend.answer = tuple(text.encode())
    answer = await post(chat, tools=[WEATHER], max_tokens=500, stream=stream)
    if not stream:
        [choice] = answer.json()["choices"]
        said, calls, ended = (
            choice["message"]["content"],
            choice["message"].get("tool_calls", []),
            choice["finish_reason"],
        )
    else:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        said = "".join(choice["delta"].get("content", "") for choice in choices)
        calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
        assert [call["index"] for call in calls] == list(range(num_calls))
        [ended] = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert (said, ended) == (content, reason)
    assert [call["function"]["name"] for call in calls] == ["get_weather"] * num_calls
    assert len({call["id"] for call in calls}) == num_calls


async def test_too_few_tokens_stay_a_matter_of_length(chat: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.answer = tuple((CALL + "\n" + CALL).encode())
    [choice] = (await post(chat, tools=[WEATHER], max_tokens=len(CALL.encode()) + 9)).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert len(choice["message"]["tool_calls"]) == 1


async def test_one_call_ends_the_answer_if_more_are_not_wanted(chat: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.answer = tuple((CALL + "\n" + CALL).encode())
    answer = await post(chat, tools=[WEATHER], max_tokens=500, parallel_tool_calls=False)
    [choice] = answer.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert len(choice["message"]["tool_calls"]) == 1
    assert len(backend.aborted) == 1
    assert answer.json()["usage"]["completion_tokens"] == len(CALL.encode())


async def test_without_tools_tags_are_text(chat: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.answer = tuple(CALL.encode())
    extras: list[dict[str, Any]] = [{}, {"tools": [WEATHER], "tool_choice": "none"}]
    for extra in extras:
        [choice] = (await post(chat, max_tokens=200, **extra)).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


async def test_log_probabilities_beside_calls(chat: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.answer = tuple(("a" + CALL).encode())
    [choice] = (await post(chat, tools=[WEATHER], max_tokens=200, logprobs=True)).json()["choices"]
    assert len(choice["logprobs"]["content"]) == len(backend.answer)


def test_openai_client(backend: FakeBackend) -> None:
    backend.answer = tuple(("Hm.\n" + CALL).encode())
    with served(create_app(backend, byte_tokenizer(TOOL_TEMPLATE))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        asked: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "x"}]}
        asked["tools"] = [{"type": "function", "function": {"name": "get_weather"}}]
        backend.info = msgspec.structs.replace(backend.info, max_model_len=4096)
        whole = client.chat.completions.create(**asked).choices[0]
        assert whole.finish_reason == "tool_calls"
        assert whole.message.tool_calls is not None
        assert whole.message.tool_calls[0].function.name == "get_weather"
        with client.chat.completions.stream(**asked) as stream:
            final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.content == "Hm."
    assert final.message.tool_calls is not None
    assert json.loads(final.message.tool_calls[0].function.arguments) == {"city": "Köln"}
