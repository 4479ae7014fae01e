"""What every contender is asked to do, and the limit that memory and arithmetic set on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.bench.workload import RandomWorkload
from headrace.loading.gguf import GGUFFile

READ_GB, INT8_TERA_OPS = "memory read GB/s", "int8 TOPS"  # the ceilings that limits are made of
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Workload:
    """`batch` requests together, each with a prompt of its own.

    output_len tokens are decoded and timed, or, where it is 0, the prompts are computed and timed.
    """

    batch: int
    input_len: int
    output_len: int

    @property
    def name(self) -> str:
        if self.output_len:
            return f"decode B={self.batch}"
        return f"prefill {self.input_len}"

    def prompts(self, seed: int, count: int | None = None) -> list[list[int]]:
        """Random token ids, no prefix shared; the same for every contender that takes ids."""
        made = RandomWorkload(self.input_len, max(1, self.output_len)).prompts(
            count or self.batch, np.random.default_rng(seed), None
        )
        return [prompt.token_ids or [] for prompt in made]


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a GGUF file that its speed depends on."""

    name: str
    nbytes: int
    """Of all weights that a decode step reads: a tied embedding once, an untied one not at all."""
    linear_parameters: int
    head_parameters: int

    @classmethod
    def of(cls, path: Path) -> ModelSize:
        tensors = {tensor.name: tensor for tensor in GGUFFile(path).tensors}
        head = tensors.get(HEAD, tensors[EMBEDDING])
        linear = [
            tensor
            for tensor in tensors.values()
            if len(tensor.shape) == 2 and tensor.name not in (EMBEDDING, HEAD)
        ]
        return cls(
            name=path.name,
            nbytes=sum(tensor.nbytes for tensor in (*linear, head)),
            linear_parameters=sum(int(np.prod(tensor.shape)) for tensor in linear),
            head_parameters=int(np.prod(head.shape)),
        )

    def limit(self, workload: Workload, read_gb: float, tera_ops: float) -> float:
        """Tokens per second that no kernel can exceed: the weights are read once a step, and each
        parameter is two operations a token. Attention and everything else is left out.

        read_gb: GB/s of memory. tera_ops: 10^12 multiplications and additions per second.
        """
        step_tokens = workload.batch if workload.output_len else workload.input_len
        head_rows = workload.batch
        operations = 2 * (step_tokens * self.linear_parameters + head_rows * self.head_parameters)
        return step_tokens / max(self.nbytes / (read_gb * 1e9), operations / (tera_ops * 1e12))
