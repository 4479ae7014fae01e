"""Beam search on the small checkpoint, in fp32, finds what transformers' finds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.e2e.conftest import TINY_LIGHT

if TYPE_CHECKING:
    from tests.e2e.conftest import StartServer

pytestmark = pytest.mark.e2e

PROMPT = [72, 101, 108, 108, 111, 44, 32]
END, PADDING = 258, 257
CASES: tuple[tuple[int, int, list[int], float, Any], ...] = (
    # width, max_tokens, stop_token_ids, length_penalty, early_stopping
    (1, 12, [], 1.0, False),
    (4, 20, [], 1.0, False),
    (3, 16, [48, 115, 200], 1.0, False),
    (3, 16, [48, 115, 200], 2.0, "never"),
    (4, 16, [48, 115, 200, 7], 0.5, True),
    (8, 10, [97], -1.0, False),
)


def test_the_sequences_are_those_of_transformers(
    start_server: StartServer, tiny_model: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    reference = loader.from_pretrained(tiny_model, dtype="float32").eval()
    server = start_server(tiny_model, *TINY_LIGHT, "--dtype", "float32")
    ended = 0
    for width, max_tokens, stops, penalty, early in CASES:
        found = reference.generate(
            torch.tensor([PROMPT]),
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            max_new_tokens=max_tokens,
            length_penalty=penalty,
            early_stopping=early,
            eos_token_id=[END, *stops],
            pad_token_id=PADDING,
        )
        expected = [
            [token for token in row if token != PADDING] for row in found[:, len(PROMPT) :].tolist()
        ]
        body = {
            "prompt": PROMPT,
            "use_beam_search": True,
            "n": width,
            "max_tokens": max_tokens,
            "length_penalty": penalty,
            "early_stopping": early,
            "stop_token_ids": stops,
            "return_token_ids": True,
        }
        answer = server.post("/v1/completions", body).json()
        assert [choice["token_ids"] for choice in answer["choices"]] == expected, body
        ended += sum(choice["finish_reason"] == "stop" for choice in answer["choices"])
    assert ended > 2, "sequences that end by themselves are among them"
