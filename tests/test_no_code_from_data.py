"""Nothing that is read is ever run: no pickle, no `eval`, no shell, no YAML, no code out of a model folder.

In the manner of test_layout.py: the rule reads source text, so it holds for files that need a GPU too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_layout import PACKAGE, module_files

# What reads objects by running code, or runs text. A socket that pickles is among multiprocessing's.
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "multiprocessing"}
MODULES |= {"yaml", "code", "codeop", "runpy", "pty", "subprocess"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "torch.ops.load_library"}
CALLS |= {"os.system", "os.popen", "os.execv", "os.execvp", "asyncio.create_subprocess_shell"}
CALLS |= {"jinja2.Template", "jinja2.Environment", "jinja2.sandbox.SandboxedEnvironment"}
METHODS = {"recv_pyobj", "send_pyobj", "load_pickle"}
KEYWORDS = {"trust_remote_code", "allow_pickle", "shell", "weights_only"}
# Files of the toolkit, never the server's, that may start processes: the measuring of answers that are programs, when asked
# for by --run-generated-code, and lm-evaluation-harness in its own environment. And the compiler, which the server runs at
# start over source of this package only (--no-compile: never).
MAY_START = {"sorting/sandbox.py", "sorting/lm_eval.py", "kernels/compiling.py"}
FROM_PRETRAINED = {"sorting"}  # parts that may load with transformers: tools a developer runs, never the server


def violations(package: Path) -> list[str]:
    """`file:line: what`, of everything above in the package's files."""
    found = []
    for path in module_files(package).values():
        tree = ast.parse(path.read_text(), str(path))
        name = path.relative_to(package)
        of_file = _in_tree(tree, name.parts[0] in FROM_PRETRAINED)
        may_start = str(name) in MAY_START
        found += [f"{name}:{line}: {what}" for line, what in of_file if not (may_start and what == "subprocess")]
    return sorted(found)


def _in_tree(tree: ast.AST, may_load: bool) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, n.name) for n in node.names if n.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, n) for n in names if n.split(".")[0] in MODULES or n in CALLS)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            last = called.rpartition(".")[2]
            if called in BUILTINS | CALLS or last in METHODS or (last == "from_pretrained" and not may_load):
                yield node.lineno, called
            for keyword in node.keywords:
                if keyword.arg in KEYWORDS:
                    yield node.lineno, f"{called}({keyword.arg}=)"


def test_nothing_that_is_read_is_run() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from pickle import loads",
        "import multiprocessing.connection",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "def f():\n    exec('x = 1')",
        "__import__('x')",
        "import os\nos.system('ls')",
        "import asyncio\nasyncio.create_subprocess_shell('ls')",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "from transformers import AutoModel\nAutoModel.from_pretrained('x')",
        "from transformers import AutoConfig\nAutoConfig.for_model('x', trust_remote_code=False)",
        "from jinja2 import Environment",
        "socket.recv_pyobj()",
        "import yaml",
    ],
)
def test_the_rule_finds_a_planted_violation(tmp_path: Path, planted: str) -> None:
    (tmp_path / "sortserve/engine").mkdir(parents=True)
    (tmp_path / "sortserve/engine/x.py").write_text("import asyncio, json, re\nre.compile('x')\nmodel.eval()\n")
    assert violations(tmp_path / "sortserve") == []
    (tmp_path / "sortserve/engine/x.py").write_text(planted)
    assert violations(tmp_path / "sortserve") != []


def test_who_may_start_processes_may_do_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "sortserve/sorting").mkdir(parents=True)
    (tmp_path / "sortserve/sorting/sandbox.py").write_text("import subprocess\neval('1')\n")
    (tmp_path / "sortserve/sorting/other.py").write_text("import subprocess\n")
    found = ["sorting/other.py:1: subprocess", "sorting/sandbox.py:2: eval"]
    assert violations(tmp_path / "sortserve") == found
