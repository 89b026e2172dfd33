"""Model folders that are broken or hostile: a typed error naming the fault, nothing run, nothing large allocated."""

from __future__ import annotations

import json
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmkit.errors import CheckpointError, LLMKitError
from llmkit.models.head_config import HeadConfig
from llmkit.models.heads import attach_head
from llmkit.models.hf import load_model, save_model
from llmkit.models.hf.weight_files import MAX_HEADER_BYTES
from llmkit.safe_files import MAX_BYTES
from tests.unit.models.test_encoder_config import bert, modern
from tests.unit.models.tiny import built, gpt2, llama
from tests.unit.models.tiny_seq2seq import bart, marian, t5

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"
Header = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(built(llama()), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_model(built(llama()), tmp_path / "model", max_shard_bytes=20_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


def refused(folder: Path, message: str) -> CheckpointError:
    """The error, which must come at once: nothing was built or read that is out of proportion."""
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert time.perf_counter() - begin < 5
    assert str(folder) in caught.value.where
    return caught.value


def parts(path: Path) -> tuple[Header, bytes]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def write(path: Path, header: Header | bytes, values: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- the layout of a file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 500, -4000, -1])
def test_a_truncated_file(folder: Path, kept: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, "not a readable safetensors file")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 100_000_001, MAX_HEADER_BYTES + 1, 0, 1])
def test_a_header_that_lies_about_its_length(folder: Path, length: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(folder, "not a readable safetensors file")


@pytest.mark.parametrize("text", [b"[" * 1_000_000, b'{"a":' * 1_000_000, b"{" + b" " * 9_000_000, b"\xff" * 64, b"7"])
def test_a_header_bomb(folder: Path, text: bytes) -> None:
    write(folder / WEIGHTS, text, b"")
    refused(folder, "not a readable safetensors file")


def test_a_header_over_the_limit_is_not_read(folder: Path) -> None:
    """The file is sparse: 30 MB of header that the format allows."""
    with (folder / WEIGHTS).open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 9)
    refused(folder, f"header claims {MAX_HEADER_BYTES + 1} bytes")


def overlap(header: Header) -> None:
    header[UP]["data_offsets"] = header["model.layers.0.mlp.up_proj.weight"]["data_offsets"]


def shift(header: Header) -> None:
    """Half of one tensor over the next."""
    header[UP]["data_offsets"] = [place - 64 for place in header[UP]["data_offsets"]]


@pytest.mark.parametrize(
    "change",
    [
        overlap,
        shift,
        lambda h: h[UP].update(data_offsets=[0, 2**62]),
        lambda h: h[UP].update(data_offsets=[-4096, 2048]),
        lambda h: h[UP].update(data_offsets=h[UP]["data_offsets"][::-1]),
        lambda h: h[UP].update(data_offsets=[0]),
        lambda h: h[UP].update(shape=[2**40, 2**40]),
        lambda h: h[UP].update(shape=[-64, 24]),
        lambda h: h[UP].update(shape=[1, 1]),
        lambda h: h[UP].update(shape="64"),
        lambda h: h[UP].update(dtype="F32 "),
        lambda h: h[UP].pop("dtype"),
        lambda h: h.update({UP: None}),
        lambda h: h.pop(UP),  # a gap
        lambda h: h.update({"n" * 400: h.pop(UP)}),
        lambda h: h.update({"a\x1b[2J": h.pop(UP)}),  # would clear the screen
    ],
)
def test_a_layout_that_is_wrong(folder: Path, change: Callable[[Header], object]) -> None:
    header, values = parts(folder / WEIGHTS)
    change(header)
    write(folder / WEIGHTS, header, values)
    assert "\x1b" not in str(refused(folder, "not a readable safetensors file"))


def test_a_name_twice_in_a_header(folder: Path) -> None:
    header, values = parts(folder / WEIGHTS)
    text = json.dumps(header)
    write(folder / WEIGHTS, (text[:-1] + f', "{UP}": {json.dumps(header[UP])}}}').encode(), values)
    refused(folder, "not a readable safetensors file")


