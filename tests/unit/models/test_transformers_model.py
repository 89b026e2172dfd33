"""Models of transformers in llmkit: the same numbers as the library's own, documents apart, files that come back."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmkit.errors import CheckpointError, ConfigError
from llmkit.generation import generate
from llmkit.interfaces import NO_DOCUMENT, Tokens
from llmkit.models.hf import load_config, load_model, save_model
from llmkit.models.resize import resize_embeddings
from llmkit.models.transformers_config import TransformersConfig
from llmkit.objectives.causal_lm import CausalLM
from tests.unit.byte_tokenizer import ByteTokenizer
from tests.unit.generation_settings import GREEDY
from tests.unit.models.wrapped import (
    ALL,
    BOS,
    DECODERS,
    ENCODERS,
    EOS,
    LENGTH,
    PAD,
    SEQ2SEQS,
    V,
    alone,
    built,
    config,
    ids_of,
    packed_batch,
)

pytest.importorskip("transformers", reason="extra hf")

all_models = pytest.mark.parametrize("config", ALL.values(), ids=ALL)
decoders = pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)
seq2seqs = pytest.mark.parametrize("config", SEQ2SEQS.values(), ids=SEQ2SEQS)
OBJECTIVE = CausalLM(label_smoothing=0.0, z_loss=0.0, chunk_size=7)
NEO, DISTILBERT = DECODERS["windows"], ENCODERS["transform"]


# -- numbers --------------------------------------------------------------------------------------------------------


@all_models
def test_loss_and_gradients_are_those_of_the_library(config: TransformersConfig) -> None:
    """Packed rows through the chunked loss, against the module itself on every document alone."""
    model, batch = built(config), packed_batch(config)
    loss = OBJECTIVE.loss(model, batch).losses["token"]
    loss.backward()  # type: ignore[no-untyped-call]
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    expected = torch.zeros(())
    assert batch.document_ids is not None
    for (row, number), logits in alone(model, batch).items():
        expected = expected + F.cross_entropy(
            logits, batch.labels[row][batch.document_ids[row] == number], reduction="sum"
        )
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-6)
    for name, parameter in model.named_parameters():
        theirs = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found = torch.zeros_like(parameter) if ours[name] is None else ours[name]
        torch.testing.assert_close(found, theirs, atol=1e-4, rtol=1e-4, msg=name)


@all_models
def test_documents_do_not_know_one_another(config: TransformersConfig) -> None:
    """Another text in one document, on both sides, changes no bit of the others'."""
    model, batch = built(config), packed_batch(config)
    assert batch.document_ids is not None
    other = packed_batch(config, seed=9)
    changed = batch.document_ids == 2
    mixed = torch.where(changed, other.input_ids, batch.input_ids)
    source = None
    if batch.source is not None and other.source is not None and batch.source.document_ids is not None:
        ids = torch.where(batch.source.document_ids == 2, other.source.input_ids, batch.source.input_ids)
        source = replace(batch.source, input_ids=ids)
    with torch.no_grad():
        before = model.hidden_states(batch)
        after = model.hidden_states(replace(batch, input_ids=mixed, source=source))
    assert torch.equal(before[~changed], after[~changed])
    assert not torch.equal(before[changed], after[changed])
    assert not before[batch.document_ids == NO_DOCUMENT].any()


@all_models
def test_rows_of_one_document_need_no_document_ids(config: TransformersConfig) -> None:
    model, batch = built(config), packed_batch(config)
    rows = replace(batch, document_ids=None)
    if batch.source is not None:
        rows = replace(rows, source=replace(batch.source, document_ids=None))
    one = replace(rows, document_ids=torch.zeros_like(batch.input_ids))
    torch.testing.assert_close(model.hidden_states(rows), model.hidden_states(one), atol=0, rtol=0)


@all_models
def test_counts_are_exact(config: TransformersConfig) -> None:
    model = built(config)
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(model.output_weight_VD): model.output_weight_VD}
    in_tables = sum(table.numel() for key, table in tables.items() if key in trained)
    assert config.n_params() == sum(p.numel() for p in trained.values())
    assert config.n_params_without_embeddings() == config.n_params() - in_tables
    assert config.d_model == model.output_weight_VD.shape[1]
    assert config.hf_architecture() == type(model.hf).__name__
    assert config.matmul_params() < config.n_params() + V * config.d_model
    assert config.flops_per_token(32, 16 if config.kind == "encoder_decoder" else 0) > 3 * config.matmul_params()


