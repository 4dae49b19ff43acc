"""The real server with the bundled model under whatever clients may send: `make fuzz`, and for ten seconds in `make test`.

SORTSERVE_FUZZ_SECONDS says how long; SORTSERVE_FUZZ_SEED repeats a round that failed (its number is in the output).
"""

import os
import random
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz import oracle
from tests.fuzz.strategies import Exchange, exchanges
from tests.server.real_server import Server, serving

SECONDS = float(os.environ.get("SORTSERVE_FUZZ_SECONDS", "10"))
ROUND = 100  # examples between two looks at the server's own state


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as started:
        yield started


@pytest.mark.timeout(SECONDS + 600)  # shrinking a failure takes its time
def test_fuzz(server: Server) -> None:
    given_seed = os.environ.get("SORTSERVE_FUZZ_SEED")
    number = int(given_seed) if given_seed else random.SystemRandom().randrange(2**32)
    reference = oracle.complete(server)
    deadline, answers = time.monotonic() + SECONDS, Counter[str]()

    def send(exchange: Exchange) -> None:
        num_lines = len(server.log)
        answer = oracle.ask(server.url, exchange)
        answers["none" if answer is None else f"{answer.status}"] += 1
        if answer is not None:
            oracle.check_answer(exchange, answer)
        oracle.check_log(server, num_lines)

    while True:
        print(f"round with SORTSERVE_FUZZ_SEED={number}; answers so far: {dict(answers)}")
        run = given(exchanges())(send)
        run = settings(
            max_examples=ROUND,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )(run)
        seed(number)(run)()
        oracle.check_server(server, reference)
        if time.monotonic() >= deadline or given_seed:
            break
        number += 1
    print(f"answers: {dict(answers)}")
    assert answers["200"] > answers.total() / 10, "hardly anything gets as far as the engine"
