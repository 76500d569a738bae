"""A parser for GGUF files, versions 2 and 3: metadata as a dict, tensors as views on the mapped file. No torch.

The file is untrusted: each count, length and offset is checked against the file's size before anything is allocated,
and whatever is wrong is one ModelFileError. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ModelFileError
from .config_fields import printable
from .dequantize import FORMATS, BlockFormat, Bytes
from .gguf_values import HeaderReader

_MAGIC = b"GGUF"
_MAX_ENTRIES = 65536  # of metadata, and of tensors
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 16
_LEAST_METADATA_BYTES = 8 + 4 + 1  # key length, type, value
_LEAST_TENSOR_BYTES = 8 + 4 + 4 + 8  # name length, dimension count, type, offset


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. `shape` is row-major, (out, in) for a matrix: the reverse of the file's order."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    offset: int  # from the start of the file
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A parsed file. `raw` gives read-only views; they keep the mapping alive."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    header_bytes: int  # everything before the first tensor
    _data: mmap.mmap

    def raw(self, name: str) -> Bytes:
        """The tensor's bytes as stored, flat."""
        info = self.tensors[name]
        return np.frombuffer(self._data, dtype=np.uint8, count=info.num_bytes, offset=info.offset)


def read_gguf(path: Path) -> GgufFile:
    """Parse the header of `path` and map its tensors. Raises ModelFileError."""
    data = _map(path)
    reader = HeaderReader(data, path.name)
    version = _read_version(reader)
    num_tensors = reader.count("tensor count", _LEAST_TENSOR_BYTES, _MAX_ENTRIES)
    num_values = reader.count("metadata count", _LEAST_METADATA_BYTES, _MAX_ENTRIES)
    metadata = _read_metadata(reader, num_values)
    alignment = _alignment(reader, metadata)
    entries = [_read_tensor(reader) for _ in range(num_tensors)]
    start = -(-reader.position // alignment) * alignment
    tensors = _place(reader, entries, start, alignment)
    return GgufFile(path, version, metadata, tensors, start, data)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelFileError(f"{path.name}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelFileError(f"{path.name}: is empty, not a GGUF file") from error


def _read_version(reader: HeaderReader) -> int:
    magic = reader.data[:4]
    if magic != _MAGIC:
        reader.fail("magic", magic, "not a GGUF file")
    reader.position = 4
    version = reader.u32("version")
    if version not in (2, 3):
        order = "a big-endian file; " if version & 0xFFFF == 0 and version else ""
        reader.fail("version", version, f"{order}supported: little-endian 2 and 3")
    return version


def _read_metadata(reader: HeaderReader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = reader.string(f"metadata key {index}")
        if key in metadata:
            reader.fail(f"metadata key {index}", key, "which appears twice")
        metadata[key] = reader.value(printable(key))
    if metadata.get("split.count", 0) not in (0, 1):
        reader.fail("split.count", metadata["split.count"], "merge the parts first (llama-gguf-split --merge)")
    return metadata


def _alignment(reader: HeaderReader, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        reader.fail("general.alignment", alignment, f"expected a power of two from 8 to {_MAX_ALIGNMENT}")
    return alignment


def _read_tensor(reader: HeaderReader) -> TensorInfo:
    """One entry; its offset still counts from the start of the tensor data."""
    name = reader.string("tensor name")
    label = f"tensor {printable(name)}"
    num_dimensions = reader.u32(f"{label}: dimension count")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        reader.fail(f"{label}: dimension count", num_dimensions, f"expected 1 to {_MAX_DIMENSIONS}")
    dimensions = [reader.u64(f"{label}: dimension {axis}") for axis in range(num_dimensions)]
    kind = reader.u32(f"{label}: type")
    if kind not in FORMATS:
        supported = ", ".join(form.name for form in FORMATS.values())
        reader.fail(f"{label}: type", kind, f"which is not supported; supported: {supported}")
    num_bytes = _tensor_bytes(reader, label, dimensions, FORMATS[kind])
    offset = reader.u64(f"{label}: offset")
    return TensorInfo(name, tuple(reversed(dimensions)), FORMATS[kind], offset, num_bytes)


def _tensor_bytes(reader: HeaderReader, label: str, dimensions: list[int], form: BlockFormat) -> int:
    """Python's integers do not overflow, so the product itself can be compared with the file's size."""
    num_values = 1
    for axis, dimension in enumerate(dimensions):
        if dimension < 1:
            reader.fail(f"{label}: dimension {axis}", dimension, "expected 1 or more")
        num_values *= dimension
    if dimensions[0] % form.block_size:
        reader.fail(f"{label}: dimension 0", dimensions[0], f"{form.name} needs a multiple of {form.block_size}")
    num_bytes = num_values // form.block_size * form.block_bytes
    if num_bytes > len(reader.data):
        reader.fail(f"{label}: size in bytes", num_bytes, f"the file has only {len(reader.data)}")
    return num_bytes


def _place(reader: HeaderReader, entries: list[TensorInfo], start: int, alignment: int) -> dict[str, TensorInfo]:
    """Tensors by name in file order of their entries, with absolute offsets, none of them overlapping."""
    tensors: dict[str, TensorInfo] = {}
    for info in entries:
        label = f"tensor {printable(info.name)}"
        if info.name in tensors:
            reader.fail("tensor name", info.name, "which appears twice")
        if info.offset % alignment:
            reader.fail(f"{label}: offset", info.offset, f"expected a multiple of the alignment {alignment}")
        if start + info.offset + info.num_bytes > len(reader.data):
            room = len(reader.data) - start
            reader.fail(
                f"{label}: offset", info.offset, f"with {info.num_bytes} bytes it ends beyond the {room} of data"
            )
        tensors[info.name] = TensorInfo(info.name, info.shape, info.format, start + info.offset, info.num_bytes)
    _check_overlap(reader, tensors)
    return tensors


def _check_overlap(reader: HeaderReader, tensors: dict[str, TensorInfo]) -> None:
    end, previous = 0, ""
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset < end:
            reader.fail(
                f"tensor {printable(info.name)}: offset", info.offset, f"which lies inside tensor {printable(previous)}"
            )
        end, previous = info.offset + info.num_bytes, info.name
