"""What small models learn of each objective, beside baselines that read nothing.

    python -m tests.bench.objectives --train sotu.train.jsonl --val sotu.valid.jsonl --recipes bert_tiny,t5_tiny
    python -m tests.bench.objectives --recipes gpt_tiny,lstm_tiny               # on the embedded corpus

Each recipe is trained once a seed, as a user does it; then ``llmkit evaluate`` scores the run on its validation text.
``unigram`` predicts every label from how often it was one in training: its loss and accuracy are on the same labels.
For sentence pairs, evaluation brings the accuracy of a bag of words.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.commands.training import load_text, open_datasets
from llmkit.config.build import build
from llmkit.config.check import check
from llmkit.config.compose import compose
from llmkit.data.loader import eval_batches
from llmkit.interfaces import IGNORE_INDEX, Batch

BASELINE_ROWS = 2000  # training rows whose labels are counted
SHOWN = ("val/loss", "val/mlm_loss", "val/accuracy", "val/pair_accuracy", "val/bag_of_words_accuracy")
SHOWN += ("val/bpb", "val/ppl", "val/pseudo_ppl")


def labels_of(batch: Batch) -> np.ndarray:
    labels = batch.labels.numpy().ravel()
    return labels[labels != IGNORE_INDEX]


def unigram(command: list[str]) -> dict[str, float]:
    """Loss in nats and accuracy of label frequencies, each id counted once more than it was seen."""
    cfg = check("pretrain", compose("pretrain", command, None), resuming=False)
    text, objective = load_text(cfg, progress=False), build(cfg.objective)
    seq_len = cfg.data.window(cfg.model["max_seq_len"])
    datasets, ids = open_datasets(text.prepared, objective, seq_len), text.tokenizer.token_ids()
    collate = partial(objective.collate, seq_len=seq_len, ids=ids)
    counts = np.ones(ids.vocab_size)
    train = datasets.train[0]
    for row in range(min(train.n_sequences, BASELINE_ROWS)):
        counts += np.bincount(labels_of(collate([train.row(row, (1, row), None)])), minlength=ids.vocab_size)
    assert datasets.val is not None
    found = np.concatenate([labels_of(batch) for batch in eval_batches(datasets.val, collate, 16, 0, 1)])
    share = counts / counts.sum()
    return {
        "unigram_loss": float(-np.log(share[found]).mean()),
        "unigram_accuracy": float((found == counts.argmax()).mean()),
    }


def train_and_score(root: Path, name: str, command: list[str]) -> dict[str, Any]:
    """The figures of ``llmkit evaluate``, the training's seconds and its validation curve over tokens."""
    llmkit = [sys.executable, "-m", "llmkit"]
    subprocess.run([*llmkit, "pretrain", *command, f"run.name={name}"], check=True, capture_output=True)
    scored = subprocess.run([*llmkit, "evaluate", f"init={root / name}"], check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    tokens = {row["step"]: row["data/tokens"] for row in rows if "data/tokens" in row}
    curve = [
        (tokens[row["step"]], row["perf/elapsed_seconds"], row["val/loss"], row.get("val/bpb"))
        for row in rows
        if "val/loss" in row
    ]
    figures = {key: value for key, value in json.loads(scored.stdout).items() if key in SHOWN}
    real = [row["perf/real_token_fraction"] for row in rows if "perf/real_token_fraction" in row]
    seconds = rows[-1]["perf/elapsed_seconds"]
    return {**figures, "seconds": seconds, "real_token_fraction": statistics.fmean(real), "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=["bert_tiny", "t5_tiny"])
    parser.add_argument("--train", type=Path)
    parser.add_argument("--val", type=Path)
    parser.add_argument("--seeds", type=lambda text: text.split(","), default=["1", "2", "3"])
    args, overrides = parser.parse_known_args()
    text = [f"data.path={args.train}", f"data.val_path={args.val}"] if args.train else []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        common = [*text, f"run.root={root}", f"data.cache_dir={root / 'cache'}", "tracking.wandb.mode=disabled"]
        commands = {name: [f"recipe={name}", "callbacks=none", *common, *overrides] for name in args.recipes}
        for recipe, command in commands.items():
            print(json.dumps({"recipe": recipe, **unigram(command)}), flush=True)
        for seed, (recipe, command) in product(args.seeds, commands.items()):
            result = train_and_score(root, f"{recipe}-{seed}", [*command, f"run.seed={seed}"])
            print(json.dumps({"recipe": recipe, "seed": seed, **result}), flush=True)


if __name__ == "__main__":
    main()
