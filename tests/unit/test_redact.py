"""Secrets leave no trace in text and config dumps; ordinary words stay."""

from __future__ import annotations

import pytest

from llmkit.redact import MASK, redact, redact_text


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "my_secret", "GOOGLE_CREDENTIALS"]
)
def test_values_of_secret_variables_are_masked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "open sesame 42")
    assert redact_text("before open sesame 42 after") == f"before {MASK} after"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "disallowed"),
        ("MAX_TOKENS", "1000000"),
        ("SSH_KEY_PATH", "/home/me/run"),
        ("IDENTITY_TOKEN_FILE", "/run/token"),
        ("KEY", "abc"),
        ("SOME_TOKEN", "disabled"),
    ],
)
def test_counts_switches_and_places_are_no_secrets(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert redact_text(f"a line with {value} in it") == f"a line with {value} in it"


def test_the_longer_of_two_overlapping_secrets_goes_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefghijkl")
    assert redact_text("abcdefghijkl") == MASK


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://bob:hunter2@host/x", f"https://{MASK}@host/x"),
        ("https://sometoken@github.com/a/b", f"https://{MASK}@github.com/a/b"),
        ("s3://bucket/key?token=abc&x=1", f"s3://bucket/key?token={MASK}&x=1"),
        ("curl -H 'Authorization: Bearer abcdef123456'", f"curl -H 'Authorization: Bearer {MASK}'"),
        ("tracking.wandb.api_key=abc run.name=x", f"tracking.wandb.api_key={MASK} run.name=x"),
        ("--hub_token=abc", f"--hub_token={MASK}"),
        ('{"password": "abc"}', f'{{"password": "{MASK}"}}'),
        ("hf_" + "aB3" * 8, MASK),
        ("sk-ant-" + "aB3" * 8, MASK),
        ("github_pat_" + "aB3" * 8, MASK),
        ("AKIA" + "ABCD" * 4, MASK),
        ("eyJhbGciOi.eyJzdWIiOi.c2lnbmF0", MASK),
    ],
)
def test_known_shapes_are_masked(text: str, clean: str) -> None:
    assert redact_text(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "step 10/100 loss 3.2",
        "https://host/path?x=1",
        "me@example.org",
        "eos_token=</s>",
        "max_tokens: 5",
        "a secret garden",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact_text(text) == text


def test_config_keys_mask_their_values_at_any_depth() -> None:
    config = {
        "optim": {"lr": 0.1},
        "nested": [{"api_key": "abc", "tokens": 5}],
        "hub_token": "t",
        "password": None,
        "pad_token": "<pad>",
        7: ("x",),
    }
    assert redact(config) == {
        "optim": {"lr": 0.1},
        "nested": [{"api_key": MASK, "tokens": 5}],
        "hub_token": MASK,
        "password": None,
        "pad_token": "<pad>",
        7: ["x"],
    }
    assert config["hub_token"] == "t"
