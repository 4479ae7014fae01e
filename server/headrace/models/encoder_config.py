"""EncoderConfig: a bidirectional encoder, from its config.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from headrace.errors import CheckpointError
from headrace.models.fields import Fields

ScoreActivation = Literal["sigmoid", "softmax", "none"]
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """Where one family's checkpoints differ from BERT's."""

    name: str
    models: tuple[str, ...]
    """Architectures that end in hidden states. What else they have is not read."""
    classifiers: tuple[str, ...]
    """Architectures that end in scores of labels."""
    prefix: str
    """Of tensor names, in checkpoints that have more than the encoder."""
    head: tuple[str, str]
    """Tensor names of the classifier: a dense layer on the first token, and the labels."""
    head_activation: Literal["tanh", "relu"] = "tanh"
    counts_from_padding: bool = False
    """Positions begin behind pad_token_id."""
    has_token_types: bool = True
    renamed: tuple[tuple[str, str], ...] = ()
    """(part of a tensor's name, BERT's name for it), applied in order."""


_DISTILBERT_NAMES = (
    ("transformer.layer.", "encoder.layer."),
    ("attention.q_lin.", "attention.self.query."),
    ("attention.k_lin.", "attention.self.key."),
    ("attention.v_lin.", "attention.self.value."),
    ("attention.out_lin.", "attention.output.dense."),
    ("sa_layer_norm.", "attention.output.LayerNorm."),
    ("ffn.lin1.", "intermediate.dense."),
    ("ffn.lin2.", "output.dense."),
    ("output_layer_norm.", "output.LayerNorm."),
)

FAMILIES: tuple[EncoderFamily, ...] = (
    EncoderFamily(
        name="bert",
        models=("BertModel", "BertForMaskedLM"),
        classifiers=("BertForSequenceClassification",),
        prefix="bert.",
        head=("pooler.dense", "classifier"),
        # Those of checkpoints that were converted from TensorFlow.
        renamed=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    ),
    EncoderFamily(
        name="roberta",
        models=(
            "RobertaModel",
            "RobertaForMaskedLM",
            "XLMRobertaModel",
            "XLMRobertaForMaskedLM",
        ),
        classifiers=(
            "RobertaForSequenceClassification",
            "XLMRobertaForSequenceClassification",
        ),
        prefix="roberta.",
        head=("classifier.dense", "classifier.out_proj"),
        counts_from_padding=True,
    ),
    EncoderFamily(
        name="distilbert",
        models=("DistilBertModel", "DistilBertForMaskedLM"),
        classifiers=("DistilBertForSequenceClassification",),
        prefix="distilbert.",
        head=("pre_classifier", "classifier"),
        head_activation="relu",
        has_token_types=False,
        renamed=_DISTILBERT_NAMES,
    ),
    EncoderFamily(
        name="modernbert",
        models=("ModernBertModel", "ModernBertForMaskedLM"),
        classifiers=("ModernBertForSequenceClassification",),
        prefix="model.",
        head=("head", "classifier"),
        has_token_types=False,
    ),
)


MODERN = FAMILIES[-1]


def known_encoders() -> list[str]:
    """Names of `architectures` in config.json that are encoders."""
    return [name for family in FAMILIES for name in (*family.models, *family.classifiers)]


def is_encoder(config: Mapping[str, object]) -> bool:
    """Whether a config.json is that of an encoder that can be served."""
    names = config.get("architectures")
    return isinstance(names, list) and bool(names) and names[0] in known_encoders()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModernTraits:
    """What ModernBERT has that BERT has not."""

    thetas: tuple[float, ...]
    """Of each layer's rotary embedding."""
    windows: tuple[int | None, ...]
    """Of each layer: tokens that it attends to on either side; None for all."""
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    head_bias: bool
    head_activation: str

    @classmethod
    def from_hf(cls, fields: Fields, layers: int) -> ModernTraits:
        every = fields.integer("global_attn_every_n_layers", 3)
        default = ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
        kinds = fields.sequence("layer_types", layers, str) or default
        half = fields.integer("local_attention", 128) // 2
        thetas = {
            "full_attention": fields.number("global_rope_theta", 160_000.0),
            "sliding_attention": fields.number("local_rope_theta", 10_000.0),
        }
        if rope := fields.section("rope_parameters"):
            for kind in thetas:
                if (own := rope.section(kind)) is None:
                    continue
                if (named := own.text("rope_type", "default")) != "default":
                    raise CheckpointError(f"{own.source}: 'rope_type' {named!r} is not supported.")
                thetas[kind] = own.number("rope_theta", thetas[kind])
        if unknown := sorted(set(kinds) - thetas.keys()):
            raise CheckpointError(f"config.json: 'layer_types' names {', '.join(unknown)}.")
        return cls(
            thetas=tuple(thetas[kind] for kind in kinds),
            windows=tuple(half if kind == "sliding_attention" else None for kind in kinds),
            norm_bias=fields.flag("norm_bias", False),
            attention_bias=fields.flag("attention_bias", False),
            mlp_bias=fields.flag("mlp_bias", False),
            head_bias=fields.flag("classifier_bias", False),
            head_activation=_activation(fields, "classifier_activation"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """The structure of one checkpoint. Sizes are in values, not bytes."""

    architecture: str
    family: EncoderFamily
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    layer_norm_eps: float
    num_positions: int
    """Rows of the table of positions."""
    first_position: int
    num_token_types: int
    activation: str
    """One of headrace_kernels.ops.encoder.ACTIVATIONS."""
    labels: tuple[str, ...]
    """Of a classifier; else empty."""
    score_activation: ScoreActivation
    """What turns a classifier's logits into scores."""
    checkpoint_dtype: str
    classifier_pooling: Literal["cls", "mean"] = "cls"
    """What a classifier judges: the first token, or the mean over all."""
    modern: ModernTraits | None = None
    """None: it has BERT's shape."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"config.json: 'hidden_size' {self.hidden_size} is not a multiple of "
                f"'num_attention_heads' {self.num_heads}."
            )

    @property
    def quantization(self) -> None:
        """None: encoders are read as they are."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def max_position_embeddings(self) -> int:
        """Tokens that a request may have."""
        return self.num_positions - self.first_position

    @property
    def is_classifier(self) -> bool:
        return bool(self.labels)

    @property
    def num_parameters(self) -> int:
        """Weights and biases that are read."""
        size, inner = self.hidden_size, self.intermediate_size
        if self.modern is not None:
            return self._num_modern_parameters(self.modern)
        tables = (self.vocab_size + self.num_positions + self.num_token_types) * size
        layer = 4 * (size * size + size) + 2 * size * inner + inner + size + 4 * size
        labels = len(self.labels)
        head = size * size + size + labels * size + labels if labels else 0
        return tables + 2 * size + self.num_layers * layer + head

    def _num_modern_parameters(self, traits: ModernTraits) -> int:
        size, inner, labels = self.hidden_size, self.intermediate_size, len(self.labels)
        norm = size * (1 + traits.norm_bias)
        layer = 4 * size * size + traits.attention_bias * 4 * size + 3 * size * inner + 2 * norm
        layer += traits.mlp_bias * (2 * inner + size)
        head = size * (size + traits.head_bias) + norm + labels * (size + 1) if labels else 0
        # The first layer has one norm less, and there is one at either end.
        return self.vocab_size * size + self.num_layers * layer + norm + head

    @classmethod
    def from_hf(cls, config: Mapping[str, object]) -> EncoderConfig:
        """Read a Hugging Face config.json. Raises CheckpointError for a key that is missing or
        wrong, and for a variant that is not supported."""
        names = _aliased(config)
        fields = Fields(names, "config.json")
        architecture = str(fields.sequence("architectures", 1, str)[0])  # type: ignore[index]
        family = next(f for f in FAMILIES if architecture in (*f.models, *f.classifiers))
        is_modern = family is MODERN
        layers = fields.integer("num_hidden_layers")
        if (
            not is_modern
            and (kind := fields.text("position_embedding_type", "absolute")) != "absolute"
        ):
            raise CheckpointError(
                f"config.json: 'position_embedding_type' {kind!r} is not supported: absolute."
            )
        labels = _labels(config) if architecture in family.classifiers else ()
        padding = fields.integer("pad_token_id", 1, minimum=0)
        return cls(
            architecture=architecture,
            family=family,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=layers,
            num_heads=fields.integer("num_attention_heads"),
            layer_norm_eps=fields.number("layer_norm_eps", 1e-5 if is_modern else 1e-12),
            num_positions=fields.integer("max_position_embeddings", 8192 if is_modern else 512),
            first_position=padding + 1 if family.counts_from_padding else 0,
            num_token_types=fields.integer("type_vocab_size", 2) if family.has_token_types else 0,
            activation=_activation(fields, "hidden_act"),
            labels=labels,
            score_activation=_score_activation(config, len(labels)),
            checkpoint_dtype=fields.text("dtype", fields.text("torch_dtype", "float32")),
            classifier_pooling="mean" if config.get("classifier_pooling") == "mean" else "cls",
            modern=ModernTraits.from_hf(fields, layers) if is_modern else None,
        )


def _activation(fields: Fields, key: str) -> str:
    name = fields.text(key, "gelu")
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"config.json: {key!r} {name!r} is not supported: {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]


def _aliased(config: Mapping[str, object]) -> dict[str, object]:
    """With BERT's names for what DistilBERT and ModernBERT call otherwise."""
    theirs = {
        "dim": "hidden_size",
        "hidden_dim": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "activation": "hidden_act",
        "hidden_activation": "hidden_act",
        "norm_eps": "layer_norm_eps",
    }
    own = {ours: config[name] for name, ours in theirs.items() if name in config}
    return {**own, **config}


def _labels(config: Mapping[str, object]) -> tuple[str, ...]:
    names = config.get("id2label")
    if names is None:
        count = config.get("num_labels", 2)
        return tuple(f"LABEL_{i}" for i in range(count if isinstance(count, int) else 2))
    if not isinstance(names, Mapping):
        raise CheckpointError("config.json: 'id2label' must be an object of names by number.")
    by_number = {str(number): str(name) for number, name in names.items()}
    try:
        return tuple(by_number[str(i)] for i in range(len(by_number)))
    except KeyError as error:
        raise CheckpointError(f"config.json: 'id2label' has no name for {error}.") from None


def _score_activation(config: Mapping[str, object], num_labels: int) -> ScoreActivation:
    """What the checkpoint names, or else what its kind of problem is trained with."""
    own = config.get("sentence_transformers")
    named = own.get("activation_fn") if isinstance(own, Mapping) else None
    named = named or config.get("sbert_ce_default_activation_function")
    if isinstance(named, str):
        known: dict[str, ScoreActivation] = {"Sigmoid": "sigmoid", "Identity": "none"}
        name = named.rpartition(".")[2]
        if name not in known:
            raise CheckpointError(
                f"config.json: the activation {named!r} of scores is not supported: "
                f"{', '.join(known)}."
            )
        return known[name]
    problem = config.get("problem_type")
    if problem == "regression":
        return "none"
    if num_labels == 1 or problem == "multi_label_classification":
        return "sigmoid"
    return "softmax"