def test_bytes_after_the_last_tensor(folder: Path) -> None:
    header, values = parts(folder / WEIGHTS)
    write(folder / WEIGHTS, header, values + b"\0" * 64)
    refused(folder, "not a readable safetensors file")


def test_a_file_that_shrinks_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit.models.hf import load

    def cut(*arguments: Any, **named: Any) -> Any:
        os.truncate(folder / WEIGHTS, 4000)
        return original(*arguments, **named)

    original = load._check_names
    monkeypatch.setattr(load, "_check_names", cut)
    refused(folder, "became shorter")


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        (torch.int8, "I8"),
        (torch.int32, "I32"),
        (torch.int64, "I64"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.complex64, "C64"),
    ],
)
def test_a_type_that_is_no_weight(folder: Path, kind: torch.dtype, shown: str) -> None:
    edit_tensors(folder, lambda t: t.update({UP: t[UP].to(kind)}))
    error = refused(folder, f"tensor {UP} has the type {shown}; llmkit reads F64, F32, F16, BF16")
    assert error.where == f"{folder / WEIGHTS}:{UP}"


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_weight_that_is_not_finite(folder: Path, kind: torch.dtype, value: str, place: int) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[UP] = tensors[UP].to(kind)
        tensors[UP].view(-1)[place] = float(value)

    edit_tensors(folder, spoil)
    refused(folder, f"tensor {UP} holds values that are not finite")


def test_a_value_beyond_the_type_it_is_loaded_as(folder: Path) -> None:
    edit_tensors(folder, lambda t: t[NORM].fill_(1e6))
    load_model(folder)
    load_model(folder, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=rf"{NORM} has values too large for torch\.float16"):
        load_model(folder, dtype=torch.float16)
    edit_tensors(folder, lambda t: t.update({NORM: torch.full((24,), 1e300, dtype=torch.float64)}))
    refused(folder, rf"{NORM} has values too large for torch\.float32")


# -- pickles --------------------------------------------------------------------------------------------------------


def bomb(marker: Path) -> bytes:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    return pickle.dumps(Bomb())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.pth", "last.ckpt"])
def test_a_pickle_is_never_opened(folder: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    (folder / name).write_bytes(bomb(marker))
    load_model(folder)  # the safetensors file beside it
    (folder / WEIGHTS).unlink()
    assert "save_pretrained" in refused(folder, "can run code when read").fix
    assert not marker.exists()


def test_a_pickle_under_another_name(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (folder / WEIGHTS).write_bytes(bomb(marker))
    refused(folder, "not a readable safetensors file")
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(bomb(marker))
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: "pytorch_model.bin"}}))
    refused(folder, r"'pytorch_model\.bin' is not a safetensors file")
    assert not marker.exists()


# -- links and places -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_link_that_leaves_the_folder(folder: Path, name: str) -> None:
    outside = folder.parent / f"secret-{name}"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert "copy the file" in refused(folder, f"{name} is a link that leaves the folder").fix
    (folder / name).unlink()
    (folder / name).symlink_to(f"../secret-{name}")
    refused(folder, "leaves the folder")


