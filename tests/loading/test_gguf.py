"""The GGUF reader against the gguf package, and against files that are not what they claim."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.errors import CheckpointError
from headrace.loading.gguf import GGUFFile
from headrace.loading.gguf_weights import gguf_weights, rope_frequency_factors

STRING, ARRAY, U8, U32, U64 = 8, 9, 0, 4, 10
F32, Q4_1 = 0, 3


def string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: str, dims: list[int], kind: int = F32, offset: int = 0) -> bytes:
    head = string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    return head + struct.pack("<IQ", kind, offset)


def file_bytes(
    entries: list[bytes],
    tensors: list[bytes] | None = None,
    *,
    data: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensors = tensors or []
    num_tensors, num_entries = counts or (len(tensors), len(entries))
    header = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries)
    body = header + b"".join(entries) + b"".join(tensors)
    return body + b"\0" * (-len(body) % 32) + data


SMALL = file_bytes(
    [
        entry("general.architecture", STRING, string("llama")),
        entry("llama.attention.head_count", U32, struct.pack("<I", 2)),
        entry("tokenizer.ggml.tokens", ARRAY, array(STRING, 2, string("a") + string("é"))),
        entry("tokenizer.ggml.token_type", ARRAY, array(5, 2, struct.pack("<2i", 1, 3))),
    ],
    [
        tensor("token_embd.weight", [32, 2], Q4_1),
        tensor("blk.0.attn_q.weight", [2, 4], F32, 64),
        tensor("rope_freqs.weight", [4], F32, 96),
    ],
    data=bytes(range(40))
    + bytes(24)
    + struct.pack("<8f", *range(8))
    + struct.pack("<4f", *[1] * 4),
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write_file(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write_file


def read_all(path: Path) -> None:
    """Whatever a consumer does with a file short of reading values."""
    file = GGUFFile(path)
    for weight in gguf_weights(file):
        assert len(weight.raw) == weight.nbytes
    rope_frequency_factors(file)


def test_real_file_reads_as_the_gguf_package_reads_it(
    smollm2_path: Path, smollm2_by_gguf: gguf.GGUFReader
) -> None:
    ours, theirs = GGUFFile(smollm2_path), smollm2_by_gguf

    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, value in ours.metadata.items():
        if isinstance(value, list) and len(value) > 1000:
            # The package decodes a string at a time, slowly: a sample, and the length.
            assert len(value) == len(fields[key].data)
            assert value[:50] == fields[key].contents(slice(0, 50))
            assert value[-50:] == fields[key].contents(slice(-50, None))
        else:
            assert value == fields[key].contents(), key

    assert len(ours.tensors) == len(theirs.tensors)
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (mine.name, mine.shape) == (other.name, tuple(reversed(other.shape.tolist())))
        assert (mine.quantization.name, mine.start) == (other.tensor_type.name, other.data_offset)
        assert mine.nbytes == other.n_bytes
    mine, other = ours.tensors[-1], theirs.tensors[-1]
    assert bytes(ours.bytes_of(mine)) == other.data.tobytes()


@pytest.mark.parametrize("version", [2, 3])
def test_small_file(write: Callable[[bytes], Path], version: int) -> None:
    path = write(SMALL[:4] + struct.pack("<I", version) + SMALL[8:])
    file = GGUFFile(path)
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "é"]
    assert file.metadata["tokenizer.ggml.token_type"] == [1, 3]
    assert [info.shape for info in file.tensors] == [(2, 32), (4, 2), (4,)]
    assert bytes(file.bytes_of(file.tensors[0])) == bytes(range(40))
    assert rope_frequency_factors(file) == (1, 1, 1, 1)
    read_all(path)


def test_all_scalar_types_and_alignment(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    expected = {
        "u8": 255, "i8": -5, "u16": 65535, "i16": -300, "u32": 1 << 31, "i32": -(1 << 31),
        "u64": 1 << 63, "i64": -(1 << 63), "f32": 0.5, "f64": 0.1, "yes": True, "text": "ø\n",
        "floats": [0.5, 1.5], "flags": [True, False],
    }  # fmt: skip
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -5)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -300)
    writer.add_uint32("u32", 1 << 31)
    writer.add_int32("i32", -(1 << 31))
    writer.add_uint64("u64", 1 << 63)
    writer.add_int64("i64", -(1 << 63))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "ø\n")
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("flags", [True, False])
    values = np.arange(3, dtype=np.float32)
    writer.add_tensor("output_norm.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile(path)
    assert file.alignment == 64
    assert {key: file.metadata[key] for key in expected} == expected
    assert bytes(file.bytes_of(file.tensors[0])) == values.tobytes()


ARCH = entry("general.architecture", STRING, string("llama"))
BROKEN = {
    "empty": (b"", "empty"),
    "magic": (b"PK\3\4" + SMALL[4:], "not a GGUF file"),
    "version 1": (file_bytes([], version=1), "version 1 is not supported"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count": (file_bytes([], counts=(1 << 60, 0)), "claims 1152921504606846976 tensors"),
    "entry count": (file_bytes([ARCH], counts=(0, 9)).rstrip(b"\0"), "truncated or corrupt"),
    "key length": (file_bytes([struct.pack("<Q", 1 << 40)]), "a metadata key claims a length"),
    "key not UTF-8": (file_bytes([entry(b"\xff", U8, b"\1")]), "a metadata key is not UTF-8"),
    "duplicate key": (file_bytes([ARCH, ARCH]), "'general.architecture' occurs twice"),
    "value type": (file_bytes([entry("k", 13, b"\0" * 8)]), "'k' has the unknown type 13"),
    "string length": (file_bytes([entry("k", STRING, struct.pack("<Q", 1 << 63))]), "'k' claims"),
    "array count": (
        file_bytes([entry("k", ARRAY, array(U64, 1 << 61, b""))]),
        "'k' .* runs past the end",
    ),
    "string count": (
        file_bytes([entry("k", ARRAY, array(STRING, 1 << 61, b""))]),
        "'k' .* runs past the end",
    ),
    "string in array": (
        file_bytes([entry("k", ARRAY, array(STRING, 1, struct.pack("<Q", 1 << 62)))]),
        "'k' .* runs past the end",
    ),
    "array not UTF-8": (
        file_bytes([entry("k", ARRAY, array(STRING, 1, string(b"\xc3")))]),
        "'k' holds a string that is not UTF-8",
    ),
    "array type": (file_bytes([entry("k", ARRAY, array(99, 1, b"\0"))]), "unknown type 99"),
    "nested array": (file_bytes([entry("k", ARRAY, array(ARRAY, 1, b""))]), "array of arrays"),
    "alignment": (
        file_bytes([entry("general.alignment", U32, struct.pack("<I", 24))]),
        "general.alignment is 24",
    ),
    "split": (
        file_bytes([entry("split.count", 2, struct.pack("<H", 3))]),
        "one of 3 parts .* llama-gguf-split --merge",
    ),
    "no dimensions": (file_bytes([], [tensor("t", [])]), "'t' claims 0 dimensions"),
    "five dimensions": (file_bytes([], [tensor("t", [1] * 5)]), "'t' claims 5 dimensions"),
    "zero dimension": (file_bytes([], [tensor("t", [0])]), "cannot be stored as F32"),
    "half a block": (file_bytes([], [tensor("t", [33, 2], Q4_1)]), "cannot be stored as Q4_1"),
    "tensor type": (file_bytes([], [tensor("t", [256], 16)]), "type IQ2_XXS.*one of F32, F16"),
    "unknown tensor type": (file_bytes([], [tensor("t", [256], 77)]), "'t' has the type 77"),
    "offset": (file_bytes([], [tensor("t", [1], F32, 4)], data=bytes(64)), "unaligned offset, 4"),
    "huge offset": (
        file_bytes([], [tensor("t", [1], F32, (1 << 64) - 32)], data=bytes(64)),
        "'t' ends at byte .* download it again",
    ),
    "huge dimensions": (
        file_bytes([], [tensor("t", [1 << 63] * 4)], data=bytes(64)),
        "'t' ends at byte .* download it again",
    ),
    "duplicate tensor": (
        file_bytes([], [tensor("t", [1]), tensor("t", [1])], data=bytes(64)),
        "'t' occurs twice",
    ),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named_with_a_remedy(
    write: Callable[[bytes], Path], content: bytes, message: str
) -> None:
    path = write(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            GGUFFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in caught.value.message
    assert peak < 1 << 20


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.gguf: cannot be read: No such file"):
        GGUFFile(tmp_path / "absent.gguf")


def test_every_truncation_is_an_error(write: Callable[[bytes], Path]) -> None:
    for length in range(len(SMALL)):
        with pytest.raises(CheckpointError):
            GGUFFile(write(SMALL[:length]))


def test_truncated_weights_of_a_real_file(
    smollm2_path: Path, write: Callable[[bytes], Path]
) -> None:
    with smollm2_path.open("rb") as file:
        head = file.read(8 << 20)
    with pytest.raises(
        CheckpointError, match=r"tensor 'token_embd.weight' ends at byte .*truncated"
    ):
        GGUFFile(write(head))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    flips=st.lists(
        st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=4
    )
)
def test_flipped_bytes_are_an_error_or_a_valid_file(
    write: Callable[[bytes], Path], flips: list[tuple[int, int]]
) -> None:
    content = bytearray(SMALL)
    for position, value in flips:
        content[position] = value
    try:
        read_all(write(bytes(content)))
    except CheckpointError as error:
        assert "model.gguf" in error.message


@pytest.mark.parametrize("value", [0, 0xFF])
def test_every_single_byte_corrupted(write: Callable[[bytes], Path], value: int) -> None:
    for position in range(len(SMALL)):
        content = bytearray(SMALL)
        content[position] = value
        try:
            read_all(write(bytes(content)))
        except CheckpointError as error:
            assert "model.gguf" in error.message
