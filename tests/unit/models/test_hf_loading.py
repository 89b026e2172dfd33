"""Opening folders of others: types, new heads, other heads, repeated tensors, and how much memory it takes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmkit.errors import CheckpointError, MemoryBudgetError
from llmkit.models.hf import load_model, save_model
from llmkit.models.hf.weight_files import list_tensors, read_tensor, write_tensors
from tests.conftest import REPO
from tests.unit.models.test_encoder_config import bert
from tests.unit.models.tiny import built, gpt2, llama

WEIGHTS = "model.safetensors"
Tensors = dict[str, Tensor]


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS)


def saved(folder: Path, config: Any, seed: int = 0) -> Any:
    model = built(config, seed)
    save_model(model, folder)
    return model


# -- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [llama(), gpt2()], ids=["llama", "gpt2"])
def test_every_type_is_read_into_every_type(
    tmp_path: Path, config: Any, kind: torch.dtype, dtype: torch.dtype | None
) -> None:
    """Equal to a cast by torch of what safetensors itself reads, and that is why an embedding is looked at."""
    saved(tmp_path, config)
    edit(tmp_path, lambda t: t.update({name: tensor.to(kind) for name, tensor in t.items()}))
    name = "model.embed_tokens.weight" if config.position == "rotary" else "transformer.wte.weight"
    loaded = load_model(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype or torch.float32}
    assert torch.equal(loaded.embedding.weight, load_file(tmp_path / WEIGHTS)[name].to(dtype or torch.float32))


def test_types_may_be_mixed(tmp_path: Path) -> None:
    model = saved(tmp_path, llama())
    edit(tmp_path, lambda t: t.update({name: x.bfloat16() for name, x in t.items() if "norm" not in name}))
    loaded = load_model(tmp_path)
    assert torch.equal(loaded.norm.weight, model.norm.weight)
    assert torch.equal(loaded.embedding.weight, model.embedding.weight.bfloat16().float())


@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        max_size=5,
    )
)
def test_what_is_written_is_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[torch.dtype, list[int]]]
) -> None:
    """And what is read here is what the library wrote."""
    folder = tmp_path_factory.mktemp("files")
    kinds = sorted(kinds, key=lambda item: -item[0].itemsize)
    tensors = {f"t{i}": torch.randn(shape).to(kind) for i, (kind, shape) in enumerate(kinds)}
    save_file(tensors, folder / WEIGHTS)
    read = {stored.name: stored for stored in list_tensors(folder)}
    assert all(torch.equal(read_tensor(read[name]), tensor) for name, tensor in tensors.items())
    layout = {name: (read[name].kind, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(folder / "ours.safetensors", layout, tensors.values())
    again = load_file(folder / "ours.safetensors")
    assert again.keys() == tensors.keys()
    assert all(
        torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_a_tensor_that_is_not_as_announced_is_not_written(tmp_path: Path) -> None:
    for other in (torch.ones(3), torch.ones(2).half()):
        with pytest.raises(ValueError, match=r"where F32\[2\] was due"):
            write_tensors(tmp_path / WEIGHTS, {"a": ("F32", (2,))}, [other])


def test_a_model_of_two_types_is_written_aligned(tmp_path: Path) -> None:
    model = built(gpt2(d_model=25, n_heads=5)).bfloat16()  # an odd number of values in the embedding
    model.norm.float()
    save_model(model, tmp_path)
    for stored in list_tensors(tmp_path):
        assert stored.start % (4 if stored.kind == "F32" else 2) == 0
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.get_tensor("transformer.ln_f.weight").dtype == torch.float32


# -- heads ----------------------------------------------------------------------------------------------------------

TRANSFORM = "cls.predictions.transform.dense.weight"


def without_head(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("cls.")]:
        del tensors[name]


def test_a_head_that_is_not_there_is_new_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = saved(tmp_path, bert(pooler=False))
    edit(tmp_path, without_head)
    loaded = load_model(tmp_path, seed=3)
    for part in ("transform.dense.weight", "transform.norm.weight", "output_bias"):
        assert part in caplog.text
    assert "the head is not in the files; it is new" in caplog.text
    assert torch.equal(loaded.embedding.weight, model.embedding.weight)
    assert torch.equal(loaded.blocks[1].mlp.up.weight, model.blocks[1].mlp.up.weight)
    dense = loaded.transform.dense.weight.detach()
    assert float(dense.std()) == pytest.approx(model.config.init_std, rel=0.2)
    assert abs(float(dense.mean())) < model.config.init_std / 5
    assert bool((loaded.transform.norm.weight == 1).all())
    assert not any(bool(x.any()) for x in (loaded.transform.dense.bias, loaded.transform.norm.bias, loaded.output_bias))
    assert torch.equal(load_model(tmp_path, seed=3).transform.dense.weight, dense)
    assert not torch.equal(load_model(tmp_path, seed=4).transform.dense.weight, dense)
    assert load_model(tmp_path, dtype=torch.bfloat16).transform.dense.weight.dtype == torch.bfloat16


def test_a_head_that_is_there_is_not_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, bert(pooler=False))
    load_model(tmp_path)
    assert caplog.text == ""


@pytest.mark.parametrize("kept", [TRANSFORM, "cls.predictions.bias"])
def test_half_a_head_is_damage(tmp_path: Path, kept: str) -> None:
    saved(tmp_path, bert(pooler=False))

    def halve(tensors: Tensors) -> None:
        part = tensors[kept]
        without_head(tensors)
        tensors[kept] = part

    edit(tmp_path, halve)
    with pytest.raises(CheckpointError, match=r"tensor cls\.predictions\S* and \d more: missing"):
        load_model(tmp_path)


def test_the_rest_may_not_be_missing_with_the_head(tmp_path: Path) -> None:
    saved(tmp_path, bert(pooler=False))
    edit(tmp_path, without_head)
    edit(tmp_path, lambda t: t.pop("bert.embeddings.LayerNorm.weight"))
    with pytest.raises(CheckpointError, match=r"tensor bert\.embeddings\.LayerNorm\.weight: missing"):
        load_model(tmp_path)


def test_other_heads_are_left_aside_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = saved(tmp_path, bert(pooler=False))
    extra = {"classifier.weight": torch.ones(2, 24), "classifier.bias": torch.ones(2)}
    edit(tmp_path, lambda t: t.update(extra))
    with caplog.at_level(logging.INFO, "llmkit.models"):
        loaded = load_model(tmp_path)
    lines = [record.message for record in caplog.records if "left aside" in record.message]
    assert len(lines) == 1
    assert "classifier.bias, classifier.weight" in lines[0]
    assert torch.equal(loaded.transform.dense.weight, model.transform.dense.weight)
    edit(tmp_path, lambda t: t.update(klassifier=torch.ones(1)))
    with pytest.raises(CheckpointError, match=r"klassifier: not part of the model"):
        load_model(tmp_path)


# -- repeated tensors -----------------------------------------------------------------------------------------------


def test_a_repeated_tensor_may_stand_alone(tmp_path: Path) -> None:
    """Writers that store one of two equal tensors may choose the other one."""
    model = saved(tmp_path, llama())
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(load_model(tmp_path).embedding.weight, model.embedding.weight)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_a_repeated_tensor_must_be_equal_to_the_last_value(tmp_path: Path, kind: torch.dtype) -> None:
    saved(tmp_path, llama(vocab_size=50_000, n_layers=1))  # more than is compared at once

    def repeat(tensors: Tensors, change: float = 0.0) -> None:
        table = tensors["model.embed_tokens.weight"].half().to(kind)
        tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = table, table.float().clone()
        tensors["lm_head.weight"][-1, -1] += change

    edit(tmp_path, repeat)
    load_model(tmp_path)
    edit(tmp_path, lambda t: repeat(t, 1.0))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_model(tmp_path)


def test_an_untied_head_is_no_copy(tmp_path: Path) -> None:
    model = saved(tmp_path, llama(tie_embeddings=False))
    assert torch.equal(load_model(tmp_path).head.weight, model.head.weight)
    edit(tmp_path, lambda t: t.pop("model.embed_tokens.weight"))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: missing"):
        load_model(tmp_path)


# -- memory ---------------------------------------------------------------------------------------------------------


def test_names_are_checked_before_anything_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, llama())
    edit(tmp_path, lambda t: (t.pop("model.norm.weight"), t.update(extra=torch.ones(1))))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("memory was asked for")

    monkeypatch.setattr(torch.nn.Module, "to_empty", never)
    with pytest.raises(CheckpointError, match="missing"):
        load_model(tmp_path)


def test_memory_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, llama())

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(torch.nn.Module, "to_empty", full)
    with pytest.raises(MemoryBudgetError, match=r"needs 0\.0 GB on cpu") as caught:
        load_model(tmp_path)
    assert caught.value.where == str(tmp_path)


PEAKS = """
import sys
from pathlib import Path
import torch
from llmkit.models.hf import load_model, save_model
from tests.bench.load_memory import status
torch.set_num_threads(1)
small, large = Path(sys.argv[1]), Path(sys.argv[2])
model = load_model(small)
save_model(model, small / "copy")
del model
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = load_model(large)
loaded = status("VmHWM") - before
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
save_model(model, large / "copy")
written = status("VmHWM") - before
weights = sum(p.nbytes for p in model.parameters())
largest = max(p.nbytes for p in model.parameters())
print(weights, largest, loaded, written)
"""
SLACK = 16e6  # what the allocator keeps, and the pages of code that is new


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's high-water mark")
def test_the_peak_is_the_model_and_one_tensor(tmp_path: Path) -> None:
    """50 MB of weights in 12 blocks: mapped files or a second copy would show as another 50 MB."""
    saved(tmp_path / "small", llama())
    sizes = {"d_model": 256, "d_ff": 1024, "n_layers": 12, "vocab_size": 1000}
    save_model(built(llama(**sizes, position="rotary", n_heads=4)), tmp_path / "large")
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", PEAKS, str(tmp_path / "small"), str(tmp_path / "large")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    weights, largest, loaded, written = map(int, result.stdout.split())
    assert weights > 45e6
    assert loaded < weights + largest + SLACK
    assert written < largest + SLACK
    assert json.loads((tmp_path / "large" / "copy" / "config.json").read_text())["num_hidden_layers"] == 12
