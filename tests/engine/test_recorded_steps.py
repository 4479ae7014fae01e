"""Decode steps that are replayed: the same bits as op by op, for every number of requests."""

from __future__ import annotations

import pytest
import torch

from headrace.config import CacheOptions, DeviceOptions, EngineConfig, ModelOptions
from headrace.engine.build import build_engine
from headrace.engine.engine import Engine
from headrace.sampling_params import GenerateRequest, SamplingParams
from headrace_kernels import native
from headrace_kernels.cpu import tape

pytestmark = pytest.mark.skipif(
    native.missing("begin_recording") is not None, reason="the native kernels are not built"
)

Logits = dict[tuple[int, int], torch.Tensor]


def engine_of(path, *, kernel: tuple[str, ...] = ()) -> Engine:
    return build_engine(
        EngineConfig(
            model=str(path),
            model_options=ModelOptions(max_model_len=256),
            cache=CacheOptions(kv_cache_memory_bytes=1 << 27, enable_prefix_caching=False),
            device=DeviceOptions(device="cpu", threads=2, kernel=kernel),
        )
    )


def logits_of(engine: Engine, count: int) -> Logits:
    """Requests that end one after another, so that batches of every size up to `count` run."""
    found: Logits = {}
    sampler = engine._runner._sampler
    sample = sampler.sample

    def keep(logits, batch, *, reuse=False):
        keys = zip(batch.seed.tolist(), batch.position.tolist(), strict=True)
        found.update({key: logits[row, ::97].clone() for row, key in enumerate(keys)})
        return sample(logits, batch, reuse=reuse)

    sampler.sample = keep
    for index in range(count):
        sampling = SamplingParams(
            temperature=0, seed=index, max_tokens=8 + 4 * index, ignore_eos=True
        )
        prompt = [100 + 7 * index + position for position in range(3 + 5 * index)]
        request = GenerateRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling)
        engine.add(request, index)
    while engine.has_work:
        engine.step()
    sampler.sample = sample
    return found


def test_replays_have_the_bits_of_ops(smollm2_path, monkeypatch):
    replays = []
    replay = tape.Tape.replay
    monkeypatch.setattr(tape.Tape, "replay", lambda self: (replays.append(1), replay(self)))
    recorded = engine_of(smollm2_path)
    first = logits_of(recorded, 10)
    again = logits_of(recorded, 10)
    assert len(replays) > 40
    assert recorded._runner._recorded._recorded.keys() == set(range(1, 11))
    by_ops = engine_of(smollm2_path)
    by_ops._runner._recorded = None
    expected = logits_of(by_ops, 10)
    assert expected.keys() == first.keys() == again.keys()
    for key, row in expected.items():
        assert torch.equal(row, first[key]), key
        assert torch.equal(row, again[key]), key


def test_ops_of_torch_are_not_recorded(smollm2_path, caplog):
    engine = engine_of(smollm2_path, kernel=("norm=reference",))
    with caplog.at_level("INFO"):
        logits = logits_of(engine, 2)
    assert not engine._runner._recorded._recorded
    assert "cannot be recorded" in caplog.text
    for row in logits.values():
        assert row.isfinite().all()
