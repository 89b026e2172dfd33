"""Continued pretraining of a published model on new text: what it learns, and what it forgets, with and without replay.

    python -m tests.bench.continued --init smollm2.gguf --new de.txt --new-val de_val.txt --old old.jsonl --steps 120

The last ``HELD_OUT`` documents of ``--old`` are the old validation text, cut to ``OLD_BYTES`` each; the others are what
``--replay`` is the share of. ``--new-val`` is cut to ``NEW_BYTES``. Two runs, one after the other, in a new folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HELD_OUT, OLD_BYTES, NEW_BYTES = 4, 6000, 12000


def split_old(path: Path, folder: Path) -> tuple[Path, Path]:
    """(text to replay, old validation text)."""
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    files = folder / "old.jsonl", folder / "old_val.jsonl"
    for file, part in zip(files, (texts[:-HELD_OUT], [t[:OLD_BYTES] for t in texts[-HELD_OUT:]]), strict=True):
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return files


def train(name: str, folder: Path, settings: list[str]) -> list[dict[str, float]]:
    """The evaluations of one run, the first before any step."""
    command = [sys.executable, "-m", "llmkit", "pretrain", f"run.root={folder}", f"run.name={name}", *settings]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "val/loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("init", "new", "new-val", "old"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--replay", type=float, default=0.25)
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        old, old_val = split_old(args.old, folder)
        new_val = folder / "new_val.txt"
        new_val.write_text(args.new_val.read_bytes()[:NEW_BYTES].decode(errors="ignore").rpartition("\n")[0])
        common = [f"init={args.init}", f"data.val_path={new_val}", f"data.old_val_path={old_val}", "data.seq_len=256"]
        common += [
            "engine.micro_batch_size=2",
            f"engine.max_steps={args.steps}",
            f"engine.eval_every={args.steps // 3}",
        ]
        common += ["engine.save_every=null", "schedule.warmup_steps=10", "optim.lr=1e-4", "tracking=none"]
        common += ["callbacks=none", *overrides]
        mixed = [f"data.path=[{args.new},{old}]", f"data.weights=[{1 - args.replay},{args.replay}]"]
        runs = {
            "new text alone": train("alone", folder, [f"data.path={args.new}", *common]),
            f"{args.replay:.0%} replayed": train("replay", folder, [*mixed, *common]),
        }
    print("| run | step | new loss | old loss |\n|---|---|---|---|")
    for name, rows in runs.items():
        for row in rows:
            print(f"| {name} | {row['step']} | {row['val/loss']:.3f} | {row['val_old/loss']:.3f} |")


if __name__ == "__main__":
    main()
