"""``llmkit generate``: where prompts come from, what is printed, and what is refused."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmkit.commands.generate import run
from llmkit.config.schema import GenerateConfig
from llmkit.errors import ConfigError, DataError
from llmkit.generation import generate
from llmkit.models.hf import load_model, save_model
from llmkit.settings import DeviceConfig
from llmkit.tokenizers.load import load_tokenizer
from llmkit.tokenizers.sentencepiece import SentencePieceSpec
from tests.unit.generation_settings import GREEDY
from tests.unit.models.tiny import built, llama
from tests.unit.models.tiny_seq2seq import built as built_seq2seq
from tests.unit.models.tiny_seq2seq import t5

SETTINGS = replace(GREEDY, max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    spec = SentencePieceSpec(
        kind="bpe",
        vocab_size=285,
        path=None,
        character_coverage=1.0,
        split_digits=False,
        extra_symbols=[],
        n_sentinels=0,
        max_train_bytes=10_000,
    )
    tokenizer = spec.train(["the cat sat on the mat and the dog ran"] * 20, folder)
    model = built(llama(vocab_size=None, max_seq_len=64).with_vocab(tokenizer.vocab_size))
    save_model(model, folder, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    return folder


def config(folder: Path, precision: str = "fp32") -> GenerateConfig:
    device = DeviceConfig(device="cpu", precision=precision, n_threads=1, micro_batch_size=2)  # type: ignore[arg-type]
    return GenerateConfig(init=str(folder), candidates=5, generation=SETTINGS, engine=device)


def arguments(prompt: list[str] | None = None, prompt_file: str | None = None) -> argparse.Namespace:
    return argparse.Namespace(prompt=prompt, prompt_file=prompt_file)


def expected(folder: Path, prompt: str) -> str:
    (text,) = generate(load_model(folder), load_tokenizer(folder), [prompt], SETTINGS, device="cpu")
    return prompt + text


def test_each_prompt_is_printed_with_its_continuation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["the cat", "on", "the dog ran"]
    assert run(config(folder), arguments(prompts)) == 0
    assert capsys.readouterr().out == "\n---\n".join(expected(folder, prompt) for prompt in prompts) + "\n"


def test_prompts_from_a_file_and_from_standard_input(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("the cat\n\non the mat\n")
    both = f"{expected(folder, 'the cat')}\n---\n{expected(folder, 'on the mat')}\n"
    run(config(folder), arguments(None, str(tmp_path / "prompts.txt")))
    assert capsys.readouterr().out == both
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\non the mat\n"))
    run(config(folder), arguments(None, "-"))
    assert capsys.readouterr().out == both
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    run(config(folder), arguments())
    assert capsys.readouterr().out == expected(folder, "the cat") + "\n"


def test_one_prompt_on_a_terminal_is_streamed_and_cannot_steer_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run(config(folder), arguments(["\x1b[2Jthe cat"]))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert shown.startswith("\\x1b[2Jthe cat")


def test_bf16_halves_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def watch(model: torch.nn.Module, *args: object, **kwargs: object) -> list[str]:
        seen.extend(parameter.dtype for parameter in model.parameters())
        return ["", ""]

    monkeypatch.setattr("llmkit.commands.generate.generate", watch)
    run(config(folder, "bf16"), arguments(["a", "b"]))
    assert set(seen) == {torch.bfloat16}


def test_no_prompt_and_unreadable_prompts_are_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(ConfigError, match="there is no prompt"):
        run(config(folder), arguments())
    with pytest.raises(DataError, match="cannot be read"):
        run(config(folder), arguments(None, str(tmp_path / "absent")))
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="cannot be read"):
        run(config(folder), arguments(None, str(tmp_path / "latin")))


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    load_tokenizer(folder).save(tmp_path)
    save_model(built(replace(llama(), vocab_size=64)), tmp_path)
    with pytest.raises(DataError, match="ids, the embedding 64 rows"):
        run(config(tmp_path), arguments(["a"]))


@pytest.mark.parametrize(
    ("n_sentinels", "prompt", "hint"),
    [
        (3, "the [MASK] sat", "reads [MASK] as plain text: write <extra_id_0>"),
        (3, "the <mask> sat", "reads <mask> as plain text: write <extra_id_0>"),
        (0, "the [MASK] sat", "reads [MASK] as plain text: it fills no gaps"),
        (3, "the <extra_id_0> sat", ""),
    ],
)
def test_a_mask_for_an_encoder_decoder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, n_sentinels: int, prompt: str, hint: str
) -> None:
    spec = SentencePieceSpec("bpe", 300, None, 1.0, False, [], n_sentinels, 10_000)
    tokenizer = spec.train(["the cat sat on the mat and the dog ran"] * 20, tmp_path)
    model = built_seq2seq(t5(vocab_size=tokenizer.vocab_size))
    save_model(model, tmp_path, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    with caplog.at_level(logging.WARNING, logger="llmkit"):
        assert run(config(tmp_path), arguments([prompt])) == 0
    assert hint in caplog.text
    assert bool(hint) == ("plain text" in caplog.text)
