"""The words of ``config.json`` for activation functions, in both directions and for all families. Free of torch.

Several words are one function: ``gelu_fast`` and others are ``gelu_new`` written in another way.
"""

from __future__ import annotations

from llmkit.models.config import GATED

PLAIN = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
GATES = {word: GATED[ours] for word, ours in PLAIN.items()}  # of families whose layers are gated

# What is written. Older tools know fewer words: each is the one that the published files of such models have.
PLAIN_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}
GATE_NAMES = {"geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh", "reglu": "relu", "swiglu": "silu"}
