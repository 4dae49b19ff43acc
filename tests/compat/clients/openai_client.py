"""What the official client sees: `openai_client.py URL KEY PID SCENARIO ...` prints `{scenario: what it saw}` as JSON.

Runs in the client's own environment; test_openai.py judges what it prints.
"""

import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import openai

PROMPT = "Once upon a time there was a king"
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me of the sea."}]
GREEDY: dict[str, Any] = {"model": "bundled", "max_tokens": 16, "temperature": 0}
USAGE = {"include_usage": True, "continuous_usage_stats": True}


class Client:
    """The scenarios, each a method that returns plain data."""

    def __init__(self, url: str, key: str, pid: int) -> None:
        self.url, self.key, self.pid = url, key, pid
        self.client = self.open()

    def open(self, **options: Any) -> openai.OpenAI:
        """A client that tries once."""
        defaults = {"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0}
        return openai.OpenAI(**{**defaults, **options})

    def completions(self) -> Any:
        """Whole and streamed."""
        whole = self.client.completions.create(prompt=PROMPT, **GREEDY)
        chunks = list(
            self.client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY)
        )
        return {"whole": whole.model_dump(), "chunks": [chunk.model_dump() for chunk in chunks]}

    def chat(self) -> Any:
        """Whole, streamed with usage in every chunk, and as the client's own events."""
        whole = self.client.chat.completions.create(messages=MESSAGES, **GREEDY)
        options: Any = USAGE
        chunks = list(
            self.client.chat.completions.create(messages=MESSAGES, stream=True, stream_options=options, **GREEDY)
        )
        with self.client.chat.completions.stream(messages=MESSAGES, **GREEDY) as stream:
            accumulated = [event.delta for event in stream if event.type == "content.delta"]
        return {
            "whole": whole.model_dump(),
            "chunks": [chunk.model_dump() for chunk in chunks],
            "accumulated": "".join(accumulated),
        }

    def asynchronous(self) -> Any:
        """Eight at once, half of them streamed, from one event loop."""

        async def ask(client: openai.AsyncOpenAI, number: int) -> str:
            if number % 2:
                answer = await client.completions.create(prompt=f"{PROMPT} {number // 2}", **GREEDY)
                return str(answer.choices[0].text)
            chunks = await client.completions.create(prompt=f"{PROMPT} {number // 2}", stream=True, **GREEDY)
            return "".join([chunk.choices[0].text async for chunk in chunks if chunk.choices])

        async def everything() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0) as client:
                return list(await asyncio.gather(*(ask(client, number) for number in range(8))))

        return asyncio.run(everything())

    def logprobs(self) -> Any:
        """Of both endpoints, and of the prompt through echo."""
        completion = self.client.completions.create(prompt=PROMPT, logprobs=3, **GREEDY)
        chat = self.client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY)
        echo = self.client.completions.create(prompt=PROMPT, echo=True, logprobs=2, **(GREEDY | {"max_tokens": 1}))
        return {
            "completion": completion.choices[0].model_dump(),
            "chat": chat.choices[0].model_dump(),
            "echo": echo.choices[0].model_dump(),
        }

    def several(self) -> Any:
        """`n`, several prompts, `stop`, `seed`."""

        def draw(seed: int, **fields: Any) -> list[Any]:
            asked = {**GREEDY, "temperature": 1, "seed": seed, "extra_body": {"ignore_eos": True}, **fields}
            answer = self.client.completions.create(**{"prompt": PROMPT, **asked})
            return [[choice.index, choice.text, choice.finish_reason] for choice in answer.choices]

        plain = draw(7)
        stop = plain[0][1][6:9]
        tokens = [5, 6, 7]
        return {
            "three": draw(7, n=3),
            "again": draw(7, n=3),
            "other": draw(8, n=3),
            "prompts": draw(7, prompt=[PROMPT, "The ship"]),
            "tokens": draw(7, prompt=[tokens, tokens], temperature=0),
            "plain": plain,
            "stop": stop,
            "stopped": draw(7, stop=[stop, "\x00"]),
        }

    def budgets(self) -> Any:
        """By header, by body, and as the client's default header; response headers as the client hands them out."""
        asked = GREEDY | {"prompt": PROMPT}
        raw = self.client.completions.with_raw_response
        header = raw.create(**asked, extra_headers={"X-Latency-Budget-Ms": "30s", "X-Request-Id": "compat-1"})
        body = raw.create(**asked, extra_body={"latency_budget_ms": 30_000, "submodel_floor": "d4-w50"})
        default = self.open(default_headers={"X-Latency-Budget-TTFT-Ms": "20s", "x-slo-tpot-ms": "9s"})
        pinned = raw.create(**asked | {"model": "bundled:d2-w25"})
        seen = {"header": header, "body": body, "pinned": pinned}
        seen["default"] = default.completions.with_raw_response.create(**asked)
        with self.client.chat.completions.with_streaming_response.create(
            messages=MESSAGES, stream=True, **GREEDY, extra_headers={"X-Latency-Budget-Ms": "30000"}
        ) as streamed:
            lines = [line for line in streamed.iter_lines() if line]
            stream = {"headers": dict(streamed.headers), "last": lines[-1], "told": json.loads(lines[-2][6:])}
        found = {
            name: {"headers": dict(answer.headers), "body": answer.parse().model_dump()}
            for name, answer in seen.items()
        }
        return {**found, "stream": stream}

    def models(self) -> Any:
        """The list, and each entry by its own name."""
        listed = [model.model_dump() for model in self.client.models.list()]
        return {"list": listed, "each": [self.client.models.retrieve(model["id"]).model_dump() for model in listed]}

    def refusals(self) -> Any:
        """The class of each mistake, and what it says."""
        asked = GREEDY | {"prompt": PROMPT}
        strict = {"X-Latency-Budget-Policy": "strict", "X-Latency-Budget-Ms": "0.001"}

        def complete(client: openai.OpenAI | None = None, **fields: Any) -> Callable[[], Any]:
            return lambda: (client or self.client).completions.create(**{**asked, **fields})

        retrying = self.open(max_retries=2)
        mistakes = {
            "wrong type": complete(prompt=5),
            "too long": complete(max_tokens=100_000),
            "temperature": complete(temperature=9),
            "bad header": complete(extra_headers={"X-Latency-Budget-Ms": "soon"}),
            "strict": complete(retrying, extra_headers=strict),
            "model": complete(model="gpt-9"),
            "submodel": complete(extra_headers={"X-Submodel": "d99"}),
            "retrieve": lambda: self.client.models.retrieve("gpt-9"),
            "path": lambda: self.client.embeddings.create(model="bundled", input="x"),
            "key": complete(self.open(api_key="sk-wrong")),
            "too large": complete(prompt="x" * 5_000_000),
            "timeout": complete(self.open(timeout=0.05), max_tokens=900, extra_body={"ignore_eos": True}),
            "no server": complete(self.open(base_url="http://127.0.0.1:9/v1")),
        }
        return {name: _refusal(ask) for name, ask in mistakes.items()}

    def overload(self) -> Any:
        """256 answers at a server where two may wait; two more tries are made."""
        client = self.open(max_retries=2)
        many: dict[str, Any] = {**GREEDY, "prompt": [PROMPT] * 16, "n": 16, "extra_body": {"ignore_eos": True}}
        seen = _refusal(lambda: client.completions.create(**many))
        after = client.completions.with_raw_response.create(prompt=PROMPT, **GREEDY)
        return {"refused": seen, "after": after.status_code, "retries": after.retries_taken}

    def drain(self) -> Any:
        """SIGTERM during a stream: it runs to its end, and new requests are sent away."""
        fields = GREEDY | {"max_tokens": 600, "extra_body": {"ignore_eos": True}}
        stream = self.client.completions.create(prompt=PROMPT, stream=True, **fields)
        chunks = [next(stream)]
        os.kill(self.pid, signal.SIGTERM)
        while (refused := _refusal(lambda: self.client.completions.create(prompt=PROMPT, **GREEDY))) is None:
            chunks.append(next(stream))
        chunks.extend(stream)
        told: Any = chunks[-1].model_extra
        return {"refused": refused, "finish": chunks[-1].choices[0].finish_reason, "told": told["sortserve"]}


def _refusal(ask: Callable[[], Any]) -> Any:
    """What kind of error came, None if there was none."""
    try:
        ask()
    except openai.APIStatusError as error:
        return {
            "class": type(error).__name__,
            "status": error.status_code,
            "code": error.code,
            "param": error.param,
            "type": error.type,
            "message": error.message,
            "headers": dict(error.response.headers),
            "retries": int(error.request.headers.get("x-stainless-retry-count", 0)),
        }
    except openai.APIConnectionError as error:
        return {"class": type(error).__name__}
    return None


def main() -> None:
    """Run the scenarios named; one that raises is told with its traceback."""
    url, key, pid, *names = sys.argv[1:]
    client = Client(url, key, int(pid))
    seen: dict[str, Any] = {}
    for name in names:
        try:
            seen[name] = getattr(client, name)()
        except Exception:
            seen[name] = {"failed": traceback.format_exc()}
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
