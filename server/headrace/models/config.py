"""ModelConfig: all that a model's structure depends on, from config.json or GGUF metadata.

Imports no torch: `headrace plan` reads it without loading anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.errors import CheckpointError
from headrace.layers.rope_parameters import ROPE_TYPES, RopeParameters
from headrace.models.family import Traits
from headrace.models.fields import Fields
from headrace.models.quantization_config import quantization_scheme
from headrace.models.registry import family_of_architecture, family_of_gguf
from headrace.quantization.scheme import Scheme

# general.file_type of GGUF: the type of most of its weights.
_GGUF_FILE_TYPES = {0: "float32", 1: "float16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0"}
_GGUF_FILE_TYPES |= {9: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q3_K", 13: "Q3_K", 14: "Q4_K"}
_GGUF_FILE_TYPES |= {15: "Q4_K", 16: "Q5_K", 17: "Q5_K", 18: "Q6_K", 32: "bfloat16"}

_GGUF_ROPE_TYPES = {"none": "default", "linear": "linear", "yarn": "yarn"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The structure of one checkpoint. Sizes are in values, not bytes."""

    architecture: str
    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeParameters
    traits: Traits
    tie_word_embeddings: bool | None
    """Whether the head is the embedding; None: if the checkpoint stores no head (GGUF)."""
    eos_token_ids: tuple[int, ...]
    checkpoint_dtype: str
    """float32, bfloat16, float16, or the name of a GGUF file's quantization."""
    quantization: Scheme | None = None
    """Of a checkpoint in safetensors; what it leaves out is of checkpoint_dtype."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} kv heads: "
                "num_attention_heads must be a multiple of num_key_value_heads."
            )
        rotary_dim = self.rope.rotary_dim
        if rotary_dim % 2 or rotary_dim > self.head_dim:
            raise CheckpointError(
                f"The rotary embedding covers {rotary_dim} of {self.head_dim} values of a head: it"
                " must be even and fit. Check head_dim and partial_rotary_factor."
            )

    @property
    def num_parameters(self) -> int:
        """Weights and biases; a head that may or may not be tied counts as tied."""
        traits, hidden = self.traits, self.hidden_size
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = hidden * (q_size + 2 * kv_size) + q_size * hidden
        attention += traits.qkv_bias * (q_size + 2 * kv_size) + traits.o_bias * hidden
        attention += traits.qk_norm * 2 * self.head_dim
        mlp = 3 * hidden * self.intermediate_size
        mlp += traits.mlp_bias * (2 * self.intermediate_size + hidden)
        embeddings = self.vocab_size * hidden * (2 if self.tie_word_embeddings is False else 1)
        return self.num_layers * (attention + mlp + 2 * hidden) + hidden + embeddings

    @property
    def kv_elements_per_token(self) -> int:
        """Values of K and V that a token keeps in the cache, over all layers."""
        return self.kv_rows_per_token * self.head_dim

    @property
    def kv_rows_per_token(self) -> int:
        """K and V of each head and layer."""
        return 2 * self.num_layers * self.num_kv_heads

    @classmethod
    def from_hf(
        cls, config: Mapping[str, object], generation_config: Mapping[str, object] | None = None
    ) -> ModelConfig:
        """Read a Hugging Face config.json (and generation_config.json, for its stop tokens).

        Raises CheckpointError for an unknown architecture, and for a key that is missing or wrong.
        """
        fields = Fields(config, "config.json")
        names = fields.sequence("architectures", 1, str)
        if not names:
            raise CheckpointError("config.json has no 'architectures'. Is it of a language model?")
        family = family_of_architecture(names[0])
        if (activation := fields.text("hidden_act", "silu")) != "silu":
            raise CheckpointError(
                f"config.json: 'hidden_act' {activation!r} is not supported: silu."
            )
        layers, heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
        hidden_size = fields.integer("hidden_size")
        head_dim = fields.integer("head_dim", max(1, hidden_size // heads))
        return cls(
            architecture=names[0],
            family=family.name,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            rope=_rope_from_hf(fields, head_dim, family.default_rope_theta),
            traits=family.traits_from_hf(fields, layers),
            tie_word_embeddings=fields.flag("tie_word_embeddings", family.default_tied),
            eos_token_ids=_eos_token_ids(config, generation_config or {}),
            checkpoint_dtype=fields.text("dtype", fields.text("torch_dtype", "float32")),
            quantization=quantization_scheme(fields),
        )

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, object], frequency_factors: Sequence[float] | None = None
    ) -> ModelConfig:
        """Read GGUF metadata; `frequency_factors` is the tensor rope_freqs.weight, if there is one.

        Raises CheckpointError for an unknown architecture, and for a key that is missing or wrong.
        """
        everything = Fields(metadata, "The GGUF metadata")
        prefix = everything.text("general.architecture")
        family = family_of_gguf(prefix)
        assert family.traits_from_gguf is not None
        fields = Fields(
            {
                key.removeprefix(f"{prefix}."): value
                for key, value in metadata.items()
                if key.startswith(f"{prefix}.")
            },
            f"The GGUF metadata, {prefix}.*",
        )
        layers, heads = fields.integer("block_count"), fields.integer("attention.head_count")
        hidden_size = fields.integer("embedding_length")
        head_dim = fields.integer("attention.key_length", max(1, hidden_size // heads))
        tokens = metadata.get("tokenizer.ggml.tokens")
        vocab_size = len(tokens) if isinstance(tokens, Sequence) else None
        eos_keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        eos = (everything.raw(f"tokenizer.ggml.{key}") for key in eos_keys)
        return cls(
            architecture=family.architectures[0],
            family=family.name,
            vocab_size=fields.integer("vocab_size", vocab_size),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("feed_forward_length"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=fields.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
            max_position_embeddings=fields.integer("context_length"),
            rope=_rope_from_gguf(
                fields, head_dim, family.default_rope_theta, tuple(frequency_factors or ())
            ),
            traits=family.traits_from_gguf(fields, layers),
            tie_word_embeddings=None,
            eos_token_ids=tuple(dict.fromkeys(i for i in eos if isinstance(i, int))),
            checkpoint_dtype=_GGUF_FILE_TYPES.get(
                everything.integer("general.file_type", -1, minimum=-1), "quantized"
            ),
        )


def _eos_token_ids(*configs: Mapping[str, object]) -> tuple[int, ...]:
    """All that either file names: generation_config.json often adds the end of a chat turn."""
    ids: dict[int, None] = {}
    for config in configs:
        value = config.get("eos_token_id")
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, int) and not isinstance(item, bool):
                ids[item] = None
    return tuple(ids)


def _rope_from_hf(config: Fields, head_dim: int, default_theta: float) -> RopeParameters:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = config.section("rope_scaling") or config.section("rope_parameters")
    rope = rope or Fields({}, config.source)
    rope_type = rope.text("rope_type", rope.text("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(
            f"{rope.source}: 'rope_type' {rope_type!r} is not known. Known are: "
            f"{', '.join(ROPE_TYPES)}."
        )
    share = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * share)
    trained = config.integer("max_position_embeddings")
    original = config.optional_integer("original_max_position_embeddings")
    if original is None:
        original = rope.integer("original_max_position_embeddings", trained)
    if rope_type in ("linear", "dynamic", "llama3"):
        rope.number("factor")
    short, long = _pair_factors(rope, rope_type, rotary_dim // 2)
    return RopeParameters(
        rope_type=rope_type,
        rope_theta=rope.number("rope_theta", config.number("rope_theta", default_theta)),
        rotary_dim=rotary_dim,
        max_position_embeddings=trained,
        original_max_position_embeddings=original,
        factor=rope.optional_number("factor"),
        attention_factor=rope.optional_number("attention_factor"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
        low_freq_factor=rope.number("low_freq_factor", 1.0),
        high_freq_factor=rope.number("high_freq_factor", 4.0),
        short_factor=short,
        long_factor=long,
    )


def _pair_factors(
    rope: Fields, rope_type: str, pairs: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if rope_type != "longrope":
        return (), ()
    short = rope.sequence("short_factor", pairs, (int, float))
    long = rope.sequence("long_factor", pairs, (int, float))
    if short is None or long is None:
        raise CheckpointError(f"{rope.source}: longrope needs 'short_factor' and 'long_factor'.")
    return tuple(short), tuple(long)


def _rope_from_gguf(
    metadata: Fields, head_dim: int, default_theta: float, frequency_factors: tuple[float, ...]
) -> RopeParameters:
    scaling = metadata.text("rope.scaling.type", "none")
    if scaling not in _GGUF_ROPE_TYPES:
        raise CheckpointError(
            f"{metadata.source}: 'rope.scaling.type' {scaling!r} is not known. Known are: "
            f"{', '.join(_GGUF_ROPE_TYPES)}."
        )
    rotary_dim = metadata.integer("rope.dimension_count", head_dim)
    if frequency_factors and len(frequency_factors) != rotary_dim // 2:
        raise CheckpointError(
            f"rope_freqs.weight has {len(frequency_factors)} values, but {rotary_dim // 2} pairs of"
            " a head are rotated. The file is corrupt: download it again."
        )
    trained = metadata.integer("context_length")
    return RopeParameters(
        rope_type=_GGUF_ROPE_TYPES[scaling],
        rope_theta=metadata.number("rope.freq_base", default_theta),
        rotary_dim=rotary_dim,
        max_position_embeddings=trained,
        original_max_position_embeddings=metadata.integer(
            "rope.scaling.original_context_length", trained
        ),
        factor=metadata.optional_number("rope.scaling.factor"),
        beta_fast=metadata.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=metadata.number("rope.scaling.yarn_beta_slow", 1.0),
        frequency_factors=frequency_factors,
    )
