"""Encoders against transformers, on tiny random checkpoints of every family, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.models.encoder_config import EncoderConfig, is_encoder
from headrace.models.encoders import EncoderModel, build_encoder
from headrace_kernels.dispatch import KernelFacts, choose

MAX_ERROR = 1e-4
SIZES = {
    "vocab_size": 160,
    "hidden_size": 60,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "initializer_range": 0.2,
}
DISTILBERT = {
    "vocab_size": 160,
    "dim": 60,
    "hidden_dim": 88,
    "n_layers": 3,
    "n_heads": 4,
    "max_position_embeddings": 66,
    "initializer_range": 0.2,
}
MODERN = {
    **SIZES,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "local_attention": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", SIZES),
    "bert tanh": ("BertModel", {**SIZES, "hidden_act": "gelu_new"}),
    "bert with a head": ("BertForMaskedLM", SIZES),
    "roberta": ("RobertaModel", {**SIZES, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaModel", {**SIZES, "type_vocab_size": 1, "hidden_act": "relu"}),
    "distilbert": ("DistilBertModel", DISTILBERT),
    "modernbert": ("ModernBertModel", MODERN),
    "modernbert biases": (
        "ModernBertModel",
        {**MODERN, "norm_bias": True, "attention_bias": True, "mlp_bias": True},
    ),
    "modernbert with a head": ("ModernBertForMaskedLM", MODERN),
}
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", {**SIZES, "num_labels": 3}),
    "roberta": ("RobertaForSequenceClassification", {**SIZES, "num_labels": 1}),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", {**SIZES, "num_labels": 2}),
    "distilbert": ("DistilBertForSequenceClassification", {**DISTILBERT, "num_labels": 5}),
    "modernbert": ("ModernBertForSequenceClassification", {**MODERN, "num_labels": 2}),
}


def reference(architecture: str, options: dict[str, Any]) -> Any:
    import transformers

    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower():
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_()
    return model


def ours(model: Any, as_weights: Any, dtype: torch.dtype = torch.float32) -> EncoderModel:
    diff = {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}
    assert is_encoder(diff)
    config = EncoderConfig.from_hf(diff)
    facts = KernelFacts(
        device="cpu", arch="any", dtype=dtype, head_dim=config.head_dim, page_size=16
    )
    encoder = build_encoder(
        config,
        dtype=dtype,
        device=torch.device("cpu"),
        kernels=choose(facts),
        max_positions=config.max_position_embeddings,
    )
    for parameter in encoder.parameters():
        parameter.fill_(float("nan"))
    encoder.load_weights(as_weights(model.state_dict()))
    return encoder


@torch.inference_mode()
def hidden_states(
    encoder: EncoderModel, requests: Sequence[Sequence[int]], second: Sequence[int] = ()
) -> list[Tensor]:
    """Of each request, computed together; `second`: where the second text of each begins."""
    lengths = [len(request) for request in requests]
    second = second or lengths
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    padding = [0] * (-starts[-1] % 8)
    token_ids = [token for request in requests for token in request]
    positions = [i for length in lengths for i in range(length)]
    types = [
        int(i >= at) for length, at in zip(lengths, second, strict=True) for i in range(length)
    ]
    hidden = encoder(
        torch.tensor(token_ids + padding),
        torch.tensor(positions + padding),
        torch.tensor(types + padding),
        starts,
    )
    return [part.clone() for part in torch.split(hidden[: starts[-1]], lengths)]


def random_requests(*lengths: int) -> list[list[int]]:
    # From 5 on: RoBERTa counts positions by what is no padding token.
    return [torch.randint(5, 160, (length,)).tolist() for length in lengths]


@pytest.mark.parametrize(("architecture", "options"), VARIANTS.values(), ids=VARIANTS.keys())
def test_hidden_states(architecture: str, options: dict[str, Any], as_weights: Any) -> None:
    model = reference(architecture, options)
    encoder = ours(model, as_weights)
    requests = random_requests(1, 37, 64, 9)
    base = getattr(model, model.base_model_prefix) if "Masked" in architecture else model
    for request, hidden in zip(requests, hidden_states(encoder, requests), strict=True):
        with torch.inference_mode():
            expected = base(torch.tensor([request])).last_hidden_state[0]
        assert expected.std() > 0.3, "values this small would hide an error"
        assert (hidden - expected).abs().max() < MAX_ERROR
    assert encoder.config.num_parameters == sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize(("architecture", "options"), CLASSIFIERS.values(), ids=CLASSIFIERS.keys())
def test_logits_of_pairs(architecture: str, options: dict[str, Any], as_weights: Any) -> None:
    model = reference(architecture, options)
    encoder = ours(model, as_weights)
    requests, second = random_requests(20, 7), [12, 3]
    if not encoder.config.num_token_types > 1:
        second = [20, 7]
    first = torch.stack([h[0] for h in hidden_states(encoder, requests, second)])
    with torch.inference_mode():
        logits = encoder.classify(first)
        for row, request, at in zip(logits, requests, second, strict=True):
            kwargs = {}
            if encoder.config.num_token_types > 1:
                types = [int(i >= at) for i in range(len(request))]
                kwargs["token_type_ids"] = torch.tensor([types])
            expected = model(torch.tensor([request]), **kwargs).logits[0]
            assert expected.abs().max() > 0.1
            assert (row - expected).abs().max() < MAX_ERROR
    assert len(encoder.config.labels) == logits.shape[1]
    assert encoder.config.num_parameters == sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
@torch.inference_mode()
def test_a_request_is_the_same_in_any_company(
    family: str, dtype: torch.dtype, threads: int, as_weights: Any
) -> None:
    encoder = ours(reference(*CLASSIFIERS[family]), as_weights, dtype)
    requests = random_requests(37, 1, 64, 9, 50)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = hidden_states(encoder, requests)
        logits = encoder.classify(torch.stack([hidden[0] for hidden in together]))
        for request, hidden, own in zip(requests, together, logits, strict=True):
            [alone] = hidden_states(encoder, [request])
            assert torch.equal(hidden, alone)
            assert torch.equal(encoder.classify(alone[:1])[0], own)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "silu"}, "'hidden_act' 'silu' is not supported"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
        ({"hidden_size": 61}, "is not a multiple of"),
        ({"num_attention_heads": None}, "no 'num_attention_heads'"),
        ({"id2label": {"0": "a", "2": "b"}}, "no name for '1'"),
        ({"sbert_ce_default_activation_function": "torch.nn.ReLU"}, "'torch.nn.ReLU'"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    config = {**SIZES, "architectures": ["BertForSequenceClassification"], **changes}
    with pytest.raises(CheckpointError, match=message):
        EncoderConfig.from_hf(config)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"num_labels": 3}, "softmax"),
        ({"num_labels": 1}, "sigmoid"),
        ({"num_labels": 1, "problem_type": "regression"}, "none"),
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.Identity"}}, "none"),
    ],
)
def test_how_scores_are_made_of_logits(more: dict[str, Any], expected: str) -> None:
    config = {**SIZES, "architectures": ["BertForSequenceClassification"], **more}
    assert EncoderConfig.from_hf(config).score_activation == expected


def test_old_names_of_norms(as_weights: Callable[..., Any]) -> None:
    model = reference(*VARIANTS["bert"])
    encoder = ours(model, as_weights)
    state = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in model.state_dict().items()
    }
    state["cls.predictions.bias"] = torch.zeros(3)
    [request] = random_requests(12)
    [expected] = hidden_states(encoder, [request])
    for parameter in encoder.parameters():
        parameter.fill_(float("nan"))
    encoder.load_weights(as_weights(state))
    assert torch.equal(hidden_states(encoder, [request])[0], expected)


def test_configs_of_modernbert_old_and_new() -> None:
    base = {**MODERN, "architectures": ["ModernBertModel"]}
    old = {
        **base,
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 500.0,
        "local_rope_theta": 50.0,
        "position_embedding_type": "sans_pos",
    }
    traits = EncoderConfig.from_hf(old).modern
    assert traits is not None
    assert traits.windows == (None, 8, None, 8)
    assert traits.thetas == (500.0, 50.0, 500.0, 50.0)
    new = {
        **base,
        "layer_types": ["sliding_attention"] + ["full_attention"] * 3,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7.0}},
    }
    traits = EncoderConfig.from_hf(new).modern
    assert traits is not None
    assert traits.windows == (8, None, None, None)
    assert traits.thetas == (10_000.0, 7.0, 7.0, 7.0)
    with pytest.raises(CheckpointError, match="'rope_type' 'yarn' is not supported"):
        EncoderConfig.from_hf({**new, "rope_parameters": {"full_attention": {"rope_type": "yarn"}}})
    with pytest.raises(CheckpointError, match="'layer_types' names chunked"):
        EncoderConfig.from_hf({**base, "layer_types": ["chunked"] * 4})
