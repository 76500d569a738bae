"""Builds the native kernels beside the package: the same sources once for each level of instructions.

Everything else is in pyproject.toml. Without a compiler the package installs all the same and computes with torch.
"""

from __future__ import annotations

import platform
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

X86_LEVELS = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mavx512vnni"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"],
}
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]


def libraries() -> list[Extension]:
    """`portable` for every machine; the loader (kernels/native/library.py) chooses among those that were built."""
    levels: dict[str, list[str]] = {"portable": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        levels |= X86_LEVELS
    return [
        Extension(
            f"penstock.kernels.native._{name}",
            sources=sorted(glob("kernels/*/*.cpp")),
            depends=sorted(glob("kernels/*/*.h")),
            extra_compile_args=[*FLAGS, *flags],
            libraries=["pthread"] if platform.system() == "Linux" else [],
            language="c++",
            optional=True,
        )
        for name, flags in levels.items()
    ]


class BuildWithoutThis(build_py):
    """The repository is the package, so this file lies in it; it is no module of it."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [entry for entry in found if entry[:2] != ("penstock", "setup")]


setup(ext_modules=libraries(), cmdclass={"build_py": BuildWithoutThis})