@all_models
def test_all_that_is_trained_gets_a_gradient(config: TransformersConfig, caplog: pytest.LogCaptureFixture) -> None:
    """An optimizer has a state for every parameter; what nothing depends on is named."""
    model, batch = built(config), packed_batch(config)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with caplog.at_level(logging.INFO, logger="llmkit"):
        model.freeze_unused()
    OBJECTIVE.loss(model, batch).losses["token"].backward()  # type: ignore[no-untyped-call]
    frozen = {name for name, parameter in model.named_parameters() if parameter.requires_grad != before[name]}
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert frozen == ({"hf.fnet.pooler.dense.weight", "hf.fnet.pooler.dense.bias"} if "fnet" in str(config) else set())
    assert ("fnet.pooler.dense.bias" in caplog.text) == bool(frozen)


def test_activation_checkpointing_changes_no_number() -> None:
    model, batch = built(NEO), packed_batch(NEO)
    model.train()

    def gradients() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        OBJECTIVE.loss(model, batch).losses["token"].backward()  # type: ignore[no-untyped-call]
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.set_activation_checkpointing(True)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert all(map(torch.equal, plain, gradients()))


def test_compiled_are_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    built(NEO).compile_blocks()
    assert compiled == ["GPTNeoBlock"] * 2


# -- weights --------------------------------------------------------------------------------------------------------


def test_the_seed_decides_the_weights_and_nothing_else_is_drawn() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = NEO.build(), NEO.build(), NEO.build()
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        model.init_weights(seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not torch.equal(first.output_weight_VD, other.output_weight_VD)


def test_special_ids_reach_the_architecture() -> None:
    made = built(SEQ2SEQS["sinusoids"]).hf.config
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id, made.decoder_start_token_id) == (0, 1, 2, 2)
    plain = replace(DECODERS["positions from the mask"], settings={"word_embed_proj_dim": 8})
    assert plain.with_special_ids(None, 3, 3).settings["pad_token_id"] is None
    assert config("causal_lm", "opt", pad_token_id=7).settings["pad_token_id"] == 7


def test_a_position_table_has_room_for_the_rows_it_loses() -> None:
    model = built(ENCODERS["lost positions"])
    assert model.hf.config.max_position_embeddings == LENGTH + 2
    assert model(ids_of(1, LENGTH, 0)).shape == (1, LENGTH, V)
    with pytest.raises(ConfigError, match="do not fit"):
        model(ids_of(1, LENGTH + 1, 0))


@all_models
def test_saved_models_come_back(config: TransformersConfig, tmp_path: Path) -> None:
    """Every bit, for llmkit and for transformers, and once more after that."""
    import transformers

    model, batch = built(config), packed_batch(config)
    save_model(model, tmp_path, bos_id=BOS, eos_id=EOS, pad_id=PAD)
    again = load_model(tmp_path)
    assert again.training
    assert again.config == load_config(tmp_path)
    assert again.config.max_seq_len == LENGTH
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in again.named_parameters()} == flags
    assert torch.equal(again.eval().hidden_states(batch), model.hidden_states(batch))
    save_model(again, tmp_path / "again", bos_id=BOS, eos_id=EOS, pad_id=PAD)
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    theirs = getattr(transformers, type(model.hf).__name__).from_pretrained(tmp_path)
    for name, value in model.hf.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    assert config.kind == "encoder" or theirs.generation_config.eos_token_id == EOS


def test_shards_and_narrow_types(tmp_path: Path) -> None:
    model = built(NEO)
    save_model(model, tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    narrow = load_model(tmp_path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(narrow.named_parameters())[name], parameter.bfloat16()), name
    assert narrow(ids_of(1, 4, 0)).dtype == torch.bfloat16


@pytest.mark.parametrize("config", [NEO, DISTILBERT, SEQ2SEQS["sinusoids"]], ids=["decoder", "encoder", "seq2seq"])
def test_a_grown_vocabulary(config: TransformersConfig, tmp_path: Path) -> None:
    """New rows are the mean of the known ones, old logits stay, and the files know the new size."""
    model, batch = built(config), packed_batch(config)
    old = model._logits(model.hidden_states(batch))
    mean = model.output_weight_VD[:50].mean(0)
    resize_embeddings(model, 70, known=50)
    assert model.config.vocab_rows == 70
    new = model._logits(model.eval().hidden_states(batch))
    assert new.shape[-1] == 70
    if not (batch.input_ids >= 50).any():
        torch.testing.assert_close(new[..., :50], old[..., :50])
    torch.testing.assert_close(model.output_weight_VD[50:], mean.expand(20, -1))
    save_model(model, tmp_path)
    assert load_model(tmp_path).config.vocab_rows == 70


# -- generation -----------------------------------------------------------------------------------------------------


@decoders
def test_greedy_tokens_are_those_of_the_library(config: TransformersConfig) -> None:
    """64 steps with the cache, and logits as without it."""
    model, ids = built(config), ids_of(1, 7, 3)
    expected = model.hf.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
        pad_token_id=PAD,
    )
    cache, given, found = model.new_cache(1, 71), ids, ids
    with torch.no_grad():
        for _ in range(64):
            logits = model(given, None, None, cache, last_only=True)
            logits[..., EOS] = float("-inf")  # as min_new_tokens does
            given = logits[:, -1].argmax(-1)[:, None]
            found = torch.cat((found, given), dim=1)
        assert torch.equal(found, expected)
        torch.testing.assert_close(model(found[:, :-1])[:, -1, 5:], logits[:, -1, 5:], atol=2e-5, rtol=1e-4)


