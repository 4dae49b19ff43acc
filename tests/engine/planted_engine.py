"""The engine process with faults planted: `python planted_engine.py CONTROL ENDPOINT`.

Each step looks into the folder CONTROL: while it holds `slow`, a step takes 20 ms more; `crash` raises in a step; `hang`
never ends one. With `unloadable` there, loading is refused.
"""

import sys
import time
from pathlib import Path
from typing import Any

from sortserve.engine import process
from sortserve.engine.engine import Engine
from sortserve.engine.errors import StartupError
from sortserve.engine.plan import Plan, StepResult
from sortserve.engine.runner import Runner

CONTROL = Path(sys.argv.pop(1))
_run, _load = Runner.run, Engine.load


def run(self: Runner, plan: Plan) -> StepResult:
    """A step, with whatever is planted."""
    if (CONTROL / "slow").exists():
        time.sleep(0.02)
    if (CONTROL / "crash").exists():
        raise RuntimeError("planted")
    while (CONTROL / "hang").exists():
        time.sleep(0.01)
    return _run(self, plan)


def load(*args: Any) -> Engine:
    """Loading, unless it is refused."""
    if (CONTROL / "unloadable").exists():
        raise StartupError("planted: not loaded", param="model_folder")
    return _load(*args)


Runner.run = run  # type: ignore[method-assign]
Engine.load = load  # type: ignore[method-assign, assignment]

if __name__ == "__main__":
    sys.exit(process.main())
