"""What an architecture of ``transformers`` does to its logits after the output matrix, found out by trying.

``logits = cap(scale * x) + bias`` with ``cap(x) = c tanh(x / c)``, x being what the output matrix gives: BART adds a
bias, Granite and Cohere scale, Gemma 2 caps; none both adds and caps. The loss needs these numbers because it computes
the product itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkit.errors import ConfigError
from llmkit.models.transformers_build import quiet

# A cap bends SMALL by less than fp32 shows, and LARGE to itself; powers of two, so that a scale comes out exactly.
SMALL, LARGE = 2.0**-10, 2.0**26
SPREAD = 10.0  # of the random values
ROUNDING = 1e-5  # a scale this near to 1 is 1
TOLERANCE = (
    1e-4  # of the check against random values, relative to the largest; rounding to the model's type comes on top
)


class Tail(NamedTuple):
    """Scale, and c of the cap; the bias is a tensor of its own."""

    scale: float
    softcap: float | None


def measure_tail(module: Any, head: nn.Linear, inputs: dict[str, Tensor]) -> tuple[Tail, Tensor | None]:
    """The tail of a module with weights, from one forward pass. Raises ``ConfigError`` where it is of another form."""
    n_rows, device = head.weight.shape[0], head.weight.device
    random_V = SPREAD * torch.randn(n_rows, generator=torch.Generator().manual_seed(0))
    one_V = torch.ones(n_rows)
    tried_4V = torch.stack((0 * one_V, SMALL * one_V, LARGE * one_V, random_V)).to(device)
    bias_V, small_V, large_V, found_V = _ends(module, head, inputs, tried_4V).unbind()
    scale = float((small_V - bias_V).mean()) / SMALL
    scale = 1.0 if abs(scale - 1) < ROUNDING else scale
    reached = float((large_V - bias_V).mean())
    softcap = reached if 0 < reached < abs(scale) * LARGE / 2 else None
    expected_V = scale * tried_4V[3].double()
    expected_V = bias_V + (expected_V if softcap is None else softcap * torch.tanh(expected_V / softcap))
    allowed = TOLERANCE + 4 * torch.finfo(head.weight.dtype).eps
    both = softcap is not None and bool(bias_V.any())
    if both or not bool((found_V - expected_V).abs().max() <= allowed * expected_V.abs().max().clamp(min=1)):
        what = f"what {type(module).__name__} does after its output matrix is not a scale, a soft cap and a bias"
        raise ConfigError(what, where="model", fix="choose another architecture")
    return Tail(scale, softcap), bias_V.to(head.weight.dtype) if bool(bias_V.any()) else None


def _ends(module: Any, head: nn.Linear, inputs: dict[str, Tensor], tried_4V: Tensor) -> Tensor:
    """4V in fp64: the logits of the last position where the output matrix gives these values."""
    device = tried_4V.device
    inputs = {name: ids.to(device).expand(len(tried_4V), -1) for name, ids in inputs.items()}
    handle = head.register_forward_hook(lambda _, __, out: tried_4V[:, None].expand(-1, out.shape[1], -1).clone())
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.random.fork_rng(devices=[]), quiet():
            ends_4V: Tensor = module(**inputs).logits[:, -1].double()
    finally:
        handle.remove()
        for part, mode in modes:
            part.training = mode
    return ends_4V
