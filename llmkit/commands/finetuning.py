"""What ``llmkit finetune`` trains: a task's rows, and a model with what the task and the configuration ask of it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.commands.assemble import Score, Start, Work, assemble, find_start
from llmkit.commands.open_model import check_base, open_config, open_model, open_tokenizer, save_adapted
from llmkit.commands.training import write_model as write_whole
from llmkit.commands.training import write_tokenizer
from llmkit.config.build import build
from llmkit.config.compose import compose
from llmkit.config.schema import FinetuneConfig, Node
from llmkit.data.loader import check_vocabulary
from llmkit.data.task_questions import Questions, load_questions
from llmkit.data.task_rows import SomeRows, TaskDataset, encode_rows
from llmkit.data.task_tokenizer import task_tokenizer
from llmkit.engine.best_metric import BestMetric
from llmkit.engine.checkpoint import Checkpoint
from llmkit.engine.evaluate import COUNTED, validation_metrics
from llmkit.engine.init import resolve_init
from llmkit.engine.prediction import Answerer
from llmkit.engine.recorder import Recorder
from llmkit.engine.trainer import Trainer
from llmkit.errors import ConfigError
from llmkit.interfaces import ModelConfig, Objective, Tokenizer
from llmkit.models.adapters import attach, trainable_report
from llmkit.models.freezing import freeze
from llmkit.models.head_config import HeadConfig
from llmkit.models.heads import attach_head, detach_head
from llmkit.models.hf import load_model
from llmkit.models.hf.peft import load_adapter
from llmkit.models.resize import make_room
from llmkit.objectives.for_task import objective_for
from llmkit.objectives.r_drop import has_dropout
from llmkit.settings import TaskDataConfig
from llmkit.task_interface import Prediction, Question, Task
from llmkit.tokenizers.chat_template import with_template
from llmkit.tokenizers.grow import add_tokens
from llmkit.tokenizers.load import load_tokenizer

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("llmkit.training")

N_HALVINGS = 4  # of the usual vocabulary, where the rows hold too little text for it
N_SCORED = 20  # questions that are scored before the first step, to see that it can be done
N_SHOWN = 20  # answers kept of every evaluation
N_LABELS_SHOWN = 20
RARE_SHARE = 0.01  # of the training rows; a label below it is told apart
GAP_ROWS = 500  # training rows, at most, on which the loss is taken as on validation rows
USUAL_RECIPE = {"encoder": "bert_tiny", "encoder_decoder": "t5_tiny", "decoder": "gpt_tiny"}


@dataclass(frozen=True)
class Beginning:
    """What training starts from: the files of ``init``, or an architecture to draw random weights for."""

    init: Path | None
    config: ModelConfig
    tokenizer: Tokenizer


@dataclass(frozen=True)
class TaskRows:
    """The rows of both splits, and the validation questions that are answered at every evaluation."""

    train: TaskDataset
    val: TaskDataset | None
    answered: list[Question]

    @property
    def key(self) -> str:
        """What the run trains on, and is compared with."""
        keys = [self.train.key, "" if self.val is None else self.val.key]
        return hashlib.sha256(" ".join(keys).encode()).hexdigest()[:16]


def make_trainer(cfg: FinetuneConfig, folder: Path, recorder: Recorder, stop_requested: Callable[[], bool]) -> Trainer:
    """Everything from files to a trainer whose ``fit`` can be called."""
    task: Task = build(cfg.task)
    init = opened(cfg.init, task)
    if cfg.adapter is not None and init is None:
        what = "an adapter is trained beside the weights of a model, and there is none"
        raise ConfigError(what, where="adapter", fix="init=<a model>, or adapter=none")
    if init is not None:
        row_length(cfg.data, open_config(init))  # before the rows are read, which takes long
    questions = load_questions(task, cfg.data)
    tell("data", questions.report.lines())
    task = task.with_labels(questions.labels())
    tell("labels", label_lines(questions.train))
    beginning = find_beginning(init, cfg.add_tokens, cfg.model, cfg.tokenizer, task, questions)
    kind = beginning.config.kind
    objective = objective_for(task.answers(kind), kind, cfg.loss)
    max_len = row_length(cfg.data, beginning.config)
    rows = encode_all(cfg, task, questions, beginning.tokenizer, kind, max_len)
    writes = task.answers(kind) == "text"
    check_metric(cfg.engine.best_metric, task, objective, rows.answered, writes=writes)
    start = find_start(cfg, folder, rows.key)
    model = starting_model(cfg, task, beginning, start)
    scorer = None
    if rows.answered:
        scorer = partial(score_with, cfg, folder, task, objective, model, beginning.tokenizer, max_len, rows.answered)
    gap = {} if rows.val is None else {"train_part": (SomeRows(rows.train, min(GAP_ROWS, rows.val.n_sequences)),)}
    work = Work(
        command="finetune",
        model=model,
        objective=objective,
        tokenizer=beginning.tokenizer,
        seq_len=max_len,
        tokens_per_row=rows.train.n_tokens / rows.train.n_sequences,
        train=(rows.train,),
        weights=None,
        lengths=rows.train.side_lengths() if kind == "encoder_decoder" else None,  # other kinds pack theirs
        eval_rows={} if rows.val is None else {"val": (rows.val,), **gap},
        scorer=scorer,
        usual_metric=task.best_metric,
        evaluate_first=False,
        facts={"task": task.name, "n_trained_params": trainable_report(model)[0]},
        save_model=partial(write_trained, cfg, model, beginning),
    )
    return assemble(cfg, work, start, folder, recorder, stop_requested)


def label_lines(questions: Sequence[Question]) -> list[str]:
    """How often each label stands in the data; nothing for tasks without. A rare one may be a slip of the pen."""
    counts = Counter(str(q.fields["label"]) for q in questions if q.fields.get("label") is not None).most_common()
    if not counts:
        return []
    found = ", ".join(f"{label} {n:,}" for label, n in counts[:N_LABELS_SHOWN])
    more = f" and {len(counts) - N_LABELS_SHOWN:,} more" if len(counts) > N_LABELS_SHOWN else ""
    rare = [label for label, n in counts if n < RARE_SHARE * len(questions)]
    shown = ", ".join(rare[:N_LABELS_SHOWN])
    fix = "task.labels=[...] names those that count"
    warning = [f"warning: in less than 1 % of the rows: {shown}; misspelt? {fix}"] if rare else []
    return [f"{len(counts)} in the training rows: {found}{more}", *warning]


def tell(subject: str, lines: Sequence[str]) -> None:
    """Counts of a report, warnings as such."""
    for line in lines:
        level = logging.WARNING if line.startswith("warning: ") else logging.INFO
        log.log(level, "%s: %s", subject, line.removeprefix("warning: "))


# -- where it starts ------------------------------------------------------------------------------------------------


def opened(init: str | None, task: Task) -> Path | None:
    """The model folder of ``init``. Raises ``ConfigError`` for a model that cannot do the task, and reads no rows."""
    if init is None:
        return None
    folder = resolve_init(init)
    task.answers(open_config(folder).kind)
    return folder


def find_beginning(
    init: Path | None,
    new_tokens: Sequence[str],
    model: Node | None,
    spec: Node | None,
    task: Task,
    questions: Questions,
) -> Beginning:
    """The model of ``init``, else a small one with random weights and a tokenizer trained on the rows."""
    if init is not None:
        tokenizer = add_tokens(open_tokenizer(init), new_tokens)
        return Beginning(init, open_config(init), for_task(task, tokenizer))
    if model is None or spec is None:
        recipe = USUAL_RECIPE[task.usual_kind] if model is None else USUAL_RECIPE[build(model).kind]
        small = compose("pretrain", [f"recipe={recipe}"]).plain
        sizes = [small["tokenizer"]["vocab_size"] >> halvings for halvings in range(N_HALVINGS + 1)]
        specs = [{**small["tokenizer"], "vocab_size": size} for size in sizes] if spec is None else [spec]
        model = model or small["model"]
    else:
        specs = [spec]
    tokenizer = task_tokenizer([build(spec) for spec in specs], [*questions.train, *questions.val], load_tokenizer)
    config: ModelConfig = build(model).with_vocab(tokenizer.vocab_size)
    log.warning(
        "no init: the model starts from random weights (%s parameters); this shows that things work, not what a "
        "trained model can do",
        f"{config.n_params():,}",
    )
    return Beginning(None, config, for_task(task, tokenizer))


def for_task(task: Task, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer; for conversations with a template, a plain one where it has none."""
    if task.name != "chat":
        return tokenizer
    with_one, given = with_template(tokenizer)
    if given:
        log.info("the tokenizer has no chat template: a plain one is used")
    templated: Tokenizer = with_one
    return templated


