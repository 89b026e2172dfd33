"""Fill the gaps of a text with an encoder: the likeliest tokens for every mask."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.errors import ConfigError, NumericsError
from llmkit.interfaces import IGNORE_INDEX, NO_DOCUMENT, Batch, Model, TokenIds, Tokenizer

MASK_TEXTS = ("[MASK]", "<mask>")  # how prompts spell the mask, whatever the vocabulary calls it
# The spaces before a mask belong to the word it stands for: vocabularies hold words with the space before them, or none
_MASK = re.compile(" *(?:" + "|".join(map(re.escape, MASK_TEXTS)) + ")")

Candidates = list[tuple[str, float]]  # text and probability, the likeliest first


class MaskedLanguageModel(Model, Protocol):
    """An encoder (``llmkit.models.encoder.Encoder``)."""

    @property
    def max_seq_len(self) -> int: ...
    def modules(self) -> Iterator[torch.nn.Module]: ...


def fill_masks(
    model: MaskedLanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    top_k: int,
    *,
    device: torch.device | str,
) -> list[list[Candidates]]:
    """For each prompt, for each of its masks in order: the ``top_k`` likeliest tokens, fewer in a smaller vocabulary.

    Each mask stands for one token, judged with the others still masked. Probabilities are over what a text can hold:
    special tokens and rows of the embedding without a token have no share. A prompt is one document, and its result
    does not depend on the other prompts. Raises ``ConfigError`` for a prompt without a mask or longer than the model's
    window, and for a vocabulary without a mask token, ``NumericsError`` when the model gives NaN.
    """
    if top_k < 1:
        raise ConfigError(f"there is no such thing as the best {top_k}", where="top_k", fix="set it to at least 1")
    if not prompts:
        return []
    ids = tokenizer.token_ids()
    rows = [_row(tokenizer, ids, prompt, number, model.max_seq_len) for number, prompt in enumerate(prompts, 1)]
    with _evaluating(model), torch.no_grad():
        probabilities_NV = _probabilities(model, _batch(rows, ids.pad_id, device), ids)
    values_NK, ids_NK = probabilities_NV.topk(min(top_k, int((~ids.special).sum())))
    found = iter(zip(values_NK.tolist(), ids_NK.tolist(), strict=True))
    return [[_candidates(tokenizer, *next(found)) for _ in _MASK.findall(prompt)] for prompt in prompts]


def _row(tokenizer: Tokenizer, ids: TokenIds, prompt: str, number: int, max_seq_len: int) -> list[int]:
    """A prompt as a document: its parts between the masks, each encoded alone, with the mask's id between them."""
    if ids.mask_id is None:
        what = "the tokenizer has no mask token"
        raise ConfigError(what, where="tokenizer", fix="use a model that was trained with masked LM")
    first, *others = tokenizer.encode_batch(_MASK.split(prompt))
    if not others:
        fix = f"write {' or '.join(MASK_TEXTS)} where a word is to be found"
        raise ConfigError("there is no mask in the prompt", where=f"prompt {number}", fix=fix)
    row = [*([] if ids.bos_id is None else [ids.bos_id]), *first]
    for part in others:
        row += [ids.mask_id, *part]
    row.append(ids.eos_id)
    if len(row) > max_seq_len:
        what = f"the prompt has {len(row)} tokens, the model takes {max_seq_len}"
        raise ConfigError(what, where=f"prompt {number}", fix="shorten it")
    return row


def _batch(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> Batch:
    """One document a row, padded on the right."""
    lengths = torch.tensor([len(row) for row in rows])
    columns = torch.arange(int(lengths.max())).expand(len(rows), -1)
    real = columns < lengths[:, None]
    input_ids = torch.full(columns.shape, pad_id)
    input_ids[real] = torch.tensor([i for row in rows for i in row])
    return Batch(
        input_ids=input_ids,
        labels=torch.full_like(input_ids, IGNORE_INDEX),
        position_ids=columns * real,
        document_ids=None if bool(real.all()) else torch.where(real, 0, NO_DOCUMENT),
        n_targets=0,
    ).to(device)


def _probabilities(model: MaskedLanguageModel, batch: Batch, ids: TokenIds) -> Tensor:
    """NV in fp32 for the N masks of a batch, row by row; 0 for special tokens. V is the tokenizer's."""
    hidden_ND = model.hidden_states(batch)[batch.input_ids == ids.mask_id]
    logits_NV = F.linear(model.output_states(hidden_ND), model.output_weight_VD, model.output_bias_V)
    logits_NV = logits_NV[:, : ids.vocab_size].float()
    if bool(logits_NV.isnan().any()):
        raise NumericsError("the model's logits are not numbers", fix="use an earlier checkpoint, or precision fp32")
    special_V = torch.tensor(ids.special, device=logits_NV.device)
    return logits_NV.masked_fill(special_V, float("-inf")).softmax(-1)


def _candidates(tokenizer: Tokenizer, values: Sequence[float], ids: Sequence[int]) -> Candidates:
    return [(tokenizer.decode([i]), value) for i, value in zip(ids, values, strict=True)]


@contextmanager
def _evaluating(model: MaskedLanguageModel) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
