"""The tokenizer of a Hugging Face folder: tokenizer.json, and the files that say how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import tokenizers

from ..core.errors import ModelFileError
from .tokenizer_settings import TokenizerSettings

_MAX_FILE_BYTES = 256 << 20  # the largest vocabularies need about 35 MB


def load_folder_tokenizer(folder: Path) -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    """Read `folder`. Raises ModelFileError that names the file at fault."""
    backend = _backend(folder / "tokenizer.json")
    config = _read_object(folder / "tokenizer_config.json")
    ids = _read_object(folder / "config.json") | _read_object(folder / "generation_config.json")
    return backend, TokenizerSettings(
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        eos_token_ids=_eos_ids(backend, config, ids, folder),
        bos_token_id=_named_id(backend, config.get("bos_token")),
        chat_template=_chat_template(folder, config),
    )


def _backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ModelFileError(
            f"{path} is missing; save the tokenizer there with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    _check_size(path)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as err:  # the library raises bare Exception for every kind of bad file
        raise ModelFileError(f"{path} is not a tokenizer file that 'tokenizers' can read: {err}") from err
    backend.no_padding()
    backend.no_truncation()
    return backend


def _eos_ids(
    backend: tokenizers.Tokenizer, config: Mapping[str, object], ids: Mapping[str, object], folder: Path
) -> tuple[int, ...]:
    listed = ids.get("eos_token_id")
    found = [_named_id(backend, config.get("eos_token")), *(listed if isinstance(listed, list) else [listed])]
    for token_id in found:
        if token_id is not None and not isinstance(token_id, int):
            raise ModelFileError(f"eos_token_id in {folder} holds {token_id!r}; it must be a number or a list of them")
    return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))


def _named_id(backend: tokenizers.Tokenizer, token: object) -> int | None:
    """Id of a token given as its text or as the object form {"content": text}."""
    name = token.get("content") if isinstance(token, dict) else token
    if not isinstance(name, str):
        return None
    token_id: int | None = backend.token_to_id(name)
    return token_id


def _chat_template(folder: Path, config: Mapping[str, object]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        _check_size(path)
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as err:
            raise ModelFileError(f"{path} is not UTF-8 text: {err}") from err
    stored = config.get("chat_template") or _read_object(folder / "chat_template.json").get("chat_template")
    if isinstance(stored, list):  # several named templates
        stored = next((t.get("template") for t in stored if isinstance(t, dict) and t.get("name") == "default"), None)
    return stored if isinstance(stored, str) else None


def _read_object(path: Path) -> dict[str, object]:
    """The JSON object in `path`; empty when there is no such file."""
    if not path.is_file():
        return {}
    _check_size(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as err:
        raise ModelFileError(f"{path} is not valid JSON: {err}") from err
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > _MAX_FILE_BYTES:
        raise ModelFileError(f"{path} has {size} bytes; a tokenizer file has at most {_MAX_FILE_BYTES}")
