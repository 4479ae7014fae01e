"""The safetensors reader against the safetensors package, and against broken files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from headrace.errors import CheckpointError
from headrace.loading.safetensors import SafetensorsFile, open_safetensors


def file_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def row(
    dtype: str = "F32", shape: tuple[Any, ...] = (2,), offsets: tuple[Any, ...] = (0, 8)
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write_file(content: bytes) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return path

    return write_file


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_the_safetensors_package_wrote(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.randn(700, 513).to(stored),
        "model.norm.weight": torch.randn(513).to(stored),
        "scalar": torch.randn(()).to(stored),
        "none": torch.randn(0, 4).to(stored),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    (file,) = open_safetensors(tmp_path)

    assert {tensor.name for tensor in file.tensors} == set(tensors)
    for tensor in file.tensors:
        expected = tensors[tensor.name]
        assert tensor.shape == tuple(expected.shape)
        assert tensor.nbytes == expected.nbytes
        out = torch.full(expected.shape, float("nan"), dtype=wanted)
        tensor.read_into(out)
        assert torch.equal(out, expected.to(wanted))


def test_reads_into_a_strided_slice(tmp_path: Path) -> None:
    expected = torch.randn(6, 4)
    save_file({"w": expected}, tmp_path / "model.safetensors")
    (file,) = open_safetensors(tmp_path)
    fused = torch.full((4, 10), -1.0)
    file.tensors[0].read_into(fused.T[2:8])
    assert torch.equal(fused[:, 2:8], expected.T)
    assert (fused[:, :2] == -1).all() and (fused[:, 8:] == -1).all()


def test_integers_and_8_bit_floats_are_loaded_as_they_are(tmp_path: Path) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    tensors = {
        "I8": bits.view(torch.int8),
        "U8": bits.view(16, 16),
        "I32": bits.view(torch.int32),
        "I64": torch.tensor([3, -4]),
        "F8_E4M3": bits.view(torch.float8_e4m3fn),
        "F8_E8M0": bits.view(torch.float8_e8m0fnu),
        "BF16": torch.tensor(1.5, dtype=torch.bfloat16),
        "F32": torch.empty(0, 4),
    }
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (file,) = open_safetensors(tmp_path)
    assert {tensor.name: tensor.dtype for tensor in file.tensors} == {
        name: name for name in tensors
    }
    for tensor in file.tensors:
        expected, loaded = tensors[tensor.name], tensor.load()
        assert (loaded.dtype, loaded.shape) == (expected.dtype, expected.shape)
        assert loaded.flatten().view(torch.uint8).equal(expected.flatten().view(torch.uint8))
        elsewhere = tensor.load(torch.device("meta"))
        assert elsewhere.is_meta and elsewhere.shape == expected.shape


def test_types_that_torch_lacks_are_refused_when_loaded(write: Callable[[bytes], Path]) -> None:
    file = SafetensorsFile(write(file_bytes({"w": row("U16", (2,), (0, 4))}, b"1234")))
    with pytest.raises(CheckpointError, match="'w' is stored as U16, which is not supported"):
        file.tensors[0].load()


def test_other_types_are_listed_and_refused_when_read(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3, dtype=torch.int64)}, tmp_path / "model.safetensors")
    (file,) = open_safetensors(tmp_path)
    assert file.tensors[0].dtype == "I64"
    with pytest.raises(CheckpointError, match="'w' is stored as I64.*F32, F16, BF16"):
        file.tensors[0].read_into(torch.empty(3))


def test_wrong_shape(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    (file,) = open_safetensors(tmp_path)
    with pytest.raises(CheckpointError, match=r"'w' has the shape \(3, 2\).*expects \(2, 3\)"):
        file.tensors[0].read_into(torch.empty(2, 3))


def test_sharded(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"again": torch.ones(5)}, tmp_path / "consolidated.safetensors")
    index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    path = tmp_path / "model.safetensors.index.json"

    path.write_text(json.dumps({"weight_map": index}))
    assert [[t.name for t in file.tensors] for file in open_safetensors(tmp_path)] == [["a"], ["b"]]

    path.write_text(json.dumps({"weight_map": index | {"c": index["b"]}}))
    with pytest.raises(CheckpointError, match="'c' is not in model-00002-of-00002.safetensors"):
        open_safetensors(tmp_path)

    path.write_text(json.dumps({"weight_map": index | {"c": "model-3.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"1 of 3 shards are missing \(model-3.safetensors\)"):
        open_safetensors(tmp_path)

    path.write_text(json.dumps({"weight_map": {"a": "../other/model.safetensors"}}))
    with pytest.raises(CheckpointError, match="lies outside the folder"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_broken_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: .*ownload"):
        open_safetensors(tmp_path)


def test_ambiguous_folder(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    assert len(open_safetensors(tmp_path)) == 1
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"found: one\.safetensors, two\.safetensors"):
        open_safetensors(tmp_path)


DATA = bytes(8)
BROKEN = {
    "empty": (b"", "empty"),
    "short": (b"\1\2\3", "truncated, or not a safetensors file"),
    "header length": (struct.pack("<Q", 1 << 62) + b"{}", "header claims 4611686018427387904"),
    "header cut": (file_bytes({"w": row()})[:20], "truncated, or not a safetensors file"),
    "not JSON": (file_bytes(b"{nonsense"), "not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "deep": (file_bytes(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "huge number": (file_bytes(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "list": (file_bytes([]), "not a JSON object"),
    "twice": (file_bytes(b'{"a": 1, "a": 2}'), "a name occurs twice"),
    "no row": (file_bytes({"w": 3}), "'w' has no valid dtype, shape and data_offsets"),
    "no offsets": (file_bytes({"w": {"dtype": "F32", "shape": []}}), "no valid dtype"),
    "float shape": (file_bytes({"w": row(shape=(2.0,))}, DATA), "no valid dtype"),
    "negative shape": (file_bytes({"w": row(shape=(-1, -2))}, DATA), "no valid dtype"),
    "bool shape": (file_bytes({"w": row(shape=(True, 2))}, DATA), "no valid dtype"),
    "three offsets": (file_bytes({"w": row(offsets=(0, 4, 8))}, DATA), "no valid dtype"),
    "unknown type": (file_bytes({"w": row("F4")}, DATA), "unknown type 'F4'"),
    "size": (file_bytes({"w": row(shape=(3,))}, DATA), "does not fill bytes 0 to 8"),
    "overflow": (file_bytes({"w": row(shape=(1 << 62, 4))}, DATA), "does not fill bytes 0 to 8"),
    "truncated": (file_bytes({"w": row()}, DATA[:-1]), "but the file has .*: it is truncated"),
    "trailing": (file_bytes({"w": row()}, DATA + b"!"), "tensors end at byte"),
    "hole": (file_bytes({"w": row(offsets=(4, 12))}, bytes(12)), "starts at .*, expected"),
    "overlap": (file_bytes({"v": row(), "w": row()}, DATA), "starts at .*, expected"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named_with_a_remedy(
    write: Callable[[bytes], Path], content: bytes, message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s)model\.safetensors: .*{message}"):
        SafetensorsFile(write(content))


SMALL = save({"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)})


def test_every_truncation_is_an_error(write: Callable[[bytes], Path]) -> None:
    for length in range(len(SMALL)):
        with pytest.raises(CheckpointError):
            SafetensorsFile(write(SMALL[:length]))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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
        file = SafetensorsFile(write(bytes(content)))
    except CheckpointError as error:
        assert "model.safetensors" in error.message
    else:
        assert sum(len(tensor.raw) for tensor in file.tensors) == file.size - file.data_start


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype, bad: float
) -> None:
    good, broken = torch.randn(40, 33), torch.randn(40, 33)
    broken[39, 32] = bad
    save_file({"a": good.to(stored), "b": broken.to(stored)}, tmp_path / "model.safetensors")
    (file,) = open_safetensors(tmp_path)
    first, second = file.tensors
    fused = torch.empty(80, 33, dtype=wanted)
    first.read_into(fused[:40])
    with pytest.raises(CheckpointError, match="tensor 'b' has values that are not finite.*again"):
        second.read_into(fused[40:])


def test_large_values_are_read_and_what_overflows_names_the_remedy(tmp_path: Path) -> None:
    large = torch.full((64, 64), 3e38)  # their sum is infinite
    save_file({"w": large}, tmp_path / "model.safetensors")
    [tensor] = open_safetensors(tmp_path)[0].tensors
    out = torch.empty(64, 64)
    tensor.read_into(out)
    assert torch.equal(out, large)
    with pytest.raises(CheckpointError, match=r"'w' has the value 3e\+38, .*--dtype float32"):
        tensor.read_into(out.half())
