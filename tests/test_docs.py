"""The docs point at what is there, stay short, and know every folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

MAX_LINES = {"docs/ARCHITECTURE.md": 150, "CONTRIBUTING.md": 120, "docs/THREATS.md": 80}
MAX_ADR_LINES = 40


def documents(root: Path) -> list[Path]:
    return sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")])


def dead_links(document: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    return [target for target in targets if not (document.parent / target).exists()]


def test_links_lead_somewhere(repo_root: Path) -> None:
    assert {str(path): dead for path in documents(repo_root) if (dead := dead_links(path))} == {}


def test_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[here](page.md) [web](https://example.org/x.md) [gone](docs/gone.md#part)")
    assert dead_links(page) == ["docs/gone.md"]


def test_paths_in_docs_exist(repo_root: Path) -> None:
    named = {
        (str(page.relative_to(repo_root)), path)
        for page in documents(repo_root)
        for path in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|md|toml|yaml))`", page.read_text(encoding="utf-8"))
    }
    assert sorted((page, path) for page, path in named if not (repo_root / path).exists()) == []


@pytest.mark.parametrize(("name", "limit"), MAX_LINES.items())
def test_document_stays_short(name: str, limit: int, repo_root: Path) -> None:
    assert len((repo_root / name).read_text(encoding="utf-8").splitlines()) <= limit


def test_decisions_are_numbered_and_give_reasons(repo_root: Path) -> None:
    pages = sorted((repo_root / "docs" / "adr").glob("*.md"))
    assert [int(page.name[:3]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MAX_ADR_LINES, page.name
        for part in ("**Context.**", "**Decision.**", "**What would change our mind.**"):
            assert part in text, f"{page.name} has no {part}"


@pytest.mark.parametrize("name", ["README.md", "docs/ARCHITECTURE.md"])
def test_every_folder_is_introduced(name: str, repo_root: Path, product_sources: dict[str, str]) -> None:
    text = (repo_root / name).read_text(encoding="utf-8")
    folders = sorted({path.split("/")[0] for path in product_sources if "/" in path})
    assert [folder for folder in folders if f"{folder}/" not in text] == []


def test_every_command_of_run_is_explained_and_in_the_makefile(repo_root: Path) -> None:
    script = (repo_root / "run").read_text()
    verbs = re.findall(r"^    ([a-z]+)\) ", script, re.MULTILINE)
    makefile = (repo_root / "Makefile").read_text()
    assert {"demo", "test", "check"} <= set(verbs)
    head = script.split("set -eu")[0]
    for verb in verbs:
        assert re.search(rf"\b{verb}\b", head), verb
        assert re.search(rf"^{verb}: ## ", makefile, re.MULTILINE), verb
