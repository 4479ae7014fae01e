"""What the engine and its peers are asked to do: token ids and lengths, of random requests."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Requests that arrive together. Outputs have exactly their length; end tokens are ignored."""

    name: str
    prompts: list[list[int]]
    output_lengths: list[int]
    temperature: float = 0.0

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lengths)

    @property
    def longest(self) -> int:
        lengths = zip(self.prompts, self.output_lengths, strict=True)
        return max(len(prompt) + output for prompt, output in lengths)


def nano_vllm(count: int = 256, longest: int = 1024, vocabulary: int = 10_000) -> Workload:
    """The public workload of nano-vllm's bench.py: 256 requests of 100 to 1024 tokens in and out,
    seed 0, temperature 0.6."""
    shortest = min(100, longest // 4)
    rng = random.Random(0)
    prompts = [
        [rng.randint(0, vocabulary - 1) for _ in range(rng.randint(shortest, longest))]
        for _ in range(count)
    ]
    lengths = [rng.randint(shortest, longest) for _ in range(count)]
    return Workload("nano-vllm", prompts, lengths, 0.6)


def uniform(count: int, prompt: int, output: int, vocabulary: int = 10_000) -> Workload:
    """`count` requests of the same lengths and different tokens, greedy."""
    rng = random.Random(1)
    prompts = [[rng.randrange(vocabulary) for _ in range(prompt)] for _ in range(count)]
    return Workload(f"{count} x {prompt}/{output}", prompts, [output] * count)
