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
from llmkit.config.schema import ExportConfig
from llmkit.engine.checkpoint import STEP_FOLDER
from llmkit.engine.init import HUB_ID
from llmkit.errors import DataError
from llmkit.interfaces import ModelConfig, Tokenizer
from llmkit.redact import redact_text
from llmkit.tracking.jsonl import read_metrics

NOT_STATED = "not stated"
CARD = "README.md"
MAX_CARD_BYTES = 1 << 20  # of a card that is read
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
TASKS = {"decoder": "text-generation", "encoder": "fill-mask", "encoder_decoder": "text2text-generation"}
LOADERS = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForMaskedLM",
    "encoder_decoder": "AutoModelForSeq2SeqLM",
}

Rows = Iterable[tuple[str, Any]]


@dataclass(frozen=True)
class Run:
    """What a run folder says of the checkpoint in it; everything is empty for a model that is not a run's."""

    step: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)  # of the checkpoint
    metrics: Mapping[str, Any] = field(default_factory=dict)  # the latest of each name up to the step
    versions: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)

    def of(self, path: str) -> Any:
        """A value of the configuration by its dotted path; None where there is none."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def write_card(
    cfg: ExportConfig,
    source: Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    findings: Sequence[tuple[str, str]],
    folder: Path,
) -> None:
    """Write ``README.md`` into ``folder``. ``source`` is the model folder behind ``cfg.init``."""
    run = read_run(source)
    base = base_model(cfg.init, run)
    license_name = cfg.card.license or base_license(source, run)
    parts = [
        _front_matter(cfg, config, base, license_name),
        f"# {_words(run.of('run.name') or _name(cfg.init))}",
        _section("Model", _model(cfg, config, tokenizer, base)),
        _section("Data", _data(cfg, run)),
        _section("Training", _training(run)),
        _section("Metrics", _metrics(run)),
        _section("Licence", [("weights", license_name), ("training text", cfg.card.data_license)]),
        _section("Check of this export", findings),
        _usage(cfg, config),
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
    step = int(found[1])
    manifest, machine = _json(checkpoint / "manifest.json"), _json(folder / "environment.json")
    return Run(
        step=step,
        config=_mapping(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))),
        state=_json(checkpoint / "state.json"),
        metrics=_metrics_until(folder / "metrics.jsonl", step),
        versions=_mapping(manifest.get("versions")),
        machine=machine,
    )


def base_model(init: str, run: Run) -> str:
    """What the weights were before: a hub id, the name of a folder, or random."""
    origin = run.of("init") if run.config else init
    return _name(origin) if isinstance(origin, str) else "random weights"


def base_license(source: Path, run: Run) -> str | None:
    """The licence in the card beside the model, else in the card of what its run started from."""
    origin = run.of("init")
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


def _metrics_until(path: Path, step: int) -> dict[str, Any]:
    latest: dict[str, Any] = {}
    try:
        rows = read_metrics(path)
    except (OSError, DataError):
        return latest
    for row in rows:
        latest |= row if isinstance(row.get("step"), int) and row["step"] <= step else {}
    return latest


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


def _front_matter(cfg: ExportConfig, config: ModelConfig, base: str, license_name: str | None) -> str:
    """The part that the hub reads."""
    matter: dict[str, Any] = {
        "license": license_name or "unknown",
        "library_name": "gguf" if cfg.format == "gguf" else "transformers",
        "pipeline_tag": TASKS[config.kind],
        "tags": ["llmkit"],
    }
    if _is_hub_id(base):
        matter["base_model"] = base.partition("@")[0]
    if cfg.card.language:
        matter["language"] = cfg.card.language
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---"


def _model(cfg: ExportConfig, config: ModelConfig, tokenizer: Tokenizer, base: str) -> Rows:
    yield "architecture", config.hf_architecture() or "of llmkit's own; other libraries do not open it"
    yield "parameters", config.n_params()
    yield "window", f"{config.max_seq_len:,} tokens"
    yield "vocabulary", f"{tokenizer.vocab_size:,} tokens, {config.vocab_rows:,} embedding rows"
    yield "format", f"{cfg.format}, {cfg.dtype}"
    yield "started from", base


def _data(cfg: ExportConfig, run: Run) -> Rows:
    """Names of files without their folders: those are nobody's business."""
    text, held_out, weights = run.of("data.path"), run.of("data.val_path"), run.of("data.weights")
    yield "text", _names(text)
    yield "shares", ", ".join(map(str, weights)) if weights else "each text by its size" if text else None
    share = run.of("data.val_fraction")
    yield "validation text", _names(held_out) or (share is not None and f"{share:.1%} of the documents") or None
    yield "prepared text", run.state.get("data_key")
    yield "language", cfg.card.language


def _training(run: Run) -> Rows:
    progress = _mapping(run.state.get("progress"))
    batch, length = run.state.get("global_batch_size"), run.of("data.seq_len") or run.of("model.max_seq_len")
    seconds = progress.get("elapsed_seconds")
    yield "objective", _node(run.of("objective"))
    yield "steps", run.step
    yield "tokens", progress.get("n_tokens")
    yield "batch", f"{batch} sequences of {length} tokens" if batch and length else None
    yield "optimizer", _node(run.of("optim"))
    yield "schedule", _node(run.of("schedule"))
    yield "precision", run.of("engine.precision")
    yield "seed", str(run.of("run.seed")) if run.config else None
    yield "hardware", _hardware(run.machine)
    yield "time", f"{seconds:,.0f} seconds" if isinstance(seconds, float) else None
    yield "software", ", ".join(f"{name} {version}" for name, version in run.versions.items())


def _metrics(run: Run) -> Rows:
    """Losses and scores at the checkpoint's step, the validation ones first."""
    wanted = ("val/", "train/loss")
    names = sorted((name for name in run.metrics if name.startswith(wanted)), key=lambda name: (name[0] != "v", name))
    return [(name, run.metrics[name]) for name in names] or [("validation", None)]


def _usage(cfg: ExportConfig, config: ModelConfig) -> str:
    """How to open it, to copy."""
    if config.hf_architecture() is None:
        lines = ["```sh", "llmkit generate init=FOLDER --prompt 'Once upon a time'", "```"]
    elif cfg.format == "gguf":
        lines = ["```sh", "llama-cli -m model.gguf -p 'Once upon a time'", "```"]
    else:
        loader = LOADERS[config.kind]
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
    """A hub id or a built-in text as it is, of a path the last part."""
    return path if path.startswith("builtin:") or _is_hub_id(path) else Path(path).expanduser().resolve().name


def _node(node: Any) -> str | None:
    """``AdamW(lr=0.001, ...)``"""
    if not isinstance(node, Mapping):
        return None
    given = ", ".join(f"{name}={value}" for name, value in node.items() if name != "_target_")
    return f"{str(node.get('_target_')).rpartition('.')[2]}({given})"


def _hardware(machine: Mapping[str, Any]) -> str | None:
    gpus, cpus = machine.get("gpus"), machine.get("n_cpus")
    if isinstance(gpus, list) and gpus:
        return ", ".join(map(str, gpus))
    return f"{cpus} CPU cores" if cpus else None
