"""Pseudo-perplexity of an encoder: what it expects at each place when it sees everything but that place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.errors import ConfigError
from llmkit.interfaces import Batch, TokenIds
from llmkit.metrics.language_modelling import perplexity
from llmkit.objectives.rows import document_columns, isolation, to_tensor

if TYPE_CHECKING:
    from llmkit.data.token_shards import TokenShards

COPIES = 16  # of a window, each with another token masked, in one forward pass


def pseudo_perplexity(
    model: Any, shards: Sequence[TokenShards], ids: TokenIds, seq_len: int, n_tokens: int, device: torch.device
) -> dict[str, float]:
    """``exp`` of the mean negative log-likelihood of ``n_tokens`` tokens, each masked alone (Salazar et al. 2020).

    The windows are spread evenly over the text, and all text tokens of a window are scored, so a figure from fewer
    tokens than there are is a sample of whole windows.
    """
    mask_id = ids.mask_id
    if mask_id is None:
        raise ConfigError("the tokenizer has no mask token", where="pseudo_ppl_tokens", fix="pseudo_ppl_tokens=0")
    nll, scored = 0.0, 0
    model.eval()
    for window in _spread_windows(shards, seq_len, n_tokens):
        places = np.flatnonzero(~ids.special[window])
        for start in range(0, places.size, COPIES):
            nll += _masked_nll(model, window, places[start : start + COPIES], mask_id, ids.eos_id, device)
        scored += places.size
    return {"val/pseudo_ppl": perplexity(nll / max(scored, 1)), "val/pseudo_ppl_n_tokens": scored}


def _spread_windows(shards: Sequence[TokenShards], seq_len: int, n_tokens: int) -> list[NDArray[np.int64]]:
    """Whole windows, evenly over all shards, enough for about ``n_tokens``."""
    windows = [
        (shard, start, min(start + seq_len, shard.n_tokens))
        for shard in shards
        for start in range(0, shard.n_tokens, seq_len)
    ]
    n_windows = max(1, min(len(windows), round(n_tokens / seq_len)))
    chosen = np.linspace(0, len(windows) - 1, n_windows).round().astype(int)
    return [shard.window(start, stop) for shard, start, stop in (windows[place] for place in chosen)]


def _masked_nll(
    model: Any,
    window: NDArray[np.int64],
    places: NDArray[np.intp],
    mask_id: int,
    eos_id: int,
    device: torch.device,
) -> float:
    """Nats of the tokens at ``places``, each in a copy of the window where it alone is masked."""
    inputs = np.repeat(window[None], places.size, axis=0)
    positions, documents = document_columns(inputs, np.ones(inputs.shape, bool), eos_id)
    rows = np.arange(places.size)
    inputs[rows, places] = mask_id
    labels = to_tensor(window[places]).to(device)
    packed = isolation(documents)
    batch = Batch(to_tensor(inputs), to_tensor(inputs), to_tensor(positions), packed, places.size).to(device)
    hidden_PD: Tensor = model.hidden_states(batch)[to_tensor(rows), to_tensor(places)]
    states_PD = model.output_states(hidden_PD)
    logits_PV = torch.nn.functional.linear(states_PD, model.output_weight_VD, model.output_bias_V)
    return float(torch.nn.functional.cross_entropy(logits_PV.double(), labels, reduction="sum"))
