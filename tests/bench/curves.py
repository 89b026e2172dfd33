"""Pictures of validation losses from what ``tests.bench.objectives`` printed: over tokens, and over seconds.

python -m tests.bench.objectives --recipes gpt_tiny,lstm_tiny > out.jsonl
python -m tests.bench.curves out.jsonl docs/curves/lstm.svg --title "GPT and LSTM"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llmkit.tracking.curve import Panel, Series, picture

COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea")
COLUMNS = {"million tokens": (0, 1e6), "seconds": (1, 1.0)}


def panels(rows: list[dict[str, Any]], columns: list[str]) -> list[Panel]:
    """A line a seed, a colour a recipe."""
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    found = []
    for label in columns:
        column, unit = COLUMNS[label]
        series = []
        for row in rows:
            colour = COLOURS[recipes.index(row["recipe"])]
            if "curve" in row:
                points = [(point[column] / unit, point[2]) for point in row["curve"]]
                series.append(Series(f"{row['recipe']}, seed {row['seed']}", colour, points, marks=True))
        found.append(Panel("validation loss (nats)", series, label))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--title", required=True)
    parser.add_argument("--over", default="million tokens,seconds", type=lambda text: text.split(","))
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    args.picture.parent.mkdir(exist_ok=True)
    args.picture.write_text(picture(panels(rows, args.over), args.title))


if __name__ == "__main__":
    main()