@seq2seqs
def test_greedy_targets_are_those_of_the_library(config: TransformersConfig) -> None:
    model, ids = built(config), ids_of(2, 9, 3)
    documents = torch.zeros_like(ids)
    documents[0, 6:] = NO_DOCUMENT
    source = Tokens(ids, torch.zeros_like(ids), documents)
    expected = model.hf.generate(
        ids, attention_mask=(documents == 0).long(), max_new_tokens=64, min_new_tokens=64, do_sample=False, num_beams=1,
        decoder_start_token_id=PAD, forced_eos_token_id=None,
    )  # fmt: skip
    with torch.no_grad():
        memory = model.encode(source)
        cache, given = model.new_cache(memory, 65), torch.full((2, 1), PAD)
        found = given
        for _ in range(64):
            logits = model.decode(memory, given, None, None, cache, last_only=True)
            logits[..., EOS] = float("-inf")
            given = logits[:, -1].argmax(-1)[:, None]
            found = torch.cat((found, given), dim=1)
        assert torch.equal(found, expected)
        torch.testing.assert_close(
            model.decode(memory, found[:, :-1])[:, -1, 5:], logits[:, -1, 5:], atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize("config", [DECODERS["windows"], DECODERS["no mask, own state"]], ids=["mask", "no mask"])
def test_prompts_of_a_batch_do_not_know_one_another(config: TransformersConfig) -> None:
    model = built(replace(config, vocab_size=259))
    settings = replace(GREEDY, max_new_tokens=12, temperature=0.8, seed=1)
    prompts, tokenizer = ["some", "words", "b", "more"], ByteTokenizer()
    together = generate(model, tokenizer, prompts, settings, device="cpu")  # type: ignore[arg-type]
    assert together == [
        generate(model, tokenizer, [prompt], settings, device="cpu")[0]  # type: ignore[arg-type]
        for prompt in prompts
    ]
    slow = replace(settings, use_cache=False)
    assert together == generate(model, tokenizer, prompts, slow, device="cpu")  # type: ignore[arg-type]


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "what"),
    {
        "a misspelt setting": (config("causal_lm", "gpt_neo", num_layer=2), "did you mean num_layers"),
        "no such architecture": (config("causal_lm", "gpt_neon"), "gpt_neon"),
        "not for this task": (config("causal_lm", "distilbert"), "AutoModelForCausalLM"),
        "a contradiction": (config("causal_lm", "gpt_neo", num_layers=3), "num_layers"),
        "a wrong type": (config("causal_lm", "opt", hidden_size="x"), "hidden_size"),
        "too few positions": (config("causal_lm", "opt", max_position_embeddings=8), "longer than the 8 positions"),
        "no architecture": (replace(NEO, model_type=None), "which architecture"),
    }.values(),
)
def test_mistakes_are_named(wrong: TransformersConfig, what: str) -> None:
    with pytest.raises(ConfigError) as error:
        wrong.with_vocab(60).build()
    assert what in str(error.value)


def test_problems() -> None:
    assert NEO.problems() == []
    bad = replace(NEO, vocab_size=0, max_seq_len=0, settings={"vocab_size": 3, "auto_map": {}})
    assert [name for name, _ in bad.problems()] == ["vocab_size", "max_seq_len", "settings", "settings"]


