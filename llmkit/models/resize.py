"""A grown vocabulary: embedding, untied head and output bias get rows for the new ids.

A new row is the mean of the old ones (Hewitt 2021, "Initializing new word embeddings for pretrained language models"):
its logit is then about the mean logit, so that the model says before training what it said without the new ids, where a
row of random numbers could take any share of the probability. The mean is taken in fp32.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.errors import ConfigError

log = logging.getLogger("llmkit.models")

ANNOUNCEMENT = "vocabulary: %d rows for %d ids are new, each the mean of the %d known ones"


@torch.no_grad()
def resize_embeddings(model: Any, n: int, *, known: int | None = None) -> None:
    """Give ``model`` ``n`` embedding rows, in place; its config, head and output bias follow.

    ``known``: the ids that the model was trained with, all its rows when None. Rows from there on, which stand in a
    rounded-up vocabulary, are as new as those that are added. To be called before an optimizer sees the parameters.
    Raises ``ConfigError`` when ``n`` is below the rows there are, or ``known`` above them.
    """
    rows = model.config.vocab_rows
    known = rows if known is None else known
    if n < rows:
        what = f"the model has {rows} embedding rows; {n} would take ids away"
        raise ConfigError(what, where="model.vocab_size", fix=f"ask for at least {rows}")
    if not 0 < known <= rows:
        raise ConfigError(f"{known} known ids, but the model has {rows} embedding rows", where="model.vocab_size")
    if known == n:
        return
    if hasattr(model, "resize_vocab"):  # a wrapped model, whose tables have other names
        model.resize_vocab(n, known)
    else:
        _resize_tables(model, n, known)
    log.info("vocabulary: %d of %d rows are new, each the mean of the %d known ones", n - known, n, known)


def make_room(model: Any, n_known: int, n_ids: int) -> None:
    """Embeddings for the ids of a vocabulary that grew; the model was trained with ``n_known`` of them."""
    rows = model.config.vocab_rows
    if n_ids > min(n_known, rows):
        resize_embeddings(model, max(rows, n_ids), known=min(n_known, rows))


def _resize_tables(model: Any, n: int, known: int) -> None:
    head, bias = getattr(model, "head", None), getattr(model, "output_bias", None)
    model.embedding.weight = _grown(model.embedding.weight, n, known)
    model.embedding.num_embeddings = n
    if head is not None:
        head.weight = _grown(head.weight, n, known)
        head.out_features = n
    if bias is not None:
        model.output_bias = _grown(bias, n, known)
    model.config = replace(model.config, vocab_size=n)


def _grown(old: Tensor, n: int, known: int) -> nn.Parameter:
    """``old`` with ``n`` rows, those from ``known`` on the mean of those before."""
    new = old.new_empty(n, *old.shape[1:])
    new[:known] = old[:known]
    new[known:] = old[:known].mean(0, dtype=torch.float32).to(old.dtype)
    return nn.Parameter(new, requires_grad=old.requires_grad)