def test_a_linked_shard_that_leaves_the_folder(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.rename(sharded.parent / "elsewhere.safetensors")
    shard.symlink_to(sharded.parent / "elsewhere.safetensors")
    refused(sharded, f"{shard.name} is a link that leaves the folder")


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_a_hub_cache_is_read_through_its_links(tmp_path: Path, max_shard_bytes: int) -> None:
    cache = tmp_path / "models--owner--name"
    revision, blobs = cache / "snapshots" / "abc123", cache / "blobs"
    model = built(llama())
    save_model(model, revision, max_shard_bytes=max_shard_bytes)
    blobs.mkdir()
    for number, path in enumerate(sorted(revision.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert torch.equal(load_model(revision).norm.weight, model.norm.weight)
    (tmp_path / "through").symlink_to(revision)
    assert torch.equal(load_model(tmp_path / "through").norm.weight, model.norm.weight)


@pytest.mark.parametrize("target", ["private/0", "other/blobs/0", "models--a--b/private/0", "blobs/more/0"])
def test_only_the_blobs_of_a_cache_may_be_linked(tmp_path: Path, target: str) -> None:
    revision = tmp_path / "snapshots" / "abc123"
    save_model(built(llama()), revision)
    (tmp_path / target).parent.mkdir(parents=True)
    (revision / WEIGHTS).rename(tmp_path / target)
    (revision / WEIGHTS).symlink_to(f"../../{target}")
    refused(revision, "leaves the folder")


def test_a_link_inside_the_folder_is_fine(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "copy.safetensors")
    (folder / WEIGHTS).symlink_to("copy.safetensors")
    load_model(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
@pytest.mark.parametrize("kind", ["loop", "dangling", "pipe", "folder"])
def test_what_is_no_file(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)  # reading it would wait for ever
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name if kind == "loop" else "nothing")
    refused(folder, name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../model/model-00001.safetensors", "outside of the folder"),
        ("..", "not a safetensors file"),
        ("a/../../b.safetensors", "outside of the folder"),
        ("..\\b.safetensors", "outside of the folder"),
        ("b\0.safetensors", "outside of the folder"),
        ("", "not a safetensors file"),
        ("none.safetensors", "is missing"),
        (7, "must name a file"),
    ],
)
def test_an_index_that_points_elsewhere(sharded: Path, name: Any, message: str) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][NORM] = name
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, message)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": []}', '{"weight_map":' * 100_000])
def test_a_broken_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, "weight_map|cannot be read|must hold an object")


def test_an_index_names_a_tensor_that_its_shard_lacks(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    places = index["weight_map"]
    places[NORM] = next(name for name in places.values() if name != places[NORM])
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, rf"tensor {NORM} is not in {places[NORM]}, where the index has it")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    places = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = sharded / next(name for name in places.values() if name != places[NORM])
    tensors = load_file(other) | {NORM: torch.ones(24)}
    other.unlink()
    save_file(tensors, other)
    refused(sharded, f"tensor {NORM} is in model-")


def test_two_names_of_one_tensor(tmp_path: Path) -> None:
    """BERT's first files call the weights of norms gamma."""
    save_model(random_model(bert()), tmp_path)
    name = "bert.embeddings.LayerNorm.weight"
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    save_file(tensors | {name.replace("weight", "gamma"): tensors[name].clone()}, tmp_path / WEIGHTS)
    refused(tmp_path, "are the same one")


