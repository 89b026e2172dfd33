"""Share of computed tokens that are real, packed as llmkit does it and padded as is usual: one document a row.

    python -m tests.bench.padding --recipes bert_tiny,t5_tiny,gpt_tiny                      # the embedded corpus
    python -m tests.bench.padding --recipes bert_tiny,t5_tiny --train sotu.train.jsonl

The padded figure takes the documents of the packed rows (cut where a row is), shuffles them, and pads
batches of ``engine.micro_batch_size`` documents to the longest of each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from llmkit.commands.training import load_text, open_datasets
from llmkit.config.build import build
from llmkit.config.check import check
from llmkit.config.compose import compose
from llmkit.interfaces import NO_DOCUMENT, Batch, Tokens

ROWS = 4096
BATCH = 16


def lengths_of(side: Batch | Tokens) -> dict[tuple[int, int], int]:
    """Tokens of every document, by row and number."""
    ids = side.document_ids
    documents = np.zeros(side.input_ids.shape, int) if ids is None else ids.numpy()
    found = {}
    for row, numbers in enumerate(documents):
        marks, counts = np.unique(numbers, return_counts=True)
        found |= {(row, int(mark)): int(n) for mark, n in zip(marks, counts, strict=True) if mark != NO_DOCUMENT}
    return found


def padded_share(lengths: np.ndarray, batch_size: int) -> float:
    """Real tokens over all, for documents x sides in shuffled batches, each side padded to its longest."""
    order = np.random.default_rng(0).permutation(len(lengths))
    batches = [lengths[order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
    return float(lengths.sum() / sum((batch.max(0) * len(batch)).sum() for batch in batches))


def shares(command: list[str]) -> dict[str, float]:
    cfg = check("pretrain", compose("pretrain", command, None), resuming=False)
    text, objective = load_text(cfg, progress=False), build(cfg.objective)
    seq_len = cfg.data.window(cfg.model["max_seq_len"])
    train = open_datasets(text.prepared, objective, seq_len).train[0]
    collate = partial(objective.collate, seq_len=seq_len, ids=text.tokenizer.token_ids())
    n_tokens, n_computed = 0, 0
    found: list[tuple[int, ...]] = []
    for first in range(0, min(ROWS, train.n_sequences), BATCH):
        rows = range(first, min(first + BATCH, train.n_sequences))
        batch = collate([train.row(row, (1, row), None) for row in rows])
        n_tokens, n_computed = n_tokens + batch.n_tokens, n_computed + batch.n_computed
        sides = [lengths_of(side) for side in (batch, batch.source) if side is not None]
        documents = sorted(set().union(*sides))
        found += [tuple(side.get(document, 0) for side in sides) for document in documents]
    padded = padded_share(np.array(found), cfg.engine.micro_batch_size)
    return {"packed": n_tokens / n_computed, "padded": padded, "tokens_a_document": float(np.mean(np.sum(found, 1)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=["bert_tiny", "t5_tiny", "gpt_tiny"])
    parser.add_argument("--train", type=Path)
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        common = [f"run.root={folder}", f"data.cache_dir={folder}/cache", "callbacks=none"]
        common += [f"data.path={args.train}"] if args.train else []
        for recipe in args.recipes:
            figures = shares([f"recipe={recipe}", *common, *overrides])
            print(json.dumps({"recipe": recipe, "overrides": overrides} | figures), flush=True)


if __name__ == "__main__":
    main()
