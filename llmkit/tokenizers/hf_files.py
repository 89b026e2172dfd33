"""Writes a SentencePiece model as ``tokenizer.json`` and ``tokenizer_config.json``, without any Hugging Face package.

``transformers`` then makes the same ids (``tests/parity/test_tokenizers.py``), whatever the model type of the folder.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.safe_files import read_bytes
from llmkit.tokenizers.ends import around
from llmkit.tokenizers.vocabulary import MASK_NAMES, SPACE, stands_for_text

logger = logging.getLogger("llmkit.tokenizers")

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
MAX_TEMPLATE_BYTES = 1_000_000  # long ones have 20,000
FORMAT_KEY = "llmkit_format"  # in CONFIG_FILE: which of the kinds that llmkit trains this is
BEGINS_KEY = "add_bos_token"  # in CONFIG_FILE: whether a text begins with the begin symbol
SENTENCEPIECE, WORDPIECE = "sentencepiece", "wordpiece"  # tokenizer.model decides the ids of the first
_NEVER = -1e6  # the score of a piece that Unigram must not take from text; special tokens are found before it runs
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # piece types of sentencepiece_model.proto
_KINDS = {1: "Unigram", 2: "BPE"}  # model types of sentencepiece_model.proto


@dataclass(frozen=True)
class ModelProto:
    """What decides the ids of a SentencePiece model."""

    kind: str
    pieces: list[tuple[str, float, int]]  # text, score, type
    dummy_prefix: bool
    convertible: bool  # tokenizer.json can say the same
    byte_fallback: bool
    ids: dict[str, int]  # unk, bos, eos, pad; absent ones are left out
    complete: bool  # a file cut between two pieces is still a model to the library
    lossy: bool  # text changes on the way, by design
    space_after: bool  # the sign of a space ends a word instead of beginning one
    charsmap: bytes = b""  # a compiled normalisation of characters, as SentencePiece and tokenizers both run it
    trims: bool = False  # spaces at the ends go, runs of them become one

    @classmethod
    def parse(cls, model: bytes) -> ModelProto:
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
        ids = {name: getattr(trainer, f"{name}_id") for name in ("unk", "bos", "eos", "pad")}
        plain = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
        return cls(
            kind=_KINDS.get(trainer.model_type, "other"),
            pieces=[(piece.piece, piece.score, piece.type) for piece in proto.pieces],
            dummy_prefix=normalizer.add_dummy_prefix,
            convertible=plain and normalizer.escape_whitespaces and trainer.model_type in _KINDS,
            byte_fallback=trainer.byte_fallback,
            ids={name: index for name, index in ids.items() if index >= 0},
            complete=proto.HasField("normalizer_spec"),
            lossy=not plain,
            space_after=trainer.treat_whitespace_as_suffix,
            charsmap=normalizer.precompiled_charsmap,
            trims=normalizer.remove_extra_whitespaces,
        )

    @property
    def words_apart(self) -> bool:
        """Whether no piece spans a character and a space after it: a text can then be encoded in parts."""
        plain = self.convertible and not self.dummy_prefix
        return plain and not any(re.search(f"[^{SPACE}]{SPACE}", piece) for piece, _, _ in self.pieces)

    @property
    def silent_ids(self) -> set[int]:
        """Ids that the library never gives for a text it knows."""
        return {i for i, (_, _, kind) in enumerate(self.pieces) if kind in (_UNKNOWN, _CONTROL, _UNUSED)}

    def symbol(self, name: str) -> str:
        return self.pieces[self.ids[name]][0]

    def named(self, name: str) -> tuple[str, int] | None:
        """Symbol and id of a role, if the model has it."""
        return (self.symbol(name), self.ids[name]) if name in self.ids else None


def write_hf_files(model: ModelProto, folder: Path, kind: str | None = None, *, begins: bool = True) -> None:
    """Into ``folder``, for a model of ``kind``: its rows are what the users of these files make of a text.

    ``begins``: rows begin with the begin symbol, where the model has one.

    A model with a normalisation of its own gets no ``tokenizer.json``, and a warning.
    """
    masks = [name for name in MASK_NAMES if any(piece == name for piece, _, _ in model.pieces)]
    config: dict[str, Any] = {
        FORMAT_KEY: SENTENCEPIECE,
        "tokenizer_class": "PreTrainedTokenizerFast" if model.convertible else "LlamaTokenizer",
        "clean_up_tokenization_spaces": False,
        BEGINS_KEY: begins and "bos" in model.ids,
        "model_max_length": int(1e30),  # as transformers writes "no limit"
        **{f"{name}_token": model.symbol(name) for name in model.ids},
        **({"mask_token": masks[0]} if masks else {}),
    }
    if model.convertible:
        _write(folder / TOKENIZER_FILE, _as_trained(model, kind, begins))
    else:
        logger.warning("this SentencePiece model normalises text; transformers may give other ids than llmkit")
    _write(folder / CONFIG_FILE, config)


def template_files(folder: Path) -> dict[str, bytes]:
    """The chat templates of a folder, by their path in it. Raises ``CheckpointError`` as ``safe_files``."""
    named = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")) if (folder / TEMPLATE_FOLDER).is_dir() else []
    files = [file for file in (folder / TEMPLATE_FILE, *named) if file.is_file()]
    read = (read_bytes(file, folder, max_bytes=MAX_TEMPLATE_BYTES) for file in files)
    return {file.relative_to(folder).as_posix(): data for file, data in zip(files, read, strict=True)}


def write_template_files(files: Mapping[str, bytes], folder: Path) -> None:
    """What ``template_files`` found, in another folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _as_trained(model: ModelProto, kind: str | None, begins: bool) -> dict[str, Any]:
    """``tokenizer_json`` with the ends of a training row, and masks and sentinels that take the space before them.

    In training they stand for pieces such as ``\u2581with``, space included. Where a model puts a space of its own
    before every text, nothing here could keep it from the text after them.
    """
    content, eos = tokenizer_json(model), model.named("eos")
    if eos is not None:
        content["post_processor"] = around(model.named("bos") if begins else None, eos, kind)
    if not model.dummy_prefix and not model.space_after:
        for token in content["added_tokens"]:
            token["lstrip"] = stands_for_text(token["content"])
    return content


