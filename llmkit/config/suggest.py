"""Finds what the user probably meant."""

from __future__ import annotations

from collections.abc import Iterable

# The same idea under the names that other projects use.
OTHER_NAMES = {
    "learning_rate": "lr",
    "n_embd": "d_model",
    "hidden_size": "d_model",
    "embed_dim": "d_model",
    "dim": "d_model",
    "n_layer": "n_layers",
    "num_layers": "n_layers",
    "num_hidden_layers": "n_layers",
    "n_head": "n_heads",
    "num_heads": "n_heads",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "d_ff",
    "block_size": "seq_len",
    "sequence_length": "seq_len",
    "context_length": "max_seq_len",
    "n_positions": "max_seq_len",
    "batch_size": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "device_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "grad_accum_steps",
    "gradient_checkpointing": "memory",
    "activation_checkpointing": "memory",
    "max_iters": "max_steps",
    "num_steps": "max_steps",
    "epochs": "max_epochs",
    "num_train_epochs": "max_epochs",
    "grad_clip": "max_grad_norm",
    "gradient_clip_val": "max_grad_norm",
    "mixed_precision": "precision",
    "dtype": "precision",
    "warmup_iters": "warmup_steps",
    "num_warmup_steps": "warmup_steps",
    "eval_interval": "eval_every",
    "save_interval": "save_every",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "log_interval": "log_every",
    "dataset": "path",
    "train_path": "path",
    "output_dir": "root",
    "max_length": "max_new_tokens",
}


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option spelt most like ``word``, or None when nothing is close."""
    import difflib

    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return close[0] if close else None


def nearest_key(path: str, known: Iterable[str]) -> str | None:
    """The known dotted key that ``path`` probably means: same section first, then the same last word anywhere."""
    keys = sorted(known)
    section, _, leaf = path.rpartition(".")
    leaf = OTHER_NAMES.get(leaf, leaf)
    same_leaf = [key for key in keys if key.rpartition(".")[2] == leaf]
    if f"{section}.{leaf}" in keys:
        return f"{section}.{leaf}"
    sections = {key.rpartition(".")[0] for key in keys}
    if section not in sections and (meant := nearest(section, sections)):
        section = meant
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}
    if section and (near := nearest(leaf, siblings)):
        return siblings[near]
    if len(same_leaf) == 1:
        return same_leaf[0]
    return nearest(f"{section}.{leaf}" if section else leaf, [*same_leaf, *keys]) or next(iter(same_leaf), None)


def did_you_mean(guess: str | None) -> str:
    return f"did you mean {guess}?" if guess else ""
