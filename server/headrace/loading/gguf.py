"""A bounded reader of GGUF files: header, metadata and tensor table through mmap.

Model files are untrusted: every count, length, offset and dimension is checked against the file
before it is used. Knows nothing of torch, numpy or what the tensors mean (`gguf_weights.py`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from headrace.errors import CheckpointError
from headrace.loading.mapping import map_file

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_ALIGNMENTS = tuple(1 << power for power in range(21))
_MAX_DIMENSIONS = 4

# Far above any real model (the largest vocabularies have 0.3 M tokens), low enough that a forged
# header cannot make us allocate more than a few GB.
_MAX_HEADER_BYTES = 256 << 20
_MAX_KEY_BYTES = (1 << 16) - 1
_MAX_METADATA_ENTRIES = 1 << 16
_MAX_TENSORS = 1 << 18

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class Quantization:
    """How a GGUF tensor is stored: `block_bytes` bytes hold `block_size` consecutive values."""

    name: str
    block_size: int
    block_bytes: int


QUANTIZATIONS: dict[int, Quantization] = {
    0: Quantization("F32", 1, 4),
    1: Quantization("F16", 1, 2),
    2: Quantization("Q4_0", 32, 18),
    3: Quantization("Q4_1", 32, 20),
    6: Quantization("Q5_0", 32, 22),
    7: Quantization("Q5_1", 32, 24),
    8: Quantization("Q8_0", 32, 34),
    10: Quantization("Q2_K", 256, 84),
    11: Quantization("Q3_K", 256, 110),
    12: Quantization("Q4_K", 256, 144),
    13: Quantization("Q5_K", 256, 176),
    14: Quantization("Q6_K", 256, 210),
    30: Quantization("BF16", 1, 2),
}

# Types that exist but that we do not read, so that the error can name them.
_UNSUPPORTED = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table. `shape` is row-major (outermost dimension first);
    `start` and `nbytes` are bytes in the file, already checked to lie inside it."""

    name: str
    shape: tuple[int, ...]
    quantization: Quantization
    start: int
    nbytes: int


