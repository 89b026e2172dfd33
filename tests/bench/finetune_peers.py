"""The work of ``tests.bench.finetune`` as transformers' own Trainer does it: one process, one job, one seed.

Prints one JSON line: the seconds from ``--started`` until training had ended, and the metrics of the test rows.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from llmkit.metrics.squad import squad_scores
from llmkit.metrics.translation import sacre_bleu

MAX_ANSWER = 64


def training_arguments(folder: str, args: argparse.Namespace, **more: Any) -> transformers.TrainingArguments:
    kind = more.pop("kind", transformers.TrainingArguments)
    return kind(
        folder, seed=args.seed, data_seed=args.seed, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_steps=100, **more,
    )  # fmt: skip


def json_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def sst2(args: argparse.Namespace) -> dict[str, float]:
    """Three epochs of 32 rows, rate 1e-4 and the rest as Trainer has it; validation after every epoch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    parts = {}
    for part in ("train", "valid", "test"):
        rows = json_rows(args.data / "sentiment" / f"sst2.{part}.jsonl")
        ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=128)["input_ids"]
        parts[part] = [{"input_ids": i, "labels": row["label"]} for i, row in zip(ids, rows, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=training_arguments(
                folder,
                args,
                num_train_epochs=3,
                per_device_train_batch_size=32,
                learning_rate=1e-4,
                eval_strategy="epoch",
            ),
            train_dataset=parts["train"],
            eval_dataset=parts["valid"],
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        seconds = time.time() - args.started
        found = trainer.predict(parts["test"])
    right = (found.predictions.argmax(1) == found.label_ids).mean()
    return {"seconds": seconds, "accuracy": float(right)}


def squad_rows(path: Path) -> list[dict[str, Any]]:
    articles = json.loads(path.read_text("utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    return [{"context": part["context"], **question} for part in paragraphs for question in part["qas"]]


def question_features(tokenizer: Any, row: dict[str, Any]) -> dict[str, Any]:
    """One window of 384 tokens, the first; an answer outside of it is trained as the first token, as run_qa does."""
    made = tokenizer(
        row["question"], row["context"], truncation="only_second", max_length=384, return_offsets_mapping=True
    )
    offsets, parts = made.pop("offset_mapping"), made.sequence_ids()
    answer = row["answers"][0]
    start, stop = answer["answer_start"], answer["answer_start"] + len(answer["text"])
    inside = [i for i, part in enumerate(parts) if part == 1 and offsets[i][0] < stop and offsets[i][1] > start]
    whole = bool(inside) and offsets[inside[-1]][1] >= stop
    first, last = (inside[0], inside[-1]) if whole else (0, 0)
    return {**made, "start_positions": first, "end_positions": last}


def best_span(starts: torch.Tensor, ends: torch.Tensor, offsets: list[Any], parts: list[Any], context: str) -> str:
    """The text of the span with the largest sum of the two scores, at most ``MAX_ANSWER`` tokens long."""
    allowed = torch.tensor([part == 1 for part in parts])
    scores = starts[:, None] + ends[None, :]
    square = torch.ones_like(scores, dtype=torch.bool)
    scores = scores.masked_fill(~(square.triu() & square.tril(MAX_ANSWER - 1)), -torch.inf)
    scores = scores.masked_fill(~(allowed[:, None] & allowed[None, :]), -torch.inf)
    first, last = divmod(int(scores.argmax()), len(parts))
    return context[offsets[first][0] : offsets[last][1]]


def policyqa(args: argparse.Namespace) -> dict[str, float]:
    """One epoch of 16 questions, rate 1e-4, as run_qa trains; SQuAD's scores of the validation file."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(args.model)
    train = [question_features(tokenizer, row) for row in squad_rows(args.data / "qa" / "policyqa.train.json")]
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=training_arguments(
                folder, args, num_train_epochs=1, per_device_train_batch_size=16, learning_rate=1e-4
            ),
            train_dataset=train,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
    seconds = time.time() - args.started
    model.eval()
    rows, texts = squad_rows(args.data / "qa" / "policyqa.valid.json"), []
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        batch = tokenizer(
            [row["question"] for row in part], [row["context"] for row in part], truncation="only_second",
            max_length=384, padding=True, return_offsets_mapping=True, return_tensors="pt",
        )  # fmt: skip
        offsets = batch.pop("offset_mapping").tolist()
        with torch.inference_mode():
            found = model(**batch)
        texts += [
            best_span(found.start_logits[i], found.end_logits[i], offsets[i], batch.sequence_ids(i), row["context"])
            for i, row in enumerate(part)
        ]
    golds = [[answer["text"] for answer in row["answers"]] for row in rows]
    scores = squad_scores(texts, golds, version=1)
    return {"seconds": seconds, "f1": scores["f1"], "exact_match": scores["exact_match"]}


class StopAfter(transformers.TrainerCallback):
    """Ends training when ``minutes`` have passed since ``started``."""

    def __init__(self, started: float, minutes: float) -> None:
        self.deadline = started + 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = time.time() >= self.deadline


def joint_tokenizer(texts: list[str], size: int) -> Any:
    """Byte-level BPE over both languages, ids 0 to 2: padding, begin, end."""
    from tokenizers import ByteLevelBPETokenizer, processors

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=size, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    trained._tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A $B </s>", [("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def multi30k(args: argparse.Namespace) -> dict[str, float]:
    """A Marian of 7.6 million parameters from scratch for ``--minutes``, batches of like lengths; beam search of 4."""
    text = {
        (part, language): (args.data / "translation" / f"multi30k.{part}.{language}.txt")
        .read_text("utf-8")
        .split("\n")[:-1]
        for part in ("train", "test")
        for language in ("en", "de")
    }
    tokenizer = joint_tokenizer(text["train", "en"] + text["train", "de"], 8192)
    config = transformers.MarianConfig(
        vocab_size=8192, d_model=256, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=1024, decoder_ffn_dim=1024, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, scale_embedding=True,
        decoder_start_token_id=0, forced_eos_token_id=None, dropout=0.1,
    )  # fmt: skip
    model = transformers.MarianMTModel(config)
    sides = [
        tokenizer(text["train", language], truncation=True, max_length=128)["input_ids"] for language in ("en", "de")
    ]
    train = [{"input_ids": source, "labels": target} for source, target in zip(*sides, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Seq2SeqTrainer(
            model=model,
            args=training_arguments(
                folder, args, kind=transformers.Seq2SeqTrainingArguments, num_train_epochs=60, learning_rate=1e-3,
                per_device_train_batch_size=64, train_sampling_strategy="group_by_length", label_smoothing_factor=0.1,
                lr_scheduler_type="inverse_sqrt", warmup_steps=400,
            ),
            train_dataset=train,
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model),
            callbacks=[StopAfter(args.started, args.minutes)],
        )  # fmt: skip
        trainer.train()
    seconds = time.time() - args.started
    model.eval()
    written: list[str] = []
    for start in range(0, len(text["test", "en"]), 32):
        batch = tokenizer(text["test", "en"][start : start + 32], padding=True, return_tensors="pt")
        ids = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=4, max_new_tokens=80)
        written += tokenizer.batch_decode(ids, skip_special_tokens=True)
    bleu, chrf, _ = sacre_bleu(written, [[line] for line in text["test", "de"]])
    return {"seconds": seconds, "bleu": bleu, "chrf": chrf, "steps": trainer.state.global_step}


JOBS = {"sst2": sst2, "policyqa": policyqa, "multi30k": multi30k}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument(
        "--started", type=float, default=time.time(), help="when the process was started, in Unix seconds"
    )
    args = parser.parse_args()
    transformers.set_seed(args.seed)
    print(json.dumps(JOBS[args.job](args)), flush=True)


if __name__ == "__main__":
    main()