class Ending(nn.Module):
    """A model whose logits end in some function."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.end = nn.Linear(4, 11), end

    def forward(self, input_ids: Tensor) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.end(self.head(torch.zeros(*input_ids.shape, 4))))


def test_what_comes_after_the_output_matrix_is_measured() -> None:
    from llmkit.models.transformers_tail import measure_tail

    def tail(end: Callable[[Tensor], Tensor]) -> Any:
        model = Ending(end)
        return measure_tail(model, model.head, {"input_ids": torch.zeros(1, 2, dtype=torch.int64)})

    shift = torch.arange(11.0)
    assert tail(lambda x: x) == ((1.0, None), None)
    assert tail(lambda x: x / 8)[0] == (0.125, None)
    assert tail(lambda x: 30 * torch.tanh(x / 30))[0] == (1.0, pytest.approx(30))
    scale_and_shift, bias = tail(lambda x: x * 2 + shift)
    assert scale_and_shift == (2.0, None)
    assert torch.equal(bias, shift)
    for odd in (torch.square, torch.sigmoid, lambda x: x.log_softmax(-1), lambda x: 5 * torch.tanh(x / 5) + shift):
        with pytest.raises(ConfigError, match="after its output matrix"):
            tail(odd)


# -- files of others ------------------------------------------------------------------------------------------------


def saved(config: TransformersConfig, folder: Path, **changes: Any) -> Path:
    """A folder with some keys of config.json changed, or taken out where they are None."""
    save_model(built(config), folder, bos_id=BOS, eos_id=EOS, pad_id=PAD)
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))
    return folder


def chosen(task: str) -> TransformersConfig:
    return TransformersConfig(task, None, {}, None, 77)  # type: ignore[arg-type]


def test_a_folder_that_llmkit_has_no_table_of(tmp_path: Path) -> None:
    neo = saved(NEO, tmp_path / "neo", llmkit=None)
    with pytest.raises(CheckpointError) as error:
        load_model(neo)
    assert "model=transformers" in error.value.fix
    model = chosen("causal_lm").load(neo, seed=0)
    assert model.config.max_seq_len == LENGTH
    batch = packed_batch(NEO)
    assert torch.equal(model.eval().hidden_states(batch), built(NEO).hidden_states(batch))
    with pytest.raises(CheckpointError, match="AutoModelForMaskedLM"):
        chosen("masked_lm").load(neo, seed=0)
    mamba = saved(DECODERS["no attention"], tmp_path / "mamba", llmkit=None)
    assert chosen("causal_lm").opened(mamba).max_seq_len == 77


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
        {"transformers_weights": "../other.safetensors"},
        {"fusion_config": {"x": True}},
        {"torch_dtype": "evil"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_keys_that_name_code_or_files_are_not_followed(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(NEO, tmp_path / "neo", **changes)
    for place in (folder, folder / "custom_generate"):
        place.mkdir(exist_ok=True)
        for name in ("evil.py", "generate.py"):
            (place / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    batch = packed_batch(NEO)
    assert torch.equal(load_model(folder).eval().hidden_states(batch), built(NEO).hidden_states(batch))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": [1]}, "model_type"),
        ({"num_layers": 10**9}, "absurdly large"),
        ({"hidden_size": 10**7}, "parameters"),
        ({"vocab_size": "x"}, "vocab_size"),
        ({"max_position_embeddings": 10**12}, "gpt_neo"),
        ({"max_position_embeddings": 200_000, "hidden_size": 16}, "parameters"),
        ({"llmkit": {"transformers": "chat", "max_seq_len": 4}}, "must be one of"),
        ({"llmkit": {"transformers": "causal_lm", "max_seq_len": 0}}, "at least 1"),
        ({"llmkit": {"transformers": "causal_lm", "max_seq_len": 4000}}, "longer than"),
    ],
)
def test_bad_configs(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        load_model(saved(NEO, tmp_path, **changes))
    assert what in str(error.value)


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NORM, TABLE = "transformer.h.0.ln_1.weight", "transformer.wpe.weight"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop(NORM), f"{NORM}: missing"),
        (lambda t: t.update({"transformer.h.7.x": torch.zeros(2)}), "transformer.h.7.x: not part"),
        (lambda t: t.update({TABLE: torch.zeros(5, 16)}), rf"{TABLE} has the shape \(5, 16\)"),
        (lambda t: t.update({TABLE: torch.full((LENGTH, 16), float("nan"))}), "not finite"),
        (lambda t: t.update({TABLE: torch.zeros(LENGTH, 16, dtype=torch.int64)}), "I64"),
    ],
    ids=["missing", "extra", "shape", "nan", "integers"],
)
def test_bad_weights(change: Callable[[dict[str, Tensor]], object], what: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=what):
        load_model(rewritten(saved(NEO, tmp_path), change))


def test_a_new_head_is_announced_and_drawn_from_the_seed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = rewritten(
        saved(DISTILBERT, tmp_path), lambda t: [t.pop(name) for name in list(t) if not name.startswith("distilbert.")]
    )
    with caplog.at_level(logging.WARNING, logger="llmkit"):
        first, again, other = (load_model(folder, seed=seed) for seed in (1, 1, 2))
    assert "the head is not in the files" in caplog.text
    assert "vocab_transform.weight" in caplog.text
    assert torch.equal(first.hf.vocab_transform.weight, again.hf.vocab_transform.weight)
    assert not torch.equal(first.hf.vocab_transform.weight, other.hf.vocab_transform.weight)


def test_tensors_of_other_heads_are_left_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = rewritten(saved(NEO, tmp_path), lambda t: t.update({"score.weight": torch.zeros(2, 16)}))
    with caplog.at_level(logging.INFO, logger="llmkit"):
        load_model(folder)
    assert "left aside: score.weight" in caplog.text
