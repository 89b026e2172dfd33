"""The tables of docs/model.md name every field of the three configs once, and no other."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from llmkit.models.config import DecoderConfig
from llmkit.models.encoder_config import EncoderConfig
from llmkit.models.encoder_decoder_config import EncoderDecoderConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "model.md"
CONFIGS = {"Decoder": DecoderConfig, "Encoder": EncoderConfig, "Encoder-decoder": EncoderDecoderConfig}


@pytest.mark.parametrize("title", CONFIGS)
def test_every_field_has_a_row(title: str) -> None:
    sections = re.split(r"^## ", PAGE.read_text("utf8"), flags=re.MULTILINE)
    (section,) = (text for text in sections if text.startswith(f"{title}\n"))
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert all(len(row) == 3 and all(len(cell) > 2 for cell in row) for row in rows)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(field.name for field in fields(CONFIGS[title]))
