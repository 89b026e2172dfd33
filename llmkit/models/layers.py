"""Norms, rotary positions and feed-forward layers. Letters as in ``llmkit/interfaces.py``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.errors import ConfigError
from llmkit.models.config import GATED


def check_length(n_tokens: int, max_seq_len: int) -> None:
    """Raise ``ConfigError`` for more tokens than a model takes."""
    if n_tokens > max_seq_len:
        what = f"{n_tokens} tokens do not fit into {max_seq_len}"
        raise ConfigError(what, where="model.max_seq_len", fix="use shorter sequences")


def next_positions(input_ids_BT: Tensor, start: int, max_seq_len: int) -> Tensor:
    """1T: the positions from ``start`` on. Raises ``ConfigError`` past ``max_seq_len``."""
    stop = start + input_ids_BT.shape[1]
    check_length(stop, max_seq_len)
    return torch.arange(start, stop, device=input_ids_BT.device)[None]


class NormSizes(Protocol):
    """What ``build_norm`` asks of a configuration."""

    @property
    def d_model(self) -> int: ...
    @property
    def norm(self) -> str: ...
    @property
    def norm_bias(self) -> bool: ...
    @property
    def norm_eps(self) -> float: ...


class FeedForwardSizes(Protocol):
    """What ``FeedForward`` asks of a configuration."""

    @property
    def d_model(self) -> int: ...
    @property
    def ff_width(self) -> int: ...
    @property
    def mlp_bias(self) -> bool: ...
    @property
    def activation(self) -> str: ...


def at(x_BTD: Tensor, places_P: Tensor | None) -> Tensor:
    """PD: ``x`` at these of the B T positions, counted row by row; None: ``x`` as it is."""
    return x_BTD if places_P is None else x_BTD.flatten(0, 1).index_select(0, places_P)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type matrix products run in: autocast's where it is on, else the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@torch.no_grad()
def init_normal(model: nn.Module, seed: int, std_of: Callable[[str, Tensor], float]) -> None:
    """Matrices and tables normal with the deviation of their name, biases 0, the weights of norms 1.

    Drawn on the CPU in the order of the parameters, so that a seed gives the same weights on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = std_of(name, parameter)
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def residual_std(std: float, n_layers: int, *, scaled: bool) -> Callable[[str, Tensor], float]:
    """``std``, divided by sqrt(2 L) in the matrices that write to the residual stream if ``scaled`` (GPT-2)."""
    writing = std / math.sqrt(2 * n_layers) if scaled else std
    return lambda name, _: writing if name.endswith((".o.weight", ".down.weight")) else std


class Linear(nn.Linear):
    """Uninitialised: ``Decoder.init_weights`` or a checkpoint gives the values, and no random number is drawn here."""

    def reset_parameters(self) -> None:
        """Nothing, at every size."""


class Embedding(nn.Embedding):
    """Uninitialised, like ``Linear``."""

    def reset_parameters(self) -> None:
        """Nothing, at every size."""


class LayerNorm(nn.Module):
    """Layer normalisation with fp32 statistics (Ba et al. 2016); the result has the compute type, cast once for all.

    With ``keep_type`` it has the type of the input: where it goes on as the residual stream (post-norm).
    """

    def __init__(self, width: int, eps: float, *, bias: bool, keep_type: bool = False) -> None:
        super().__init__()
        self.eps, self.keep_type = eps, keep_type
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        y = F.layer_norm(x.float(), self.weight.shape, self.weight.float(), bias, self.eps)
        return y.to(x.dtype if self.keep_type else compute_dtype(x))


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with fp32 statistics (Zhang and Sennrich 2019); types as in ``LayerNorm``."""

    def __init__(self, width: int, eps: float, *, keep_type: bool = False) -> None:
        super().__init__()
        self.eps, self.keep_type = eps, keep_type
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return y.to(x.dtype if self.keep_type else compute_dtype(x))


def build_norm(config: NormSizes, *, keep_type: bool = False) -> LayerNorm | RMSNorm:
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps, keep_type=keep_type)
    return LayerNorm(config.d_model, config.norm_eps, bias=config.norm_bias, keep_type=keep_type)


Rotation = tuple[Tensor, Tensor]  # cosine and sine, BT1K with K/2 values: both halves of a head share the angles


def rotation(position_ids_BT: Tensor, width: int, theta: float) -> Rotation:
    """The angles of rotary position embedding (Su et al. 2021), frequencies ``theta^(-2i/K)``.

    Computed from the positions once per forward pass, in fp32 whatever the compute type is. So there is no table that a
    cast could round, a checkpoint could carry, or a move to another device could leave behind.
    """
    return turned(position_ids_BT, 1.0 / wave_lengths(width, theta, position_ids_BT.device))


def wave_lengths(width: int, theta: float | Tensor, device: torch.device) -> Tensor:
    """``theta^(2i/K)``: the positions that each pair of dimensions takes for a radian."""
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    lengths: Tensor = theta**exponents
    return lengths


def turned(position_ids_BT: Tensor, frequencies: Tensor) -> Rotation:
    """Cosine and sine of positions times frequencies (K, or BT1K)."""
    angles = position_ids_BT[:, :, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x_BTHK: Tensor, by: Rotation) -> Tensor:
    """Turn every head, in the split-halves layout of the Hugging Face Llama checkpoints; fp32 inside.

    Angles for fewer dimensions than a head has turn the first ones and leave the others.
    """
    cos, sin = by
    width = 2 * cos.shape[-1]
    first, second = x_BTHK[..., :width].chunk(2, dim=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if width < x_BTHK.shape[-1]:
        parts.append(x_BTHK[..., width:])
    return torch.cat(parts, dim=-1).to(x_BTHK.dtype)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(x / cap)``: values stay below ``cap`` (Gemma 2, arXiv 2408.00118, section 2); null leaves them."""
    return x if cap is None else cap * torch.tanh(x / cap)


def gelu_tanh(x: Tensor) -> Tensor:
    """The approximation of GELU in GPT-2 and T5 v1.1 (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
}
ACTIVATIONS = PLAIN | {GATED[name]: function for name, function in PLAIN.items()}


class FeedForward(nn.Module):
    """The position-wise layer: two matrices, or three with a gate (Shazeer 2020: SwiGLU, GEGLU)."""

    def __init__(self, config: FeedForwardSizes) -> None:
        super().__init__()
        D, F_, bias = config.d_model, config.ff_width, config.mlp_bias
        self.activation = ACTIVATIONS[config.activation]
        self.gate = Linear(D, F_, bias=bias) if config.activation in GATED.values() else None
        self.up = Linear(D, F_, bias=bias)
        self.down = Linear(F_, D, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = self.up(x_BTD)
        if self.gate is None:
            hidden_BTF = self.activation(hidden_BTF)
        else:
            hidden_BTF = hidden_BTF * self.activation(self.gate(x_BTD))
        out_BTD: Tensor = self.down(hidden_BTF)
        return out_BTD
