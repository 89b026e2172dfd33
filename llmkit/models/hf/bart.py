"""BART: post-norm blocks, a norm after the embeddings, learned positions. Two rows of no use stand in their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkit.interfaces import ModelConfig
from llmkit.models.encoder_decoder_config import EncoderDecoderConfig
from llmkit.models.hf import activations
from llmkit.models.hf.bert import BOTH
from llmkit.models.hf.family import Family, Keys, warn_once
from llmkit.models.hf.rows import Row, Stack, stacked_rows
from llmkit.models.hf.t5 import start_id, start_key

NORM_EPS = 1e-5  # the architecture has no other
ROWS_BEFORE = 2  # of a position table


class BartFamily(Family):
    def rows(self, config: ModelConfig, present: Sequence[str]) -> list[Row]:
        """The bias of the logits is zeros in the file of a model that has none."""
        ours = "output_bias" if "output_bias" in present else "embedding.bias"
        return [*super().rows(config, present), Row("final_logits_bias", (ours,), lifted=True)]


def fits(config: EncoderDecoderConfig) -> bool:
    return is_bart_like(config) and config.position == "learned" and config.embedding_norm


def is_bart_like(config: EncoderDecoderConfig) -> bool:
    """What BART and Marian always have. Biases that are not there are written as zeros."""
    norms = config.norm == "layernorm" and config.norm_position == "post" and config.norm_eps == NORM_EPS
    scales = config.scale_attention and not config.scale_logits and config.tie_embeddings
    sizes = config.n_heads * config.head_width == config.d_model
    return norms and scales and sizes and not config.gated


def write(config: EncoderDecoderConfig) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for side, n_layers in (("encoder", config.n_layers), ("decoder", config.decoder_layers)):
        sizes[f"{side}_layers"] = n_layers
        sizes[f"{side}_attention_heads"] = config.n_heads
        sizes[f"{side}_ffn_dim"] = config.ff_width
    return {
        "vocab_size": config.vocab_rows,
        "max_position_embeddings": config.max_seq_len,
        "d_model": config.d_model,
        **sizes,
        "activation_function": activations.PLAIN_NAMES[config.activation],
        "dropout": config.dropout,
        "attention_dropout": config.weights_dropout,
        "activation_dropout": 0.0,
        "init_std": 0.02 if config.init_std is None else config.init_std,
        "scale_embedding": config.scale_embedding,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "forced_eos_token_id": None,
        **start_key(config),
    }


def read(keys: Keys) -> EncoderDecoderConfig:
    keys.expect("normalize_embedding", True)
    keys.expect("static_position_embeddings", False)
    return read_bart_like(keys, "learned", embedding_norm=True)


def read_bart_like(keys: Keys, position: Any, *, embedding_norm: bool) -> EncoderDecoderConfig:
    keys.expect("tie_word_embeddings", True)
    keys.expect("normalize_before", False)
    keys.expect("add_final_layer_norm", False)
    n_layers, n_heads = keys.integer("encoder_layers", 12), keys.integer("encoder_attention_heads", 16)
    width = keys.integer("encoder_ffn_dim", 4096)
    for name, value in (("decoder_attention_heads", n_heads), ("decoder_ffn_dim", width)):
        keys.expect(name, value)
    dropout, attention_dropout = keys.number("dropout", 0.1), keys.number("attention_dropout", 0.0)
    if inner := keys.number("activation_dropout", 0.0):
        warn_once(f"{keys.where}: activation_dropout is {inner}; llmkit has none inside of feed-forward layers")
    return EncoderDecoderConfig(
        vocab_size=keys.integer("vocab_size"),
        max_seq_len=keys.integer("max_position_embeddings", 1024),
        d_model=keys.integer("d_model", 1024),
        n_layers=n_layers,
        n_decoder_layers=keys.integer("decoder_layers", 12),
        n_heads=n_heads,
        d_head=None,
        d_ff=width,
        norm="layernorm",
        norm_bias=True,
        norm_eps=NORM_EPS,
        norm_position="post",
        embedding_norm=embedding_norm,
        activation=keys.choice("activation_function", "gelu", activations.PLAIN),
        position=position,
        n_position_buckets=None,
        max_position_distance=None,
        scale_embedding=keys.flag("scale_embedding", False),
        scale_attention=True,
        scale_logits=False,
        attention_bias=True,
        mlp_bias=True,
        head_bias=True,
        dropout=dropout,
        attention_dropout=None if attention_dropout == dropout else attention_dropout,
        tie_embeddings=True,
        init_std=keys.number("init_std", 0.02),
        start_id=start_id(keys),
    )


def _block(side: str, **attentions: str) -> Stack:
    """``attentions``: our names of a block's attentions, each with the beginning of its norm, by their names."""
    layer, ours = f"model.{side}.layers.{{}}", f"{side}.blocks.{{}}"
    pairs = [(f"{layer}.fc1", f"{ours}.mlp.up"), (f"{layer}.fc2", f"{ours}.mlp.down")]
    pairs.append((f"{layer}.final_layer_norm", f"{ours}.mlp_norm"))
    for theirs, name in attentions.items():
        projections = zip(("q_proj", "k_proj", "v_proj", "out_proj"), "qkvo", strict=True)
        pairs += [(f"{layer}.{theirs}.{projection}", f"{ours}.{name}.{x}") for projection, x in projections]
        norm = "attention_norm" if name == "attention" else "cross_norm"
        pairs.append((f"{layer}.{theirs}_layer_norm", f"{ours}.{norm}"))
    return Stack("n_layers" if side == "encoder" else "decoder_layers", stacked_rows(pairs, kinds=BOTH))


STACKS = (
    _block("encoder", self_attn="attention"),
    _block("decoder", self_attn="attention", encoder_attn="cross_attention"),
)
SHARED = Row("model.shared.weight", ("embedding.weight",))
COPIES = {
    name: SHARED.name
    for name in ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
}
UNPREFIXED = ("lm_head.", "final_logits_bias")
HEAD = ("output_bias",)  # ``BartModel`` and ``MarianModel`` have none
OTHER_HEADS = ("classification_head.", "qa_outputs.")

FAMILY = BartFamily(
    model_types=("bart",),
    architecture="BartForConditionalGeneration",
    config=EncoderDecoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=(
        SHARED,
        *(
            Row(f"model.{side}.embed_positions.weight", (f"{side}.position_embedding.weight",), before=ROWS_BEFORE)
            for side in ("encoder", "decoder")
        ),
        *stacked_rows(
            [(f"model.{side}.layernorm_embedding", f"{side}.embedding_norm") for side in ("encoder", "decoder")],
            kinds=BOTH,
        ),
    ),
    stacks=STACKS,
    copies=COPIES,
    prefix="model.",
    unprefixed=UNPREFIXED,
    ignored=(".version",),  # of old files
    heads=HEAD,
    left_aside=OTHER_HEADS,
    zero_biases=True,
)
