"""Small decoders for tests: two starting points, and weights in which nothing is zero or one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llmkit.interfaces import Batch
from llmkit.models.config import DecoderConfig
from llmkit.models.decoder import Decoder

LLAMA: dict[str, Any] = {
    "vocab_size": 61,
    "max_seq_len": 32,
    "d_model": 24,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": None,
    "d_head": None,
    "d_ff": None,
    "norm": "rmsnorm",
    "norm_bias": False,
    "norm_eps": 1e-5,
    "norm_position": "pre",
    "parallel_residual": False,
    "activation": "swiglu",
    "position": "rotary",
    "rope_theta": 10000.0,
    "rotary_fraction": 1.0,
    "local_rope_theta": None,
    "rope_scaling": None,
    "attention_windows": None,
    "qk_norm": None,
    "attention_bias": False,
    "attention_out_bias": False,
    "attention_scale_dim": None,
    "scale_attention_by_layer": False,
    "attention_softcap": None,
    "logit_softcap": None,
    "scale_embedding": False,
    "mlp_bias": False,
    "dropout": 0.0,
    "tie_embeddings": True,
    "init_std": 0.02,
    "residual_init_scale": False,
}
GPT2: dict[str, Any] = {
    **LLAMA,
    "norm": "layernorm",
    "norm_bias": True,
    "activation": "gelu_tanh",
    "position": "learned",
    "rope_theta": None,
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "residual_init_scale": True,
}


def llama(**changes: Any) -> DecoderConfig:
    return DecoderConfig(**{**LLAMA, **changes})


def gpt2(**changes: Any) -> DecoderConfig:
    return DecoderConfig(**{**GPT2, **changes})


def built(config: DecoderConfig, seed: int = 0, std: float = 0.2) -> Decoder:
    """Every parameter random: with fresh weights, biases of 0 and norms of 1 would hide a swap."""
    model, generator = config.build(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
    return model


def random_ids(config: DecoderConfig, rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(0, config.vocab_rows, (rows, columns), generator=torch.Generator().manual_seed(seed))


def check_states_at(model: Any, batch: Batch) -> None:
    """``states_at`` gives what ``hidden_states`` has at places, one of them twice: values, gradients, less work."""
    places = torch.tensor([0, 8, 9, 25, 39, 25])
    found, flops = [], []
    for states_at in (lambda: model.hidden_states(batch).flatten(0, 1)[places], lambda: model.states_at(batch, places)):
        with FlopCounterMode(display=False) as counted:
            states_PD = states_at()
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append((states_PD, *torch.autograd.grad(states_PD.pow(3).sum(), trained, allow_unused=True)))
        flops.append(counted.get_total_flops())
    assert flops[1] < flops[0]
    for whole, part in zip(*found, strict=True):
        assert (whole is None) == (part is None)
        if whole is not None:
            torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)
