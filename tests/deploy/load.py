"""Clients that ask without pause, streams and whole answers in turn, and remember everything that was not as it should."""

import json
import threading
import time
from dataclasses import dataclass, field

import httpx


@dataclass
class Load:
    """A few clients, each in a thread of its own, until told to stop; none tries anything twice."""

    url: str
    num_clients: int = 4
    max_tokens: int = 24
    num_done: int = 0
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(self.num_clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def wait_for(self, num_more: int, seconds: float = 60.0) -> None:
        """Until so many more requests have ended, well or not."""
        goal = self._ended() + num_more
        deadline = time.monotonic() + seconds
        while self._ended() < goal:
            assert time.monotonic() < deadline, f"{self._ended()} of {goal} requests ended; {self.failures[-3:]}"
            time.sleep(0.02)

    def _ended(self) -> int:
        with self._lock:
            return self.num_done + len(self.failures)

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            count = number
            while not self._stop.is_set():
                wrong = self._one(client, count)
                count += 1
                with self._lock:
                    if wrong is None:
                        self.num_done += 1
                    else:
                        self.failures.append(wrong)

    def _one(self, client: httpx.Client, count: int) -> str | None:
        """One request; None if it was answered as it should be, to its last byte."""
        streams = count % 2 == 0
        body = {
            "prompt": f"Once upon a time {count}",
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "stream": streams,
        }
        headers = {"X-Latency-Budget-Ms": str(200 + 200 * (count % 5))}
        try:
            answer = client.post("/v1/completions", json=body, headers=headers)
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:200]}"
        if not streams:
            num_tokens = answer.json()["usage"]["completion_tokens"]
            return None if num_tokens == self.max_tokens else f"{num_tokens} tokens of {self.max_tokens}"
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        if events[-1] != "[DONE]":
            return f"a stream ended without [DONE]: {events[-1][:200]}"
        wrong = [event for event in events[:-1] if "error" in json.loads(event)]
        return f"an error in a stream: {wrong[0][:200]}" if wrong else None
