"""Imports run one way only, other people's packages stay in their folder, and what must start fast loads no torch.

The checks work on a map of path → source, so each is shown to catch a planted violation.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

# A folder may import those of lower layers. Folders of one layer do not know each other.
LAYERS = [
    {"core"},
    {"protocol", "kernels"},
    {"models"},
    {"engine"},
    {"kvtransfer"},
    {"worker", "training"},
    {"prefill_node", "decode_node", "router"},
    {"gateway", "simulator"},
    {"deploy", "loadtest"},
    {"cli"},
]
RANK: dict[str, float] = {folder: rank for rank, folders in enumerate(LAYERS) for folder in folders}
RANK |= {"testing": RANK["gateway"] + 0.5, "__main__": len(LAYERS)}
NEVER_IMPORTED = {"testing", "__main__"}  # by the product; users' tests do

HOME = {  # folders, separated by spaces
    "aiohttp": "gateway loadtest testing",
    "zmq": "protocol",
    "ray": "deploy",
    "triton": "kernels",
    "ucxx": "kvtransfer",
    "nixl": "kvtransfer",
    "nixl_cu12": "kvtransfer",
    "huggingface_hub": "models",
}
TEST_ONLY = {"transformers", "openai", "pytest", "hypothesis", "gguf", "jsonschema"}

# Loading one of these must not load torch. A trailing slash means the whole folder.
TORCH_FREE = [
    "core/",
    "protocol/",
    "router/",
    "gateway/",
    "simulator/",
    "deploy/",
    "cli/",
    "loadtest/",
    "kvtransfer/effects.py",
    "kvtransfer/layout.py",
    "kvtransfer/wire_choice.py",
    "kvtransfer/source.py",
    "kvtransfer/destination.py",
    "kvtransfer/transports/",
    "engine/block_pool.py",
    "engine/sequence.py",
    "engine/interface.py",
    "engine/kv_memory.py",
    "engine/ledger.py",
    "engine/shared_files.py",
    "engine/shared_pool.py",
    "kvtransfer/ownership.py",
    "kernels/wire_format/formats.py",
    "engine/parking.py",
]


Check = Callable[[dict[str, str]], list[str]]  # path → source in, one message for each violation out


@dataclass(frozen=True)
class Import:
    """`source` imports `target`; both are dotted names below the package, or `target` is somebody else's package."""

    source: str
    target: str
    line: int
    is_ours: bool
    is_loaded: bool  # when the module is: not inside a function, not for type checkers only

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def import_nodes(node: ast.AST, is_loaded: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, is_loaded
        elif is_type_checking(child):
            assert isinstance(child, ast.If)
            for part, loaded in [*((n, False) for n in child.body), *((n, is_loaded) for n in child.orelse)]:
                yield from import_nodes(ast.Module([part], []), loaded)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from import_nodes(child, is_loaded and not is_function)


def resolve(path: str, node: ast.Import | ast.ImportFrom, modules: set[str]) -> Iterator[tuple[str, bool]]:
    """The names that an import statement loads: (dotted name, is it ours)."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, False) for alias in node.names)
    elif node.level == 0:
        yield node.module or "", False
    else:
        folders = path.split("/")[:-1]
        base = folders[: len(folders) - (node.level - 1)] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            member = ".".join([*base, alias.name])
            yield (member if member in modules else ".".join(base)), True


def imports_of(sources: dict[str, str]) -> list[Import]:
    modules = {module_name(path) for path in sources}
    return [
        Import(module_name(path), target, node.lineno, is_ours, is_loaded)
        for path, text in sorted(sources.items())
        for node, is_loaded in import_nodes(ast.parse(text, path))
        for target, is_ours in resolve(path, node, modules)
    ]


def check_direction(sources: dict[str, str]) -> list[str]:
    """Imports inside functions and for type checkers count as well: they are dependencies all the same."""
    found = []
    for item in imports_of(sources):
        source, target = item.source.split(".")[0], item.target.split(".")[0]
        if not item.is_ours:
            if target == "penstock":
                found.append(f"{item}: inside the package imports are relative")
        elif source != target and target in RANK:
            if source not in RANK:
                found.append(f"{item}: folder {source} has no layer")
            elif target in NEVER_IMPORTED or RANK[target] >= RANK[source]:
                found.append(f"{item}: {source} may not know {target}")
        elif source != target and target not in {"", "__init__"}:
            found.append(f"{item}: folder {target} has no layer")
    return found


def check_homes(sources: dict[str, str]) -> list[str]:
    found = []
    for item in imports_of(sources):
        target = item.target.split(".")[0]
        if item.is_ours:
            continue
        if target in TEST_ONLY:
            found.append(f"{item}: for tests only")
        elif target in HOME and item.source.split(".")[0] not in HOME[target].split():
            found.append(f"{item}: only {'/, '.join(HOME[target].split())}/ may")
    return found


def load_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module → modules and packages that are loaded with it."""
    graph: dict[str, set[str]] = {module_name(path): set() for path in sources}
    for item in imports_of(sources):
        if item.is_loaded:
            graph[item.source].add(item.target if item.is_ours else item.target.split(".")[0])
    return graph


def check_cycles(sources: dict[str, str]) -> list[str]:
    graph = load_graph(sources)
    done: set[str] = set()
    found: list[str] = []

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append(" → ".join([*trail[trail.index(module) :], module]))
            return
        if module in done:
            return
        for target in sorted(graph.get(module, ())):
            visit(target, [*trail, module])
        done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def is_torch_free(path: str) -> bool:
    return any(path == rule or (rule.endswith("/") and path.startswith(rule)) for rule in TORCH_FREE)


def check_torch_free(sources: dict[str, str]) -> list[str]:
    graph = load_graph(sources)
    found = []
    for path in filter(is_torch_free, sources):
        trails = [[module_name(path)]]
        seen = {trails[0][0]}
        for trail in trails:  # grows while it is read: breadth first, so the shortest trail is named
            if "torch" in graph.get(trail[-1], ()):
                found.append(" → ".join([*trail, "torch"]))
                break
            for target in sorted(graph.get(trail[-1], set()) - seen):
                seen.add(target)
                trails.append([*trail, target])
    return found


CHECKS: list[Check] = [check_direction, check_homes, check_cycles, check_torch_free]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_sources_keep_the_layers(check: Check, product_sources: dict[str, str]) -> None:
    assert check(product_sources) == []


def test_every_folder_has_a_layer(product_sources: dict[str, str]) -> None:
    folders = {path.split("/")[0] for path in product_sources if "/" in path}
    assert folders <= RANK.keys()


def test_torch_free_modules_load_without_torch(product_sources: dict[str, str]) -> None:
    modules = [f"penstock.{module_name(path)}" for path in filter(is_torch_free, product_sources)]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "heavy = sorted({'torch', 'transformers', 'triton', 'ucxx', 'nixl', 'nixl_cu12'} & set(sys.modules))\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("check", "planted", "expected"),
    [
        (check_direction, {"core/a.py": "from ..engine import b"}, "core may not know engine"),
        (check_direction, {"core/a.py": "def f():\n    from ..engine.b import C"}, "core may not know engine"),
        (check_direction, {"router/a.py": "from ..prefill_node.b import C"}, "router may not know prefill_node"),
        (check_direction, {"cli/a.py": "from ..testing.clock import FakeClock"}, "cli may not know testing"),
        (check_direction, {"core/a.py": "from penstock.core.errors import X"}, "imports are relative"),
        (check_direction, {"engine/a.py": "from ..extras.b import C"}, "folder extras has no layer"),
        (
            check_direction,
            {"core/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..router.b import C"},
            "core may not know router",
        ),
        (check_homes, {"router/a.py": "import aiohttp.web"}, "only gateway/, loadtest/, testing/ may"),
        (check_homes, {"worker/a.py": "def f():\n    import zmq.asyncio"}, "only protocol/ may"),
        (check_homes, {"models/a.py": "from transformers import AutoModel"}, "for tests only"),
        (
            check_cycles,
            {"core/a.py": "from . import b", "core/b.py": "from .c import D", "core/c.py": "from .a import E"},
            "core.a → core.b → core.c → core.a",
        ),
        (check_torch_free, {"router/a.py": "import torch.nn"}, "router.a → torch"),
        (
            check_torch_free,
            {
                "gateway/a.py": "from ..models.b import C",
                "models/b.py": "from .c import C",
                "models/c.py": "import torch",
            },
            "gateway.a → models.b → models.c → torch",
        ),
    ],
)
def test_planted_violation_is_found(check: Check, planted: dict[str, str], expected: str) -> None:
    (message,) = check(planted)
    assert expected in message


@pytest.mark.parametrize(
    ("check", "allowed"),
    [
        (
            check_direction,
            {"engine/a.py": "from ..core.errors import X", "gateway/b.py": "from ..router.core import Y"},
        ),
        (check_direction, {"testing/a.py": "from ..gateway.app import X", "__main__.py": "from .cli.main import main"}),
        (check_homes, {"gateway/a.py": "import aiohttp", "protocol/b.py": "import zmq"}),
        (check_cycles, {"core/a.py": "from .b import C", "core/b.py": "def f():\n    from .a import D"}),
        (check_torch_free, {"cli/a.py": "def f():\n    import torch", "engine/torch_engine.py": "import torch"}),
        (
            check_torch_free,
            {"router/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nelse:\n    pass"},
        ),
    ],
)
def test_allowed_import_is_not_reported(check: Check, allowed: dict[str, str]) -> None:
    assert check(allowed) == []
