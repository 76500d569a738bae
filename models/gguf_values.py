"""The value encoding of a GGUF header: scalars, strings, arrays. Nothing is allocated before its size is checked."""

from __future__ import annotations

import mmap
import struct
from typing import Any, NoReturn

import numpy as np

from ..core.errors import ModelFileError
from .config_fields import shown

MAX_HEADER_BYTES = 256 << 20  # a vocabulary of 256k tokens with its merges takes about 10 MB
MAX_ARRAY_VALUES = 8_000_000  # in all arrays of one file together
_MAX_ARRAY_DEPTH = 4

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
_STRUCTS = {kind: struct.Struct("<" + code) for kind, code in _SCALARS.items()}
_LEAST_BYTES = {_STRING: 8, _ARRAY: 12, **{kind: form.size for kind, form in _STRUCTS.items()}}


class HeaderReader:
    """A cursor over a file's first bytes. Each read names the field it is for, so errors can say where they are."""

    def __init__(self, data: mmap.mmap | bytes, file_name: str) -> None:
        self.data = data
        self.file_name = file_name
        self.position = 0
        self.end = min(len(data), MAX_HEADER_BYTES)
        self._array_values = 0

    def fail(self, field: str, value: object, problem: str) -> NoReturn:
        raise ModelFileError(f"{self.file_name}: {field} is {shown(value)}, {problem}")

    def _advance(self, num_bytes: int, field: str) -> int:
        """Step over `num_bytes`; returns where they start."""
        start = self.position
        if num_bytes > self.end - start:
            left = f"only {self.end - start} bytes are left of the header"
            raise ModelFileError(f"{self.file_name}: {field} needs {shown(num_bytes)} bytes at offset {start}, {left}")
        self.position = start + num_bytes
        return start

    def u32(self, field: str) -> int:
        return int(_U32.unpack_from(self.data, self._advance(4, field))[0])

    def u64(self, field: str) -> int:
        return int(_U64.unpack_from(self.data, self._advance(8, field))[0])

    def count(self, field: str, least_bytes: int, limit: int) -> int:
        """A number of entries that follow, each at least `least_bytes` long."""
        value = self.u64(field)
        if value > limit or value * least_bytes > self.end - self.position:
            self.fail(field, value, f"more than the file can hold or than {limit}")
        return value

    def string(self, field: str) -> str:
        length = self.u64(f"length of {field}")
        start = self._advance(length, field)
        return self._text(self.data[start : start + length], field)

    def _text(self, raw: bytes, field: str) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(field, raw[:40], "not valid UTF-8")

    def value(self, field: str) -> Any:
        """A typed value: the type number, then the value."""
        return self._value(self.u32(f"type of {field}"), field, 0)

    def _value(self, kind: int, field: str, depth: int) -> Any:
        if kind == _STRING:
            return self.string(field)
        if kind == _ARRAY:
            return self._array(field, depth + 1)
        form = _STRUCTS.get(kind)
        if form is None:
            self.fail(f"type of {field}", kind, "not a GGUF value type")
        value = form.unpack_from(self.data, self._advance(form.size, field))[0]
        return self._boolean(value, field) if kind == _BOOL else value

    def _boolean(self, value: int, field: str) -> bool:
        if value > 1:
            self.fail(field, value, "expected a boolean (0 or 1)")
        return value == 1

    def _array(self, field: str, depth: int) -> list[Any]:
        kind = self.u32(f"element type of {field}")
        if kind not in _LEAST_BYTES:
            self.fail(f"element type of {field}", kind, "not a GGUF value type")
        if depth > _MAX_ARRAY_DEPTH:
            self.fail(f"depth of {field}", depth, f"arrays nest at most {_MAX_ARRAY_DEPTH} deep")
        length = self.count(f"length of {field}", _LEAST_BYTES[kind], MAX_ARRAY_VALUES - self._array_values)
        self._array_values += length
        if kind == _STRING:
            return self._strings(length, field)
        if kind == _ARRAY:
            return [self._value(kind, field, depth) for _ in range(length)]
        return self._scalars(kind, length, field)

    def _scalars(self, kind: int, length: int, field: str) -> list[Any]:
        if not length:
            return []
        form = _STRUCTS[kind]
        start = self._advance(length * form.size, field)
        values = np.frombuffer(self.data, dtype="<" + _numpy_code(kind), count=length, offset=start)
        if kind == _BOOL:
            if values.max() > 1:
                self.fail(field, int(values.max()), "expected booleans (0 or 1)")
            values = values.astype(bool)
        return list(values.tolist())

    def _strings(self, length: int, field: str) -> list[str]:
        """The one hot loop of the parser: a vocabulary has hundreds of thousands of strings."""
        data, position, end, unpack = self.data, self.position, self.end, _U64.unpack_from
        out: list[str] = []
        for _ in range(length):
            start = position + 8
            if start > end:
                break
            position = start + unpack(data, position)[0]
            if position > end:
                break
            try:
                out.append(data[start:position].decode())
            except UnicodeDecodeError:
                self.fail(f"{field}[{len(out)}]", data[start : min(position, start + 40)], "not valid UTF-8")
        if len(out) < length:
            self.fail(f"{field}[{len(out)}]", f"at offset {self.position}", "a string that runs past the header's end")
        self.position = position
        return out


def _numpy_code(kind: int) -> str:
    """numpy's letter and width: struct's letters for eight-byte integers mean other sizes to numpy."""
    code = _SCALARS[kind]
    letter = "f" if code in "fd" else "u" if code.isupper() else "i"
    return f"{letter}{_STRUCTS[kind].size}"
