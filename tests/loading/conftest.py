"""Builders of small model files, written with other people's packages (gguf, safetensors)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

WriteGGUF = Callable[..., Path]


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGGUF:
    """`write(tensors, metadata={}, arch="llama")` -> path. A tensor is an array, or
    (raw bytes as [rows, row_bytes] uint8, gguf.GGMLQuantizationType)."""

    def write(
        tensors: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
        arch: str = "llama",
        name: str = "model.gguf",
    ) -> Path:
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, arch)
        for key, value in (metadata or {}).items():
            match value:
                case str():
                    writer.add_string(key, value)
                case bool():
                    writer.add_bool(key, value)
                case int():
                    writer.add_uint32(key, value)
                case float():
                    writer.add_float32(key, value)
                case _:
                    writer.add_array(key, value)
        for tensor_name, value in tensors.items():
            if isinstance(value, tuple):
                raw, quantization = value
                writer.add_tensor(tensor_name, raw, raw_dtype=quantization)
            else:
                writer.add_tensor(tensor_name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def smollm2_by_gguf(smollm2_path: Path) -> gguf.GGUFReader:
    """The real file as the gguf package reads it (which takes it seconds: once is enough)."""
    return gguf.GGUFReader(smollm2_path)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
