"""The model card of an export: ``README.md`` with what is known of model, data, training, metrics and licence.

What the run recorded is taken from its folder, what no run knows from the section ``card``; all else is "not stated".
Folders of this machine are left out: of a path only the last part is shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmkit import __version__
from llmkit.commands.exported import Subject, answers_of
from llmkit.commands.head_check import LOADERS as HEAD_LOADERS
from llmkit.config.build import build
from llmkit.config.schema import ExportConfig
from llmkit.engine.best_metric import BestMetric
from llmkit.engine.checkpoint import MODEL, STEP_FOLDER
from llmkit.engine.init import HUB_ID, is_adapter
from llmkit.errors import DataError, LLMKitError
from llmkit.models.hf.weight_files import ADAPTER_CONFIG
from llmkit.models.transformers_config import TransformersConfig
from llmkit.redact import redact_text
from llmkit.tracking.jsonl import read_metrics

NOT_STATED = "not stated"
CARD = "README.md"
MAX_CARD_BYTES = 1 << 20  # of a card that is read
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
KINDS = {"decoder": "text-generation", "encoder": "fill-mask", "encoder_decoder": "text2text-generation"}
HEADS = {"class": "text-classification", "span": "question-answering"}
TASKS = {"Translation": "translation", "Summarization": "summarization"}  # of models that write, by the class of task
LOADERS = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForMaskedLM",
    "encoder_decoder": "AutoModelForSeq2SeqLM",
}

# What the log of a run says of its rows. Newer lines win: a run that goes on says it again.
COUNTS = {
    "columns": re.compile(r" data: .*; columns: (.+)$", re.MULTILINE),
    "questions": re.compile(r" data: questions: (.+)$", re.MULTILINE),
    "training rows": re.compile(r" training rows: (\d.+)$", re.MULTILINE),
    "validation rows": re.compile(r" validation rows: (\d.+)$", re.MULTILINE),
}

Rows = Iterable[tuple[str, Any]]


@dataclass(frozen=True)
class Run:
    """What a run folder says of the checkpoint in it; everything is empty for a model that is not a run's."""

    step: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)  # of the checkpoint
    metrics: Mapping[str, Any] = field(default_factory=dict)  # the latest of each name up to the step
    best: Mapping[str, Any] = field(default_factory=dict)  # those of the best evaluation up to the step
    counts: Mapping[str, str] = field(default_factory=dict)  # of rows for a task, by the names in ``COUNTS``
    versions: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)

    def of(self, path: str) -> Any:
        """A value of the configuration by its dotted path; None where there is none."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def write_card(
    cfg: ExportConfig, source: Path, subject: Subject, findings: Sequence[tuple[str, str]], folder: Path
) -> None:
    """Write ``README.md`` into ``folder``. ``source`` is the model folder behind ``cfg.init``."""
    run = read_run(source)
    base = base_model(cfg.init, source, run)
    license_name = cfg.card.license or base_license(source, run)
    is_tuned = run.of("task") is not None
    parts = [
        _front_matter(cfg, subject, run, base, license_name),
        f"# {_words(run.of('run.name') or _name(cfg.init))}",
        _section("Model", _model(cfg, subject, source, base)),
        *([_section("Task", _task(subject, run))] if is_tuned or subject.head else []),
        _section("Data", _task_data(cfg, run) if is_tuned else _data(cfg, run)),
        _section("Training", _training(run, subject)),
        _section("Metrics", _metrics(run)),
        _section("Licence", [("weights", license_name), ("training text", cfg.card.data_license)]),
        _section("Check of this export", findings),
        _usage(cfg, subject),
        f"Written by llmkit {__version__}.",
    ]
    text = redact_text("\n\n".join(parts)) + "\n"
    (folder / CARD).write_text(text, encoding="utf-8")


# -- sources ----------------------------------------------------------------------------------------------------------


def read_run(source: Path) -> Run:
    """What the run of a checkpoint's model folder ``run/checkpoints/step_N/model`` recorded."""
    checkpoint, folder = source.parent, source.parent.parent.parent
    found = STEP_FOLDER.fullmatch(checkpoint.name)
    if found is None or not (folder / "config.yaml").is_file():
        return Run()
    step, state = int(found[1]), _json(checkpoint / "state.json")
    rows = _rows_until(folder / "metrics.jsonl", step)
    best = _mapping(state.get("progress")).get("best_step")
    manifest, machine = _json(checkpoint / "manifest.json"), _json(folder / "environment.json")
    return Run(
        step=step,
        config=_mapping(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))),
        state=state,
        metrics=_joined(rows),
        best=_joined(row for row in rows if row["step"] == best),
        counts=_counts(folder / "train.log"),
        versions=_mapping(manifest.get("versions")),
        machine=machine,
    )


