"""The ``llmkit`` key of ``config.json``: every field of a config survives JSON, and what does not fit is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmkit.errors import CheckpointError
from llmkit.models.config import DecoderConfig
from llmkit.models.hf import own
from llmkit.models.hf.family import Keys
from tests.unit.models.tiny import gpt2, llama

FULL = llama(
    attention_windows=(4, None),
    local_rope_theta=100.0,
    rope_scaling={"type": "yarn", "factor": 4.0, "original_len": 8, "truncate": False},
    qk_norm="all",
    logit_softcap=30,
)


def through_json(config: DecoderConfig, **changes: Any) -> Keys:
    key = json.loads(json.dumps({**own.as_key(config), **changes}))
    return Keys({own.KEY: key})


@pytest.mark.parametrize("config", [llama(), gpt2(), FULL], ids=["llama", "gpt2", "full"])
def test_every_config_survives_json(config: DecoderConfig) -> None:
    assert own.read(through_json(config), DecoderConfig) == config
    assert config.problems() == []


def test_fields_that_came_later_are_as_they_were() -> None:
    """Folders that llmkit wrote before are opened; fields of the first day must be there."""
    keys = through_json(gpt2())
    keys.raw[own.KEY].pop("scale_attention_by_layer")
    assert own.read(keys, DecoderConfig) == gpt2()
    keys.raw[own.KEY].pop("norm")
    with pytest.raises(CheckpointError, match=r"llmkit\.norm is missing"):
        own.read(keys, DecoderConfig)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_windows", 4),
        ("attention_windows", [4, "5"]),
        ("attention_windows", [4.5]),
        ("rope_scaling", ["yarn"]),
        ("rope_scaling", "yarn"),
        ("qk_norm", "heads"),
        ("qk_norm", True),
        ("norm_position", None),
        ("logit_softcap", [30]),
    ],
)
def test_a_value_of_another_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"llmkit\.{name} has the value"):
        own.read(through_json(FULL, **{name: value}), DecoderConfig)
