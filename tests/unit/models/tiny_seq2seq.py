"""Small encoder-decoders for tests: three styles, and packed sources and targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkit.interfaces import NO_DOCUMENT, Batch, Tokens
from llmkit.models.encoder_decoder import EncoderDecoder
from llmkit.models.encoder_decoder_config import EncoderDecoderConfig

T5: dict[str, Any] = {
    "vocab_size": 61,
    "max_seq_len": 40,
    "d_model": 24,
    "n_layers": 2,
    "n_decoder_layers": 3,
    "n_heads": 4,
    "d_head": 5,
    "d_ff": 40,
    "norm": "rmsnorm",
    "norm_bias": False,
    "norm_eps": 1e-6,
    "norm_position": "pre",
    "embedding_norm": False,
    "activation": "relu",
    "position": "relative",
    "n_position_buckets": 8,
    "max_position_distance": 12,
    "scale_embedding": False,
    "scale_attention": False,
    "scale_logits": True,
    "attention_bias": False,
    "mlp_bias": False,
    "head_bias": False,
    "dropout": 0.0,
    "attention_dropout": None,
    "tie_embeddings": True,
    "init_std": None,
    "start_id": None,
}
T5_GATED: dict[str, Any] = {**T5, "activation": "geglu_tanh", "tie_embeddings": False, "scale_logits": False}
BART: dict[str, Any] = {
    **T5,
    "d_head": None,
    "norm": "layernorm",
    "norm_bias": True,
    "norm_eps": 1e-5,
    "norm_position": "post",
    "embedding_norm": True,
    "activation": "gelu",
    "position": "learned",
    "n_position_buckets": None,
    "max_position_distance": None,
    "scale_attention": True,
    "scale_logits": False,
    "attention_bias": True,
    "mlp_bias": True,
    "head_bias": True,
    "init_std": 0.02,
}
MARIAN: dict[str, Any] = {
    **BART,
    "position": "sinusoidal",
    "embedding_norm": False,
    "scale_embedding": True,
    "activation": "silu",
}


def t5(**changes: Any) -> EncoderDecoderConfig:
    return EncoderDecoderConfig(**{**T5, **changes})


def bart(**changes: Any) -> EncoderDecoderConfig:
    return EncoderDecoderConfig(**{**BART, **changes})


def marian(**changes: Any) -> EncoderDecoderConfig:
    return EncoderDecoderConfig(**{**MARIAN, **changes})


STYLES = {
    "t5": t5(),
    "t5_gated": EncoderDecoderConfig(**T5_GATED),
    "bart": bart(),
    "marian": marian(),
    "mixed": bart(norm_position="pre", position="relative", n_position_buckets=6, max_position_distance=9),
}


def built(config: EncoderDecoderConfig, seed: int = 0, std: float = 0.2) -> EncoderDecoder:
    """Every parameter random: with fresh weights, biases of 0 and norms of 1 would hide a swap."""
    model, generator = config.build(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
    return model


def random_ids(config: EncoderDecoderConfig, rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(0, config.vocab_rows, (rows, columns), generator=torch.Generator().manual_seed(seed))


def whole(ids_BS: Tensor) -> Tokens:
    """Rows of one document each, without padding."""
    return Tokens(ids_BS, torch.arange(ids_BS.shape[1]).expand(ids_BS.shape), None)


def padded(ids_BS: Tensor, lengths: list[int]) -> Tokens:
    """Rows of one document each, padding on the right."""
    columns = torch.arange(ids_BS.shape[1])
    real = columns < torch.tensor(lengths)[:, None]
    return Tokens(ids_BS, torch.where(real, columns, 0), torch.where(real, 0, NO_DOCUMENT))


def packed(ids_BS: Tensor, lengths: list[int]) -> Tokens:
    """In every row documents of these lengths, one after another; what is left is padding."""
    rest = ids_BS.shape[1] - sum(lengths)
    positions = torch.cat([torch.arange(n) for n in [*lengths]] + [torch.zeros(rest, dtype=torch.int64)])
    documents = torch.cat(
        [torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((rest,), NO_DOCUMENT, dtype=torch.int64)]
    )
    return Tokens(ids_BS, positions.expand(ids_BS.shape), documents.expand(ids_BS.shape))


def batch_of(source: Tokens, target: Tokens) -> Batch:
    n_targets = target.input_ids.numel()
    return Batch(target.input_ids, target.input_ids, target.position_ids, target.document_ids, n_targets, source=source)


def logits_of(model: EncoderDecoder, source: Tokens, target: Tokens) -> Tensor:
    return model(source, target.input_ids, target.position_ids, target.document_ids)
