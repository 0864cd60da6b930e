"""A file imports from lower floors or its own, never upwards and never in a circle; read from the source, nothing runs.

Also held here: the kernels know torch and triton only, one module reads the environment, the library prints nothing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The first name below collm_fast: a module or a folder.
FLOORS = {
    0: {"config", "reference", "metrics", "graph", "_native", "kernels"},
    1: {"ops", "io", "sharding", "exchange", "distributed", "ranking"},
    2: {"data", "models", "environment", "peft"},
    3: {
        "training",
        "evaluate",
        "baselines",
        "bench_compare",
        "report",
        "rank",
        "run",
        "conclusions",
        "plots",
        "report_page",
    },
    4: {"cli", "options", "__main__", "demo", "bench", "official", "rank_command"},
}
# The package itself imports the ops and nothing above them, except by name and later (module __getattr__).
ROOT_FLOOR = 1
# Rules of the platform, not settings of ours.
SYSTEM_VARIABLES = {"XDG_CACHE_HOME", "WORLD_SIZE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"}
LAZY_ONLY = {"transformers", "peft", "pyarrow", "matplotlib", "tensorboard", "tqdm", "triton", "gguf"}


def modules() -> dict[str, Path]:
    """Dotted name of every module of the package: its file."""
    found = {}
    for folder, prefix in ((ROOT / "collm_fast", "collm_fast"), (ROOT / "kernels", "collm_fast.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in MODULES.items()}


def floor(name: str) -> int:
    parts = name.split(".")
    if len(parts) == 1:
        return ROOT_FLOOR
    for level, names in FLOORS.items():
        if parts[1] in names:
            return level
    return max(FLOORS)  # test_every_module_has_a_floor tells.


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST, *, types: bool, functions: bool) -> Iterator[ast.AST]:
    """The nodes below `node`, with or without those for type checkers and those inside functions."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child) and not types:
            continue
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not functions:
            continue
        yield child
        yield from statements(child, types=types, functions=functions)


def imports(name: str, *, types: bool = True, functions: bool = True) -> set[str]:
    """Dotted names that a module imports; a name taken from a package counts as its module where there is one."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in statements(TREES[name], types=types, functions=functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {full if full in MODULES else base for full in names}
    return found


def test_every_module_has_a_floor() -> None:
    known = set().union(*FLOORS.values())
    assert {name for name in MODULES if "." in name and name.split(".")[1] not in known} == set()


@pytest.mark.parametrize("name", MODULES)
def test_no_import_goes_upwards(name: str) -> None:
    types = name != "collm_fast"  # Its type-only imports name what __getattr__ loads later.
    for target in imports(name, types=types):
        if target.split(".")[0] == "collm_fast":
            assert floor(target) <= floor(name), (
                f"{name} (floor {floor(name)}) imports {target} (floor {floor(target)})"
            )


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: (imports(name, types=False) & MODULES.keys()) - {name, "collm_fast"} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "imports in a circle: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("collm_fast.kernels")])
def test_kernels_import_torch_and_triton_only(name: str) -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for target in imports(name):
        assert target.split(".")[0] in allowed or target.startswith("collm_fast.kernels"), f"{name} imports {target}"


def test_importing_the_package_needs_only_torch_and_numpy() -> None:
    """What `import collm_fast` reaches without calling anything imports no heavy package."""
    reached, todo = set(), ["collm_fast"]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += imports(name, types=False, functions=False) & MODULES.keys()
    heavy = {
        (name, target)
        for name in reached
        for target in imports(name, types=False, functions=False)
        if target.split(".")[0] in LAZY_ONLY
    }
    assert not heavy


@pytest.mark.parametrize("name", [name for name in MODULES if name != "collm_fast._native"])
def test_only_native_reads_settings_from_the_environment(name: str) -> None:
    lines = MODULES[name].read_text().splitlines()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            line = lines[node.lineno - 1]
            assert any(variable in line for variable in SYSTEM_VARIABLES), f"{MODULES[name]}:{node.lineno}: {line}"


@pytest.mark.parametrize("name", [name for name in MODULES if floor(name) < 4])
def test_the_library_prints_nothing(name: str) -> None:
    for node in ast.walk(TREES[name]):
        printed = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not printed, f"{MODULES[name]}:{node.lineno} prints"
