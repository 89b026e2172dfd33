"""A vocabulary with more special tokens: all other ids stay, text never makes the new ones, and files agree."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.errors import ConfigError
from llmkit.interfaces import Tokenizer
from llmkit.tokenizers.grow import add_tokens
from llmkit.tokenizers.load import load_tokenizer
from tests.unit.byte_tokenizer import ByteTokenizer
from tests.unit.tokenizers.strings import many_strings, strings, trained, trained_byte_level, trained_wordpiece

pytest.importorskip("tokenizers")
NAMES = ["<|im_start|>", "<|im_end|>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bpe": lambda: trained("bpe"),
    "unigram": lambda: trained("unigram"),
    "wordpiece": trained_wordpiece,
    "byte level": trained_byte_level,
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


def test_new_ids_follow_and_all_others_stay(tokenizer: Tokenizer, tmp_path: Path) -> None:
    size = tokenizer.vocab_size
    grown: Any = add_tokens(tokenizer, NAMES)
    ids, old = grown.token_ids(), tokenizer.token_ids()
    assert grown.vocab_size == size + len(NAMES)
    assert [grown.id_of(name) for name in NAMES] == list(range(size, size + len(NAMES)))
    assert ids.infill_ids == (size + 2, size + 3, size + 4)
    assert (ids.bos_id, ids.eos_id, ids.pad_id, ids.mask_id) == (old.bos_id, old.eos_id, old.pad_id, old.mask_id)
    np.testing.assert_array_equal(ids.special, [*old.special, *[True] * len(NAMES)])
    np.testing.assert_array_equal(ids.word_starts[:size], old.word_starts)
    texts = [*strings(), "".join(NAMES), *NAMES]
    assert grown.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert grown.encode_symbols("".join(NAMES)) == list(range(size, size + len(NAMES)))
    assert grown.decode([size, *grown.encode("some text"), size + 1]) == grown.decode(grown.encode("some text"))
    assert grown.fingerprint != tokenizer.fingerprint
    grown.save(tmp_path)
    again: Any = load_tokenizer(tmp_path)
    assert again.fingerprint == grown.fingerprint
    assert type(again) is type(tokenizer)


def test_transformers_reads_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    grown: Any = add_tokens(tokenizer, NAMES)
    grown.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == grown.vocab_size
    assert theirs.convert_tokens_to_ids(NAMES) == [grown.id_of(name) for name in NAMES]
    texts = list(many_strings())
    assert theirs(texts, add_special_tokens=False, split_special_tokens=True).input_ids == grown.encode_batch(texts)
    marked = "<|im_start|>user\nHello<|im_end|>"
    assert theirs.encode(marked, add_special_tokens=False) == grown.encode_symbols(marked)
    assert theirs.decode(grown.encode_symbols(marked), skip_special_tokens=True) == grown.decode(
        grown.encode_symbols(marked)
    )


def test_tokens_it_has_stay_where_they_are(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    name = {"[SEP]", "</s>"}
    (eos,) = (one for one in name if getattr(tokenizer, "id_of")(one) is not None)  # noqa: B009
    assert add_tokens(tokenizer, []) is tokenizer
    assert not caplog.messages
    assert add_tokens(tokenizer, [eos]) is tokenizer
    assert caplog.messages == [f"add_tokens: 0 added to the vocabulary; already in it: {eos}"]
    assert add_tokens(tokenizer, [eos, "<new>"]).vocab_size == tokenizer.vocab_size + 1


def test_a_free_role_is_taken() -> None:
    tokenizer = trained("bpe")
    assert tokenizer.token_ids().mask_id is None
    ids = add_tokens(tokenizer, ["<mask>", "<extra_id_0>", "<extra_id_1>"]).token_ids()
    assert ids.mask_id == 1024
    assert ids.sentinel_ids == (1025, 1026)


def test_what_is_refused(tokenizer: Tokenizer) -> None:
    (piece, *_) = (name for name in ("e", "▁the", "Ġthe") if getattr(tokenizer, "id_of")(name) is not None)  # noqa: B009
    for names, what in (([piece], "piece of text"), (["<a>", "<a>"], "twice"), ([" "], "blank"), ([""], "blank")):
        with pytest.raises(ConfigError, match=what) as caught:
            add_tokens(tokenizer, names)
        assert caught.value.fix
        assert caught.value.where == "add_tokens"
    with pytest.raises(ConfigError, match="ByteTokenizer"):
        add_tokens(ByteTokenizer(), ["<a>"])  # type: ignore[arg-type]