class GGUFFile:
    """An open GGUF file. Versions 2 and 3, little endian, one part.

    metadata: every key of the header; arrays are lists.
    tensors: the tensor table in file order.
    data_start: where the header ends and the (aligned) tensor data begins, in bytes.
    Raises CheckpointError for anything that is not a whole, well-formed file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = map_file(path)
        self.size = len(self._map)
        self._pos = 0
        self._end = min(self.size, _MAX_HEADER_BYTES)

        num_tensors, num_entries = self._read_counts()
        self.metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            self._read_entry()
        self._refuse_split()
        self.alignment = self._read_alignment()
        rows = [self._read_tensor_row() for _ in range(num_tensors)]
        self.data_start = -(-self._pos // self.alignment) * self.alignment
        self.tensors = self._place_tensors(rows)

    def bytes_of(self, tensor: TensorInfo) -> memoryview:
        """The stored bytes of `tensor`: a read-only view of the mapped file, no copy."""
        return memoryview(self._map)[tensor.start : tensor.start + tensor.nbytes]

    def view(self) -> memoryview:
        """The whole mapped file, read-only."""
        return memoryview(self._map)

    # header

    def _read_counts(self) -> tuple[int, int]:
        if self.size < 4 or self._map[:4] != _MAGIC:
            raise CheckpointError(
                f"{self.path}: not a GGUF file (it does not start with 'GGUF'). "
                "Give a .gguf file, or a folder with config.json and safetensors files."
            )
        self._pos = 4
        version = self._unpack(_U32, "the version")
        if version not in _VERSIONS:
            if version & 0xFFFF == 0 and version >> 16:
                self._refuse("it is a big-endian GGUF file", "Convert it to little endian.")
            self._refuse(
                f"GGUF version {version} is not supported (known: 2 and 3)",
                "Convert the model again with a current llama.cpp.",
            )
        num_tensors = self._unpack(_U64, "the tensor count")
        num_entries = self._unpack(_U64, "the metadata count")
        if num_tensors > _MAX_TENSORS or num_entries > _MAX_METADATA_ENTRIES:
            self._corrupt(f"it claims {num_tensors} tensors and {num_entries} metadata entries")
        return num_tensors, num_entries

    def _read_entry(self) -> None:
        at = self._pos
        key = self._read_string("a metadata key", _MAX_KEY_BYTES)
        if key in self.metadata:
            self._corrupt(f"metadata key {key!r} occurs twice", at)
        what = f"metadata {key!r}"
        kind = self._unpack(_U32, what)
        self.metadata[key] = (
            self._read_array(what) if kind == _ARRAY else self._read_value(kind, what)
        )

    def _read_value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self._read_string(what, self._end)
        if kind not in _SCALARS:
            self._corrupt(f"{what} has the unknown type {kind}")
        return self._unpack(struct.Struct("<" + _SCALARS[kind]), what)

    def _read_array(self, what: str) -> list[Any]:
        kind = self._unpack(_U32, what)
        count = self._unpack(_U64, what)
        if kind == _STRING:
            return self._read_strings(count, what)
        if kind == _ARRAY:
            self._refuse(f"{what} is an array of arrays", "No known model needs one.")
        if kind not in _SCALARS:
            self._corrupt(f"{what} is an array of the unknown type {kind}")
        item = struct.calcsize("<" + _SCALARS[kind])
        self._need(count * item, what)
        values = struct.unpack_from(f"<{count}{_SCALARS[kind]}", self._map, self._pos)
        self._pos += count * item
        return list(values)

    def _read_strings(self, count: int, what: str) -> list[str]:
        # A vocabulary and its merges are 0.1 M strings and more: this loop is most of the header,
        # so it keeps its state in locals.
        self._need(count * 8, what)
        data, pos, end = self._map, self._pos, self._end
        unpack = _U64.unpack_from
        strings: list[str] = []
        for _ in range(count):
            start = pos + 8
            if start > end:
                self._truncated(what, pos)
            stop = start + unpack(data, pos)[0]
            if stop > end:
                self._truncated(what, pos)
            try:
                strings.append(data[start:stop].decode())
            except UnicodeDecodeError:
                self._corrupt(f"{what} holds a string that is not UTF-8", start)
            pos = stop
        self._pos = pos
        return strings

    def _refuse_split(self) -> None:
        parts = self.metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            self._refuse(
                f"it is one of {parts} parts of a split model",
                "Join them first: llama-gguf-split --merge FIRST_PART OUTPUT.gguf.",
            )

    def _read_alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        power_of_two = (
            isinstance(alignment, int) and alignment > 0 and not alignment & (alignment - 1)
        )
        if not power_of_two or alignment > 1 << 20:
            self._corrupt(f"general.alignment is {alignment!r}, not a power of two")
        return int(alignment)

    # tensor table

    def _read_tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._read_string("a tensor name", _MAX_KEY_BYTES)
        what = f"tensor {name!r}"
        num_dims = self._unpack(_U32, what)
        if not 1 <= num_dims <= _MAX_DIMENSIONS:
            self._corrupt(f"{what} claims {num_dims} dimensions")
        dims = [self._unpack(_U64, what) for _ in range(num_dims)]
        kind = self._unpack(_U32, what)
        offset = self._unpack(_U64, what)
        return name, tuple(reversed(dims)), kind, offset

    def _place_tensors(
        self, rows: list[tuple[str, tuple[int, ...], int, int]]
    ) -> tuple[TensorInfo, ...]:
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in rows:
            if name in tensors:
                self._corrupt(f"tensor {name!r} occurs twice")
            quantization = self._quantization(name, kind)
            if min(shape) == 0 or shape[-1] % quantization.block_size:
                self._corrupt(
                    f"tensor {name!r} of shape {shape} cannot be stored as {quantization.name}"
                )
            values = 1
            for dim in shape:
                values *= dim
            nbytes = values // quantization.block_size * quantization.block_bytes
            start = self.data_start + offset
            if offset % self.alignment:
                self._corrupt(f"tensor {name!r} starts at an unaligned offset, {offset}")
            if start + nbytes > self.size:
                self._refuse(
                    f"tensor {name!r} ends at byte {start + nbytes}, but the file has {self.size}",
                    "The file is truncated or corrupt: download it again.",
                )
            tensors[name] = TensorInfo(name, shape, quantization, start, nbytes)
        return tuple(tensors.values())

    def _quantization(self, name: str, kind: int) -> Quantization:
        if kind not in QUANTIZATIONS:
            known = ", ".join(q.name for q in QUANTIZATIONS.values())
            self._refuse(
                f"tensor {name!r} has the type {_UNSUPPORTED.get(kind, kind)}",
                f"Use a file quantized as one of {known}.",
            )
        return QUANTIZATIONS[kind]

    # bounded primitives

    def _unpack(self, layout: struct.Struct, what: str) -> Any:
        self._need(layout.size, what)
        (value,) = layout.unpack_from(self._map, self._pos)
        self._pos += layout.size
        return value

    def _read_string(self, what: str, limit: int) -> str:
        length = self._unpack(_U64, what)
        if length > limit:
            self._corrupt(f"{what} claims a length of {length} bytes")
        self._need(length, what)
        start = self._pos
        self._pos += length
        try:
            return self._map[start : self._pos].decode()
        except UnicodeDecodeError:
            self._corrupt(f"{what} is not UTF-8", start)

    def _need(self, nbytes: int, what: str) -> None:
        if nbytes > self._end - self._pos:
            self._truncated(what, self._pos)

    def _truncated(self, what: str, at: int) -> NoReturn:
        if self._end < self.size:
            self._corrupt(f"{what} passes the header limit of {_MAX_HEADER_BYTES >> 20} MiB", at)
        self._refuse(
            f"{what} (byte {at}) runs past the end of the file ({self.size} bytes)",
            "The file is truncated or corrupt: download it again.",
        )

    def _corrupt(self, problem: str, at: int | None = None) -> NoReturn:
        where = self._pos if at is None else at
        self._refuse(f"{problem} (near byte {where})", "The file is corrupt: download it again.")

    def _refuse(self, problem: str, remedy: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {problem}. {remedy}")
