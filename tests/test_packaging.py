"""What is installed is what is in the repository."""

from __future__ import annotations

import ast
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock.kernels.native.library import LEVELS

# Where the import name is not the name to install.
INSTALL_NAME = {
    "zmq": "pyzmq",
    "yaml": "pyyaml",
    "prometheus_client": "prometheus-client",
    "huggingface_hub": "huggingface-hub",
    "ucxx": "ucxx-cu12",
    "nixl": "nixl-cu12",
    "nixl_cu12": "nixl-cu12",
}


@pytest.fixture(scope="module")
def pyproject(repo_root: Path) -> dict[str, Any]:
    return tomllib.loads((repo_root / "pyproject.toml").read_text())


def folders_with_code(sources: dict[str, str]) -> set[str]:
    """As package names, with the folders above them."""
    folders = {folder for path in sources for folder in Path(path).parents}
    return {".".join(["penstock", *folder.parts]) for folder in folders}


def test_package_list_equals_folders_with_code(pyproject: dict[str, Any], product_sources: dict[str, str]) -> None:
    listed = pyproject["tool"]["setuptools"]["packages"]
    assert listed == sorted(listed)
    assert set(listed) == folders_with_code(product_sources)


def test_only_the_root_has_an_init_file(all_sources: dict[str, str]) -> None:
    # A folder `kernels` with an __init__.py shadows the package of that name for whoever runs from the root.
    assert [path for path in all_sources if path.endswith("__init__.py")] == ["__init__.py"]


def test_version_heads_the_changelog(repo_root: Path) -> None:
    heads = re.findall(r"^## (\S+)", (repo_root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == penstock.__version__


def test_license_is_apache_2(repo_root: Path, pyproject: dict[str, Any]) -> None:
    assert pyproject["project"]["license"] == "Apache-2.0"
    text = (repo_root / "LICENSE").read_text()
    assert "Apache License" in text
    assert text.rstrip().endswith("limitations under the License.")


def declared_packages(pyproject: dict[str, Any], extras: set[str]) -> set[str]:
    project = pyproject["project"]
    lines = [*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name])]
    return {match[0].lower() for line in lines if (match := re.match(r"[A-Za-z0-9_.-]+", line))}


def imported_packages(sources: dict[str, str]) -> set[str]:
    found: set[str] = set()
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text, path)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return {INSTALL_NAME.get(name, name) for name in found - sys.stdlib_module_names - {"penstock"}}


def test_imported_packages_are_declared(pyproject: dict[str, Any], product_sources: dict[str, str]) -> None:
    extras = set(pyproject["project"]["optional-dependencies"]) - {"test", "dev"}
    assert imported_packages(product_sources) - declared_packages(pyproject, extras) == set()


def test_required_packages_are_imported(pyproject: dict[str, Any], product_sources: dict[str, str]) -> None:
    assert declared_packages(pyproject, set()) - imported_packages(product_sources) == set()


def test_wheel_holds_every_module(tmp_path: Path, repo_root: Path, product_sources: dict[str, str]) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools >= 77")
    source = tmp_path / "source"  # a copy: a build leaves folders beside the sources
    for path, text in product_sources.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text(text, encoding="utf-8")
    native: list[Path] = [
        path.relative_to(repo_root) for pattern in ("*.cpp", "*.h") for path in repo_root.glob(f"kernels/*/{pattern}")
    ]
    for name in (*map(Path, ("pyproject.toml", "setup.py", "README.md", "LICENSE")), *native):
        (source / name).write_bytes((repo_root / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", str(tmp_path), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("penstock-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"penstock/{path}" for path in product_sources} == {name for name in names if name.endswith(".py")}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    if shutil.which("c++") and platform.machine() == "x86_64":
        built = {name.split("/")[-1].split(".")[0] for name in names if name.endswith(".so")}
        assert built == {f"_{level}" for level in LEVELS}
    assert {name.split("/")[0] for name in names} == {"penstock", f"penstock-{penstock.__version__}.dist-info"}
