"""A bounded reader of safetensors files, single or sharded, through mmap.

Model files are untrusted: the header is checked against the file before it is used. The package of
the same name is not needed: the format is one JSON object, and mapping it ourselves lets a tensor
go straight into its parameter. Imports torch only when a tensor is read.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from headrace.errors import CheckpointError
from headrace.loading.mapping import map_file

if TYPE_CHECKING:
    import torch

# https://github.com/huggingface/safetensors#format ; the limit is the format's own.
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 8
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_READABLE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LOADABLE = _READABLE | {
    "I8": "int8", "U8": "uint8", "I32": "int32", "I64": "int64",
    "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


class SafetensorsTensor:
    """One weight of a safetensors file.

    name: as stored, which is the Hugging Face name. shape: row-major. nbytes: bytes in the file.
    dtype: the stored type, such as "BF16". raw: the stored bytes, a view without a copy.
    """

    def __init__(
        self, file: SafetensorsFile, name: str, dtype: str, shape: tuple[int, ...], start: int
    ) -> None:
        self._file = file
        self._start = start
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.nbytes = math.prod(shape) * _ITEM_BYTES[dtype]

    @property
    def raw(self) -> memoryview:
        return self._file.view()[self._start : self._start + self.nbytes]

    @property
    def is_readable(self) -> bool:
        """Whether `read_into` takes its stored type."""
        return self.dtype in _READABLE

    def load(self, device: torch.device | None = None) -> torch.Tensor:
        """A copy in the stored type, by default on the CPU.

        Raises CheckpointError for a type that torch lacks.
        """
        import torch

        from headrace.loading.streaming import bytes_on

        if self.dtype not in _LOADABLE:
            raise CheckpointError(
                f"{self._file.path}: tensor {self.name!r} is stored as {self.dtype}, which is not "
                f"supported. Use a checkpoint in {', '.join(_LOADABLE)}."
            )
        dtype = getattr(torch, _LOADABLE[self.dtype])
        return bytes_on(device or torch.device("cpu"), self.raw).view(dtype).view(self.shape)

    def read_into(self, out: torch.Tensor) -> None:
        """Convert into `out` in place: the same shape, any float dtype, strides and device.

        Raises CheckpointError if the shapes differ, or for a stored type that is not F32, F16 or
        BF16.
        """
        import torch

        from headrace.loading.streaming import check_shape, stream_into

        what = f"{self._file.path}: tensor {self.name!r}"
        check_shape(out, self.shape, what)
        if self.dtype not in _READABLE:
            raise CheckpointError(
                f"{what} is stored as {self.dtype}, which is not supported. "
                f"Use a checkpoint in {', '.join(_READABLE)}."
            )
        dtype = getattr(torch, _READABLE[self.dtype])
        stream_into(
            out,
            self.raw,
            block_size=1,
            block_bytes=_ITEM_BYTES[self.dtype],
            decode=lambda values: values.view(dtype),
            what=what,
        )


class SafetensorsFile:
    """An open safetensors file. `tensors` are in file order; `data_start` is in bytes.

    Raises CheckpointError for anything that is not a whole, well-formed file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap = map_file(path)
        self.size = len(self._map)
        header = self._read_header()
        header.pop("__metadata__", None)
        rows = [self._read_row(name, row) for name, row in header.items()]
        self.tensors = tuple(sorted(rows, key=lambda tensor: (tensor._start, tensor.name)))
        self._check_layout()

    def view(self) -> memoryview:
        """The whole mapped file, read-only."""
        return memoryview(self._map)

    def _read_header(self) -> dict[str, Any]:
        length = int.from_bytes(self._map[:8], "little")
        self.data_start = 8 + length
        if self.size < 8 or length > _MAX_HEADER_BYTES or self.data_start > self.size:
            self._refuse(
                f"the header claims {length} bytes, the file has {self.size}: "
                "it is truncated, or not a safetensors file"
            )
        try:
            header = json.loads(self._map[8 : self.data_start], object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            self._refuse(f"the header is not valid JSON ({error})")
        if not isinstance(header, dict):
            self._refuse("the header is not a JSON object")
        return header

    def _read_row(self, name: str, row: Any) -> SafetensorsTensor:
        match row:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop]} if len(
                shape
            ) <= _MAX_DIMENSIONS and all(map(_is_size, (start, stop, *shape))):
                pass
            case _:
                self._refuse(f"tensor {name!r} has no valid dtype, shape and data_offsets")
        if dtype not in _ITEM_BYTES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has the unknown type {dtype[:32]!r}. "
                f"Use a checkpoint in {', '.join(_READABLE)}."
            )
        expected = math.prod(shape) * _ITEM_BYTES[dtype]
        if stop - start != expected:
            self._refuse(f"tensor {name!r}: {dtype} {shape} does not fill bytes {start} to {stop}")
        if self.data_start + stop > self.size:
            self._refuse(
                f"tensor {name!r} ends at byte {self.data_start + stop}, "
                f"but the file has {self.size}: it is truncated"
            )
        return SafetensorsTensor(self, name, dtype, tuple(shape), self.data_start + start)

    def _check_layout(self) -> None:
        """The format allows neither holes nor overlaps: either one is a sign of corruption."""
        end = self.data_start
        for tensor in self.tensors:
            if tensor._start != end:
                self._refuse(f"tensor {tensor.name!r} starts at {tensor._start}, expected {end}")
            end += tensor.nbytes
        if end != self.size:
            self._refuse(f"the tensors end at byte {end}, but the file has {self.size}")

    def _refuse(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {problem}. Download the file again.")


def open_safetensors(folder: Path) -> tuple[SafetensorsFile, ...]:
    """The safetensors files of a checkpoint folder, in the order of their names.

    The index wins over a single model.safetensors, and either over files of other names (some
    repositories hold a second copy of the weights in another layout).
    Raises CheckpointError if there are none, or if shards or indexed tensors are missing.
    """
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        return _open_shards(folder, index_path)
    paths = sorted(folder.glob("*.safetensors"))
    if folder / "model.safetensors" in paths:
        paths = [folder / "model.safetensors"]
    if len(paths) != 1:
        found = ", ".join(path.name for path in paths) or "none"
        raise CheckpointError(
            f"{folder}: expected model.safetensors or model.safetensors.index.json "
            f"(safetensors files found: {found}). Download the missing file."
        )
    return (SafetensorsFile(paths[0]),)


def _open_shards(folder: Path, index_path: Path) -> tuple[SafetensorsFile, ...]:
    try:
        weight_map = json.loads(index_path.read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
        well_formed = all(isinstance(shard, str) for shard in shards)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index_path}: not a readable index ({error!r}). Download the file again."
        ) from error
    if not well_formed or not shards:
        raise CheckpointError(f"{index_path}: weight_map names no files. Download it again.")
    if outside := next((shard for shard in shards if Path(shard).name != shard), None):
        raise CheckpointError(f"{index_path}: shard {outside!r} lies outside the folder.")
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing ({', '.join(missing)}). "
            "The download is incomplete: run it again."
        )
    files = tuple(SafetensorsFile(folder / shard) for shard in shards)
    present = {(tensor.name, file.path.name) for file in files for tensor in file.tensors}
    if absent := next((row for row in weight_map.items() if row not in present), None):
        raise CheckpointError(
            f"{index_path}: tensor {absent[0]!r} is not in {absent[1]}. "
            "Index and shards do not belong together: download all of them again."
        )
    return files


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name occurs twice")
    return unique
