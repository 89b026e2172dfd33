"""Fine-tuned models are exported and asked by transformers alone: the same answers to the same texts."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llmkit.cli import main
from llmkit.commands.open_model import open_model, open_tokenizer
from llmkit.models.hf import load_model
from tests.integration.task_place import Place, opened_model, row_of

transformers = pytest.importorskip("transformers")
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
LLAMA = ["model=llama", "tokenizer=bpe", "tokenizer.vocab_size=280", "model.d_model=32", "model.n_layers=2"]
LLAMA += ["model.n_heads=2", "model.max_seq_len=64"]
TEXTS = [row_of("sentiment", i)["text"] for i in (50, 51)] + ["What a lovely café, and good food!"]
IDS = torch.randint(10, 250, (2, 20), generator=torch.Generator().manual_seed(0))


def exported(source: Path, out: Path, *words: str) -> tuple[Path, str]:
    """The folder, and its card."""
    assert main(["export", f"init={source}", f"out={out}", *words]) == 0
    return out, (out / "README.md").read_text()


def predicted(source: Path, rows: list[dict[str, Any]], folder: Path, *words: str) -> list[dict[str, Any]]:
    """What llmkit answers, with scores."""
    file, out = folder / "asked.jsonl", folder / "answered.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["predict", f"init={source}", "--file", str(file), "--out", str(out), *words]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@torch.no_grad()
def asked_there(folder: Path, name: str, *texts: str) -> tuple[Any, Any]:
    """(model, its output for one text, or one pair), with nothing but what a user of transformers writes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, name).from_pretrained(folder).eval()
    return model, model(**tokenizer(*texts, return_tensors="pt"))


def matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_classifier(place: Place, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.done("sentiment", kind)
    out, card = exported(run, tmp_path / "out")
    assert "rows of the task head       6 texts equal" in capsys.readouterr().out
    for text, answer in zip(TEXTS, predicted(run, [{"text": text} for text in TEXTS], tmp_path), strict=True):
        model, output = asked_there(out, "AutoModelForSequenceClassification", text)
        odds = output.logits[0].softmax(0).tolist()
        assert {model.config.id2label[i]: p for i, p in enumerate(odds)} == pytest.approx(answer["scores"], abs=1e-6)
    assert matter(card)["pipeline_tag"] == "text-classification"
    n_written = sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values())
    scores = place.best_scores(run.name)
    lines = ["task | Sentiment(labels=None)", "answers with | 2 classes: negative, positive", "rows | sentiment.jsonl"]
    lines += ["columns | text, label", f"parameters | {n_written:,}", f"val/macro_f1 | {scores['macro_f1']:.6g}"]
    best = json.loads((opened_model(run).parent / "state.json").read_text())["progress"]["best_step"]
    lines += [f"best step | {best}, by val/accuracy", "started from | " + kind]
    for line in lines:
        assert f"| {line} |" in card, line
    assert "| questions | " in card
    assert "| training rows | " in card
    assert str(place.root) not in card


def test_spans(place: Place, tmp_path: Path) -> None:
    run = place.done("qa", "encoder")
    out, card = exported(run, tmp_path / "out")
    rows = [{name: row_of("qa", i)[name] for name in ("question", "context")} for i in (50, 51)]
    for row, answer in zip(rows, predicted(run, rows, tmp_path), strict=True):
        _, output = asked_there(out, "AutoModelForQuestionAnswering", row["question"], row["context"])
        sums_TT = output.start_logits[0, :, None] + output.end_logits[0, None, :]
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        sides = tokenizer(row["question"], row["context"]).sequence_ids()
        inside = torch.tensor([side == 1 for side in sides])
        allowed = (inside[:, None] & inside[None, :]).triu()
        assert float(sums_TT[0, 0]) == pytest.approx(answer["scores"]["no_answer"], abs=1e-5)
        assert float(sums_TT[allowed].max()) == pytest.approx(answer["scores"]["span"], abs=1e-5)
    assert matter(card)["pipeline_tag"] == "question-answering"
    assert "| answers with | spans of a text |" in card
    assert "by val/f1 |" in card


