"""``llmkit export``: every kind of model passes its check, and whatever is written wrong is found and not published."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.cli import main
from llmkit.commands import export as command
from llmkit.commands import export_check, template_check
from llmkit.commands.exported import Exported
from llmkit.engine import files
from llmkit.errors import CheckpointError, ConfigError, NumericsError, Stopped
from llmkit.models.hf import load_model
from tests.unit.commands.exporting import export, export_spoilt, write_source

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("llama"), "llama")


def left_over(out: Path) -> list[str]:
    """What an export that failed left where it was to be."""
    return [path.name for path in out.parent.iterdir() if path.name.startswith((".tmp", out.name))]


# -- what passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "kind", "changes"),
    [
        ("llama", "bpe", {"n_kv_heads": 2}),
        ("llama", "unigram", {"tie_embeddings": False}),
        ("gpt2", "bpe", {}),
        ("bert", "wordpiece", {}),
        ("bert", "wordpiece", {"pooler": False}),
        ("modern_bert", "bpe", {}),
        ("t5", "bpe", {}),
        ("bart", "bpe", {}),
    ],
)
def test_every_kind_is_checked_by_transformers(
    option: str, kind: str, changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path / "source", option, kind, **changes)
    assert export(source, tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert f"opened by                   transformers {transformers.__version__}" in shown
    for line in ("tokenizer ", "logits, against the source", "logits, against llmkit"):
        assert line in shown
    assert ("greedy tokens               32 of 32" in shown) == (option not in ("bert", "modern_bert"))
    assert left_over(tmp_path / "out") == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"README.md", "config.json", "model.safetensors"}


def test_the_weights_are_the_rounded_ones(llama: Path, tmp_path: Path) -> None:
    source = load_file(llama / "model.safetensors")
    for dtype in ("bfloat16", "float16"):
        assert export(llama, tmp_path / dtype, dtype=dtype) == 0
        written = load_file(tmp_path / dtype / "model.safetensors")
        assert written.keys() == source.keys()
        for name, tensor in source.items():
            assert torch.equal(written[name], tensor.to(getattr(torch, dtype))), name
        said = json.loads((tmp_path / dtype / "config.json").read_text())
        assert said["dtype"] == said["torch_dtype"] == dtype


@pytest.mark.parametrize("dtype", ["float32", "float16", "q8_0"])
def test_gguf_is_checked_by_transformers(
    dtype: str, llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    assert export(llama, tmp_path / "out", "gguf", dtype) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    for line in (
        "transformers",
        "tokenizer ",
        "logits, against the source",
        "logits, against llmkit",
        "32 of 32 equal",
    ):
        assert line in shown.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model.gguf"]
    assert "llama-cli -m model.gguf" in (tmp_path / "out" / "README.md").read_text()


def test_gguf_matrices_not_laid_out_as_its_readers_expect(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both readers undo the same permutation of q and k, so that they agree with one another about wrong weights."""
    pytest.importorskip("gguf")
    import llmkit.models.gguf as package

    write = package.save_gguf

    def unpermuted(model: Any, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            weight = model.blocks[0].attention.q.weight
            weight.copy_(weight.flip(0))
        write(model, *args, **kwargs)

    monkeypatch.setattr(package, "save_gguf", unpermuted)
    with pytest.raises(CheckpointError, match="its logits differ from the source's by"):
        export(llama, tmp_path / "out", "gguf", "float32")
    assert left_over(tmp_path / "out") == []


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_a_chat_template_goes_with_the_weights(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if format == "gguf":
        pytest.importorskip("gguf")
    source = write_source(tmp_path / "source", "llama")
    (source / "chat_template.jinja").write_text(
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ message.role }}] {{ message.content | trim }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert export(source, tmp_path / "out", format) == 0
    assert "chat template               4 prompts equal, 2 refused by it" in capsys.readouterr().out
    monkeypatch.setattr(template_check, "_rendered_there", lambda *args: ["[user] What"] * 4)
    with pytest.raises(CheckpointError, match=r"the chat template gives '\[user\] What' there"):
        export(source, tmp_path / "other", format)
    assert left_over(tmp_path / "other") == []


def test_a_small_window_and_a_short_model(tmp_path: Path) -> None:
    """Fewer positions than the check would like."""
    source = write_source(tmp_path / "source", "gpt2", max_seq_len=2)
    assert export(source, tmp_path / "out") == 0


def test_a_model_of_our_own_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = write_source(tmp_path / "source", "lstm")
    assert export(source, tmp_path / "out") == 0
    assert "opens in llmkit only" in caplog.text
    assert "opened by                   llmkit only" in capsys.readouterr().out
    before, after = load_model(source).state_dict(), load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_without_transformers_llmkit_reads_it_back(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_check, "find_spec", lambda name: None)
    assert export(llama, tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "transformers is not installed (pip install 'llmkit[hf]')" in shown
    assert "logits, against the source" in shown
    assert "against llmkit" not in shown


def test_an_empty_folder_is_filled_and_parents_are_made(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert export(llama, tmp_path / "empty") == 0
    assert export(llama, tmp_path / "a" / "b") == 0


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "full", "link", ""])
def test_a_place_that_is_taken(llama: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="not a new or an empty folder"):
        command.free_place(place)
    assert (tmp_path / "full" / "x").read_text() == "x"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["dtype=q8_0"], "format=hf is not written in q8_0"),
        (["format=gguf", "dtype=bfloat16"], "format=gguf is not written in bfloat16"),
        (["format=onnx"], "format: must be"),
        (["formt=hf"], "did you mean format?"),
    ],
)
def test_mistakes_are_told_before_torch_is_imported(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run", None)
    assert main(["export", "init=nowhere", "out=nowhere", *words]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(("option", "name"), [("lstm", "model of its own kind"), ("gpt2", "GPT2LMHeadModel")])
def test_gguf_has_not_every_model(option: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the weights are read."""
    pytest.importorskip("gguf")
    source = write_source(tmp_path / "source", option)
    monkeypatch.setattr(command, "open_model", None)
    with pytest.raises(ConfigError, match=f"a {name} is not written as GGUF"):
        export(source, tmp_path / "out", "gguf")
    assert left_over(tmp_path / "out") == []


def test_a_weight_beyond_float16(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 7e4
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"blocks\.1\.mlp\.up\.weight holds 7e\+04, float16 ends at 65504"):
        export(source, tmp_path / "out", dtype="float16")
    assert left_over(tmp_path / "out") == []
    assert export(source, tmp_path / "out", dtype="bfloat16") == 0


# -- what the check finds ---------------------------------------------------------------------------------------------


def change_weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def change_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return spoil


def swap(tensors: dict[str, Any]) -> None:
    q, k = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk")
    tensors[q], tensors[k] = tensors[k], tensors[q]


def swap_pieces(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    content["model"]["merges"] = merges[len(merges) // 2 :]


NORM = "model.norm.weight"
FAULTS = {
    "two matrices swapped": (change_weights(swap), "its logits differ from the source's by"),
    "not rounded but scaled": (change_weights(lambda t: t[NORM].mul_(1.01)), "its logits differ from the source's by"),
    "a tensor is missing": (change_weights(lambda t: t.pop(NORM)), f"missing tensors, {NORM}"),
    "a tensor too many": (change_weights(lambda t: t.update(more=torch.ones(2))), "unexpected tensors, more"),
    "another shape": (change_weights(lambda t: t.update({NORM: torch.ones(5)})), "cannot open it|mismatched tensors"),
    "cut file": (lambda folder: cut(folder / "model.safetensors"), "transformers cannot open it"),
    "another head count": (
        change_json("config.json", lambda c: c.update(num_attention_heads=2, num_key_value_heads=2, head_dim=12)),
        "its logits differ from the source's by",
    ),
    "another wave length": (
        change_json(
            "config.json",
            lambda c: c.update(rope_theta=50.0, rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
        ),
        "its logits differ from the source's by",
    ),
    "other merges": (change_json("tokenizer.json", swap_pieces), "transformers makes other tokens of"),
    "no tokenizer": (
        lambda folder: [(folder / f"tokenizer{end}").unlink() for end in (".json", ".model", "_config.json")],
        "transformers cannot open the tokenizer",
    ),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_nothing_is_published(
    name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, message = FAULTS[name]
    caught = export_spoilt(llama, tmp_path / "out", spoil, monkeypatch, match=message)
    assert "nothing was published" in caught.fix
    assert left_over(tmp_path / "out") == []


def test_a_computation_that_differs_there(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are right, but what transformers makes of them is not quite what llmkit does."""
    read = export_check.read_by_transformers

    def other(exported: Exported) -> Any:
        reading = read(exported)
        (logits_BTV,) = reading.logits
        off = torch.zeros_like(logits_BTV)
        off[0, 0, 0] = 1
        return reading._replace(logits=[logits_BTV + off])

    monkeypatch.setattr(export_check, "read_by_transformers", other)
    monkeypatch.setattr(export_check, "ROUNDING", {"float32": 1.0})
    with pytest.raises(CheckpointError, match="transformers computes differ from llmkit's by 1"):
        export(llama, tmp_path / "out")
    assert left_over(tmp_path / "out") == []


def test_a_greedy_text_that_differs_there(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One id of 32; two ids whose logits are the same within the tolerance are as good as one another."""
    read = export_check.read_by_transformers

    def other(exported: Exported) -> Any:
        reading = read(exported)
        return reading._replace(new_ids=[*reading.new_ids[:-1], (reading.new_ids[-1] + 1) % 300])

    monkeypatch.setattr(export_check, "read_by_transformers", other)
    with pytest.raises(CheckpointError, match="greedy token 32 of transformers is"):
        export(llama, tmp_path / "out")
    monkeypatch.setattr(export_check, "SUMMING", 1e3)
    assert export(llama, tmp_path / "out") == 0


def test_a_disk_that_refuses(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(operation: str, *paths: Path) -> None:
        if operation == "rename":
            raise OSError(28, "No space left on device", str(paths[0]))

    monkeypatch.setattr(files, "fail_point", refuse)
    with pytest.raises(CheckpointError, match="could not be written: No space left"):
        export(llama, tmp_path / "out")
    monkeypatch.undo()
    assert left_over(tmp_path / "out") == []


def test_a_stop_signal_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "check_export", lambda exported: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped):
        export(llama, tmp_path / "out")
    assert left_over(tmp_path / "out") == []
