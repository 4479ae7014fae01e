"""Whether there is room for another version, and what a broken one does to who asks."""

from __future__ import annotations

import dataclasses

import pytest

from headrace.config import CacheOptions, EngineConfig
from headrace.engine import hardware
from headrace.hosting.fit import Question, Verdict, beside, fits, judge

GIB = 1 << 30


@pytest.fixture
def with_memory(monkeypatch):
    """The machine is a CPU with so much memory."""
    real = dataclasses.replace(hardware.probe("cpu"), memory_bytes=2 * GIB)

    def give(memory_bytes):
        machine = dataclasses.replace(real, memory_bytes=memory_bytes)
        monkeypatch.setattr(hardware, "probe", lambda *args, **options: machine)

    return give


def question(path, kv=GIB, freed=0, claimed=0):
    config = EngineConfig(model=str(path))
    return Question(config, beside(config, kv), freed, claimed)


def test_room_is_weights_and_as_much_kv_cache_as_the_others_have(smollm2_path, with_memory):
    with_memory(2 * GIB)
    assert judge(question(smollm2_path)) == Verdict()
    with_memory(GIB)
    verdict = judge(question(smollm2_path))
    assert verdict.no_room.startswith("Weights and KV cache take 1.")
    assert not verdict.error
    with_memory(3 * GIB)
    assert judge(question(smollm2_path, claimed=2 * GIB)).no_room, (
        "free until it is used by those that are there"
    )


def test_without_room_for_the_weights_it_depends_on_what_goes(smollm2_path, with_memory):
    with_memory(1 << 20)
    assert "The weights of" in judge(question(smollm2_path)).error
    verdict = judge(question(smollm2_path, freed=2 * GIB))
    assert not verdict.error and "The weights of" in verdict.no_room


def test_a_kv_cache_that_was_asked_for_stays():
    given = EngineConfig(cache=CacheOptions(kv_cache_memory_bytes=5))
    assert beside(given, 7) is given
    assert beside(EngineConfig(), 7).cache.kv_cache_memory_bytes == 7
    assert beside(EngineConfig(), 0).cache.kv_cache_memory_bytes is None, "an encoder has none"


@pytest.mark.slow
async def test_it_is_asked_in_a_process_of_its_own(smollm2_path, tmp_path):
    assert await fits(question(smollm2_path, kv=1 << 24)) == Verdict()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(smollm2_path.read_bytes()[: 1 << 20])
    assert "broken.gguf" in (await fits(question(broken))).error