# -- config.json ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 2**20, "head_dim": 2**18, "num_hidden_layers": 1000}, "asks for .* parameters, the weights"),
        ({"vocab_size": 10**12}, "asks for 24,000,"),
        ({"intermediate_size": 10**30}, "asks for"),
        ({"num_hidden_layers": 99_999}, "asks for"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is above"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers is above"),
        ({"num_hidden_layers": -1}, "n_layers must be at least 1"),
        ({"rms_norm_eps": 10**400}, "makes no sense|number"),
        ({"rms_norm_eps": float("inf")}, "norm_eps is inf|finite"),
        ({"rms_norm_eps": float("nan")}, "norm_eps"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": {}}, "model_type"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_a_config_that_asks_for_too_much(folder: Path, changes: Header, message: str) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    content.pop("llmkit")
    (folder / "config.json").write_text(json.dumps(content))
    refused(folder, message)


@pytest.mark.parametrize("value", [10**9, 10**400])
def test_our_own_key_cannot_ask_for_more(tmp_path: Path, value: int) -> None:
    save_model(built(gpt2(norm="rmsnorm", norm_bias=False)), tmp_path)
    key = json.loads((tmp_path / "config.json").read_text())["llmkit"]
    edit_json(tmp_path / "config.json", llmkit=key | {"d_ff": value})
    refused(tmp_path, "asks for")
    edit_json(tmp_path / "config.json", llmkit=key | {"n_layers": value})
    refused(tmp_path, "n_layers is above")


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"a":' * 200_000, '{"hidden_size": 1e999', "9" * 5000, '{"n": ' + "9" * 5000 + "}", "\ufeff{}"],
)
def test_a_config_that_strains_the_reader(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    refused(folder, r"config\.json")


def test_a_config_of_gigabytes_is_not_read(folder: Path) -> None:
    os.truncate(folder / "config.json", MAX_BYTES + 1)
    refused(folder, "more than")


# -- anything -------------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 10**30, 10**400, 0.5, -1e300, float("inf"), float("nan")),
    *("", "x", "gelu", "\0", [], [1], ["x"], {}, {"a": 1}, {"rope_type": "yarn"}, [[[]]]),
)


def mutated_config(rng: random.Random, text: str) -> bytes:
    """One or two keys, at the top or in our own part, with another value."""
    content = json.loads(text)
    for _ in range(rng.randint(1, 2)):
        place = content["llmkit"] if rng.random() < 0.4 else content
        place[rng.choice(sorted(place))] = rng.choice(VALUES)
        if not isinstance(content["llmkit"], dict) or not content["llmkit"]:
            break
    if rng.random() < 0.3:
        content.pop("llmkit")
    return json.dumps(content).encode()


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes changed, most of them in the header; cut off; or a piece copied elsewhere."""
    changed = bytearray(content)
    reach = len(content) if rng.random() < 0.2 else 8 + int.from_bytes(content[:8], "little")
    how = rng.randrange(4)
    if how == 0:
        return bytes(changed[: rng.randrange(len(changed))])
    if how == 1:
        start, stop = sorted(rng.randrange(reach) for _ in range(2))
        changed[rng.randrange(reach) :] = changed[start:stop]
        return bytes(changed)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(reach)] = rng.choice(
            (0, 32, 34, 44, 45, 48, 57, 91, 93, 123, 125, 255, rng.randrange(256))
        )
    return bytes(changed)


def random_model(config: Any) -> Any:
    model = config.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    return model


def survives(folder: Path) -> bool:
    """Whether the folder opens; then everything in the model is finite. Any error must be one of ours."""
    try:
        model = load_model(folder)
    except LLMKitError:
        return False
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


FUZZED = {
    **{"llama": llama(), "gpt2": gpt2(), "gpt_neox": gpt2(position="rotary", rope_theta=1e4, parallel_residual=True)},
    **{"qwen3": llama(qk_norm="head"), "olmo2": llama(qk_norm="all", norm_position="post")},
    **{"mistral": llama(attention_windows=(8,)), "bert": bert(), "electra": bert(d_embedding=16, pooler=False)},
    **{"modernbert": modern(), "bart": bart(), "marian": marian(), "t5": t5()},
}


def fuzz(tmp_path: Path, n: int, seed: int, head: HeadConfig | None = None) -> int:
    """``n`` mutations of weights and configs of many families; the number that was refused."""
    rng, n_refused = random.Random(seed), 0
    for name, config in FUZZED.items():
        folder, model = tmp_path / name, random_model(config)
        if head is not None:
            attach_head(model, head, seed=0)
        save_model(model, folder)
        whole = {file: (folder / file).read_bytes() for file in ("config.json", WEIGHTS)}
        for _ in range(n // len(FUZZED)):
            file = rng.choice(sorted(whole))
            content = whole[file]
            new = mutated_config(rng, content.decode()) if file == "config.json" else mutated_bytes(rng, content)
            (folder / file).write_bytes(new)
            n_refused += not survives(folder)
            (folder / file).write_bytes(content)
        assert survives(folder)
    return n_refused


def test_mutated_folders_give_typed_errors(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 300, seed=0) > 150


def test_mutated_folders_with_a_task_head_give_typed_errors(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 100, seed=2, head=HeadConfig("class", ("bad", "good"))) > 40


@pytest.mark.slow
def test_many_mutated_folders_give_typed_errors(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 4_000, seed=1) > 2_000
