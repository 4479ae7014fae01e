"""Vectors of decoders and encoders: in any company and in any chunks they are the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from headrace.config import (
    CacheOptions,
    DeviceOptions,
    EngineConfig,
    ModelOptions,
    SchedulerOptions,
)
from headrace.engine.build import build_engine
from headrace.engine.client import FinishReason, RequestOutput, Task
from headrace.errors import CheckpointError, ConfigError
from headrace.models.pooling_config import PoolingConfig
from headrace.sampling_params import (
    BACKGROUND_PRIORITY,
    GenerateRequest,
    PoolingParams,
    SamplingParams,
)

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


def save(folder: Path, architecture: str, **more: Any) -> Any:
    """A random checkpoint, and the transformers model that it is."""
    import transformers

    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**SIZES, **more})).eval()
    config = {**model.config.to_diff_dict(), "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def engine_of(
    folder: Path, *, budget: int = 256, pooling: Any = "auto", kv_bytes: int = 1 << 20, **more: Any
) -> Any:
    return build_engine(
        EngineConfig(
            model=str(folder),
            model_options=ModelOptions(dtype="float32", pooling=pooling, **more),
            cache=CacheOptions(kv_cache_memory_bytes=kv_bytes, block_size=4),
            scheduler=SchedulerOptions(max_num_seqs=8, max_num_batched_tokens=budget),
            device=DeviceOptions(device="cpu", threads=1),
        )
    )


def request(
    name: object,
    prompt: Sequence[int],
    priority: int = 0,
    deadline: float | None = None,
    **fields: Any,
) -> GenerateRequest:
    return GenerateRequest(
        request_id=str(name),
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(seed=1),
        priority=priority,
        deadline=deadline,
        pooling=PoolingParams(**fields),
    )


def run(engine: Any, *requests: GenerateRequest) -> dict[str, RequestOutput]:
    for handle, one in enumerate(requests):
        engine.add(one, handle)
    ended = {}
    while engine.has_work:
        for output in engine.step().details:
            if output.finish_reason is not None:
                ended[output.request_id] = output
        engine.check_invariants()
    return ended


def vector_of(output: RequestOutput) -> np.ndarray:
    assert output.finish_reason is FinishReason.STOP and output.vector is not None
    assert output.record is not None and output.record.output_tokens == 0
    assert not output.token_ids
    return np.frombuffer(output.vector, "<f4")


def vectors(engine: Any, prompts: Sequence[Sequence[int]], **fields: Any) -> list[np.ndarray]:
    ended = run(engine, *(request(i, prompt, **fields) for i, prompt in enumerate(prompts)))
    return [vector_of(ended[str(i)]) for i in range(len(prompts))]


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    common = rng.integers(3, 160, 24).tolist()
    return [(common + rng.integers(3, 160, length).tolist())[:length] for length in lengths]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("decoder")
    return folder, save(folder, "LlamaForCausalLM", num_key_value_heads=2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("encoder")
    return folder, save(folder, "BertModel")


def expected(hidden: torch.Tensor, pooling: str) -> np.ndarray:
    pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    return (pooled / pooled.norm()).numpy()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_decoder_embeds(decoder: tuple[Path, Any], pooling: str) -> None:
    folder, model = decoder
    engine = engine_of(folder, pooling=pooling)
    assert engine.info.pooling.pooling == pooling
    assert engine.info.tasks == [Task.GENERATE, Task.EMBED, Task.SCORE]
    texts = prompts(1, 40, 127, 30)
    found = vectors(engine, texts, pooling=pooling)
    for text, vector in zip(texts, found, strict=True):
        with torch.inference_mode():
            hidden = model.model(torch.tensor([text])).last_hidden_state[0]
        assert np.abs(vector - expected(hidden, pooling)).max() < 1e-5


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_chunks_company_cached_prefixes_and_preemption_change_no_bit(
    decoder: tuple[Path, Any], pooling: Any
) -> None:
    folder, _ = decoder
    texts = prompts(1, 40, 90, 30, 61)
    whole = [vectors(engine_of(folder), [text], pooling=pooling)[0] for text in texts]
    small = engine_of(folder, budget=8, kv_bytes=1 << 16)
    for _ in range(2):  # the second time over cached prefixes
        requests = [request(i, text, pooling=pooling) for i, text in enumerate(texts)]
        words = GenerateRequest(
            request_id="words",
            prompt_token_ids=texts[1],
            sampling=SamplingParams(seed=2, max_tokens=50, ignore_eos=True),
        )
        ended = run(small, words, *requests)
        assert ended["words"].vector is None
        for index, vector in enumerate(whole):
            assert np.array_equal(vector_of(ended[str(index)]), vector), f"text {index}"
    cached = ended["2"].cached_tokens
    assert cached == 0 if pooling != "last" else cached
    assert small.stats().kv_blocks_used == 0


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_an_encoder_embeds(encoder: tuple[Path, Any], pooling: str) -> None:
    folder, model = encoder
    engine = engine_of(folder, budget=64)
    assert engine.info.tasks == [Task.EMBED, Task.SCORE]
    texts = prompts(1, 40, 128, 30, 5)
    together = vectors(engine, texts, pooling=pooling)
    for text, vector in zip(texts, together, strict=True):
        with torch.inference_mode():
            hidden = model(torch.tensor([text])).last_hidden_state[0]
        assert np.abs(vector - expected(hidden, pooling)).max() < 1e-5
        assert np.array_equal(vector, vectors(engine, [text], pooling=pooling)[0])


def test_dimensions_are_cut_before_the_vector_is_made_one_long(encoder: tuple[Path, Any]) -> None:
    engine = engine_of(encoder[0])
    [text] = prompts(20)
    [raw] = vectors(engine, [text], pooling="mean", normalize=False)
    [cut] = vectors(engine, [text], pooling="mean", dimensions=7)
    assert abs(np.linalg.norm(raw) - 1) > 0.1
    assert np.allclose(cut, raw[:7] / np.linalg.norm(raw[:7]), atol=1e-6)


def test_a_classifier_gives_logits(tmp_path: Path) -> None:
    model = save(tmp_path, "BertForSequenceClassification", num_labels=3)
    engine = engine_of(tmp_path)
    assert engine.info.tasks == [Task.CLASSIFY]
    assert engine.info.pooling.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    texts = prompts(12, 9)
    found = vectors(engine, texts, task="classify", pooling="cls", second_text=5)
    for text, logits in zip(texts, found, strict=True):
        types = torch.tensor([[int(i >= 5) for i in range(len(text))]])
        with torch.inference_mode():
            theirs = model(torch.tensor([text]), token_type_ids=types).logits[0].numpy()
        assert np.abs(logits - theirs).max() < 1e-5


def test_a_model_of_one_type_of_text_ignores_the_second(tmp_path: Path) -> None:
    save(tmp_path, "XLMRobertaForSequenceClassification", num_labels=1, type_vocab_size=1)
    engine = engine_of(tmp_path)
    [text] = prompts(12)
    [told] = vectors(engine, [text], task="classify", pooling="cls", second_text=5)
    [plain] = vectors(engine, [text], task="classify", pooling="cls")
    assert np.array_equal(told, plain)


def test_a_classifier_that_judges_the_mean(tmp_path: Path) -> None:
    ids = {name: 1 for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    ids |= {"cls_token_id": 1, "sep_token_id": 1}
    architecture = "ModernBertForSequenceClassification"
    model = save(tmp_path, architecture, num_labels=1, classifier_pooling="mean", **ids)
    engine = engine_of(tmp_path)
    assert engine.info.tasks == [Task.CLASSIFY, Task.SCORE]
    assert engine.info.pooling.pooling == "mean"
    texts = prompts(12, 90)
    for text, logits in zip(
        texts, vectors(engine, texts, task="classify", pooling="mean"), strict=True
    ):
        with torch.inference_mode():
            theirs = model(torch.tensor([text])).logits[0].numpy()
        assert np.abs(logits - theirs).max() < 1e-5


def test_an_encoder_keeps_order_deadlines_and_aborts(encoder: tuple[Path, Any]) -> None:
    engine = engine_of(encoder[0], budget=8)
    [text] = prompts(10)
    requests = {
        "background": request("background", text, BACKGROUND_PRIORITY),
        "late": request("late", text, deadline=0.5),
        "second": request("second", text, priority=1),
        "first": request("first", text),
        "gone": request("gone", text),
    }
    for handle, one in enumerate(requests.values()):
        engine.add(one, handle)
    engine.abort("gone")
    engine.abort("unknown")
    assert engine.stats().waiting == 4
    ended = [output for _ in range(4) if engine.has_work for output in engine.step().details]
    assert [output.request_id for output in ended] == [
        "gone",
        "late",
        "first",
        "second",
        "background",
    ]
    reasons = [FinishReason.ABORT, FinishReason.DEADLINE, *[FinishReason.STOP] * 3]
    assert [output.finish_reason for output in ended] == reasons
    assert not engine.has_work and engine.reset_prefix_cache() and not engine.idle()
    assert engine.stats().steps == 3 and engine.stats().step_tokens == 10


def modules(folder: Path, *kinds: str, **pooling: Any) -> None:
    entries = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "Transformer").mkdir(exist_ok=True)
    config = {"max_seq_length": 50}
    (folder / "Transformer" / "sentence_bert_config.json").write_text(json.dumps(config))
    (folder / "Pooling").mkdir(exist_ok=True)
    (folder / "Pooling" / "config.json").write_text(json.dumps(pooling))


def test_the_folder_says_how_to_pool(tmp_path: Path) -> None:
    save(tmp_path, "BertModel")
    modules(tmp_path, "Transformer", "Pooling", pooling_mode_cls_token=True, include_prompt=True)
    info = engine_of(tmp_path).info
    assert (info.pooling.pooling, info.pooling.normalize) == ("cls", False)
    assert (info.max_model_len, info.max_prompt_len) == (50, 50)
    assert engine_of(tmp_path, max_model_len=128).info.max_model_len == 128
    assert engine_of(tmp_path, pooling="last").info.pooling.pooling == "last"
    modules(tmp_path, "Transformer", "Pooling", "Normalize", pooling_mode="mean")
    info = engine_of(tmp_path).info
    assert (info.pooling.pooling, info.pooling.normalize) == ("mean", True)


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        (("Pooling", "Dense"), {"pooling_mode_mean_tokens": True}, "'Dense' is not supported"),
        (("Pooling",), {"pooling_mode_max_tokens": True}, "takes max_tokens"),
        (("Pooling",), {}, "takes nothing"),
        (("Transformer",), {}, "has no Pooling"),
    ],
)
def test_other_modules_are_refused_by_name(
    tmp_path: Path, kinds: tuple[str, ...], pooling: dict[str, Any], message: str
) -> None:
    save(tmp_path, "BertModel")
    modules(tmp_path, *kinds, **pooling)
    with pytest.raises(CheckpointError, match=message):
        engine_of(tmp_path)


@pytest.mark.parametrize("content", ['{"a": 1}', "[1]", '[{"type": "x", "path": "../y"}]', "[["])
def test_a_broken_list_of_modules_is_named(tmp_path: Path, content: str) -> None:
    save(tmp_path, "BertModel")
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        engine_of(tmp_path)


def test_options_that_make_no_sense_are_refused(decoder: Any, encoder: Any) -> None:
    with pytest.raises(ConfigError, match="--pooling cls"):
        engine_of(decoder[0], pooling="cls")
    with pytest.raises(ConfigError, match="encoders are not quantized"):
        engine_of(encoder[0], quantization="int8")
    with pytest.raises(ConfigError, match=r"max_model_len must be in \[2, 128\]"):
        engine_of(encoder[0], max_model_len=129)


def test_matryoshka_is_what_the_config_says() -> None:
    for config in ({"is_matryoshka": True}, {"matryoshka_dimensions": [64]}):
        assert PoolingConfig.of((), config, is_encoder=True).matryoshka
    assert not PoolingConfig.of((), {}, is_encoder=True).matryoshka