def test_a_head_without_a_class_there(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.done("sentiment", "encoder_decoder")
    out, card = exported(run, tmp_path / "out")
    shown = capsys.readouterr()
    assert "no class of transformers computes this task head: the export opens in llmkit only" in shown.err
    assert "llmkit only: no class of transformers computes this task head" in shown.out
    rows = [{"text": text} for text in TEXTS]
    (tmp_path / "again").mkdir()
    again = predicted(out, rows, tmp_path / "again", "task=sentiment")
    assert [row["scores"] for row in again] == [row["scores"] for row in predicted(run, rows, tmp_path)]
    assert "llmkit predict init=FOLDER task=sentiment" in card


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(place: Place) -> Path:
    """A run whose weights nothing but an adapter changes later."""
    assert place.finetune("translation", None, "llama", *LLAMA) == 0
    return place.run("llama")


@pytest.fixture(scope="module")
def tuned(place: Place, llama: Path) -> Path:
    """An adapter that has learned something."""
    words = [f"init={llama}", "adapter=lora", "adapter.r=4", "optim.lr=0.05"]
    assert place.finetune("translation", None, "llama-lora", *words) == 0
    return place.run("llama-lora")


def test_gguf_has_no_heads(place: Place, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model that would go into GGUF without one."""
    pytest.importorskip("gguf")
    assert place.finetune("sentiment", None, "llama-sentiment", f"init={llama}") == 0
    words = [f"init={place.run('llama-sentiment')}", f"out={tmp_path / 'out'}"]
    capsys.readouterr()
    assert main(["export", *words, "format=gguf", "dtype=float16"]) == 2
    told = capsys.readouterr().err
    assert "the model answers by a task head (2 classes: negative, positive), and GGUF has no place for one" in told
    assert list(tmp_path.iterdir()) == []
    assert main(["export", *words]) == 0
    assert "LlamaForSequenceClassification" in capsys.readouterr().out


@torch.no_grad()
def logits_there(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits


@needs_peft
@pytest.mark.filterwarnings("ignore::FutureWarning")  # between peft and transformers
def test_an_adapter_is_merged(llama: Path, tuned: Path, tmp_path: Path) -> None:
    """transformers alone computes with the export what peft does with base and adapter."""
    from peft import PeftModel

    out, card = exported(tuned, tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(opened_model(llama))
    before = logits_there(base)
    expected = logits_there(PeftModel.from_pretrained(base, opened_model(tuned)))
    found = logits_there(transformers.AutoModelForCausalLM.from_pretrained(out))
    assert float((expected - before).abs().max()) > 0.01
    assert torch.allclose(found, expected, atol=1e-5)
    assert not (out / "adapter_config.json").exists()
    assert "| started from | llama |" in card
    assert "| adapter | LoRA, rank 4, alpha 32, on " in card
    assert "merged into the weights of llama |" in card
    assert matter(card)["pipeline_tag"] == "translation"


def test_a_merged_adapter_as_gguf(tuned: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    out, _ = exported(tuned, tmp_path / "out", "format=gguf", "dtype=float32")
    merged, again = (
        dict(model.named_parameters()) for model in (open_model(opened_model(tuned)), load_model(out / "model.gguf"))
    )
    assert all(torch.allclose(again[name], tensor, atol=1e-6) for name, tensor in merged.items())


@needs_peft
@pytest.mark.filterwarnings("ignore::FutureWarning")  # between peft and transformers
def test_an_adapter_that_peft_made(llama: Path, tmp_path: Path) -> None:
    """Its folder has no tokenizer: that of its model goes with it."""
    from peft import LoraConfig, get_peft_model

    base = transformers.AutoModelForCausalLM.from_pretrained(opened_model(llama))
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    out, card = exported(tmp_path / "adapter", tmp_path / "out")
    found = logits_there(transformers.AutoModelForCausalLM.from_pretrained(out))
    assert torch.allclose(found, logits_there(adapted), atol=1e-5)
    assert open_tokenizer(out).fingerprint == open_tokenizer(opened_model(llama)).fingerprint
    assert "| started from | llama |" in card
    assert "| adapter | LoRA, rank 3, alpha 6, on q_proj, v_proj; merged" in card


def test_an_adapter_with_a_head(place: Place, tmp_path: Path) -> None:
    run = place.done("sentiment", "encoder", "adapter=lora", "adapter.r=4")
    out, card = exported(run, tmp_path / "out")
    rows = [{"text": text} for text in TEXTS]
    for text, answer in zip(TEXTS, predicted(run, rows, tmp_path), strict=True):
        model, output = asked_there(out, "AutoModelForSequenceClassification", text)
        odds = output.logits[0].softmax(0).tolist()
        assert {model.config.id2label[i]: p for i, p in enumerate(odds)} == pytest.approx(answer["scores"], abs=1e-5)
    assert "| adapter | LoRA" in card


def test_a_model_to_talk_with(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its chat template goes along, and gives the same prompts there."""
    run = place.done("chat", "decoder")
    out, _ = exported(run, tmp_path / "out")
    assert "chat template               6 prompts equal, 0 refused by it" in capsys.readouterr().out
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "say 7"}]
    ours = open_tokenizer(opened_model(run)).render_chat(chat, add_generation_prompt=True)
    assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == ours
