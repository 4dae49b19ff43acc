"""What LangChain sees: `langchain_client.py URL` prints it as JSON.

Runs in the tool's own environment; test_langchain.py judges what it prints.
"""

import asyncio
import json
import sys
from typing import Any

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

QUESTION = "Tell me of the sea."


def main(url: str) -> None:
    """Chat and completion models, whole, streamed, in batches and asynchronously."""
    options: dict[str, Any] = {
        "base_url": f"{url}/v1",
        "api_key": "none",
        "model": "bundled",
        "max_retries": 0,
        "temperature": 0,
        "max_tokens": 12,
    }
    chat = ChatOpenAI(**options, stream_usage=True)
    budgeted = ChatOpenAI(**options, default_headers={"X-Latency-Budget-Ms": "30s"}, include_response_headers=True)
    pinned = ChatOpenAI(**options, extra_body={"submodel": "d2-w25"})
    messages = [SystemMessage("You are a sailor."), HumanMessage(QUESTION)]

    async def both() -> tuple[str, list[str]]:
        whole = await chat.ainvoke(QUESTION)
        return str(whole.content), [str(chunk.content) async for chunk in chat.astream(QUESTION)]

    streamed = list(chat.stream(QUESTION))
    whole = streamed[0]
    for chunk in streamed[1:]:
        whole += chunk
    invoked = chat.invoke(QUESTION)
    under_budget = budgeted.invoke(QUESTION)
    completion = OpenAI(**options)
    ainvoked, astreamed = asyncio.run(both())
    seen = {
        "invoke": {"content": invoked.content, "usage": invoked.usage_metadata, "metadata": invoked.response_metadata},
        "messages": chat.invoke(messages).content,
        "stream": {
            "contents": [str(chunk.content) for chunk in streamed],
            "usage": whole.usage_metadata,
            "metadata": whole.response_metadata,
        },
        "batch": [answer.content for answer in chat.batch([QUESTION, "Tell me of a king.", QUESTION])],
        "ainvoke": ainvoked,
        "astream": astreamed,
        "budget": {"content": under_budget.content, "headers": under_budget.response_metadata["headers"]},
        "pinned": pinned.invoke(QUESTION).response_metadata["system_fingerprint"],
        "completion": completion.invoke(QUESTION),
        "completion_stream": list(completion.stream(QUESTION)),
    }
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
