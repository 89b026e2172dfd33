"""From what a user writes as ``init`` to a model folder: a run, a checkpoint, a Hugging Face folder or a hub id."""

from __future__ import annotations

import json
import logging
import re
import shlex
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path

from llmkit.engine.checkpoint import MODEL, STEP_FOLDER, CheckpointStore, open_checkpoint
from llmkit.engine.manifest import MANIFEST
from llmkit.errors import CheckpointError, ConfigError, LLMKitError, SetupError
from llmkit.gguf_file import SUFFIX
from llmkit.models.hf.weight_files import ADAPTER_CONFIG, PICKLES
from llmkit.redact import redact_text
from llmkit.safe_files import read_text

CONFIG = "config.yaml"

log = logging.getLogger("llmkit.models")

HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?(@[\w./-]+)?")
TEMPLATES = "additional_chat_templates"  # the one subfolder that belongs to a tokenizer
# Weights, configuration, tokenizer, and the model card for its licence; no code.
HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.spm", "*.jinja", "merges.txt", "vocab.txt"]
HUB_FILES += ["README.md"]
# Pickles, code, and every subfolder but that of the templates, of which files end in ".jinja". A pattern's ``*`` goes
# past ``/`` and none can say "not this folder": each of these drops the folders whose name parts from it at one letter.
HUB_LEFT_OUT = ["consolidated*", "*.py", "*.pkl", "*.pickle", *PICKLES, f"{TEMPLATES}/*[!a]", f"{TEMPLATES}/*/*"]
HUB_LEFT_OUT += [f"{TEMPLATES[:at]}[!{letter}]*/*" for at, letter in enumerate(f"{TEMPLATES}/")]
HUB_LEFT_OUT += [f"{TEMPLATES[:at]}/*" for at in range(1, len(TEMPLATES))]


def resolve_init(init: str) -> Path:
    """The model folder behind ``init``: ``config.json``, weights in safetensors, tokenizer files; or a ``.gguf`` file.

    A folder that holds one ``.gguf`` file and no ``config.json`` gives that file. A run folder gives its newest valid
    checkpoint, that of a fine-tuning run its best. ``owner/name@revision`` pins a hub model. No code in it is ever run.
    Errors: ``ConfigError`` for what does not exist, ``CheckpointError`` for what cannot be trusted or read,
    ``SetupError`` when the hub cannot be reached.
    """
    path = Path(init).expanduser()
    if path.is_dir():
        return _model_in(path)
    if path.suffix == SUFFIX and path.is_file():
        return path
    if path.exists():
        raise ConfigError(f"{init} is a file, not a folder", where="init", fix=f"init={path.parent}")
    if _looks_local(init):
        raise ConfigError(f"{init} does not exist", where="init", fix=_suggestion(path))
    folder = _from_hub(init, path)
    try:
        return _checked(folder)
    except (ConfigError, CheckpointError) as error:
        raise _hub_error(init, folder, error) from error


def _model_in(folder: Path) -> Path:
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    if folder.name == "checkpoints" or any(STEP_FOLDER.fullmatch(entry.name) for entry in folder.iterdir()):
        store = CheckpointStore(folder, keep_last=2, keep_best=False)
        newest = store.newest()
        if newest is None:
            raise CheckpointError(
                "this run has not saved a checkpoint yet",
                where=str(folder),
                fix="let it reach engine.save_every, or its end",
            )
        best = store.best() if _is_fine_tuned(folder.parent) else None
        if best is not None and best.step != newest.step:
            log.info("%s: the best checkpoint is that of step %d, of %d", folder.parent, best.step, newest.step)
        return (best or newest).model
    if (folder / MANIFEST).is_file() or (folder / MODEL).is_dir():
        return open_checkpoint(folder).model
    return _checked(folder)


def _is_fine_tuned(run: Path) -> bool:
    """Whether the run was scored on a task, and is meant to be used where it scored best."""
    try:
        lines = read_text(run / CONFIG).splitlines()
    except (OSError, ValueError, CheckpointError):
        return False
    return any(line.startswith("task:") for line in lines)