def base_model(init: str, source: Path, run: Run) -> str:
    """What the weights were before: a hub id, the name of a run or a folder, or random."""
    origin = run.of("init") if run.config else _base_of(source) or init
    return _name(origin) if isinstance(origin, str) else "random weights"


def _base_of(source: Path) -> str | None:
    """What an adapter's own file says that it belongs to; None of a whole model."""
    base = _json(source / ADAPTER_CONFIG).get("base_model_name_or_path") if is_adapter(source) else None
    return base if isinstance(base, str) else None


def base_license(source: Path, run: Run) -> str | None:
    """The licence in the card beside the model, else in the card of what its run started from."""
    origin = run.of("init") or _base_of(source)
    places = [source, *([Path(origin).expanduser()] if isinstance(origin, str) else [])]
    found = (_card_of(place).get("license") for place in places)
    return next((name for name in found if isinstance(name, str)), None)


def _card_of(folder: Path) -> Mapping[str, Any]:
    """The front matter of a model folder's card; empty where there is none that can be read."""
    path = folder / CARD
    try:
        with path.open(encoding="utf-8") as file:
            matter = FRONT_MATTER.match(file.read(MAX_CARD_BYTES))
        return _mapping(yaml.safe_load(matter[1])) if matter else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    try:
        rows = read_metrics(path)
    except (OSError, DataError):
        return []
    return [row for row in rows if isinstance(row.get("step"), int) and row["step"] <= step]


