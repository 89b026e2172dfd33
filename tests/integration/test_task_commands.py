"""What is done with a fine-tuned model: evaluate task=, predict, chat, data show; and how mistakes are told."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.cli import main
from tests.integration.task_place import N_ROWS, PROMPTS, Place, opened_model, row_of

QUIET = ["engine.n_threads=1", "engine.device=cpu"]
SHORT = [*QUIET, "generation.max_new_tokens=4"]  # replies; answers are as short as in the run
Said = pytest.CaptureFixture[str]


def ask(said: Said, *words: str) -> str:
    """What a command that ends well prints."""
    said.readouterr()
    assert main(list(words)) == 0
    return said.readouterr().out


# -- evaluate task= -------------------------------------------------------------------------------------------------


def test_evaluation_tells_metrics_details_and_the_worst(place: Place, capsys: Said) -> None:
    """The confusion matrix counts every row once; the worst answers are those with the least probable right label."""
    run = place.done("sentiment", "encoder")
    words = [f"init={run}", f"data.path={place.root / 'sentiment.jsonl'}", "n_examples=3", *QUIET]
    found = json.loads(ask(capsys, "evaluate", "task=sentiment", *words))
    assert sum(map(sum, found["details"]["confusion"])) == found["n_questions"] == N_ROWS
    right = sum(found["details"]["confusion"][i][i] for i in range(2))
    assert found["accuracy"] == right / N_ROWS
    assert len(found["worst"]) == 3
    scores = [each["score"] for each in found["worst"]]
    assert scores == sorted(scores)
    assert all(each["where"].startswith(str(place.root)) for each in found["worst"])


@pytest.mark.parametrize(("task", "kind"), [("qa", "encoder"), ("chat", "decoder"), ("code", "encoder_decoder")])
def test_evaluation_of_other_tasks(place: Place, task: str, kind: str, capsys: Said) -> None:
    run = place.done(task, kind)
    words = [f"init={run}", f"data.path={place.root / task}.jsonl", "data.max_rows=6", *QUIET]
    found = json.loads(ask(capsys, "evaluate", f"task={task}", *words))
    assert found["n_questions"] == 6
    assert len(found["worst"]) == 5


@pytest.mark.parametrize(("task", "kind"), [("chat", "decoder"), ("translation", "encoder_decoder")])
def test_the_loss_is_that_of_the_run(place: Place, task: str, kind: str, capsys: Said) -> None:
    run = place.done(task, kind)
    scores = place.best_scores(run.name)
    found = json.loads(ask(capsys, "evaluate", f"task={task}", f"init={run}", *QUIET))
    for name in ("loss", "accuracy", "ppl"):
        assert found[name] == pytest.approx(scores[name], rel=1e-6)


# -- predict --------------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_transformers(place: Place, tmp_path: Path, capsys: Said) -> None:
    """A file with labels, one without, and --text give the same; an answer for every row, in the order of the file."""
    transformers = pytest.importorskip("transformers")
    run, out = place.done("sentiment", "encoder"), tmp_path / "out.jsonl"
    file = place.write("unlabelled", [{"review": row_of("sentiment", i)["text"]} for i in range(N_ROWS)])
    ask(capsys, "predict", f"init={run}", "--file", str(file), "--out", str(out), *QUIET)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["where"] for row in rows] == [f"{file}:{line}" for line in range(1, N_ROWS + 1)]
    folder = opened_model(run)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row in rows[:5]:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        expected = dict(zip(model.config.id2label.values(), logits.softmax(0).tolist(), strict=True))
        assert row["scores"] == pytest.approx(expected, abs=1e-5)
        assert row["prediction"] == max(expected, key=expected.get)
    printed = ask(capsys, "predict", f"init={run}", "--text", rows[0]["text"], *QUIET)
    assert printed.startswith(rows[0]["prediction"] + "  (negative 0.")
    labelled = ask(capsys, "predict", f"init={run}", "--file", str(place.root / "sentiment.jsonl"), *QUIET)
    again = [json.loads(line) for line in labelled.splitlines()]
    assert [row["prediction"] for row in again] == [row["prediction"] for row in rows]


QUESTIONS = [
    ("qa", "encoder", '{"question": "what is box 3?", "context": "box 3 is red"}'),
    ("qa", "decoder", '{"question": "what is box 3?", "context": "box 3 is red"}'),
    ("translation", "encoder_decoder", "the house 5"),
    ("code", "decoder", "add 5 to x"),
    ("chat", "decoder", "say 5"),
    ("chat", "encoder_decoder", '{"messages": [{"role": "user", "content": "say 5"}]}'),
]


@pytest.mark.parametrize(("task", "kind", "text"), QUESTIONS)
def test_predictions_of_every_way_to_answer(place: Place, task: str, kind: str, text: str, capsys: Said) -> None:
    """Twice the same question has twice the same answer, in the batch and alone."""
    run = place.done(task, kind)
    out = ask(capsys, "predict", f"init={run}", "--text", text, "--text", text, *QUIET)
    half = len(out) // 2
    assert out[:half] == out[half:]
    named = ask(capsys, "predict", f"init={run}", f"task={task}", "--text", text, *QUIET)
    assert named == out[:half]


def test_rows_that_cannot_be_asked_are_counted(place: Place, capsys: Said) -> None:
    """And every answer says which row it belongs to."""
    rows: list[dict[str, Any]] = [row_of("sentiment", i) for i in range(10)]
    file = place.write("holes", [*rows[:4], {"text": ""}, *rows[4:]])
    words = ["predict", f"init={place.done('sentiment', 'encoder')}", "--file", str(file), *QUIET]
    assert main(words) == 3
    assert "holes.jsonl:5" in capsys.readouterr().err
    assert main([*words, "data.max_bad_fraction=0.2"]) == 0
    said = capsys.readouterr()
    assert "left out: 1 empty text" in said.err
    assert [json.loads(line)["where"].rpartition(":")[2] for line in said.out.splitlines()][3:6] == ["4", "6", "7"]


# -- chat -----------------------------------------------------------------------------------------------------------


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_a_conversation(place: Place, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    """A line is answered by a line; /new forgets, so that the same question has the same answer; /quit ends."""
    run = place.done("chat", kind)
    typed(monkeypatch, "say 1", "", "/new", "say 1", "/quit", "say 2")
    out = ask(capsys, "chat", f"init={run}", *SHORT)
    assert out.count("\n") >= 2
    assert out[: len(out) // 2] == out[len(out) // 2 :]


def test_a_conversation_that_outgrows_the_model(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    """The oldest turns are left out, then the end of a message, with a warning; what leaves no room is forgotten."""
    run = place.done("chat", "decoder")
    typed(monkeypatch, *["say 1"] * 4, "what? " * 40, "say 2")
    assert main(["chat", f"init={run}", "system='be kind'", *SHORT]) == 0
    said = capsys.readouterr()
    assert "the oldest first, are not read" in said.err
    assert "cannot be answered" not in said.err
    assert said.out.count("\n") >= 6
    typed(monkeypatch, "say 1")
    assert main(["chat", f"init={run}", f"system='{'be kind ' * 40}'", *SHORT]) == 0
    assert capsys.readouterr().err.count("cannot be answered") == 1


# -- data show ------------------------------------------------------------------------------------------------------


def test_rows_are_shown_token_by_token(place: Place, capsys: Said) -> None:
    words = [f"init={place.model('decoder')}", f"data.path={place.root / 'translation.jsonl'}", "n_rows=2"]
    out = ask(capsys, "data", "show", "task=translation", *words)
    rows = out.split("\n\n")
    assert len(rows) == 3
    assert rows[0].startswith(f"row 1 ({place.root / 'translation.jsonl'}:1), ")
    marked = [line.endswith("predicted") for line in rows[0].splitlines()[1:]]
    assert marked == sorted(marked)
    assert rows[0].splitlines()[-1].split()[2] == "(special)"
    assert f"{N_ROWS:,} rows of {N_ROWS:,} questions" in rows[2]


def test_what_is_left_out_or_cut_is_shown(place: Place, capsys: Said) -> None:
    """However much of it there is: this is where one looks at it."""
    rows = [row_of("summarization", i) for i in range(6)]
    rows += [{"document": "It rained. " * 60, "summary": "rain"}, {"document": "no summary"}, {"summary": "x"}]
    file = place.write("odd", rows)
    words = [f"init={place.model('decoder')}", f"data.path={file}", "n_rows=7", *PROMPTS["summarization"][:1]]
    out = ask(capsys, "data", "show", "task=summarization", *words)
    assert "left out: 1 too long (first: " in out
    assert "missing summary" in out
    assert "missing document" in out
    out = ask(capsys, "data", "show", "task=summarization", *words, "data.long_rows=truncate")
    assert "cut to fit: 1 rows, " in out
    assert ", 64 tokens, " in out


@pytest.mark.parametrize(("task", "kind"), [("sentiment", "encoder"), ("qa", "encoder"), ("chat", "decoder")])
def test_labels_spans_and_turns_are_shown(place: Place, task: str, kind: str, capsys: Said) -> None:
    words = [f"init={place.model(kind)}", f"data.path={place.root / task}.jsonl", "n_rows=1", *PROMPTS.get(task, [])]
    out = ask(capsys, "data", "show", f"task={task}", *words)
    marked = [line.split()[2].strip("'#") for line in out.splitlines() if line.endswith((" answer", " predicted"))]
    assert ('label 0: "negative"' in out) == (task == "sentiment")
    assert "".join(marked).replace("(special)", "") == {"sentiment": "", "qa": "red", "chat": "well:0"}[task]


# -- mistakes -------------------------------------------------------------------------------------------------------

ROWS, MODEL, RUN = "data.path={root}/sentiment.jsonl", "init={root}/encoder", "init={root}/runs/sentiment-encoder"
FINETUNE = ["finetune", "task=sentiment", "run.root={root}/refused", "run.name=a", "tracking=none", "engine.device=cpu"]
RANDOM = ["model=bert", "tokenizer=wordpiece", "tokenizer.vocab_size=70"]
EVALUATE, PREDICT = ["evaluate", "task=sentiment", RUN], ["predict", RUN]
MISTAKES = [
    # command line, exit code, what is said
    (["finetune"], 2, "task=chat|code|qa|sentiment|summarization|translation"),
    (["finetune", "task=sentimen"], 2, "did you mean sentiment?"),
    ([*FINETUNE, "recipe=gpt_tiny"], 2, "recipe=gpt_tiny is not for `llmkit finetune`"),
    ([*FINETUNE, MODEL, "objective=masked_lm"], 2, "objective: unknown key"),
    ([*FINETUNE, MODEL, "data.text_field=x"], 2, "data.text_field: unknown key"),
    ([*FINETUNE, MODEL, ROWS, "model=gpt2"], 2, "model: has no effect"),
    ([*FINETUNE, "init={root}/nothing"], 2, "{root}/nothing does not exist"),
    ([*FINETUNE, MODEL, "data.path={root}/nothing.jsonl"], 3, "nothing is found at '{root}/nothing.jsonl'"),
    ([*FINETUNE, MODEL, "data.path={root}/broken.jsonl"], 3, "broken json (first: {root}/broken.jsonl:1"),
    ([*FINETUNE, MODEL, "data.path={root}/translation.jsonl"], 3, "no column for 'text' and 'label'; there are"),
    ([*FINETUNE, MODEL, ROWS, "data.columns.text=review"], 3, "there is no column 'review'"),
    ([*FINETUNE, MODEL, ROWS, "data.columns.review=text"], 2, "it has text, label"),
    (
        [*FINETUNE, MODEL, ROWS, "task.labels=[negative,neutral]"],
        3,
        "20 unknown label (first: {root}/sentiment.jsonl:2",
    ),
    ([*FINETUNE, MODEL, ROWS, "data.seq_len=65"], 2, "set data.seq_len to 64 or less"),
    ([*FINETUNE, MODEL, ROWS, "freeze.n_layers=3"], 2, "the model has 2 layers"),
    ([*FINETUNE, MODEL, ROWS, "data.val_path={root}/nothing.jsonl"], 3, "where: data.val_path"),
    (
        [*FINETUNE, "model=bert", "tokenizer=wordpiece", "tokenizer.vocab_size=70", ROWS, "adapter=lora"],
        2,
        "where: adapter",
    ),
    (["evaluate", RUN], 2, "llmkit evaluate task="),
    (["evaluate", "task=sentiment"], 2, "init: a value is needed"),
    (["evaluate", "task=qa", RUN, "data.path={root}/qa.jsonl"], 2, "the model answers with a label, and qa is"),
    (["evaluate", "task=translation", RUN], 2, "an encoder writes no text"),
    (["evaluate", "task=sentiment", MODEL, ROWS], 2, "llmkit finetune task=sentiment init={root}/encoder"),
    ([*EVALUATE, "task.labels=[good,bad]"], 2, "the model answers with negative, positive"),
    ([*EVALUATE, "data.path={root}/numbered.jsonl"], 3, "unknown label (first: {root}/numbered.jsonl:1"),
    ([*EVALUATE, "data.path={root}/unlabelled.jsonl"], 3, "no column for 'label'"),
    ([*EVALUATE, "data.val_fraction=0.5"], 2, "has no effect"),
    (PREDICT, 2, "nothing to answer"),
    ([*PREDICT, "--text", "a", "--file", "b"], 2, "exclude each other"),
    ([*PREDICT, "--file", "{root}/nothing.jsonl"], 3, "where: --file"),
    ([*PREDICT, "--file", "{root}/translation.jsonl"], 3, "missing text"),
    ([*PREDICT, "--text", '{"review": "a"}'], 2, '--text \'{"text": "..."}\''),
    ([*PREDICT, "--text", '{"text": '], 2, "it begins as JSON does, but is none"),
    ([*PREDICT, "--text", " "], 2, "empty text"),
    ([*PREDICT, "--text", "a", "--out", "{root}/no/folder"], 2, "mkdir -p {root}/no"),
    ([*PREDICT, "--text", "a", "--out", "{root}"], 2, "{root} is a folder"),
    ([*PREDICT, "--text", "a", "data.path=x"], 2, "has no effect"),
    ([*PREDICT, "--text", "a", "task=qa"], 2, "qa is answered with a span of its text"),
    (["predict", MODEL, "--text", "a"], 2, "nothing says which task the model is for"),
    (["chat", RUN], 2, "an encoder writes no text"),
    (["chat", "init={root}/runs/sentiment-decoder"], 2, "the model answers with a label, and chat"),
    (["data"], 2, "did you mean data show?"),
    (["data", "show", "task=sentiment", "data.path={root}/nothing.jsonl"], 3, "nothing is found"),
    (["data", "show", "task=code", MODEL], 2, "an encoder writes no text"),
]


@pytest.mark.parametrize(("words", "code", "what"), MISTAKES)
def test_a_mistake_is_told_in_a_sentence(
    place: Place, words: list[str], code: int, what: str, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    place.done("sentiment", "encoder")
    place.done("sentiment", "decoder")
    place.write("unlabelled", [{"text": "a"}, {"text": "b"}])
    place.write("numbered", [{"text": "a", "label": 7}, {"text": "b", "label": 8}])
    (place.root / "broken.jsonl").write_text('{"text": "a"\n' * 3)
    typed(monkeypatch, "hello")
    capsys.readouterr()
    assert main([word.replace("{root}", str(place.root)) for word in words]) == code
    said = capsys.readouterr().err
    assert what.replace("{root}", str(place.root)) in said
    assert "bug in llmkit" not in said
    assert "Traceback" not in said


def test_two_words_are_one_command(capsys: Said) -> None:
    assert ask(capsys, "help", "data", "show") == ask(capsys, "data", "show", "--help")
    assert "llmkit data show [flags]" in ask(capsys, "data", "show", "--help")
    assert "confusion" not in ask(capsys, "evaluate", "--help")
    assert "n_examples" in ask(capsys, "evaluate", "task=sentiment", "--help")
