"""Rules that a reader of the source can check: what is banned, how long a file may be, which words we use.

Each rule takes one parsed file and yields (line, message); each is shown to find a planted violation.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Found = Iterator[tuple[int, str]]
Rule = Callable[[ast.Module, str], Found]

MAX_LINES = 450
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_NAMES = {"eval", "exec", "__import__"}
UNSAFE_CALLS = {
    "torch.load": "use safetensors",
    "yaml.load": "use yaml.safe_load, or name a safe loader",
    "yaml.unsafe_load": "use yaml.safe_load",
    "yaml.full_load": "use yaml.safe_load",
    "os.system": "use subprocess with a list",
    "os.popen": "use subprocess with a list",
    "asyncio.get_event_loop": "pass the loop, or use get_running_loop",
}
UNSAFE_METHODS = {"recv_pyobj", "send_pyobj", "recv_serialized", "send_serialized"}
UNSAFE_KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}


def no_unsafe_imports(tree: ast.Module, _: str) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        unsafe = [name for name in names if name.split(".")[0] in UNSAFE_MODULES]
        yield from ((node.lineno, f"{name} runs what it reads") for name in unsafe)


def names_safe_loader(call: ast.Call, tree: ast.Module) -> bool:
    """The loader is YAML's safe one, or the file derives its own from that."""
    loaders = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "Loader"]
    if loaders in (["yaml.SafeLoader"], ["yaml.CSafeLoader"]):
        return True
    bases = {ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases}
    return any("yaml.SafeLoader" in base for base in bases) and bool(loaders) and not loaders[0].startswith("yaml.")


def no_unsafe_calls(tree: ast.Module, _: str) -> Found:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in UNSAFE_NAMES:
            yield node.lineno, f"{called}() runs data as code"
        if called in UNSAFE_CALLS and not (called == "yaml.load" and names_safe_loader(node, tree)):
            yield node.lineno, f"{called}: {UNSAFE_CALLS[called]}"
        if called.split(".")[-1] in UNSAFE_METHODS:
            yield node.lineno, f"{called} pickles"
        for keyword in node.keywords:
            if keyword.arg in UNSAFE_KEYWORDS and not (
                isinstance(keyword.value, ast.Constant) and not keyword.value.value
            ):
                yield node.lineno, f"{called}({keyword.arg}=…)"


def no_bare_except(tree: ast.Module, _: str) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "a bare except also catches KeyboardInterrupt"


def no_unfinished_code(tree: ast.Module, text: str) -> Found:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            yield node.lineno, "NotImplementedError: a Protocol or an error of ours says it better"
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            yield number, f"{match[0]}: finish it, or file an issue"


def no_dangling_tasks(tree: ast.Module, _: str) -> Found:
    """A task that nobody keeps may be collected while it runs, and its error is lost. A TaskGroup keeps its own."""
    groups = {
        ast.unparse(item.optional_vars)
        for node in ast.walk(tree)
        if isinstance(node, ast.AsyncWith)
        for item in node.items
        if item.optional_vars and ast.unparse(item.context_expr).endswith("TaskGroup()")
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr | ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        is_kept = isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] != ["_"]
        owner, _, method = ast.unparse(node.value.func).rpartition(".")
        if (
            method in {"create_task", "ensure_future", "run_coroutine_threadsafe"}
            and not is_kept
            and owner not in groups
        ):
            yield node.lineno, f"nobody keeps the result of {method}"


def no_long_files(_: ast.Module, text: str) -> Found:
    count = len(text.splitlines())
    if count > MAX_LINES:
        yield MAX_LINES, f"{count} lines; is it two things?"


def no_vague_names(path: str) -> bool:
    return Path(path).stem not in {"utils", "util", "helpers", "helper", "misc", "common", "manager"}


EVERYWHERE: list[Rule] = [no_unsafe_imports, no_unsafe_calls, no_bare_except, no_dangling_tasks, no_long_files]
IN_PRODUCT: list[Rule] = [no_unfinished_code]


def rejected_words(glossary: str) -> dict[str, str]:
    """Synonym → the word to use, from the rows `| concept | `word` | `not`, `not` |` of the glossary."""
    found: dict[str, str] = {}
    for line in glossary.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 3 and re.search("`.+`", cells[2]):
            word = ", ".join(re.findall(r"`([^`]+)`", cells[1]))
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[2]), word)
    return found