def _joined(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The latest value of each name."""
    latest: dict[str, Any] = {}
    for row in rows:
        latest |= row
    return latest


def _counts(log: Path) -> dict[str, str]:
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {name: found[-1] for name, pattern in COUNTS.items() if (found := pattern.findall(text))}


def _json(path: Path) -> Mapping[str, Any]:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_hub_id(init: str) -> bool:
    """Whether the hub's cache on this machine has it; a folder that has gone since looks the same."""
    from huggingface_hub.constants import HF_HUB_CACHE

    name = init.partition("@")[0]
    cached = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    return bool(HUB_ID.fullmatch(init)) and cached.is_dir() and not Path(init).expanduser().exists()


# -- sections ---------------------------------------------------------------------------------------------------------


def _front_matter(cfg: ExportConfig, subject: Subject, run: Run, base: str, license_name: str | None) -> str:
    """The part that the hub reads."""
    matter: dict[str, Any] = {
        "license": license_name or "unknown",
        "library_name": "gguf" if cfg.format == "gguf" else "transformers",
        "pipeline_tag": _pipeline(subject, run),
        "tags": ["llmkit"],
    }
    if _is_hub_id(base):
        matter["base_model"] = base.partition("@")[0]
    if cfg.card.language:
        matter["language"] = cfg.card.language
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---"


def _pipeline(subject: Subject, run: Run) -> str:
    if subject.head is not None:
        return HEADS[subject.head.kind]
    return TASKS.get(_class(run.of("task")), KINDS[subject.config.kind])


def _model(cfg: ExportConfig, subject: Subject, source: Path, base: str) -> Rows:
    own = "of llmkit's own; other libraries do not open it"
    if subject.head is not None and isinstance(subject.config, TransformersConfig):
        own = f"{subject.config.hf_architecture()}; its task head, in a folder beside it, opens in llmkit only"
    yield "architecture", subject.architecture or own
    yield "parameters", subject.n_params
    yield "window", f"{subject.config.max_seq_len:,} tokens"
    yield "vocabulary", f"{subject.tokenizer.vocab_size:,} tokens, {subject.config.vocab_rows:,} embedding rows"
    yield "format", f"{cfg.format}, {cfg.dtype}"
    yield "started from", base
    if is_adapter(source):
        yield "adapter", _adapter(_json(source / ADAPTER_CONFIG), base)


def _adapter(keys: Mapping[str, Any], base: str) -> str:
    """What was trained beside the weights that it started from."""
    name = "DoRA" if keys.get("use_dora") else "LoRA"
    targets = keys.get("target_modules")
    on = f" on {', '.join(sorted(map(str, targets)))}" if isinstance(targets, list) else ""
    return f"{name}, rank {keys.get('r')}, alpha {keys.get('lora_alpha')},{on}; merged into the weights of {base}"


def _task(subject: Subject, run: Run) -> Rows:
    """What it answers, and with what."""
    yield "task", _node(run.of("task"))
    yield "answers with", "text" if subject.head is None else answers_of(subject.head)


def _task_data(cfg: ExportConfig, run: Run) -> Rows:
    """As ``_data``, of rows for a task."""
    sides = [_names(run.of(f"data.{name}")) for name in ("path", "target_path")]
    held_out, share = _names(run.of("data.val_path")), run.of("data.val_fraction")
    yield "rows", " and ".join(filter(None, sides)) or "the rows that come with llmkit, for trying things out"
    yield "columns", run.counts.get("columns")
    yield "questions", run.counts.get("questions")
    yield "training rows", run.counts.get("training rows")
    yield "validation rows", run.counts.get("validation rows")
    yield "held out", held_out or (isinstance(share, float) and f"{share:.1%} of the rows") or None
    yield "key of the rows", run.state.get("data_key")
    yield "language", cfg.card.language


def _data(cfg: ExportConfig, run: Run) -> Rows:
    """Names of files without their folders: those are nobody's business."""
    text, held_out, weights = run.of("data.path"), run.of("data.val_path"), run.of("data.weights")
    yield "text", _names(text)
    yield "shares", ", ".join(map(str, weights)) if weights else "each text by its size" if text else None
    share = run.of("data.val_fraction")
    yield "validation text", _names(held_out) or (share is not None and f"{share:.1%} of the documents") or None
    yield "prepared text", run.state.get("data_key")
    yield "language", cfg.card.language


def _training(run: Run, subject: Subject) -> Rows:
    progress = _mapping(run.state.get("progress"))
    batch, length = run.state.get("global_batch_size"), run.of("data.seq_len") or run.of("model.max_seq_len")
    seconds, is_tuned = progress.get("elapsed_seconds"), run.of("task") is not None
    if is_tuned:
        batch = f"{batch} rows of at most {length or subject.config.max_seq_len} tokens" if batch else None
        yield "loss", _fields(run.of("loss"))
        yield "frozen", _fields(run.of("freeze"))
    else:
        batch = f"{batch} sequences of {length} tokens" if batch and length else None
        yield "objective", _node(run.of("objective"))
    yield "steps", run.step
    yield "tokens", progress.get("n_tokens")
    yield "batch", batch
    yield "optimizer", _node(run.of("optim"))
    yield "schedule", _node(run.of("schedule"))
    yield "precision", run.of("engine.precision")
    yield "seed", str(run.of("run.seed")) if run.config else None
    yield "hardware", _hardware(run.machine)
    yield "time", f"{seconds:,.0f} seconds" if isinstance(seconds, float) else None
    yield "software", ", ".join(f"{name} {version}" for name, version in run.versions.items())


def _metrics(run: Run) -> Rows:
    """Losses and scores at the checkpoint's step, the validation ones first; then those of the best step before it."""
    wanted = ("val/", "train/loss")
    names = sorted((name for name in run.metrics if name.startswith(wanted)), key=lambda name: (name[0] != "v", name))
    found = [(name, run.metrics[name]) for name in names] or [("validation", None)]
    if run.of("task") is None or not run.best:
        return found
    step = run.best["step"]
    found.append(("best step", f"{step:,}, by {_picking(run)}"))
    if step != run.step:
        found += [(f"{name} at step {step:,}", run.best[name]) for name in names if name in run.best]
    return found


def _picking(run: Run) -> str:
    """The metric that chose the best step."""
    try:
        usual = str(build(run.of("task")).best_metric)
    except LLMKitError:  # of a task that another version of llmkit had
        usual = "loss"
    return BestMetric.of(run.of("engine.best_metric"), usual).name


def _usage(cfg: ExportConfig, subject: Subject) -> str:
    """How to open it, to copy."""
    if subject.architecture is None:
        command = "generate init=FOLDER --prompt 'Once upon a time'"
        if subject.head is not None:
            command = f"predict init=FOLDER task={'qa' if subject.head.kind == 'span' else 'sentiment'} --text 'TEXT'"
        lines = ["```sh", f"llmkit {command}", "```"]
    elif cfg.format == "gguf":
        lines = ["```sh", "llama-cli -m model.gguf -p 'Once upon a time'", "```"]
    else:
        loader = LOADERS[subject.config.kind] if subject.head is None else HEAD_LOADERS[subject.head.kind]
        lines = [
            "```python",
            f"from transformers import {loader}, AutoTokenizer",
            "",
            f'model = {loader}.from_pretrained("FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            "```",
        ]
    return "\n".join(["## Use", "", *lines])


# -- words ------------------------------------------------------------------------------------------------------------


def _section(title: str, rows: Rows) -> str:
    lines = [f"| {_words(name)} | {_words(value)} |" for name, value in rows]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _words(value: Any) -> str:
    """A value as the text of a table's cell: on one line, without marks that Markdown or a browser would obey."""
    if value is None or value == "":
        return NOT_STATED
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
    return re.sub(r"([\\`|\[\]*])", r"\\\1", text).replace("<", "&lt;")


def _names(paths: Any) -> str | None:
    found = [paths] if isinstance(paths, str) else paths if isinstance(paths, list) else []
    return ", ".join(_name(str(path)) for path in found) or None


def _name(path: str) -> str:
    """A hub id or a built-in text as it is, of a run its name, of another path the last part."""
    if path.startswith("builtin:") or _is_hub_id(path):
        return path
    folder = Path(path).expanduser().resolve()
    if folder.name == MODEL and STEP_FOLDER.fullmatch(folder.parent.name):
        return folder.parents[2].name
    return folder.name


def _node(node: Any) -> str | None:
    """``AdamW(lr=0.001, ...)``"""
    return f"{_class(node)}({_fields(node)})" if isinstance(node, Mapping) else None


def _class(node: Any) -> str:
    """The class of a node; empty where there is none."""
    return str(node.get("_target_")).rpartition(".")[2] if isinstance(node, Mapping) else ""


def _fields(node: Any) -> str | None:
    if not isinstance(node, Mapping):
        return None
    return ", ".join(f"{name}={value}" for name, value in node.items() if name != "_target_")


def _hardware(machine: Mapping[str, Any]) -> str | None:
    gpus, cpus = machine.get("gpus"), machine.get("n_cpus")
    if isinstance(gpus, list) and gpus:
        return ", ".join(map(str, gpus))
    return f"{cpus} CPU cores" if cpus else None
