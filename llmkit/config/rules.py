"""Values that are right alone and wrong together. A rule that lacks one of its values is silent: that was reported."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llmkit.config.choices import recipes_dir, recipes_of
from llmkit.config.compose import Composed
from llmkit.config.resume import resume_problems
from llmkit.config.targets import resolve
from llmkit.config.yaml_file import read_yaml
from llmkit.errors import Problem
from llmkit.objectives.pairing import misfit
from llmkit.tokenizers.vocabulary import find_roles

_RUN_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,128}")
_DEVICE = re.compile(r"(auto|cpu|mps|(cuda|xpu)(:\d+)?)", re.ASCII)


class View:
    """The values of a configuration by path; KeyError for one that is absent or was reported."""

    def __init__(self, composed: Composed, values: Mapping[str, Any], objects: Mapping[str, Any]) -> None:
        self.composed, self.values, self.objects = composed, values, objects

    def __getitem__(self, path: str) -> Any:
        return self.values[path]

    def problem(self, path: str, what: str, fix: str = "") -> Problem:
        return Problem(path, what, self.composed.origin(path), fix)


def broken_rules(
    composed: Composed, values: Mapping[str, Any], objects: Mapping[str, Any], *, resuming: bool
) -> list[Problem]:
    view = View(composed, values, objects)
    found: list[Problem] = []
    for rule in (*RULES, resume) if resuming else RULES:
        try:
            found += rule(view)
        except KeyError:
            continue
    return found


def run_name(view: View) -> Iterator[Problem]:
    name = view["run.name"]
    if not _RUN_NAME.fullmatch(name):
        what = f"must be 1 to 128 letters, digits, dots, dashes or underscores, is {name[:80]!r}"
        yield view.problem("run.name", what, "run.root chooses the folder that holds the run")


def run_root(view: View) -> Iterator[Problem]:
    root = view["run.root"]
    if not root or "\0" in root:
        yield view.problem("run.root", f"must be a folder, is {root[:80]!r}")


def device(view: View) -> Iterator[Problem]:
    if not _DEVICE.fullmatch(view["engine.device"]):
        what = f"must be auto, cpu, mps, cuda, cuda:N, xpu or xpu:N, is {view['engine.device'][:80]!r}"
        yield view.problem("engine.device", what)


def half_precision(view: View) -> Iterator[Problem]:
    if view["engine.device"] == "cpu" and view["engine.precision"] == "fp16":
        yield view.problem("engine.precision", "fp16 needs a GPU, and engine.device is cpu", "use bf16 or fp32")


def stop_rule(view: View) -> Iterator[Problem]:
    names = ("engine.max_steps", "engine.max_tokens", "engine.max_epochs")
    if all(view[name] is None for name in names):
        yield view.problem("engine.max_steps", "nothing says when to stop", f"set one of {', '.join(names)}")


def zero_limits(view: View) -> Iterator[Problem]:
    """Fields whose range has to start at 0 in words but where 0 itself means nothing."""
    for name in ("engine.max_epochs", "engine.max_hours", "engine.max_grad_norm", "engine.timeout_minutes"):
        if view[name] == 0:
            yield view.problem(name, "must be above 0, is 0")


def warmup(view: View) -> Iterator[Problem]:
    steps, limit = view["schedule.warmup_steps"], planned_steps(view)
    if limit is not None and steps > limit:
        fix = f"set schedule.warmup_steps={limit // 10}, or let the run be longer"
        yield view.problem("schedule.warmup_steps", f"{steps} warm-up steps, but the run ends after {limit}", fix)


def best_is_saved(view: View) -> Iterator[Problem]:
    """Early stopping without a checkpoint of the evaluation that was best would throw it away."""
    patience, between, saved = (view[f"engine.{name}"] for name in ("patience", "eval_every", "save_every"))
    if patience is not None and between is not None and (saved is None or between % saved):
        what = f"with engine.patience every evaluation needs a checkpoint, or the best is lost: is {saved}"
        yield view.problem("engine.save_every", what, f"set engine.save_every={between}")


def planned_steps(view: View) -> int | None:
    """Optimizer steps of the run as far as the configuration alone says; an epoch's length is not known yet."""
    limits = [view["engine.max_steps"]]
    if view["engine.max_tokens"] is not None:
        sequences = view["engine.micro_batch_size"] * view["engine.grad_accum_steps"] * _world_size()
        limits.append(
            math.ceil(view["engine.max_tokens"] / (sequences * (view["data.seq_len"] or view["model.max_seq_len"])))
        )
    return min((limit for limit in limits if limit is not None), default=None)


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() and int(text) else 1


