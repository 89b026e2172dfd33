from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from llmkit.engine.init import HUB_FILES, HUB_LEFT_OUT, resolve_init
from llmkit.errors import CheckpointError, ConfigError, SetupError, Stopped
from tests.faults.tiny import make_store, save


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run of two checkpoints and a model folder."""
    monkeypatch.chdir(tmp_path)
    store = make_store(tmp_path / "runs" / "mine" / "checkpoints")
    save(store, 10)
    save(store, 20)
    _model(tmp_path / "llama")
    return tmp_path


def _model(folder: Path, weights: str = "model.safetensors") -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / weights).write_text("x")


@pytest.mark.parametrize(
    ("init", "model"),
    [
        ("runs/mine", "runs/mine/checkpoints/step_20/model"),
        ("runs/mine/", "runs/mine/checkpoints/step_20/model"),
        ("./runs/mine", "runs/mine/checkpoints/step_20/model"),
        ("runs/mine/checkpoints", "runs/mine/checkpoints/step_20/model"),
        ("runs/mine/checkpoints/step_10", "runs/mine/checkpoints/step_10/model"),
        ("runs/mine/checkpoints/step_10/model", "runs/mine/checkpoints/step_10/model"),
        ("llama", "llama"),
    ],
)
def test_local_forms(work: Path, init: str, model: str) -> None:
    assert resolve_init(init) == Path(model)
    assert resolve_init(str(work / init)) == work / model


def test_gguf_files(work: Path) -> None:
    """A file is itself; a folder is the one it holds, where there is no Hugging Face model in it."""
    (work / "llama" / "copy.gguf").write_text("x")
    (work / "quantised").mkdir()
    (work / "quantised" / "model.gguf").write_text("x")
    assert resolve_init("llama/copy.gguf") == Path("llama/copy.gguf")
    assert resolve_init("llama") == Path("llama")
    assert resolve_init("quantised") == Path("quantised/model.gguf")
    (work / "quantised" / "other.gguf").write_text("x")
    with pytest.raises(ConfigError, match=r"config\.json is missing \(found: model\.gguf, other\.gguf\)") as caught:
        resolve_init("quantised")
    assert "a .gguf file" in caught.value.fix


def test_a_damaged_newest_checkpoint_of_a_run_is_skipped(work: Path) -> None:
    (work / "runs/mine/checkpoints/step_20/state.json").write_text("")
    assert resolve_init("runs/mine") == Path("runs/mine/checkpoints/step_10/model")
    with pytest.raises(CheckpointError, match=r"state\.json has 0 bytes"):
        resolve_init("runs/mine/checkpoints/step_20")


@pytest.mark.parametrize(("config", "step"), [("task:\n  _target_: x\n", 20), ("data:\n  path: x\n", 30)])
def test_a_fine_tuned_run_gives_its_best_checkpoint(tmp_path: Path, config: str, step: int) -> None:
    """The newest of those that were the best when they were written; of a run on text the newest of all."""
    run = tmp_path / "runs" / "tuned"
    store = make_store(run / "checkpoints", keep_last=5, keep_best=True)
    for number, best in ((10, True), (20, True), (30, False)):
        save(store, number, best=best)
    (run / "config.yaml").write_text(config)
    for init in (run, run / "checkpoints"):
        assert resolve_init(str(init)).parent.name == f"step_{step}"
    (run / "checkpoints" / "step_20" / "model" / "model.safetensors").write_bytes(b"damaged")
    assert resolve_init(str(run)).parent.name == ("step_10" if step == 20 else "step_30")


def test_a_run_without_a_checkpoint(work: Path) -> None:
    (work / "runs/new/checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has not saved a checkpoint yet"):
        resolve_init("runs/new")


@pytest.mark.parametrize(
    ("init", "hint"),
    [
        ("runs/mien", "did you mean init=runs/mine?"),
        ("./runs/mien", "did you mean init=runs/mine?"),
        ("/runs/mine/checkpoint", "name a run folder"),
        ("./lama", "did you mean init=llama?"),
        ("a/b/c", "name a run folder"),
        ("", "name a run folder"),
        ("bad\0name", "name a run folder"),
    ],
)
def test_a_path_that_is_not_there(work: Path, init: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_init(init)
    assert hint in caught.value.fix
    assert caught.value.exit_code == 2


def test_folders_that_hold_no_model(work: Path) -> None:
    (work / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json is missing \(found: nothing\)"):
        resolve_init("empty")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        resolve_init("llama/config.json")
    _model(work / "old", "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        resolve_init("old")
    _model(work / "bare", "tokenizer.json")
    with pytest.raises(CheckpointError, match="there are no weights"):
        resolve_init("bare")


def test_a_hub_model_comes_from_the_cache_when_offline(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library on a cache laid out as it lays it out; HF_HUB_OFFLINE is set for all tests."""
    cache = work / "hub"
    revision = "0123456789012345678901234567890123456789"
    _model(cache / "models--owner--tiny" / "snapshots" / revision)
    (cache / "models--owner--tiny" / "refs").mkdir()
    (cache / "models--owner--tiny" / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert resolve_init("owner/tiny") == cache / "models--owner--tiny" / "snapshots" / revision
    assert resolve_init(f"owner/tiny@{revision}") == cache / "models--owner--tiny" / "snapshots" / revision
    with pytest.raises(SetupError, match="HF_HUB_OFFLINE is set") as caught:
        resolve_init("owner/other")
    assert caught.value.exit_code == 8


@pytest.fixture
def hub(work: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the download; what it was asked for, and what it answers."""
    asked: dict[str, Any] = {"answer": work / "llama"}

    def download(repo_id: str, **arguments: Any) -> str:
        asked.update(arguments, repo_id=repo_id)
        if isinstance(asked["answer"], Exception):
            raise asked["answer"]
        return str(asked["answer"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_only_weights_config_and_tokenizer_are_asked_for(hub: dict[str, Any]) -> None:
    resolve_init("owner/tiny@v1.0")
    assert hub["repo_id"] == "owner/tiny"
    assert hub["revision"] == "v1.0"
    repository = [
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "merges.txt",
        "vocab.json", "source.spm", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "README.md",
        "adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "tokenizer.pkl", "tokenizer.bin",
        "modeling_evil.py", "tokenizer_evil.py", "onnx/config.json",
        "flax_model.msgpack", "x.pkl", "consolidated.safetensors", "a/config.json",
        "additional_chat_templates/evil.py", "additional_chat_templates/config.json", "model.Q4_K_M.gguf",
        "additional_chat_templates/deep/er.jinja", "additional_chat_templates2/x.jinja", "additional/x.jinja",
        "onnx/chat_template.jinja", "additional_chat_template/model.safetensors", "original/README.md",
    ]  # fmt: skip
    kept = huggingface_hub.utils.filter_repo_objects(
        repository, allow_patterns=hub["allow_patterns"], ignore_patterns=hub["ignore_patterns"]
    )
    assert list(kept) == repository[:16]
    assert hub["allow_patterns"] == HUB_FILES
    assert hub["ignore_patterns"] == HUB_LEFT_OUT


@pytest.mark.parametrize("init", ["gpt2", "openai-community/gpt2"])
def test_what_has_the_form_of_a_hub_id_is_one(hub: dict[str, Any], init: str) -> None:
    assert resolve_init(init).name == "llama"
    assert hub["repo_id"] == init
    assert hub["revision"] is None


def _http(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "no")
    return error


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (_http(RepositoryNotFoundError), ConfigError, "no folder and no hub model 'mien'"),
        (_http(GatedRepoError), SetupError, "asks for permission"),
        (LocalEntryNotFoundError("no"), SetupError, "mien"),
        (ConnectionError("no"), SetupError, "mien"),
        (_http(HfHubHTTPError), SetupError, "mien"),
        (httpx.ConnectError("no route"), SetupError, "mien"),
        (httpx.ReadTimeout("the read operation timed out"), SetupError, "mien"),
        (RuntimeError(""), SetupError, "mien"),
    ],
)
def test_what_the_hub_answers(hub: dict[str, Any], answer: Exception, error: type[Exception], text: str) -> None:
    hub["answer"] = answer
    with pytest.raises(error, match=text) as caught:
        resolve_init("mien")
    if not isinstance(answer, GatedRepoError):
        assert f"did you mean init=runs{os.sep}mine?" in caught.value.fix  # type: ignore[attr-defined]


def test_why_a_download_failed_is_said(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub["answer"] = httpx.ReadTimeout("the read operation timed out\nmore")
    with pytest.raises(SetupError, match="cannot be fetched: the read operation timed out\n") as caught:
        resolve_init("owner/tiny")
    assert "while online" in caught.value.fix
    hub["answer"] = stop = Stopped("asked to stop")
    with pytest.raises(Stopped) as stopped:
        resolve_init("owner/tiny")
    assert stopped.value is stop


def test_a_name_the_hub_does_not_allow(work: Path) -> None:
    with pytest.raises(ConfigError):
        resolve_init("a--b..c/d")


@pytest.mark.parametrize("listed", [True, False])
def test_a_hub_model_of_gguf_files_only(
    hub: dict[str, Any], work: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    """None of the files is fetched; the error says how to get one. Offline, the name tells."""

    def names(self: Any, repo_id: str, revision: str | None = None) -> list[str]:
        if not listed:
            raise RuntimeError("no")
        return ["README.md", "tiny.Q8_0.gguf", "tiny.Q4_0.gguf"]

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", names)
    hub["answer"] = work / "not made, as nothing was fetched"
    with pytest.raises(ConfigError, match=r"in \.gguf files only") as caught:
        resolve_init("owner/tiny-GGUF@v1")
    assert f"hf download owner/tiny-GGUF {'tiny.Q4_0' if listed else '...'}.gguf --revision v1" in caught.value.fix
    (work / "bare").mkdir()
    (work / "bare" / "config.json").write_text("{}")
    hub["answer"] = work / "bare"
    with pytest.raises(ConfigError if listed else CheckpointError, match="gguf" if listed else "there are no weights"):
        resolve_init("owner/tiny")


@pytest.mark.parametrize(("config", "named"), [('{"architectures": ["MarianMTModel"]}', "MarianMTModel"), ("{", "")])
def test_a_hub_model_with_pickled_weights_only(
    hub: dict[str, Any], work: Path, monkeypatch: pytest.MonkeyPatch, config: str, named: str
) -> None:
    """They are not fetched; the error says how to convert them."""
    files = ["config.json", "pytorch_model.bin", "source.spm"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: files)
    (work / "bare").mkdir()
    (work / "bare" / "config.json").write_text(config)
    hub["answer"] = work / "bare"
    with pytest.raises(CheckpointError, match="llmkit reads safetensors only") as caught:
        resolve_init("owner/tiny@v1")
    call = f't.{named or "AutoModel"}.from_pretrained("owner/tiny", revision="v1").save_pretrained("converted")'
    assert call in caught.value.fix
    assert "owner/tiny@v1" in caught.value.where
