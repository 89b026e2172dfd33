"""GGUF's words for the families it shares with Hugging Face: metadata for ``config.json``, names for tensors.

A GGUF file is read and written through the family's own table (``models/hf``); only the names differ, and the order of
the rows in Llama's query and key matrices. Names: gguf-py/gguf/constants.py; order: ``permute`` in
convert_hf_to_gguf.py, both in https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.errors import CheckpointError
from llmkit.gguf_file import GGUFFile
from llmkit.models.gguf import rope

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_KEYS = {  # in GGUF after the architecture's name
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_SAME_AS_HEAD = ("attention.value_length", "rope.dimension_count")  # other values are computations of other families
_OTHER_COMPUTATIONS = {  # when they are there and not 0
    "expert_count": "mixtures of experts",
    "attention.sliding_window": "a sliding window",
    "attention.scale": "another scale of the scores",
    "attention.clamp_kqv": "bounds on queries, keys and values",
    "logit_scale": "a scale of the logits",
}
_KNOWN = (*_KEYS, *_SAME_AS_HEAD, *_OTHER_COMPUTATIONS, *rope.KEYS, "tensor_data_layout", "expert_used_count")
_TRAINING_ONLY = {"attention_dropout", "initializer_range"}  # of a config, and not said in GGUF


@dataclass(frozen=True)
class Architecture:
    """One of GGUF's architectures. ``interleaved``: rotary pairs stand side by side in the rows of q and k."""

    name: str
    model_type: str  # of its family
    interleaved: bool
    optional_biases: Mapping[str, str]  # keys of config.json -> tensor of the first block that says so

    def config(self, file: GGUFFile, divisors: NDArray[np.float32] | None) -> dict[str, Any]:
        """What ``config.json`` would say; ``divisors`` (K/2) is ``rope_freqs.weight``.

        Raises ``CheckpointError`` for a computation llmkit does not have.
        """
        get = {key.removeprefix(f"{self.name}."): value for key, value in file.metadata.items()}
        for key, what in _OTHER_COMPUTATIONS.items():
            if get.get(key):
                raise file.error(f"{self.name}.{key}", f"is {get[key]!r}: llmkit does not compute {what} in GGUF files")
        found = {ours: get[theirs] for theirs, ours in _KEYS.items() if theirs in get}
        for key, value in found.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise file.error(f"{self.name}: {key}", f"is {value}")
        found.setdefault("rope_theta", 10000.0)
        if "token_embd.weight" in file.tensors:
            found.setdefault("vocab_size", file.tensors["token_embd.weight"].shape[0])
        self._check_head(file, get, found)
        biases = {key: tensor in file.tensors for key, tensor in self.optional_biases.items()}
        return {
            "model_type": self.model_type,
            **found,
            **biases,
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "rope_parameters": {**rope.read(file, self.name, divisors), "rope_theta": found["rope_theta"]},
        }

    def _check_head(self, file: GGUFFile, get: Mapping[str, Any], found: dict[str, Any]) -> None:
        """The width of a head, where it is not the default, and what must be equal to it."""
        width = found.get("head_dim", get.get("rope.dimension_count"))
        if width is None:
            return
        found["head_dim"] = width
        for key in _SAME_AS_HEAD:
            if get.get(key, width) != width:
                raise file.error(
                    f"{self.name}.{key}", f"is {get[key]!r}; llmkit computes only the width of a head, {width}"
                )

    def metadata(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What GGUF says of a ``config.json``; see ``lost`` for what it does not."""
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        found = {theirs: config[ours] for theirs, ours in _KEYS.items() if config.get(ours) is not None}
        found |= {"attention.key_length": width, **dict.fromkeys(_SAME_AS_HEAD, width)}
        found |= rope.write(config)
        return {f"{self.name}.{key}": value for key, value in found.items()}

    def unknown_keys(self, file: GGUFFile) -> list[str]:
        """Keys of the architecture that nothing here reads."""
        start = f"{self.name}."
        known = {start + key for key in _KNOWN}
        return sorted(key for key in file.metadata if key.startswith(start) and key not in known)

    def n_heads_of(self, tensor: str, n_heads: int, n_kv_heads: int) -> int | None:
        """Heads whose rows must change places between GGUF and us; None for tensors that are stored alike."""
        part = tensor.split(".")[-2]
        return {"attn_q": n_heads, "attn_k": n_kv_heads}.get(part) if self.interleaved else None


LLAMA = Architecture("llama", "llama", True, {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"})
QWEN2 = Architecture("qwen2", "qwen2", False, {})
QWEN3 = Architecture("qwen3", "qwen3", False, {"attention_bias": "blk.0.attn_q.bias"})
ARCHITECTURES = (LLAMA, QWEN2, QWEN3)


def architecture_of(file: GGUFFile) -> Architecture:
    """Of a file. Raises ``CheckpointError`` for one that llmkit does not read."""
    name = file.text("general.architecture")
    for known in ARCHITECTURES:
        if known.name == name:
            return known
    names = ", ".join(known.name for known in ARCHITECTURES)
    raise CheckpointError(
        f"the architecture {name!r} is not read from GGUF; llmkit reads {names}",
        where=f"{file.path}:general.architecture",
        fix="use the model's Hugging Face folder",
    )


def tensor_name(row: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    stem, _, kind = row.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    number, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_BLOCK[part]}.{kind}"


def lost(config: Mapping[str, Any], read_back: Mapping[str, Any]) -> list[str]:
    """Keys of a ``config.json`` that would change the computation and that GGUF did not keep."""
    keys = (config.keys() | read_back.keys()) - _TRAINING_ONLY
    if rope.divide_alike(config, read_back):
        keys -= {"rope_parameters", "rope_scaling"}
    return sorted(key for key in keys if config.get(key) != read_back.get(key))