def row_length(data: TaskDataConfig, config: ModelConfig) -> int:
    """The most ids of a row, on each side."""
    wanted = data.seq_len or config.max_seq_len
    if wanted > config.max_seq_len:
        what = f"rows of {wanted} tokens, but the model takes at most {config.max_seq_len}"
        raise ConfigError(what, where="data.seq_len", fix=f"set data.seq_len to {config.max_seq_len} or less")
    return wanted


def encode_all(
    cfg: FinetuneConfig, task: Task, questions: Questions, tokenizer: Tokenizer, kind: str, max_len: int
) -> TaskRows:
    """Both splits as rows, with their counts in the log."""

    def encode(part: Sequence[Question]) -> TaskDataset:
        limits = {"max_bad_fraction": cfg.data.max_bad_fraction}
        return encode_rows(part, task, tokenizer, kind, max_len, cfg.data.long_rows, **limits)

    train = encode(questions.train)
    tell("training rows", train.report.lines())
    val = encode(questions.val) if questions.val else None
    if val is None:
        log.warning("no validation rows: nothing is measured, and the last checkpoint is the best there is")
        return TaskRows(train, None, [])
    tell("validation rows", val.report.lines())
    return TaskRows(train, val, spread(questions.val, cfg.data.max_answers))


def spread(questions: Sequence[Question], n: int | None) -> list[Question]:
    """At most ``n`` of the questions, evenly spread: files may be sorted by label."""
    if n is None or n >= len(questions):
        return list(questions)
    return [questions[place * len(questions) // n] for place in range(n)]


def check_metric(
    chosen: str | None, task: Task, objective: Objective, questions: Sequence[Question], *, writes: bool
) -> None:
    """Score no answers, so that an unknown ``engine.best_metric`` or a missing package ends the run at its beginning.

    Raises ``ConfigError`` with the metrics there are.
    """
    if not questions:
        return
    name = BestMetric.of(chosen, task.best_metric).name
    counted = "token" if writes else "example"
    sums, counts = dict.fromkeys(objective.sum_names, 0.0), dict.fromkeys(COUNTED, 0) | {counted: 1}
    known = {
        f"{part}/{key}" for part in ("val", "train_part") for key in validation_metrics(objective, sums, counts, 1)
    }
    for some in (questions[:N_SCORED], questions):  # some metrics are of few questions only
        known |= {f"val/{key}" for key in task.metrics(some, [Prediction("")] * len(some))}
        if name in known:
            return
    names = ", ".join(sorted(key.removeprefix("val/") for key in known if key.split("/")[1] not in COUNTED.values()))
    raise ConfigError(f"no metric is called {name}", where="engine.best_metric", fix=f"one of {names}")


def starting_model(cfg: FinetuneConfig, task: Task, beginning: Beginning, start: Start) -> Any:
    """The model of the checkpoint, of ``init`` or a new one, with its head, adapter and frozen parts."""
    head = head_for(task, beginning.config.kind)
    checkpoint = start.checkpoint
    if checkpoint is not None and cfg.adapter is None:
        model = load_model(checkpoint.model, head=head, seed=cfg.run.seed)
    else:
        model = base_model(beginning, head, cfg.run.seed)
    check_vocabulary(beginning.tokenizer.vocab_size, model.config.vocab_rows)
    choose_trained(cfg, model, beginning, checkpoint)
    return model


def base_model(beginning: Beginning, head: HeadConfig | None, seed: int) -> Any:
    """The model of ``init``, with room for new tokens, or random weights; with ``head`` or without any."""
    if beginning.init is not None:
        model = open_model(beginning.init, head=head, seed=seed)
        make_room(model, open_tokenizer(beginning.init).vocab_size, beginning.tokenizer.vocab_size)
        if head is None:
            detach_head(model)
        return model
    model = beginning.config.build()
    model.init_weights(seed)
    if head is not None:
        attach_head(model, head, seed)
    return model


def choose_trained(cfg: FinetuneConfig, model: Any, beginning: Beginning, checkpoint: Checkpoint | None) -> None:
    """Attach the adapter, as the checkpoint has it, and freeze what is to stay."""
    if cfg.adapter is not None and checkpoint is not None:
        check_base(checkpoint.model, beginning.init)
        load_adapter(model, checkpoint.model)
    elif cfg.adapter is not None:
        attach(model, adapter_of(cfg, beginning), cfg.run.seed)
    if cfg.freeze.n_layers or cfg.freeze.embeddings:
        freeze(model, cfg.freeze.n_layers, cfg.freeze.embeddings)
    trained, n_all = trainable_report(model)
    if not trained:
        raise ConfigError("all of the model is frozen", where="freeze", fix="lower freeze.n_layers")
    if cfg.loss.r_drop and not has_dropout(model):
        what = "has no effect: nothing is dropped out, so that both passes are the same"
        raise ConfigError(what, where="loss.r_drop", fix="leave it out, or take a model with dropout")
    log.info("%s of %s parameters are trained (%.2f %%)", f"{trained:,}", f"{n_all:,}", 100 * trained / n_all)


def adapter_of(cfg: FinetuneConfig, beginning: Beginning) -> Any:
    """The adapter's settings. Raises ``ConfigError`` where the rows of new tokens would never be trained."""
    adapter = build(cfg.adapter or {})
    known = beginning.tokenizer.vocab_size if beginning.init is None else open_tokenizer(beginning.init).vocab_size
    n_new = beginning.tokenizer.vocab_size - known
    if n_new and not adapter.train_embeddings:
        what = f"{n_new} new tokens have embeddings that the adapter does not train"
        raise ConfigError(what, where="adapter.train_embeddings", fix="adapter.train_embeddings=true")
    return adapter


def head_for(task: Task, kind: str) -> HeadConfig | None:
    """The head that answers; none where the model writes."""
    answers = task.answers(kind)
    if answers == "text":
        return None
    return HeadConfig("class", tuple(getattr(task, "labels", None) or ())) if answers == "class" else HeadConfig("span")


def write_trained(cfg: FinetuneConfig, model: Any, beginning: Beginning, folder: Path) -> None:
    """The model as a Hugging Face folder, or its adapter in the format of peft, and the tokenizer."""
    if cfg.adapter is None:
        write_whole(model, beginning.tokenizer, folder)
    else:
        save_adapted(model, folder, str(beginning.init))
        write_tokenizer(model, beginning.tokenizer, folder)


# -- evaluation -----------------------------------------------------------------------------------------------------


def score_with(
    cfg: FinetuneConfig,
    folder: Path,
    task: Task,
    objective: Objective,
    model: Any,
    tokenizer: Tokenizer,
    max_len: int,
    questions: Sequence[Question],
    accelerator: Accelerator,
    stop_requested: Callable[[], bool],
) -> Score:
    """The task's metrics of the model's answers; every rank answers its share, and all know the result."""
    size = cfg.engine.eval_batch_size or cfg.engine.micro_batch_size
    answer = Answerer(task, objective, model, tokenizer, max_len, cfg.generation, accelerator.device, size)
    rank, world_size = accelerator.process_index, accelerator.num_processes

    def score() -> dict[str, float] | None:
        with accelerator.autocast():
            own = answer(questions[rank::world_size], stop_requested)
        shares = [own] if world_size == 1 else gather([own])
        if any(share is None for share in shares):
            return None
        predictions: list[Prediction] = [Prediction("")] * len(questions)
        for number, share in enumerate(shares):
            predictions[number::world_size] = share
        if accelerator.is_main_process:
            keep_answers(folder / "samples", questions[:N_SHOWN], predictions)
        return task.metrics(questions, predictions)

    return score


def gather(own: list[Any]) -> list[Any]:
    """The lists of all ranks, one after another."""
    from accelerate.utils import gather_object

    return list(gather_object(own))


def keep_answers(folder: Path, questions: Sequence[Question], predictions: Sequence[Prediction]) -> None:
    """Some questions with the newest answers to them, for people to read."""
    lines = [
        json.dumps({"where": question.where, **question.fields, "answer": prediction.text}, ensure_ascii=False)
        for question, prediction in zip(questions, predictions, strict=False)
    ]
    try:
        folder.mkdir(exist_ok=True)
        (folder / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        log.warning("the answers could not be kept: %s", error)