def context(view: View) -> Iterator[Problem]:
    if view["init"] is None and (view["data.seq_len"] or 0) > view["model.max_seq_len"]:
        what = f"{view['data.seq_len']} tokens, but model.max_seq_len is {view['model.max_seq_len']}"
        yield view.problem("data.seq_len", what, "raise model.max_seq_len or lower data.seq_len")


def vocabulary(view: View) -> Iterator[Problem]:
    rows, ids = view["model.vocab_size"], view["tokenizer.vocab_size"]
    if view["init"] is None and rows is not None and rows < ids:
        what = f"{rows} embedding rows for a tokenizer of {ids} ids"
        yield view.problem("model.vocab_size", what, "set model.vocab_size=null to follow the tokenizer")


def architecture(view: View) -> Iterator[Problem]:
    """A model of another library has no architecture of its own."""
    if view["init"] is None and view["model.model_type"] is None:
        fix = "model.model_type=gpt_neo, or init=<a model folder>"
        yield view.problem("model.model_type", "nothing says which architecture", fix)


def weights(view: View) -> Iterator[Problem]:
    shares, paths = view["data.weights"], view["data.path"]
    if shares is None:
        return
    n_paths = 1 if isinstance(paths, str) else len(paths)
    if len(shares) != n_paths:
        what = f"{len(shares)} value(s) for {n_paths} path(s)"
        yield view.problem("data.weights", what, "give one weight for each item of data.path")
    if any(share <= 0 for share in shares):
        yield view.problem("data.weights", f"every weight must be above 0, is {shares}")


def trainable(view: View) -> Iterator[Problem]:
    """An objective and a model that have nothing to do with each other."""
    objective, model = view.objects["objective"], view.objects["model"]
    if view["init"] is None and (problem := misfit(objective, model)):
        what, fix = problem
        fits = "|".join(name for name, cls in targets_in("objective") if model.kind in cls.trains)
        models = "|".join(name for name, cls in targets_in("model") if cls.kind in objective.trains)
        yield view.problem("objective", what, other_recipe(view) + (fix or f"objective={fits}, or model={models}"))


def other_recipe(view: View) -> str:
    """The recipes that are made for a model which was put in place of the recipe's own."""
    model = view.composed.chosen.get("model")
    if model is None or "model" not in view.composed.from_command_line or "recipe" not in view.composed.chosen:
        return ""
    fits = "|".join(recipes_of(view.composed.command, "model", model))
    return f"recipe={fits} is made for model={model}; else " if fits else ""


def pair_rows(view: View) -> Iterator[Problem]:
    """Rows that hold no pair would be found out only after the text was tokenised."""
    seq_len = view["data.seq_len"]
    if seq_len is None and view["init"] is None:
        seq_len = view["model.max_seq_len"]
    if view.objects["objective"].reads in ("pairs", "ordered_pairs") and seq_len is not None:
        from llmkit.data.pair_layout import MIN_SEQ_LEN

        if seq_len < MIN_SEQ_LEN:
            what = f"rows of {seq_len} tokens are too short for pairs of sentences"
            yield view.problem("data.seq_len", what, f"set data.seq_len to at least {MIN_SEQ_LEN}")


def symbols(view: View) -> Iterator[Problem]:
    """What the objective writes into the text must be in the vocabulary that is going to be trained."""
    names = view.objects["tokenizer"].symbols() if view["init"] is None else None
    if names is not None:
        roles = find_roles({name: number for number, name in enumerate(names)})
        seq_len = view["data.seq_len"] or view["model.max_seq_len"]
        if problem := view.objects["objective"].lacks(roles, seq_len):
            yield view.problem("tokenizer", *problem)


def targets_in(group: str) -> Iterator[tuple[str, Any]]:
    """The options of a group in ``recipes/``, and the class that each names."""
    for path in sorted((recipes_dir() / group).glob("*.yaml")):
        yield path.stem, resolve(read_yaml(path).tree["_target_"])


def paths(view: View) -> Iterator[Problem]:
    for name in ("data.path", "data.val_path", "data.old_val_path"):
        value = view[name]
        if name == "data.path" and value == [] and view.composed.command == "evaluate":
            continue  # the run's own validation text
        if value is not None and (
            not value or any(not path for path in ([value] if isinstance(value, str) else value))
        ):
            yield view.problem(name, f"must name a file, is {value!r}")


