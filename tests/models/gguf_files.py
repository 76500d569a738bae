"""A small GGUF writer, and tiny models written with it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from penstock.core.errors import ConfigError
from penstock.models.store import DEFAULT_MODEL, resolve
from penstock.tests.conftest import absent

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", 5: "i", F32: "f", BOOL: "B", U64: "Q", 11: "q", 12: "d"}


class Typed(NamedTuple):
    """A metadata value whose type is not the one that `encode` would choose."""

    kind: int
    value: Any


class StoredTensor(NamedTuple):
    """`dimensions` are in the file's order: the row length first."""

    name: str
    dimensions: tuple[int, ...]
    kind: int
    raw: bytes


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def encode(value: Any) -> bytes:
    """Type number and value."""
    kind, value = value if isinstance(value, Typed) else (_natural_kind(value), value)
    return struct.pack("<I", kind) + _body(kind, value)


def _natural_kind(value: Any) -> int:
    kinds = {bool: BOOL, int: U32, float: F32, str: STRING, bytes: STRING, list: ARRAY}
    return kinds[type(value)]


def _body(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        items = [item if isinstance(item, Typed) else Typed(_natural_kind(item), item) for item in value]
        inner = items[0].kind if items else U32
        return struct.pack("<IQ", inner, len(items)) + b"".join(_body(inner, item.value) for item in items)
    return struct.pack("<" + _CODES[kind], value)


def build_gguf(
    metadata: Mapping[str, Any], tensors: list[StoredTensor], version: int = 3, alignment: int = 32
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + encode(value) for key, value in metadata.items())
    data = b""
    for tensor in tensors:
        data += b"\0" * (-len(data) % alignment)
        head += text(tensor.name) + struct.pack("<I", len(tensor.dimensions))
        head += struct.pack(f"<{len(tensor.dimensions)}Q", *tensor.dimensions)
        head += struct.pack("<IQ", tensor.kind, len(data))
        data += tensor.raw
    return head + b"\0" * (-len(head) % alignment) + data


def tiny_metadata(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """2 layers, hidden 32, 4 heads of 8, 2 key/value heads, inner 48, 40 tokens. `changes` use __ for the dot."""
    prefix = architecture + "."
    values: dict[str, Any] = {
        "general.architecture": architecture,
        prefix + "block_count": 2,
        prefix + "context_length": 128,
        prefix + "embedding_length": 32,
        prefix + "feed_forward_length": 48,
        prefix + "attention.head_count": 4,
        prefix + "attention.head_count_kv": 2,
        prefix + "attention.layer_norm_rms_epsilon": 1e-5,
        prefix + "rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(38)] + ["<|endoftext|>", "<|im_end|>"],
        "tokenizer.ggml.token_type": [1] * 38 + [3] * 2,
        "tokenizer.ggml.eos_token_id": 39,
        "tokenizer.ggml.bos_token_id": 1,
    }
    values |= {prefix + key.replace("__", "."): value for key, value in changes.items()}
    return values


def float_tensor(name: str, values: np.ndarray) -> StoredTensor:
    return StoredTensor(name, tuple(reversed(values.shape)), 0, values.astype("<f4").tobytes())


def tiny_tensors(seed: int = 0, head_dim: int = 8) -> list[StoredTensor]:
    """Random float32 weights for `tiny_metadata("llama")`, with a tied head."""
    random = np.random.default_rng(seed)
    layer = {
        "attn_norm": (32,),
        "ffn_norm": (32,),
        "attn_q": (4 * head_dim, 32),
        "attn_k": (2 * head_dim, 32),
        "attn_v": (2 * head_dim, 32),
        "attn_output": (32, 4 * head_dim),
        "ffn_gate": (48, 32),
        "ffn_up": (48, 32),
        "ffn_down": (32, 48),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (40, 32), "output_norm.weight": (32,)}
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    return [float_tensor(name, random.standard_normal(shape)) for name, shape in shapes.items()]


def tiny_gguf() -> bytes:
    return build_gguf(tiny_metadata(), tiny_tensors())


def find_smollm2() -> Path:
    """The real model's GGUF in the model store; skips the test where it was not pulled."""
    try:
        return resolve(DEFAULT_MODEL, download=False).path
    except ConfigError as error:
        absent(str(error))
        raise
