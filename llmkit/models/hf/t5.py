"""T5: v1.0 shares the embedding with its head and scales the head's input, v1.1 does neither and has gated layers.

Flan-T5 and mT5 are v1.1; mT5's ``model_type`` is another name for it, and it is written as T5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llmkit.interfaces import ModelConfig
from llmkit.models.encoder_decoder_config import EncoderDecoderConfig
from llmkit.models.hf.activations import GATE_NAMES, GATES, PLAIN, PLAIN_NAMES
from llmkit.models.hf.family import Family, Keys
from llmkit.models.hf.rows import Row, Stack, stacked_rows

ACTIVATIONS = {
    **PLAIN,
    **{f"gated-{word}": ours for word, ours in GATES.items()},
    "gated-gelu": "geglu_tanh",  # published under this name with the approximation by tanh
}
NAMES = {
    **PLAIN_NAMES,
    **{ours: f"gated-{word}" for ours, word in GATE_NAMES.items()},
    "geglu": "gated-gelu_python",
    "geglu_tanh": "gated-gelu",
}


class T5Family(Family):
    def rows(self, config: ModelConfig, present: Sequence[str]) -> list[Row]:
        """The matrix that is alone in a plain layer has another name beside a gate."""
        gated = any(".mlp.gate." in name for name in present)
        return [row for row in super().rows(config, present) if (".wi." if gated else ".wi_1.") not in row.name]


def fits(config: EncoderDecoderConfig) -> bool:
    biases = config.attention_bias or config.mlp_bias or config.head_bias
    norms = config.norm == "rmsnorm" and config.norm_position == "pre" and not config.embedding_norm
    scales = not config.scale_embedding and not config.scale_attention and config.scale_logits == config.tie_embeddings
    return (
        norms and scales and not biases and config.position == "relative" and config.weights_dropout == config.dropout
    )


def write(config: EncoderDecoderConfig) -> dict[str, Any]:
    """``n_positions`` limits nothing in transformers; published files have it."""
    return {
        "vocab_size": config.vocab_rows,
        "n_positions": config.max_seq_len,
        "d_model": config.d_model,
        "d_kv": config.head_width,
        "d_ff": config.ff_width,
        "num_layers": config.n_layers,
        "num_decoder_layers": config.decoder_layers,
        "num_heads": config.n_heads,
        "relative_attention_num_buckets": config.n_position_buckets,
        "relative_attention_max_distance": config.max_position_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_factor": 1.0,
        "feed_forward_proj": NAMES[config.activation],
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.tie_embeddings,
        **start_key(config),
    }


def start_id(keys: Keys) -> int | None:
    """The id that begins a target, where it is not the pad id."""
    start = keys.raw.get("decoder_start_token_id")
    return None if start is None or start == keys.raw.get("pad_token_id") else keys.integer("decoder_start_token_id")


def start_key(config: EncoderDecoderConfig) -> dict[str, Any]:
    """Over what is written for all encoder-decoders, the pad id."""
    return {} if config.start_id is None else {"decoder_start_token_id": config.start_id}


def read(keys: Keys) -> EncoderDecoderConfig:
    """``scale_decoder_outputs`` is how transformers 5 says that head and embedding are not shared."""
    tied = keys.flag("scale_decoder_outputs", keys.flag("tie_word_embeddings", True))
    return read_sizes(keys, tied=tied)


def read_mt5(keys: Keys) -> EncoderDecoderConfig:
    """Never scaled, and with a head of its own, whatever ``tie_word_embeddings`` says: transformers 5 writes true."""
    return read_sizes(Keys({"feed_forward_proj": "gated-gelu", **keys.raw}, keys.where), tied=False)


def read_sizes(keys: Keys, *, tied: bool) -> EncoderDecoderConfig:
    n_layers = keys.integer("num_layers", 6)
    return EncoderDecoderConfig(
        vocab_size=keys.integer("vocab_size"),
        max_seq_len=keys.integer("n_positions", 512),
        d_model=keys.integer("d_model", 512),
        n_layers=n_layers,
        n_decoder_layers=keys.integer_or("num_decoder_layers", n_layers),
        n_heads=keys.integer("num_heads", 8),
        d_head=keys.integer("d_kv", 64),
        d_ff=keys.integer("d_ff", 2048),
        norm="rmsnorm",
        norm_bias=False,
        norm_eps=keys.number("layer_norm_epsilon", 1e-6),
        norm_position="pre",
        embedding_norm=False,
        activation=keys.choice("feed_forward_proj", "relu", ACTIVATIONS),
        position="relative",
        n_position_buckets=keys.integer("relative_attention_num_buckets", 32),
        max_position_distance=keys.integer("relative_attention_max_distance", 128),
        scale_embedding=False,
        scale_attention=False,
        scale_logits=tied,
        attention_bias=False,
        mlp_bias=False,
        head_bias=False,
        dropout=keys.number("dropout_rate", 0.1),
        attention_dropout=None,
        tie_embeddings=tied,
        init_std=None,
        start_id=start_id(keys),
    )


def _block(side: str, *layers: tuple[str, str, str]) -> Stack:
    """A block's layers in order: (their name, our name, our norm)."""
    pairs = []
    for number, (theirs, ours, norm) in enumerate(layers):
        layer = f"{side}.block.{{}}.layer.{number}"
        names = zip(("wi", "wi_1", "wi_0", "wo"), ("up", "up", "gate", "down"), strict=True)
        parts = names if ours == "mlp" else zip("qkvo", "qkvo", strict=True)
        pairs += [(f"{layer}.{theirs}.{name}", f"{side}.blocks.{{}}.{ours}.{part}") for name, part in parts]
        pairs.append((f"{layer}.layer_norm", f"{side}.blocks.{{}}.{norm}"))
    return Stack("n_layers" if side == "encoder" else "decoder_layers", stacked_rows(pairs))


ATTENTION = ("SelfAttention", "attention", "attention_norm")
CROSS_ATTENTION = ("EncDecAttention", "cross_attention", "cross_norm")
MLP = ("DenseReluDense", "mlp", "mlp_norm")
POSITIONS = "block.0.layer.0.SelfAttention.relative_attention_bias"  # the first block's serve the whole stack

FAMILY = T5Family(
    model_types=("t5",),
    architecture="T5ForConditionalGeneration",
    config=EncoderDecoderConfig,
    fits=fits,
    write=write,
    read=read,
    outer_rows=stacked_rows(
        (
            ("shared", "embedding"),
            *((f"{side}.{POSITIONS}", f"{side}.position_bias") for side in ("encoder", "decoder")),
            *((f"{side}.final_layer_norm", f"{side}.norm") for side in ("encoder", "decoder")),
            ("lm_head", "head"),
        )
    ),
    stacks=(_block("encoder", ATTENTION, MLP), _block("decoder", ATTENTION, CROSS_ATTENTION, MLP)),
    copies={f"{name}.weight": "shared.weight" for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")},
    ignored=(".EncDecAttention.relative_attention_bias.weight",),  # of old files; nothing uses it
    ties_absent=("lm_head.weight",),  # transformers 5 makes models of v1.1 whose head is the embedding
    left_aside=("qa_outputs.",),
)
MT5_FAMILY = replace(
    FAMILY,
    model_types=("mt5",),
    architecture="MT5ForConditionalGeneration",
    fits=lambda config: False,
    read=read_mt5,
)
