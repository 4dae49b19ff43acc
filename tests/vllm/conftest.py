"""Engines of the suite, and what its environment is. Without vLLM every test is skipped."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import Engine, asif_ladder, start

HERE = Path(__file__).parent
BUNDLED = HERE.parent.parent / "src" / "sortserve" / "bundled"

# Read when vLLM is imported, which is in the first fixture that needs it. In one process, so that tests can look inside.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM's own warnings are no errors here, and where it is not installed nothing runs."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not here: make test-vllm"))


@pytest.fixture(scope="session")
def ladder_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's ladder and more: skips, and a width inside a block."""
    path = tmp_path_factory.mktemp("ladder") / "ladder.json"
    asif_ladder(BUNDLED).dump(path)
    return path


Starter = Callable[..., Engine]


@pytest.fixture(scope="session")
def starter() -> Starter:
    """`start`, whose engines live to the end: the first one that is collected would take the distributed groups, of which
    a process has one set, away from all the others."""
    alive: list[Engine] = []

    def started(folder: Path, **arguments: Any) -> Engine:
        alive.append(start(folder, **arguments))
        return alive[-1]

    return started


@pytest.fixture(scope="session")
def engine(starter: Starter, ladder_path: Path) -> Engine:
    """The bundled model with sub-models, float32, short of memory: prompts are chunked and requests preempted."""
    return starter(BUNDLED, ladder_path=ladder_path)


@pytest.fixture
def clean(engine: Engine) -> None:
    """Nothing that another test wrote, and nothing cached."""
    decider = engine.decider
    for written in (
        decider.program,
        decider.refuse,
        decider.cut,
        decider.order,
        decider.steps,
        decider.seen,
        decider.ends,
    ):
        written.clear()
    assert engine.llm.reset_prefix_cache()