def words_of(identifier: str) -> list[str]:
    """`num_kvBlocks` → num, kv, blocks."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", identifier)]


def defined_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names that this file gives, not those it only uses: those may be other people's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def check_words(tree: ast.Module, rejected: dict[str, str]) -> Found:
    for line, identifier in defined_names(tree):
        words = words_of(identifier)
        for synonym, word in rejected.items():
            parts = synonym.split("_")
            if any(words[i : i + len(parts)] == parts for i in range(len(words))):
                yield line, f"{identifier}: we say {word}, not {synonym}"


def broken(rules: list[Rule], sources: dict[str, str]) -> list[str]:
    return [
        f"{path}:{line} {message}"
        for path, text in sources.items()
        for rule in rules
        for line, message in rule(ast.parse(text, path), text)
    ]


def test_all_files_keep_the_rules(all_sources: dict[str, str]) -> None:
    assert broken(EVERYWHERE, all_sources) == []


def test_product_is_finished(product_sources: dict[str, str]) -> None:
    assert broken(IN_PRODUCT, product_sources) == []


def test_files_are_named_for_what_they_hold(all_sources: dict[str, str]) -> None:
    assert [path for path in all_sources if not no_vague_names(path)] == []
    assert not no_vague_names("router/utils.py")


def test_product_uses_the_words_of_the_glossary(repo_root: Path, product_sources: dict[str, str]) -> None:
    rejected = rejected_words((repo_root / "docs" / "GLOSSARY.md").read_text())
    assert len(rejected) > 10
    assert broken([lambda tree, _: check_words(tree, rejected)], product_sources) == []


@pytest.mark.parametrize(
    ("rule", "planted"),
    [
        (no_unsafe_imports, "import pickle"),
        (no_unsafe_imports, "def f():\n    from marshal import loads"),
        (no_unsafe_imports, "import shelve as s"),
        (no_unsafe_calls, "eval(text)"),
        (no_unsafe_calls, "exec(text)"),
        (no_unsafe_calls, "torch.load(path)"),
        (no_unsafe_calls, "yaml.load(text)"),
        (no_unsafe_calls, "yaml.load(text, Loader=yaml.Loader)"),
        (no_unsafe_calls, "class Strict(yaml.SafeLoader): ...\nyaml.load(text, Loader=yaml.UnsafeLoader)"),
        (no_unsafe_calls, "socket.recv_pyobj()"),
        (no_unsafe_calls, "subprocess.run(line, shell=True)"),
        (no_unsafe_calls, "np.load(path, allow_pickle=flag)"),
        (no_bare_except, "try:\n    f()\nexcept:\n    pass"),
        (no_unfinished_code, "def f():\n    raise NotImplementedError"),
        (no_unfinished_code, "def f():\n    raise NotImplementedError('later')"),
        (no_unfinished_code, "x = 1  # TO" + "DO"),
        (no_dangling_tasks, "asyncio.create_task(f())"),
        (no_dangling_tasks, "_ = loop.create_task(f())"),
        (no_long_files, "x = 1\n" * (MAX_LINES + 1)),
    ],
)
def test_planted_violation_is_found(rule: Rule, planted: str) -> None:
    assert len(broken([rule], {"planted.py": planted})) == 1


@pytest.mark.parametrize(
    "good",
    [
        "model.eval()",
        "yaml.safe_load(text)",
        "class Strict(yaml.SafeLoader): ...\nyaml.load(text, Loader=Strict)",
        "yaml.load(text, Loader=yaml.CSafeLoader)",
        "re.compile(pattern)",
        "subprocess.run(words, shell=False)",
        "np.load(path, allow_pickle=False)",
        "try:\n    f()\nexcept OSError:\n    pass",
        "task = asyncio.create_task(f())",
        "tasks.append(loop.create_task(f()))",
        "async def f():\n    async with asyncio.TaskGroup() as tasks:\n        tasks.create_task(g())",
        "x = 1\n" * MAX_LINES,
    ],
)
def test_good_code_is_left_alone(good: str) -> None:
    assert broken(EVERYWHERE + IN_PRODUCT, {"good.py": good}) == []


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        ("def free_page(): ...", "free_page: we say block, not page"),
        ("class PageTable: ...", "PageTable: we say block, not page"),
        ("def f(num_page): ...", "num_page: we say block, not page"),
        ("self.kv_page = 1", "kv_page: we say block, not page"),
        ("loc_index = 1", "loc_index: we say slot, not loc"),
    ],
)
def test_planted_synonym_is_found(planted: str, expected: str) -> None:
    rejected = rejected_words(
        "| Concept | Word | Not |\n|---|---|---|\n| unit | `block` | `page` |\n| place | `slot` | `loc` |"
    )
    assert rejected == {"page": "block", "loc": "slot"}
    assert [message for _, message in check_words(ast.parse(planted), rejected)] == [expected]


def test_synonym_inside_a_longer_word_is_left_alone() -> None:
    assert list(check_words(ast.parse("block_id = homepage = other.page()"), {"page": "block", "loc": "slot"})) == []
