"""The GGUF parser: what it reads from good files, and that bad ones are refused in one way."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from penstock.core.errors import ModelFileError
from penstock.models.checkpoint import open_checkpoint
from penstock.models.gguf import read_gguf
from penstock.tests.models.gguf_files import (
    ARRAY,
    BOOL,
    U64,
    StoredTensor,
    Typed,
    build_gguf,
    encode,
    find_smollm2,
    float_tensor,
    text,
    tiny_gguf,
    tiny_metadata,
    tiny_tensors,
)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


def raw_header(num_tensors: int, num_values: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_values) + rest


def tensor_entry(name: str, dimensions: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize("version", [2, 3])
def test_read_gguf_returns_all_value_types(tmp_path: Path, version: int) -> None:
    values = {
        "a": Typed(0, 255),
        "b": Typed(1, -1),
        "c": Typed(2, 65535),
        "d": Typed(3, -2),
        "e": Typed(4, 1 << 31),
        "f": Typed(5, -3),
        "g": Typed(6, 0.5),
        "h": Typed(7, 1),
        "i": "héllo",
        "j": Typed(10, 1 << 63),
        "k": Typed(11, -(1 << 62)),
        "l": Typed(12, 0.1),
    }
    found = read_gguf(write(tmp_path, build_gguf(values, [], version)))
    expected = {key: value.value if isinstance(value, Typed) else value for key, value in values.items()}
    assert found.metadata == expected | {"h": True}
    assert found.version == version
    assert not found.tensors


def test_read_gguf_returns_arrays_as_lists(tmp_path: Path) -> None:
    values = {
        "strings": ["", "a", "é"],
        "integers": [1, 2, 3],
        "floats": [0.5, -1.0],
        "flags": [True, False],
        "empty": [],
        "no_strings": Typed(ARRAY, []),
        "wide": [Typed(U64, (1 << 64) - 1)],
        "nested": [Typed(ARRAY, [1, 2]), Typed(ARRAY, [3])],
    }
    metadata = read_gguf(write(tmp_path, build_gguf(values, []))).metadata
    assert metadata["strings"] == ["", "a", "é"]
    assert metadata["integers"] == [1, 2, 3]
    assert metadata["floats"] == [0.5, -1.0]
    assert metadata["flags"] == [True, False]
    assert metadata["empty"] == metadata["no_strings"] == []
    assert metadata["wide"] == [(1 << 64) - 1]
    assert metadata["nested"] == [[1, 2], [3]]
    assert type(metadata["integers"][0]) is int


def test_read_gguf_tensor_has_reversed_shape_and_its_bytes(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    file = read_gguf(write(tmp_path, build_gguf({}, [float_tensor("a", matrix), float_tensor("b", matrix + 9)])))
    assert file.tensors["b"].shape == (2, 3)
    assert file.tensors["b"].offset % 32 == 0
    assert np.array_equal(file.raw("b").view(np.float32).reshape(2, 3), matrix + 9)


def test_read_gguf_honours_alignment(tmp_path: Path) -> None:
    data = build_gguf({"general.alignment": 1024}, [float_tensor("a", np.ones(4))], alignment=1024)
    file = read_gguf(write(tmp_path, data))
    assert file.tensors["a"].offset == file.header_bytes == 1024
    assert np.array_equal(file.raw("a").view(np.float32), np.ones(4))


def test_read_gguf_agrees_with_reference_writer(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "reference.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(7)
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1, 3])
    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    packed = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("w", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(path)
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["llama.block_count"] == 7
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    assert file.tensors["w"].shape == (4, 64)
    assert np.array_equal(file.raw("w"), packed.reshape(-1))


HUGE = (1 << 64) - 1
BROKEN = {
    "empty": (b"", "is empty"),
    "magic": (b"GGML" + bytes(60), r"magic is b'GGML', not a GGUF file"),
    "short": (b"GGUF\x03", "version needs 4 bytes"),
    "version 1": (raw_header(0, 0, version=1), "version is 1, supported"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count": (raw_header(HUGE, 0), f"tensor count is {HUGE}"),
    "metadata count": (raw_header(0, 1 << 40), "metadata count is 1099511627776"),
    "key length": (raw_header(0, 1, struct.pack("<Q", HUGE) + bytes(9)), "metadata key 0 needs"),
    "key not text": (raw_header(0, 1, text(b"\xff") + encode(1)), r"metadata key 0 is b'\\xff', not valid UTF-8"),
    "value type": (raw_header(0, 1, text("k") + struct.pack("<IQ", 13, 0)), "type of k is 13"),
    "value cut off": (raw_header(0, 1, text("k") + struct.pack("<I", U64) + b"\0"), "k needs 8 bytes"),
    "boolean": (raw_header(0, 1, text("k") + encode(Typed(BOOL, 2))), "k is 2, expected a boolean"),
    "booleans": (raw_header(0, 1, text("k") + encode([Typed(BOOL, 2)])), "k is 2, expected booleans"),
    "string": (raw_header(0, 1, text("k") + struct.pack("<IQ", 8, 1 << 50)), "k needs 1125899906842624 bytes"),
    "array type": (raw_header(0, 1, text("k") + struct.pack("<IIQ", 9, 99, 0)), "element type of k is 99"),
    "array length": (raw_header(0, 1, text("k") + struct.pack("<IIQ", 9, 8, 1 << 60)), "length of k is"),
    "string in array": (
        raw_header(0, 1, text("k") + struct.pack("<IIQ", 9, 8, 1) + struct.pack("<Q", 99)),
        r"k\[0\] is 'at offset",
    ),
    "array not text": (raw_header(0, 1, text("k") + encode(["a", b"\xff"])), r"k\[1\] is b'\\xff', not valid UTF-8"),
    "array depth": (raw_header(0, 1, text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9), "depth of k"),
    "key twice": (raw_header(0, 2, (text("k") + encode(1)) * 2), "metadata key 1 is 'k', which appears twice"),
    "alignment": (build_gguf({"general.alignment": 24}, []), "general.alignment is 24"),
    "alignment type": (build_gguf({"general.alignment": "x"}, []), "general.alignment is 'x'"),
    "split": (build_gguf({"split.count": 3}, []), "split.count is 3, merge the parts"),
    "no dimensions": (raw_header(1, 0, tensor_entry("w", (), 0, 0) + bytes(64)), "dimension count is 0"),
    "five dimensions": (raw_header(1, 0, tensor_entry("w", (1,) * 5, 0, 0) + bytes(64)), "dimension count is 5"),
    "zero dimension": (raw_header(1, 0, tensor_entry("w", (4, 0), 0, 0) + bytes(64)), "dimension 1 is 0"),
    "overflow": (raw_header(1, 0, tensor_entry("w", (1 << 62, 1 << 62), 0, 0) + bytes(64)), "size in bytes is"),
    "tensor type": (
        raw_header(1, 0, tensor_entry("w", (32,), 16, 0) + bytes(64)),
        "type is 16, which is not supported",
    ),
    "ragged row": (raw_header(1, 0, tensor_entry("w", (33,), 8, 0) + bytes(64)), "Q8_0 needs a multiple of 32"),
    "offset unaligned": (raw_header(1, 0, tensor_entry("w", (1,), 0, 8) + bytes(64)), "offset is 8"),
    "offset": (raw_header(1, 0, tensor_entry("w", (1,), 0, 1 << 63) + bytes(64)), "ends beyond"),
    "name twice": (build_gguf({}, [float_tensor("w", np.ones(1))] * 2), "tensor name is 'w', which appears twice"),
    "overlap": (
        raw_header(2, 0, tensor_entry("a", (16,), 0, 0) + tensor_entry("b", (1,), 0, 32) + bytes(128)),
        "lies inside tensor a",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_read_gguf_broken_file_is_refused_by_name_and_field(tmp_path: Path, case: str) -> None:
    data, message = BROKEN[case]
    with pytest.raises(ModelFileError, match=message) as caught:
        read_gguf(write(tmp_path, data))
    assert str(caught.value).startswith("model.gguf: ")
    assert len(str(caught.value)) < 400


def test_read_gguf_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"none\.gguf: cannot be read"):
        read_gguf(tmp_path / "none.gguf")


def test_read_gguf_every_truncation_is_refused(tmp_path: Path) -> None:
    data = tiny_gguf()
    for length in range(0, len(data), 41):
        with pytest.raises(ModelFileError):
            read_gguf(write(tmp_path, data[:length]))


def test_read_gguf_array_bomb_is_refused_without_allocation(tmp_path: Path) -> None:
    """Many arrays, each within the limit, together far beyond it."""
    one = struct.pack("<IIQ", 9, 0, 3_000_000) + bytes(3_000_000)
    data = raw_header(0, 4, b"".join(text(f"k{i}") + one for i in range(4)))
    with pytest.raises(ModelFileError, match="length of k2 is 3000000"):
        read_gguf(write(tmp_path, data))


def mutated(data: bytes, header: int, chance: random.Random) -> bytes:
    """One to three random damages, mostly in the header: bytes, whole fields, cuts, insertions."""
    damaged = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(header if chance.random() < 0.95 else len(data)) % max(1, len(damaged))
        kind = chance.randrange(6)
        if kind == 0:
            damaged[place : place + 1] = chance.randbytes(1)
        elif kind == 1:
            damaged[place : place + 8] = struct.pack("<Q", chance.choice([0, 1, HUGE, 1 << 31, 1 << 40, 1 << 62]))
        elif kind == 2:
            damaged[place : place + 4] = struct.pack("<I", chance.choice([0, 9, 13, 0xFFFFFFFF, 4096, 1 << 20]))
        elif kind == 3:
            del damaged[place:]
        elif kind == 4:
            damaged[place:place] = chance.randbytes(chance.randint(1, 16))
        else:
            damaged[place : place + 1] = bytes(byte ^ 1 << chance.randrange(8) for byte in damaged[place : place + 1])
    return bytes(damaged)


def test_open_checkpoint_damaged_files_raise_only_model_file_error(tmp_path: Path) -> None:
    """Thousands of damaged files: each opens or is refused, and none makes us allocate more than its size explains."""
    data = tiny_gguf()
    header = read_gguf(write(tmp_path, data)).header_bytes
    refusals: list[str] = []
    tracemalloc.start()
    try:
        for seed in range(3000):
            path = write(tmp_path, mutated(data, header, random.Random(seed)))
            try:
                weights = dict(open_checkpoint(path).tensors())
                assert len(weights) == 2 * 9 + 2
            except ModelFileError as error:
                refusals.append(str(error))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(refusals) > 1500
    assert max(map(len, refusals)) < 600
    assert peak < 40 << 20


def test_open_checkpoint_overlong_tensor_name_is_shown_short(tmp_path: Path) -> None:
    odd = StoredTensor("w" * 5000, (4,), 0, bytes(16))
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(write(tmp_path, build_gguf(tiny_metadata(), [*tiny_tensors(), odd])))
    assert len(str(caught.value)) < 300


def test_reading_metadata_loads_no_torch() -> None:
    modules = "penstock.models.gguf, penstock.models.config, penstock.models.weight_shapes"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_read_gguf_smollm2_has_its_vocabulary_and_tensors() -> None:
    file = read_gguf(find_smollm2())
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert len(file.metadata["tokenizer.ggml.merges"]) == 48900
    assert file.metadata["tokenizer.ggml.tokens"][2] == "<|im_end|>"
    assert len(file.tensors) == 272
    assert file.tensors["blk.0.attn_q.weight"].format.name == "Q4_1"
    assert file.tensors["token_embd.weight"].shape == (49152, 576)