def tokenizer_json(model: ModelProto) -> dict[str, Any]:
    """The content of ``tokenizer.json``. Special tokens are recognised inside text there, as its users expect."""
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if model.dummy_prefix else []
    unescape = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.dummy_prefix else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(model),
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, escape]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(model) if model.kind == "BPE" else _unigram(model),
    }


def _added_tokens(model: ModelProto) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": index, "content": piece, **flags, "special": kind != _USER_DEFINED}
        for index, (piece, _, kind) in enumerate(model.pieces)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]


def _unigram(model: ModelProto) -> dict[str, Any]:
    vocab = [[piece, score if kind == _NORMAL else _NEVER] for piece, score, kind in model.pieces]
    return {"type": "Unigram", "unk_id": model.ids.get("unk"), "vocab": vocab, "byte_fallback": model.byte_fallback}


def _bpe(model: ModelProto) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.symbol("unk") if "unk" in model.ids else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece: index for index, (piece, _, _) in enumerate(model.pieces)},
        "merges": _merges(model),
    }


def _merges(model: ModelProto) -> list[list[str]]:
    """Every way to join two pieces into a third, best score first: there scores decide, here the order."""
    normal = {piece: index for index, (piece, _, kind) in enumerate(model.pieces) if kind == _NORMAL}
    ranked = [
        (-model.pieces[index][1], normal[left], normal[right], left, right)
        for piece, index in normal.items()
        for left, right in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        if left in normal and right in normal
    ]
    return [[left, right] for *_, left, right in sorted(ranked)]


def with_control_pieces(model: bytes, names: Sequence[str]) -> bytes:
    """The model with symbols after its pieces; none of them is ever made from text."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for name in names:
        proto.pieces.add(piece=name, score=0.0, type=_CONTROL)
    return bytes(proto.SerializeToString(deterministic=True))


def with_coarse_scores(model: bytes) -> bytes:
    """The model with scores rounded to multiples of 1/256, which moves no probability by more than 0.2 %.

    Sums of them are exact, in SentencePiece's fp32 as in Hugging Face's fp64, so both take the same of two equally
    good Unigram segmentations.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces:
        piece.score = round(piece.score * 256) / 256
    return bytes(proto.SerializeToString(deterministic=True))