def init_decides(view: View) -> Iterator[Problem]:
    """Model and tokenizer come from ``init``; a value given beside it on the command line would be ignored."""
    if view["init"] is None:
        return
    read = getattr(view.objects.get("model"), "with_init", ())  # fields that say how to open it
    heeded = {"model", *(f"model.{name}" for name in read)} if read else set()
    for path in sorted(view.composed.from_command_line - heeded):
        if path.partition(".")[0] in ("model", "tokenizer"):
            yield view.problem(path, f"has no effect: the model and tokenizer come from init={view['init']}")


def added_tokens(view: View) -> Iterator[Problem]:
    if view["add_tokens"] and view["init"] is None:
        fix = "set tokenizer.extra_symbols, or init=<model>"
        yield view.problem("add_tokens", "has no effect: they are for the tokenizer of a model that is there", fix)


def old_text(view: View) -> Iterator[Problem]:
    """A model that begins with random weights knows no text."""
    if view["data.old_val_path"] is not None and view["init"] is None:
        yield view.problem("data.old_val_path", "has no effect: a new model knows no text", "set init=<model>")


def held_out_twice(view: View) -> Iterator[Problem]:
    """Held-out data are given, or a share of the data is held out."""
    if view["data.val_path"] is not None and "data.val_fraction" in view.composed.from_command_line:
        what = f"has no effect: validation is on data.val_path={view['data.val_path']}"
        yield view.problem("data.val_fraction", what, "leave one of the two out")


def evaluates_everything(view: View) -> Iterator[Problem]:
    """Evaluation reads every document of ``data.path`` once; what would choose among them is a mistake."""
    if view.composed.command != "evaluate":
        return
    for name in ("data.val_fraction", "data.val_path", "data.old_val_path", "data.weights"):
        if name in view.composed.from_command_line:
            yield view.problem(name, "has no effect: every document of data.path is evaluated, each once")


def beams(view: View) -> Iterator[Problem]:
    """What was asked for by name and would do nothing. The default temperature is simply not used."""
    asked = view.composed.from_command_line
    if view["generation.n_beams"] == 1:
        if "generation.length_penalty" in asked:
            what = "has no effect: it compares the texts of a beam search"
            yield view.problem("generation.length_penalty", what, "set generation.n_beams to 2 or more")
        return
    for path in ("generation.temperature", "generation.top_k", "generation.top_p"):
        if path in asked and view[path] not in (0, None):
            what, fix = "has no effect: beam search draws nothing by chance", "leave it out, or generation.n_beams=1"
            yield view.problem(path, what, fix)


def samples(view: View) -> Iterator[Problem]:
    """Several texts for a question must be able to differ."""
    n = getattr(view.objects["task"], "n_samples", 1)
    if n > 1 and view["generation.n_beams"] > 1:
        what = f"{n} texts are wanted for each question, but beam search gives one"
        yield view.problem("generation.n_beams", what, "set generation.n_beams=1")
    elif n > 1 and view["generation.temperature"] == 0:
        what = f"{n} texts are wanted for each question, but at temperature 0 they are all the same"
        yield view.problem("generation.temperature", what, "set generation.temperature=0.8, for example")


def exported_types(view: View) -> Iterator[Problem]:
    """Not every format has every type of number."""
    have = {"hf": ("float32", "bfloat16", "float16"), "gguf": ("float32", "float16", "q8_0")}[view["format"]]
    if view["dtype"] not in have:
        what = f"format={view['format']} is not written in {view['dtype']}"
        yield view.problem("dtype", what, f"use {', '.join(have)}")


def resume(view: View) -> Iterator[Problem]:
    if view.composed.command in ("pretrain", "finetune"):
        yield from resume_problems(view.composed, view.values, view.objects["schedule"])


RULES: tuple[Callable[[View], Iterator[Problem]], ...] = (
    run_name,
    run_root,
    device,
    half_precision,
    stop_rule,
    zero_limits,
    warmup,
    best_is_saved,
    context,
    vocabulary,
    trainable,
    pair_rows,
    symbols,
    architecture,
    weights,
    paths,
    init_decides,
    added_tokens,
    old_text,
    held_out_twice,
    evaluates_everything,
    beams,
    samples,
    exported_types,
)