def _checked(folder: Path) -> Path:
    """``folder`` itself, if a model is in it that can be read without pickle, or the one GGUF file in it."""
    if not (folder / "config.json").is_file() and not is_adapter(folder):
        if len(single := list(folder.glob(f"*{SUFFIX}"))) == 1:
            return single[0]
        inside = sorted(entry.name for entry in folder.glob("*"))[:5]
        raise ConfigError(
            f"{folder} holds no model: config.json is missing (found: {', '.join(inside) or 'nothing'})",
            where="init",
            fix="name a run folder, a checkpoint, a folder with config.json and model.safetensors, or a .gguf file",
        )
    if not any(folder.glob("*.safetensors")):
        if any(next(folder.glob(pattern), None) for pattern in PICKLES):
            raise pickled(str(folder), folder, str(folder))
        fix = f"bring model.safetensors there: llmkit reads safetensors and {SUFFIX} files"
        raise CheckpointError("there are no weights", where=str(folder), fix=fix)
    return folder


def pickled(model: str, folder: Path, where: str, revision: str = "") -> CheckpointError:
    """The error for a model, a folder or a hub id, that has its weights as pickles only. ``folder``: its config."""
    try:
        kind = str(json.loads(read_text(folder / "config.json"))["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError, RecursionError, CheckpointError):
        kind = ""
    kind = kind if re.fullmatch(r"\w{1,80}", kind, re.ASCII) else "AutoModel"
    source = json.dumps(model) + (f", revision={json.dumps(revision)}" if revision else "")
    lines = [f't.{name}.from_pretrained({source}).save_pretrained("converted")' for name in (kind, "AutoTokenizer")]
    program = shlex.quote("; ".join(["import transformers as t", *lines]))
    return CheckpointError(
        "the weights are pickled, which can run code when read: llmkit reads safetensors only",
        where=where,
        fix=f"if you trust it, convert it: python -c {program} ; then init=converted",
    )


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter in the format of ``peft``, and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def _looks_local(init: str) -> bool:
    """A path, or a misspelt one: only what has the form of a hub id and no folder to its name is asked of the hub."""
    first = Path(init).parts[0] if Path(init).parts else ""
    is_path = init.startswith((".", "/", "~")) or init.endswith("/") or not HUB_ID.fullmatch(init)
    return is_path or (len(Path(init).parts) > 1 and Path(first).is_dir())


def _suggestion(path: Path) -> str:
    """What the user may have meant: entries beside ``path``, and runs."""
    places = [path.parent, Path("runs")]
    names = {str(entry): entry for place in places if place.is_dir() for entry in place.iterdir() if entry.is_dir()}
    by_name = {entry.name: name for name, entry in names.items()}
    close = get_close_matches(path.name, by_name, n=1)
    if close:
        return f"did you mean init={by_name[close[0]]}?"
    return "name a run folder, a checkpoint, a model folder, or a hub id such as openai-community/gpt2"


def _from_hub(init: str, path: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = init.partition("@")
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=HUB_FILES, ignore_patterns=HUB_LEFT_OUT
        )
    except GatedRepoError as error:
        raise _unreachable(init, "asks for permission", "accept its terms, then `hf auth login`") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ConfigError(f"no folder and no hub model {init!r}", where="init", fix=_suggestion(path)) from error
    except LLMKitError:  # a stop signal's
        raise
    except Exception as error:  # no network, a server that fails or is slow, a full disk: classes of several libraries
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        why = f"cannot be fetched: {redact_text(reason)[:200]}"
        why = "is not in the local cache and HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else why
        raise _unreachable(init, why, f"{_suggestion(path)}; otherwise download it once while online") from error
    return Path(folder)


def _hub_error(init: str, folder: Path, error: LLMKitError) -> LLMKitError:
    """``error`` about a fetched hub model, in words that fit where its weights are only in a form not fetched."""
    from huggingface_hub import HfApi

    repository, _, revision = init.partition("@")
    try:
        names = HfApi().list_repo_files(repository, revision=revision or None)
    except Exception:  # offline, in whichever class the hub's library has for it: the name is all there is to go by
        names = [f"...{SUFFIX}"] if "gguf" in repository.lower() else []
    if any("/" not in name and name.endswith(".safetensors") for name in names):
        return error
    if quantised := sorted(name for name in names if name.endswith(SUFFIX)):
        what = f"hub model {init!r} has its weights in {SUFFIX} files only, and llmkit does not choose among them"
        pinned = f" --revision {revision}" if revision else ""
        command = f"hf download {repository} {quantised[0]}{pinned} --local-dir ."
        fix = f"download one by hand: {command} ; then init=<the file>"
        return ConfigError(what, where="init", fix=fix)
    if any("/" not in name and fnmatch(name, pattern) for name in names for pattern in PICKLES):
        return pickled(repository, folder, f"hub model {init!r}", revision)
    return error


def _unreachable(init: str, why: str, fix: str) -> LLMKitError:
    return SetupError(f"hub model {init!r} {why}", where="init", fix=fix)
