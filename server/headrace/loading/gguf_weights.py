"""The tensors of a GGUF file under their Hugging Face names and row order.

Owns the name map and the q/k row permutation of llama.cpp's converter. Imports torch only when a
tensor is read.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from headrace.errors import CheckpointError
from headrace.loading.gguf import GGUFFile, TensorInfo

if TYPE_CHECKING:
    import torch

_TOP_LEVEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)")
_TOP_NAME = re.compile(r"(\w+)\.(weight|bias)")

# Divisors of the rotary frequencies that the converter works out from Llama 3's rope scaling: part
# of the configuration rather than a weight.
_ROPE_FACTORS = "rope_freqs.weight"

# llama.cpp rotates neighbouring values (2i, 2i+1) in these architectures, Hugging Face the halves
# (i, i + D/2), so the converter reorders the rows of q and k. Mistral's files are of the `llama`
# architecture; SmolLM3's converter derives from Llama's; Qwen's leaves the rows alone.
ARCHITECTURES = {"llama": True, "smollm3": True, "qwen2": False, "qwen3": False}


class GGUFTensor:
    """One weight of a GGUF file.

    name: Hugging Face name. shape: row-major. nbytes: bytes in the file.
    quantization: the stored type, such as "Q4_K". raw: the stored bytes, a view without a copy.
    interleaved_heads: None, or the number of heads H of a q/k projection whose stored rows are
        [H, D/2, 2] where the Hugging Face order is [H, 2, D/2]. `raw` has the stored order,
        `read_into` gives the Hugging Face order.
    """

    def __init__(
        self, file: GGUFFile, info: TensorInfo, name: str, interleaved_heads: int | None
    ) -> None:
        self._file = file
        self._info = info
        self.name = name
        self.shape = info.shape
        self.nbytes = info.nbytes
        self.quantization = info.quantization.name
        self.interleaved_heads = interleaved_heads

    @property
    def raw(self) -> memoryview:
        return self._file.bytes_of(self._info)

    def read_into(self, out: torch.Tensor) -> None:
        """Dequantize into `out` in place: the same shape, any float dtype, strides and device.

        Raises CheckpointError if the shapes differ: the configuration and the weights disagree.
        """
        from headrace.loading.dequantize import dequantize
        from headrace.loading.streaming import check_shape, stream_into

        what = f"{self._file.path}: tensor {self._info.name!r}"
        check_shape(out, self.shape, what)
        if self.interleaved_heads is not None:
            half = self.shape[0] // (2 * self.interleaved_heads)
            out = out.view(self.interleaved_heads, 2, half, *self.shape[1:]).transpose(1, 2)
        stored = self._info.quantization
        stream_into(
            out,
            self.raw,
            block_size=stored.block_size,
            block_bytes=stored.block_bytes,
            decode=lambda blocks: dequantize(blocks, stored.name),
            what=what,
        )


def gguf_weights(file: GGUFFile) -> Iterator[GGUFTensor]:
    """Every weight of `file`, in file order (which is disk order).

    Raises CheckpointError for an architecture or a tensor that we have no name for.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: the architecture is {architecture!r}. "
            f"Known in GGUF files: {', '.join(ARCHITECTURES)}."
        )
    for info in file.tensors:
        if info.name == _ROPE_FACTORS:
            continue
        name = _hf_name(info.name)
        if name is None:
            raise CheckpointError(
                f"{file.path}: tensor {info.name!r} has no place in a {architecture} model. "
                "Mixtures of experts, adapters and multimodal parts are not supported."
            )
        heads = _heads(file, info, architecture) if ARCHITECTURES[architecture] else None
        yield GGUFTensor(file, info, name, heads)


def rope_frequency_factors(file: GGUFFile) -> tuple[float, ...] | None:
    """Divisors of the rotary frequencies, one a pair of values ([D/2]); None if absent."""
    info = next((info for info in file.tensors if info.name == _ROPE_FACTORS), None)
    if info is None:
        return None
    if info.quantization.name != "F32" or len(info.shape) != 1:
        raise CheckpointError(
            f"{file.path}: {_ROPE_FACTORS} is {info.quantization.name} of shape {info.shape}, "
            "not a vector of F32. The file is corrupt: download it again."
        )
    return struct.unpack(f"<{info.shape[0]}f", file.bytes_of(info))


def _hf_name(name: str) -> str | None:
    if match := _LAYER_NAME.fullmatch(name):
        layer, stem, kind = match.groups()
        return f"model.layers.{int(layer)}.{_IN_LAYER[stem]}.{kind}" if stem in _IN_LAYER else None
    if match := _TOP_NAME.fullmatch(name):
        stem, kind = match.groups()
        return f"{_TOP_LEVEL[stem]}.{kind}" if stem in _TOP_LEVEL else None
    return None


def _heads(file: GGUFFile, info: TensorInfo, architecture: str) -> int | None:
    """The head count by which the rows of `info` are interleaved; None if they are not."""
    match = _LAYER_NAME.fullmatch(info.name)
    if match is None or match[2] not in ("attn_q", "attn_k"):
        return None
    total = file.metadata.get(f"{architecture}.attention.head_count")
    heads = total
    if match[2] == "attn_k":
        heads = file.metadata.get(f"{architecture}.attention.head_count_kv", total)
    if not isinstance(heads, int) or heads < 1 or info.shape[0] % (2 * heads):
        raise CheckpointError(
            f"{file.path}: {info.name!r} has {info.shape[0]} rows, which {heads!r} heads cannot "
            f"share ({architecture}.attention.head_count, head_count_kv). The file is corrupt."
        )
    return heads
