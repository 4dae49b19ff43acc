"""The layout of the code: who may import whom, what stays free of torch, and what the top level looks like.

The rules read source text and import nothing, so they hold for files that need a GPU too. Each is a function of a
package folder that returns the violations; it is applied to `src/sortserve`, and to a small tree with one planted.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "sortserve"
PARTS = ("engine", "kernels", "server", "sorting")
MAX_FILE_LINES = 400

# Part of the importing file -> parts it may import. "" is `sortserve` itself: its __init__ offers the engine's names,
# and loads them only when asked for.
MAY_IMPORT = {
    "": {"", "engine"},
    "__main__": {"", "engine", "server", "sorting"},  # where the commands of all parts meet
    "kernels": {"kernels"},
    "engine": {"kernels", "engine"},
    "sorting": {"", "kernels", "engine", "sorting"},
    "server": {"", "engine", "server"},
}

# The scheduler's side of the engine: module or folder names in engine/. A name without a file is not checked.
TORCH_FREE = (
    "submodel",
    "ladder",
    "budget",
    "errors",
    "logs",
    "request",
    "plan",
    "pages",
    "kv",
    "sequence_kv",
    "prefix",
    "reclaim",
    "settings",
    "admission",
    "planner",
    "lengths",
    "tally",
    "scheduler",
    "table",
    "deciding",
    "booking",
    "acceptance",
    "assembly",
    "ahead",
    "foretelling",
    "step",
    "rungs",
    "policies",
    "simulator",
    "cost",
    "cost_model",
    "cost_fit",
    "cost_file",
    "profile_cache",
    "estimates",
    "forecast",
    "protocol",
    "messages",
    "connection",
    "supervisor",
    "grammar",
    "container",
)


# --- reading imports ----------------------------------------------------------------------------------------


def module_files(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of every Python file in the package."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        dotted = ".".join((package.name, *path.relative_to(package).with_suffix("").parts))
        files[dotted.removesuffix(".__init__")] = path
    return files


def part_of(name: str) -> str:
    """`sortserve.engine.ladder` -> `engine`; `sortserve` and names defined in it, such as `sortserve.LLM`, -> ""."""
    top = [*name.split("."), ""][1]
    return top if top in MAY_IMPORT else ""


def imports_of(module: str, path: Path) -> Iterator[str]:
    """Every dotted name the file imports, also in functions, TYPE_CHECKING blocks and literal import_module calls.

    `from a import b` yields `a.b`, whether b is a module or a name in one; `import_graph` finds out which.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = package.split(".")
            above = names[: len(names) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports (the package's own __init__ left out: it is lazy)."""
    files = module_files(package)
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        graph[module] = set()
        for name in imports_of(module, path):
            owner = name  # the longest leading part of the name that is a module
            while owner and owner not in files:
                owner = owner.rpartition(".")[0]
            graph[module] |= {owner} - {"", package.name}
    return graph


# --- the rules: a package folder in, violations out ---------------------------------------------------------


def upward_imports(package: Path) -> list[str]:
    found = set()
    for module, path in module_files(package).items():
        if path.parent == package and path.stem not in ("__init__", "__main__"):
            found.add(f"{module} is in none of the parts")
        for name in imports_of(module, path):
            if name.split(".")[0] == package.name and part_of(name) not in MAY_IMPORT[part_of(module)]:
                found.add(f"{module} imports {name}")
    unknown = (path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in PARTS)
    found |= {f"{path} is in none of the parts" for path in unknown if path.parent != package}
    return sorted(found)


def torch_imports(package: Path) -> list[str]:
    """Chains from a torch-free module to a file that imports torch, over imports inside the package."""
    files, graph = module_files(package), import_graph(package)
    roots = [f"{package.name}.engine.{name}" for name in TORCH_FREE]
    chains = {module: module for module in files if any(module == r or module.startswith(f"{r}.") for r in roots)}
    pending = list(chains)
    found = []
    while pending:
        module = pending.pop()
        if any(name.split(".")[0] == "torch" for name in imports_of(module, files[module])):
            found.append(f"{chains[module]} -> torch")
        for imported in graph[module] - chains.keys():
            chains[imported] = f"{chains[module]} -> {imported}"
            pending.append(imported)
    return sorted(found)


def import_cycles(package: Path) -> list[str]:
    graph = import_graph(package)
    done: set[str] = set()
    found = []

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for imported in sorted(graph[module]):
                visit(imported, [*trail, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def init_files(package: Path) -> list[str]:
    inits = (path for part in PARTS for path in (package / part).glob("__init__.py*"))
    return sorted(str(path.relative_to(package)) for path in inits)


def long_or_unnamed_files(package: Path) -> list[str]:
    found = []
    for path in module_files(package).values():
        num_lines = len(path.read_text().splitlines())
        if num_lines > MAX_FILE_LINES:
            found.append(f"{path.relative_to(package)} has {num_lines} lines, the limit is {MAX_FILE_LINES}")
        if path.name == "utils.py":
            found.append(f"{path.relative_to(package)}: name what it does")
    return found


def wrong_links(root: Path) -> list[str]:
    links = {part: f"src/sortserve/{part}" for part in PARTS}
    return [
        f"{part} should be a link to {target}"
        for part, target in links.items()
        if not (root / part).is_symlink() or os.readlink(root / part) != target or not (root / part).is_dir()
    ]


def hides_kernels(root: Path) -> str:
    """The file that `import kernels` would run in a process started in `root`, if that file is ours; else empty."""
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print((spec and spec.origin) or '')"
    origin = run_python(code, root).strip()
    return origin if origin and Path(origin).parent in (root / "kernels", root / "src/sortserve/kernels") else ""


def run_python(code: str, folder: Path = ROOT) -> str:
    """What the code prints in a fresh interpreter started in the folder, with `src` on its path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(PACKAGE.parent)
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


RULES = (upward_imports, torch_imports, import_cycles, init_files, long_or_unnamed_files)


# --- the tests ----------------------------------------------------------------------------------------------


def test_the_rules_see_the_code() -> None:
    """A wrong path would make every rule below pass on nothing."""
    assert PACKAGE.name in module_files(PACKAGE)


def test_imports_point_down_only() -> None:
    assert upward_imports(PACKAGE) == []


def test_scheduler_side_imports_no_torch() -> None:
    assert torch_imports(PACKAGE) == []


def test_scheduler_side_loads_no_torch() -> None:
    """The same by running it: a third-party library could bring torch in, which no reading of our files shows."""
    roots = [f"sortserve.engine.{name}" for name in TORCH_FREE]
    modules = [m for m in module_files(PACKAGE) if any(m == r or m.startswith(f"{r}.") for r in roots)]
    code = (
        f"import importlib, sys; [importlib.import_module(m) for m in {modules!r}]; assert 'torch' not in sys.modules"
    )
    run_python(code)


def test_the_package_itself_loads_no_part() -> None:
    """Its __init__ runs before every part: what it loaded, all of them would load."""
    code = "import sys, sortserve; print(*(name for name in sys.modules if name.startswith('sortserve.')))"
    assert run_python(code).strip() == ""


def test_no_import_cycles() -> None:
    assert import_cycles(PACKAGE) == []


def test_parts_have_no_init_file() -> None:
    assert init_files(PACKAGE) == []


def test_top_level_links_lead_to_the_parts() -> None:
    assert wrong_links(ROOT) == []


def test_our_kernels_hide_no_other_package() -> None:
    """With an __init__.py, `kernels` in the root hid Hugging Face's package of that name from transformers."""
    assert hides_kernels(ROOT) == ""


def test_files_are_short_and_named() -> None:
    assert long_or_unnamed_files(PACKAGE) == []


# --- the rules can fail -------------------------------------------------------------------------------------

CLEAN = {
    "__init__.py": "",
    "kernels/linear.py": "import torch",
    "engine/plan.py": "import numpy",
    "engine/scheduler.py": "from sortserve.engine import plan",
    "engine/runner.py": "import torch\nfrom sortserve.kernels.linear import x\nfrom sortserve.engine.plan import Plan",
    "server/cli.py": "from sortserve import LLM, __version__\nfrom sortserve.engine.runner import Runner",
    "sorting/soft.py": "from sortserve.engine import runner\nfrom sortserve.kernels import linear",
}

PLANTED = [
    ("upward_imports", "kernels/linear.py", "from sortserve.engine.plan import Plan"),
    ("upward_imports", "kernels/linear.py", "from sortserve import engine"),
    ("upward_imports", "kernels/linear.py", "from sortserve import __doc__"),
    ("upward_imports", "kernels/linear.py", "from ..engine import plan"),
    ("upward_imports", "engine/plan.py", "def f():\n    import sortserve.server.cli"),
    ("upward_imports", "server/cli.py", "from sortserve.sorting.soft import train"),
    ("upward_imports", "server/cli.py", "import importlib\nimportlib.import_module('sortserve.kernels.linear')"),
    ("upward_imports", "__init__.py", "from sortserve.server import cli"),
    ("upward_imports", "engine/plan.py", "from sortserve import LLM"),
    ("upward_imports", "helpers.py", ""),
    ("upward_imports", "tools/x.py", ""),
    ("torch_imports", "engine/plan.py", "import torch"),
    ("torch_imports", "engine/policies/fixed.py", "from torch import nn"),
    ("torch_imports", "engine/scheduler.py", "from sortserve.engine.runner import Runner"),
    ("import_cycles", "engine/plan.py", "from sortserve.engine import scheduler"),
    ("import_cycles", "engine/plan.py", "from . import scheduler"),
    ("init_files", "kernels/__init__.py", ""),
    ("long_or_unnamed_files", "engine/utils.py", ""),
    ("long_or_unnamed_files", "engine/plan.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
]


def write_tree(package: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)


def test_rules_pass_a_clean_tree(tmp_path: Path) -> None:
    package = tmp_path / "sortserve"
    write_tree(package, CLEAN)
    assert {rule.__name__: rule(package) for rule in RULES} == {rule.__name__: [] for rule in RULES}


@pytest.mark.parametrize(("rule_name", "file", "text"), PLANTED)
def test_rules_find_a_planted_violation(tmp_path: Path, rule_name: str, file: str, text: str) -> None:
    package = tmp_path / "sortserve"
    write_tree(package, CLEAN | {file: text})
    rule = next(rule for rule in RULES if rule.__name__ == rule_name)
    assert rule(package) != []


def test_link_rules_find_a_planted_violation(tmp_path: Path) -> None:
    for part in PARTS:
        (tmp_path / "src/sortserve" / part).mkdir(parents=True)
        (tmp_path / part).symlink_to(f"src/sortserve/{part}")
    assert wrong_links(tmp_path) == []
    assert hides_kernels(tmp_path) == ""

    (tmp_path / "kernels/__init__.py").touch()
    assert hides_kernels(tmp_path) != ""

    (tmp_path / "engine").unlink()
    (tmp_path / "engine").symlink_to(f"{tmp_path}/src/sortserve/engine")
    assert wrong_links(tmp_path) == ["engine should be a link to src/sortserve/engine"]
