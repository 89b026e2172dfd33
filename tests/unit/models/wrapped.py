"""Small models of transformers for tests: one for every way in which architectures differ for the wrapper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkit.interfaces import IGNORE_INDEX, NO_DOCUMENT, Batch, Tokens
from llmkit.models.transformers_config import TransformersConfig

V, LENGTH = 61, 96
BOS, EOS, PAD = 0, 1, 2


def config(task: str, model_type: str, **settings: Any) -> TransformersConfig:
    made = TransformersConfig(task, model_type, settings, V, LENGTH)  # type: ignore[arg-type]
    return made.with_special_ids(BOS, EOS, PAD)


SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDES: dict[str, Any] = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
         {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items()}  # fmt: skip
GPT_NEO: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 5}
DECODERS = {
    "windows": config("causal_lm", "gpt_neo", **GPT_NEO, attention_types=[[["global", "local"], 1]]),
    "positions from the mask": config("causal_lm", "opt", **SMALL, ffn_dim=32, word_embed_proj_dim=8),
    "no attention": config("causal_lm", "mamba", hidden_size=16, num_hidden_layers=2, state_size=4),
    "no mask, own state": config("causal_lm", "rwkv", hidden_size=16, num_hidden_layers=2),
    "scaled logits": config("causal_lm", "cohere", **SMALL, intermediate_size=32),
    "capped logits": config(
        *("causal_lm", "gemma2"),
        **SMALL,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        sliding_window=5,
        final_logit_softcapping=1.0,
    ),
    "biased head": config("causal_lm", "gptj", n_embd=16, n_layer=2, n_head=2, rotary_dim=4),
}
ENCODERS = {
    "transform": config("masked_lm", "distilbert", dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    "lost positions": config("masked_lm", "mpnet", **SMALL, intermediate_size=32),
    "no mask at all": config("masked_lm", "fnet", hidden_size=16, num_hidden_layers=2, intermediate_size=32),
}
SEQ2SEQS = {
    "sinusoids": config("seq2seq_lm", "pegasus", d_model=16, **SIDES),
    "relative": config("seq2seq_lm", "longt5", d_model=16, num_layers=2, num_heads=2, d_ff=32, d_kv=8),
}
ALL = DECODERS | ENCODERS | SEQ2SEQS


def built(config: TransformersConfig, seed: int = 0) -> Any:
    """In evaluation mode; no parameter is zero or one, and matrices are large enough for everything to show."""
    model: Any = config.build()
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(min(8.0, 0.2 / max(float(parameter.std()), 1e-3)))
    return model.eval()


def ids_of(n_rows: int, length: int, seed: int) -> Tensor:
    """Text ids alone."""
    return torch.randint(5, V, (n_rows, length), generator=torch.Generator().manual_seed(seed))


LENGTHS = ([5, 1, 8, 4], [20])  # of the documents in two rows; the first has padding, 5 and 8 are read together
SOURCE_LENGTHS = ([6, 8, 5, 3], [22])


def documents(lengths: tuple[list[int], ...], width: int) -> Tensor:
    rows = [[number for number, n in enumerate(row) for _ in range(n)] for row in lengths]
    return torch.tensor([row + [NO_DOCUMENT] * (width - len(row)) for row in rows])


def packed_batch(config: TransformersConfig, seed: int = 1) -> Batch:
    """Two rows, every token of a document with a label."""
    documents_BT = documents(LENGTHS, 20)
    source = None
    if config.kind == "encoder_decoder":
        sources_BS = documents(SOURCE_LENGTHS, 22)
        source = Tokens(ids_of(2, 22, seed + 1), torch.zeros_like(sources_BS), sources_BS)
    labels = torch.where(documents_BT == NO_DOCUMENT, IGNORE_INDEX, ids_of(2, 20, seed + 2))
    n_targets = int((labels != IGNORE_INDEX).sum())
    return Batch(ids_of(2, 20, seed), labels, torch.zeros_like(documents_BT), documents_BT, n_targets, None, source)


def alone(model: Any, batch: Batch) -> dict[tuple[int, int], Tensor]:
    """Logits of every document by (row, document), from the library's own forward pass on it alone."""
    found, documents_BT = {}, batch.document_ids
    assert documents_BT is not None
    for row, ids in enumerate(batch.input_ids):
        for number in sorted(set(documents_BT[row].tolist())):
            given = {"input_ids": ids[documents_BT[row] == number][None]}
            if batch.source is not None:
                assert batch.source.document_ids is not None
                read = batch.source.input_ids[row][batch.source.document_ids[row] == number][None]
                given = {"input_ids": read, "decoder_input_ids": given["input_ids"]}
            if number != NO_DOCUMENT:
                found[row, number] = (
                    model.hf(**given, use_cache=False).logits[0] if _caches(model) else model.hf(**given).logits[0]
                )
    return found


def _caches(model: Any) -> bool:
    return bool(model.config.kind != "encoder")
