"""Fine-tuning from a command line: every task with every family, stopped and resumed, whole or beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmkit.cli import main
from llmkit.commands.open_model import check_base, open_model
from llmkit.errors import CheckpointError
from llmkit.models.hf import load_model
from llmkit.tokenizers.load import load_tokenizer
from tests.integration.task_place import N_ROWS, Place, newest_model, opened_model, row_of

METRICS = {
    "sentiment": {"accuracy", "macro_f1", "mcc"},
    "qa": {"exact_match", "f1"},
    "summarization": {"rouge1", "rouge2", "rougeL", "rougeLsum"},
    "translation": {"bleu", "chrf"},
    "code": {"exact_match", "valid_syntax", "chrf"},
    "chat": {"distinct_1", "distinct_2", "reply_words"},
}
OPENS = {  # the class of transformers that opens what was saved; None: llmkit's own format
    ("sentiment", "decoder"): "AutoModelForSequenceClassification",
    ("sentiment", "encoder"): "AutoModelForSequenceClassification",
    ("sentiment", "encoder_decoder"): None,
    ("qa", "encoder"): "AutoModelForQuestionAnswering",
}
WRITES = {"decoder": "AutoModelForCausalLM", "encoder_decoder": "AutoModelForSeq2SeqLM"}
PAIRS = [(task, kind) for task in METRICS for kind in ("decoder", "encoder", "encoder_decoder")]
GOOD = [pair for pair in PAIRS if pair in OPENS or pair[1] != "encoder"]
LORA = ("adapter=lora", "adapter.r=4")


@pytest.mark.parametrize(("task", "kind"), GOOD)
def test_every_task_with_every_family(place: Place, task: str, kind: str) -> None:
    """Metrics of the task beside the loss, answers to read, and a checkpoint that transformers opens whole."""
    run = place.done(task, kind)
    scores = place.scores(run.name)
    assert METRICS[task] | {"loss"} <= scores.keys()
    answers = [json.loads(line) for line in (run / "samples" / "answers.jsonl").read_text().splitlines()]
    assert all({"where", "answer"} <= answer.keys() for answer in answers)
    if scores["n_targets"] == 0:  # answered by a head
        assert len(answers) == scores["n_examples"]
    assert {row["step"] for row in place.rows(run.name) if "train/loss" in row} == {1, 2, 3, 4}
    name = OPENS.get((task, kind), WRITES.get(kind))
    if name is not None:
        transformers = pytest.importorskip("transformers")
        _, info = getattr(transformers, name).from_pretrained(newest_model(run), output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]


@pytest.mark.parametrize("task", [task for task, kind in PAIRS if (task, kind) not in GOOD])
def test_an_encoder_writes_no_text(place: Place, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before a row is read."""
    assert place.finetune(task, "encoder", "none", "data.path=nowhere.jsonl") == 2
    assert "start from a decoder or an encoder-decoder" in capsys.readouterr().err


def losses(place: Place, name: str) -> list[tuple[Any, ...]]:
    return [(row["step"], row["train/loss"], row["optim/grad_norm"]) for row in place.rows(name) if "train/loss" in row]


