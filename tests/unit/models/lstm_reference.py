"""The LSTM models a second time, token by token and document by document, from the formulas alone.

The cell is that of Hochreiter and Schmidhuber 1997 with forget gates (Gers et al. 2000), in torch's order of the gates;
the attention is Luong et al. 2015, section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkit.models.lstm_config import LSTMConfig
from llmkit.models.lstm_seq2seq_config import LSTMSeq2SeqConfig

Weights = dict[str, Tensor]

LSTM: dict[str, Any] = {
    "vocab_size": 61,
    "max_seq_len": 32,
    "d_model": 24,
    "d_hidden": None,
    "n_layers": 2,
    "attention": True,
    "attention_window": None,
    "dropout": 0.0,
    "tie_embeddings": True,
    "init_range": 0.1,
}
SEQ2SEQ = {name: value for name, value in LSTM.items() if not name.startswith("attention")}


def lstm(**changes: Any) -> LSTMConfig:
    return LSTMConfig(**{**LSTM, **changes})


def seq2seq(**changes: Any) -> LSTMSeq2SeqConfig:
    return LSTMSeq2SeqConfig(**{**SEQ2SEQ, **changes})


def random_weights(model: Any, seed: int = 0, std: float = 0.4) -> Any:
    """Every parameter random: with fresh weights, biases of 0 would hide a swap."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def run_layer(weights: Weights, name: str, inputs: list[Tensor], h: Tensor, c: Tensor) -> tuple[list[Tensor], Tensor]:
    """States of every step, and the last cell state."""
    w_ih, w_hh = weights[f"{name}.weight_ih_l0"], weights[f"{name}.weight_hh_l0"]
    bias = weights[f"{name}.bias_ih_l0"] + weights[f"{name}.bias_hh_l0"]
    states = []
    for x in inputs:
        i, f, g, o = (w_ih @ x + w_hh @ h + bias).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        states.append(h)
    return states, c


def attended(weights: Weights, state: Tensor, memory: list[Tensor]) -> Tensor:
    scores = torch.stack([state @ weights["attention.score.weight"].T @ m for m in memory])
    shares = scores.exp() / scores.exp().sum()
    context = sum(share * m for share, m in zip(shares, memory, strict=True))
    return torch.tanh(weights["attention.combine.weight"] @ torch.cat((context, state)))


def lm_logits(weights: Weights, config: LSTMConfig, ids: list[int]) -> Tensor:
    """TV of one document."""
    zeros = torch.zeros(config.width)
    states = [weights["embedding.weight"][i] for i in ids]
    for layer in range(config.n_layers):
        states, _ = run_layer(weights, f"lstm.layers.{layer}", states, zeros, zeros)
    outputs = states
    if config.attention:
        past = [zeros, *states]  # past[t]: the state before token t
        first = [max(0, t + 1 - (config.attention_window or len(ids))) for t in range(len(ids))]
        outputs = [attended(weights, state, past[first[t] : t + 1]) for t, state in enumerate(states)]
    elif "projection.weight" in weights:
        outputs = [weights["projection.weight"] @ state for state in states]
    return torch.stack(outputs) @ weights.get("head.weight", weights["embedding.weight"]).T


def seq2seq_logits(weights: Weights, config: LSTMSeq2SeqConfig, source: list[int], target: list[int]) -> Tensor:
    """TV of one target document; an empty source leaves the decoder alone."""
    embedding, half = weights["embedding.weight"], torch.zeros(config.width // 2)
    memory, starts = [embedding[i] for i in source], []
    for layer in range(config.n_layers):
        if not source:
            starts.append((torch.zeros(config.width), torch.zeros(config.width)))
            continue
        onward, c_onward = run_layer(weights, f"encoder.onward.{layer}", memory, half, half)
        back, c_back = run_layer(weights, f"encoder.back.{layer}", memory[::-1], half, half)
        starts.append((torch.cat((onward[-1], back[-1])), torch.cat((c_onward, c_back))))
        memory = [torch.cat(pair) for pair in zip(onward, back[::-1], strict=True)]
    states = [embedding[i] for i in target]
    for layer, (h, c) in enumerate(starts):
        states, _ = run_layer(weights, f"decoder.layers.{layer}", states, h, c)
    memory = memory or [torch.zeros(config.width)]
    outputs = [attended(weights, state, memory) for state in states]
    return torch.stack(outputs) @ weights.get("head.weight", embedding).T