RESUMED = [
    ("sentiment", "encoder", ()),
    ("translation", "decoder", ()),
    ("sentiment", "encoder", LORA),
    ("summarization", "encoder_decoder", ("adapter=dora", "adapter.r=4", "loss.r_drop=0.5")),
    pytest.param("sentiment", "encoder_decoder", (), marks=pytest.mark.slow),
    pytest.param("qa", "encoder", ("loss.label_smoothing=0.1",), marks=pytest.mark.slow),
    pytest.param("chat", "decoder", LORA, marks=pytest.mark.slow),
    pytest.param("sentiment", "decoder", ("freeze.n_layers=1", "optim.layer_decay=0.8"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("task", "kind", "more"), RESUMED)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    place: Place, task: str, kind: str, more: tuple[str, ...]
) -> None:
    """Bit for bit, with dropout, for whole models and for adapters: losses, scores and weights."""
    whole = place.done(task, kind, *more)
    parts = f"parts-{whole.name}"
    assert place.finetune(task, kind, parts, *more, "engine.max_hours=1e-9") == 0
    assert len(losses(place, parts)) == 1
    assert place.finetune(task, kind, parts, *more) == 0
    assert losses(place, parts) == losses(place, whole.name)
    assert place.scores(parts) == place.scores(whole.name)
    files = [next(newest_model(run).glob("*.safetensors")) for run in (whole, place.run(parts))]
    ours, theirs = (load_file(file) for file in files)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- adapters -------------------------------------------------------------------------------------------------------


def test_only_the_adapter_is_saved(place: Place) -> None:
    """With its head and tokenizer, and nothing of the model beside which it was trained."""
    folder = newest_model(place.done("sentiment", "encoder", *LORA))
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert not (folder / "config.json").exists()
    assert all(".lora_" in name or "classifier" in name or "pooler" in name for name in names)
    keys = json.loads((folder / "adapter_config.json").read_text())
    assert keys["base_model_name_or_path"] == str(place.model("encoder"))
    assert json.loads((folder / "task_head.json").read_text())["labels"] == ["negative", "positive"]
    assert load_tokenizer(folder).vocab_size == load_tokenizer(place.model("encoder")).vocab_size


def evaluated(run: Path, task: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capsys.readouterr()
    words = [f"init={run}", "engine.n_threads=1", "engine.device=cpu", *more]
    assert main(["evaluate", f"task={task}", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("task", "kind", "more"),
    [
        ("sentiment", "encoder", ()),
        ("sentiment", "encoder", LORA),
        ("translation", "encoder_decoder", ()),
        ("summarization", "decoder", ("data.seq_len=48",)),
    ],
)
def test_evaluation_repeats_the_validation_of_the_run(
    place: Place, task: str, kind: str, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rows, its prompts, its length of rows and how it writes, though the command line names none of them."""
    run = place.done(task, kind, *more)
    found, scores = evaluated(run, task, capsys), place.best_scores(run.name)
    assert {name: found[name] for name in METRICS[task]} == {name: scores[name] for name in METRICS[task]}
    answers = (run / "samples" / "answers.jsonl").read_text().splitlines()
    assert found["n_questions"] == len(answers)


def test_evaluation_reads_as_much_as_training_did(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.done("sentiment", "encoder", "data.seq_len=8", "data.long_rows=truncate")
    capsys.readouterr()
    words = [f"init={run}", "engine.n_threads=1", "engine.device=cpu"]
    assert main(["evaluate", "task=sentiment", *words]) == 0
    assert "questions are longer than 8 tokens: a part was left out" in capsys.readouterr().err
    assert main(["evaluate", "task=sentiment", *words, "data.seq_len=64"]) == 0
    assert "a part was left out" not in capsys.readouterr().err


def test_an_adapter_is_a_model_to_every_command(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.done("summarization", "decoder", *LORA)
    quiet = ["engine.n_threads=1", "engine.device=cpu"]
    assert main(["generate", f"init={run}", "--prompt", "It rained", "generation.max_new_tokens=3", *quiet]) == 0
    assert main(["predict", f"init={run}", "--text", "It rained.", "generation.max_new_tokens=3", *quiet]) == 0
    assert capsys.readouterr().out.startswith("It rained")
    assert place.finetune("translation", None, "whole", f"init={run}", "engine.max_steps=2") == 0
    assert (newest_model(place.run("whole")) / "config.json").is_file()


def test_an_adapter_of_an_adapted_model(place: Place) -> None:
    """The second one names the first, which is merged before it is trained and whenever it is opened."""
    first = newest_model(place.done("sentiment", "encoder", *LORA))
    assert place.finetune("sentiment", None, "second", f"init={first}", *LORA, "task.labels=[positive,negative]") == 0
    second = newest_model(place.run("second"))
    model, base = open_model(second), open_model(first)
    assert (model.task_head.config.labels, base.task_head.config.labels) == (
        ("positive", "negative"),
        ("negative", "positive"),
    )
    assert not torch.equal(model.blocks[0].attention.q.weight, base.blocks[0].attention.q.weight)
    assert not any(hasattr(module, "lora_A") for module in model.modules())


def test_an_adapter_does_not_go_on_beside_another_model(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    moved = place.root / "moved"
    assert place.finetune("translation", "decoder", "beside", *LORA, "engine.max_hours=1e-9") == 0
    folder = newest_model(place.run("beside"))
    check_base(folder, place.model("decoder"))
    with pytest.raises(CheckpointError, match="the adapter was trained beside") as caught:
        check_base(folder, place.model("encoder_decoder"))
    assert f"init={place.model('decoder')}" in caught.value.fix
    place.model("decoder").rename(moved)
    try:
        capsys.readouterr()
        assert main(["predict", f"init={place.run('beside')}", "--text", "the house"]) == 4
        said = capsys.readouterr().err
        assert "the model that the adapter belongs to is not there" in said
        assert "base_model_name_or_path" in said
    finally:
        moved.rename(place.model("decoder"))


def test_new_tokens_need_embeddings_that_are_trained(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    new = "add_tokens=['<|user|>','<|end|>']"
    assert place.finetune("translation", "decoder", "grown", *LORA, new) == 2
    assert "adapter.train_embeddings=true" in capsys.readouterr().err
    assert place.finetune("translation", "decoder", "grown", *LORA, new, "adapter.train_embeddings=true") == 0
    folder = newest_model(place.run("grown"))
    n_old = load_tokenizer(place.model("decoder")).vocab_size
    assert load_tokenizer(folder).vocab_size == n_old + 2
    assert open_model(folder).config.vocab_rows >= n_old + 2
    assert place.finetune("translation", "decoder", "all", new, "engine.max_steps=2") == 0
    assert load_model(newest_model(place.run("all"))).config.vocab_rows >= n_old + 2


# -- what is trained, on what ---------------------------------------------------------------------------------------


def test_frozen_layers_keep_their_weights(place: Place) -> None:
    run = place.done("sentiment", "encoder", "freeze.n_layers=1", "freeze.embeddings=true")
    before, after = load_model(place.model("encoder")).state_dict(), load_model(newest_model(run)).state_dict()
    same = {name for name in before if name in after and torch.equal(before[name], after[name])}
    assert any(name.startswith("embedding") for name in same)
    assert {name for name in before if name.startswith("blocks.0.")} <= same
    assert not any(name.startswith("blocks.1.") and name.endswith("weight") and "norm" not in name for name in same)


def test_labels_stand_in_the_order_that_was_given(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers in the data count them; without a list numbers are names, by size."""
    rows = [{"text": row_of("sentiment", i)["text"], "label": (10, 9, 0)[i % 3]} for i in range(N_ROWS)]
    numbers = place.write("numbers", rows)
    assert place.finetune("sentiment", "encoder", "numbers", f"data.path={numbers}") == 0
    config = json.loads((newest_model(place.run("numbers")) / "config.json").read_text())
    assert [config["id2label"][str(i)] for i in range(3)] == ["0", "9", "10"]
    places = place.write("places", [row | {"label": row["label"] % 2} for row in rows])
    given = [f"data.path={places}", "task.labels=[zufrieden,unzufrieden]"]
    assert place.finetune("sentiment", "encoder", "places", *given) == 0
    config = json.loads((newest_model(place.run("places")) / "config.json").read_text())
    assert config["id2label"] == {"0": "zufrieden", "1": "unzufrieden"}
    found = evaluated(place.run("places"), "sentiment", capsys, f"data.path={places}")
    assert (found["details"]["labels"], found["n_questions"]) == (["zufrieden", "unzufrieden"], N_ROWS)


def test_rows_held_out_by_the_user(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    val = place.write("val", [row_of("sentiment", i) for i in range(100, 107)] + [row_of("sentiment", 3)])
    assert place.finetune("sentiment", "encoder", "val", f"data.val_path={val}") == 0
    assert place.scores("val")["n_examples"] == 8
    said = capsys.readouterr().err
    assert f"{N_ROWS} for training, 8 for validation" in said
    assert "1 validation questions also stand in the training data" in said
    assert "a gap of" in said


def test_fewer_answers_are_spread_over_the_validation_rows(place: Place) -> None:
    """A sorted file would otherwise show one label only."""
    rows = sorted((row_of("sentiment", i) for i in range(20)), key=lambda row: str(row["label"]))
    val = place.write("sorted", rows)
    assert place.finetune("sentiment", "encoder", "few", f"data.val_path={val}", "data.max_answers=4") == 0
    answers = [json.loads(line) for line in (place.run("few") / "samples" / "answers.jsonl").read_text().splitlines()]
    assert [answer["label"] for answer in answers] == ["negative", "negative", "positive", "positive"]
    assert place.scores("few")["n_examples"] == 20


def test_without_a_model_it_begins_with_random_weights_and_says_so(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["tokenizer=wordpiece", "tokenizer.vocab_size=70", "model=bert", "model.d_model=32", "model.n_layers=1"]
    assert place.finetune("sentiment", None, "random", *small, "model.n_heads=2") == 0
    assert "the model starts from random weights" in capsys.readouterr().err


# -- the best checkpoint, and the end -------------------------------------------------------------------------------


def best_of(place: Place, name: str) -> list[int]:
    """The steps whose checkpoints say that they are the best so far."""
    found = [json.loads(path.read_text()) for path in place.run(name).glob("checkpoints/*/manifest.json")]
    return sorted(manifest["step"] for manifest in found if manifest["best"])


def test_the_metric_that_was_named_picks_the_best_checkpoint(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """It falls after the second evaluation here: that checkpoint stays beside the newest two, and is named."""
    more = ["engine.max_steps=20", "engine.eval_every=2", "optim.lr=1e-2", "engine.best_metric=loss"]
    assert place.finetune("translation", "decoder", "best", *more) == 0
    scores = {row["step"]: row["val/loss"] for row in place.rows("best") if "val/loss" in row}
    best = min(scores, key=lambda step: scores[step])
    steps = {int(folder.name[5:]) for folder in place.run("best").glob("checkpoints/step_*")}
    assert best in steps
    assert max(best_of(place, "best")) == best
    assert opened_model(place.run("best")).parent.name == f"step_{best}", "init=<run> opens it"
    said = capsys.readouterr().err
    assert (f"step_{best}" in said) == (best != 20)


@pytest.mark.parametrize(
    ("task", "kind", "metric"), [("chat", "decoder", "ppl"), ("sentiment", "encoder", "train_part/loss")]
)
def test_every_metric_of_an_evaluation_can_be_named(place: Place, task: str, kind: str, metric: str) -> None:
    run = place.done(task, kind, f"engine.best_metric={metric}")
    name = metric if "/" in metric else f"val/{metric}"
    rows = {row["step"]: row[name] for row in place.rows(run.name) if name in row}
    assert max(best_of(place, run.name)) == min(rows, key=lambda step: rows[step])


def test_a_rare_label_is_told(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row_of("sentiment", i) for i in range(150)] + [{"text": "the food was odd", "label": "posittive"}]
    path = place.write("misspelt", rows)
    words = [f"data.path={path}", f"data.val_path={place.root / 'sentiment.jsonl'}", "data.max_answers=2"]
    assert place.finetune("sentiment", "encoder", "misspelt", *words) == 0
    said = capsys.readouterr().err
    assert "3 in the training rows: negative 75, positive 75, posittive 1" in said
    assert "in less than 1 % of the rows: posittive; misspelt?" in said


def test_a_warm_up_that_never_ends_is_told(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["engine.max_steps=null", "engine.max_epochs=0.5", "schedule.warmup_steps=20"]
    assert place.finetune("sentiment", "encoder", "cold", *more) == 0
    assert "the run ends after 4 steps, before the 20 steps of the warm-up" in capsys.readouterr().err


def test_an_unknown_metric_is_refused_before_the_first_step(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.finetune("sentiment", "encoder", "unknown", "engine.best_metric=acuracy") == 2
    said = capsys.readouterr().err
    assert "no metric is called val/acuracy" in said
    assert "one of accuracy, loss, macro_f1, mcc, train_part/" in said
    assert not place.run("unknown").joinpath("checkpoints").exists()


def test_patience_ends_a_run_for_good(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """BLEU stays 0: the second evaluation without a better one is the last. The same command then does nothing."""
    more = ["engine.max_steps=50", "engine.eval_every=1", "engine.patience=2", "engine.best_metric=bleu"]
    assert place.finetune("translation", "decoder", "patient", *more) == 0
    assert "no better val/bleu in 2 evaluations: the run ends" in capsys.readouterr().err
    before = (place.run("patient") / "metrics.jsonl").read_text()
    assert json.loads((place.run("patient") / "result.json").read_text())["step"] == 3
    assert place.finetune("translation", "decoder", "patient", *more) == 0
    assert "is complete: nothing to do after step 3" in capsys.readouterr().err
    assert (place.run("patient") / "metrics.jsonl").read_text() == before
    longer = [*more[:2], "engine.patience=4", more[3]]
    assert place.finetune("translation", "decoder", "patient", *longer) == 0
    assert json.loads((place.run("patient") / "result.json").read_text())["step"] == 5


def test_settings_that_change_nothing_are_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Two passes without dropout, and beams for a model that answers with a label."""
    new = ("model=gpt2", "model.d_model=32", "model.n_heads=2", "model.dropout=0.0", "loss.r_drop=1")
    assert place.finetune("translation", None, "same", *new, "tokenizer=bpe", "tokenizer.vocab_size=300") == 2
    assert "loss.r_drop" in capsys.readouterr().err
    run = place.done("sentiment", "encoder")
    for command, more in (("evaluate", ("task=sentiment",)), ("predict", ("--text", "fine"))):
        assert main([command, *more, f"init={run}", "generation.n_beams=2"]) == 2
        assert "the model answers with a label, not by writing" in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_settings_only(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.done("sentiment", "encoder")
    assert place.finetune("sentiment", "encoder", run.name, "optim.lr=1e-3") == 2
    assert "optim.lr: the run in this folder was started with 0.003, not 0.001" in capsys.readouterr().err
    assert place.finetune("sentiment", "encoder", run.name, "engine.eval_batch_size=2", "engine.patience=3") == 0
    assert place.done("sentiment", "encoder") == run
