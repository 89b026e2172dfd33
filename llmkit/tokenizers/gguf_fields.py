"""What a GGUF file says of a tokenizer: its kind, pieces, merges, roles and chat templates.

Two kinds can be said: byte-level BPE (``gpt2``), cut in a way that llama.cpp has a name for, and SentencePiece's BPE
(``llama``), where scores decide what is merged. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmkit.errors import ConfigError
from llmkit.gguf_file import SCORES, TOKENS, TYPES, UNUSED
from llmkit.interfaces import Tokenizer
from llmkit.safe_files import read_bytes, read_text
from llmkit.tokenizers.added_tokens import vocabulary_of
from llmkit.tokenizers.chat_template import DEFAULT, ChatTemplate
from llmkit.tokenizers.ends import ends_of
from llmkit.tokenizers.gguf_splits import SPLITS, WHOLE_WORDS, kind_of
from llmkit.tokenizers.hf_files import TOKENIZER_FILE, ModelProto
from llmkit.tokenizers.sentencepiece import MODEL_FILE
from llmkit.tokenizers.vocabulary import SPACE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of pieces, as SentencePiece has them
_GGML = "tokenizer.ggml"
KIND, PRE, MERGES = f"{_GGML}.model", f"{_GGML}.pre", f"{_GGML}.merges"
ADD_BOS, ADD_EOS, ADD_SPACE = f"{_GGML}.add_bos_token", f"{_GGML}.add_eos_token", f"{_GGML}.add_space_prefix"
CHAT, NAMED_CHATS = "tokenizer.chat_template", "tokenizer.chat_templates"
ROLE_KEYS = {
    "bos_token": f"{_GGML}.bos_token_id",
    "eos_token": f"{_GGML}.eos_token_id",
    "unk_token": f"{_GGML}.unknown_token_id",
    "pad_token": f"{_GGML}.padding_token_id",
}
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def gguf_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """The metadata of a GGUF file that holds the tokenizer.

    Raises ``ConfigError`` for one that llama.cpp would run by other rules.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(folder)
        if (folder / MODEL_FILE).is_file():
            fields = _of_model(ModelProto.parse(read_bytes(folder / MODEL_FILE)))
        else:
            content = json.loads(read_text(folder / TOKENIZER_FILE))
            fields = _of_json(content, getattr(tokenizer, "unk_id", None))
    roles = {
        "bos_token": tokenizer.bos_token_id,
        "eos_token": tokenizer.eos_id,
        "unk_token": getattr(tokenizer, "unk_id", None),
        "pad_token": tokenizer.pad_id,
    }
    ids = {ROLE_KEYS[role]: index for role, index in roles.items() if index is not None}
    return {**fields, ADD_BOS: tokenizer.bos_id is not None, **ids, **_chats(ChatTemplate.of(tokenizer))}


def _chats(template: ChatTemplate | None) -> dict[str, Any]:
    sources = {} if template is None else dict(template.sources)
    usual = {CHAT: sources.pop(DEFAULT)} if DEFAULT in sources else {}
    named = {f"{CHAT}.{name}": source for name, source in sources.items()}
    return {**usual, **({NAMED_CHATS: list(sources)} if sources else {}), **named}


def _of_model(model: ModelProto) -> dict[str, Any]:
    """Of a SentencePiece model."""
    if model.kind != "BPE" or not model.convertible or model.space_after:
        raise _refused(f"a SentencePiece model of the kind {model.kind}, or one that normalises text")
    return {
        KIND: "llama",
        PRE: "default",
        TOKENS: [piece for piece, _, _ in model.pieces],
        SCORES: [float(score) for _, score, _ in model.pieces],
        TYPES: [kind for _, _, kind in model.pieces],
        ADD_SPACE: model.dummy_prefix,
        ADD_EOS: False,
    }


def _of_json(content: Mapping[str, Any], unk_id: int | None) -> dict[str, Any]:
    model = content["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refused(f"a {model.get('type')} model with pieces of its own kind")
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    prefix = _space_first(content)
    names = {index: name for name, index in vocabulary_of(content).items()}
    tokens = [names.get(index, f"[PAD{index}]") for index in range(max(names) + 1)]
    added = {item["id"]: CONTROL if item["special"] else USER_DEFINED for item in content.get("added_tokens") or []}
    types = [added.get(index, NORMAL if index in names else UNUSED) for index in range(len(tokens))]
    fields = {TOKENS: tokens, TYPES: types, ADD_EOS: ends_of(content.get("post_processor"))[1] is not None}
    if prefix is None:
        return {KIND: "gpt2", PRE: _cut(content), **fields, MERGES: [" ".join(pair) for pair in merges]}
    if unk_id is not None:
        types[unk_id] = UNKNOWN
    bytes_ = [bool(model.get("byte_fallback")) and bool(_BYTE_PIECE.fullmatch(token)) for token in tokens]
    types[:] = [BYTE if is_byte else kind for is_byte, kind in zip(bytes_, types, strict=True)]
    scores = _scores(tokens, types, merges)
    return {KIND: "llama", PRE: "default", **fields, SCORES: scores, ADD_SPACE: prefix}


def _cut(content: Mapping[str, Any]) -> str:
    """The name of the way in which a byte-level BPE cuts text."""
    kind = kind_of(content.get("pre_tokenizer"))
    normalizer = content.get("normalizer") or {"type": "NFC"}  # which llama.cpp never does, and few texts need
    if kind is None or normalizer != {"type": "NFC"} or content["model"].get("byte_fallback"):
        raise _refused(f"a byte-level BPE that cuts text otherwise than {', '.join(SPLITS)}")
    if bool(content["model"].get("ignore_merges")) != (kind in WHOLE_WORDS):
        raise _refused(f"{kind} with ignore_merges={bool(content['model'].get('ignore_merges'))}")
    return kind


def _space_first(content: Mapping[str, Any]) -> bool | None:
    """Whether SentencePiece's rules put a space before a text; None where text goes by bytes.

    Raises ``ConfigError`` for steps that are neither.
    """
    before = _steps(content.get("normalizer"), "normalizers")
    cuts = _steps(content.get("pre_tokenizer"), "pretokenizers")
    if any(step["type"] == "ByteLevel" for step in cuts):
        return None
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not cuts and before and before[-1] == escape and before[:-1] in ([], [{"type": "Prepend", "prepend": SPACE}]):
        return len(before) == 2
    if not before and len(cuts) == 1 and cuts[0]["type"] == "Metaspace" and not cuts[0].get("split", True):
        return bool(cuts[0].get("prepend_scheme", "always") != "never")
    raise _refused("a BPE model whose text is neither cut into bytes nor only has its spaces marked")


def _steps(node: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    return [] if node is None else list(node.get(parts, [node]))


def _scores(tokens: Sequence[str], types: Sequence[int], merges: Sequence[Sequence[str]]) -> list[float]:
    """Scores that decide as the order of the merges does: one for each piece they make, best first.

    Raises ``ConfigError`` where the order says what scores cannot: pairs that make one piece must stand together, and
    no way to make it may be left out.
    """
    made = ["".join(pair) for pair in merges]
    rank: dict[str, int] = {}
    for place, piece in enumerate(made):
        if rank.setdefault(piece, len(rank)) != len(rank) - 1 and made[place - 1] != piece:
            raise _refused("merges in an order that scores cannot give")
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    ways = {(piece[:cut], piece[cut:]) for piece in normal for cut in range(1, len(piece))}
    if {(left, right) for left, right in ways if left in normal and right in normal} != {(a, b) for a, b in merges}:
        raise _refused("merges that leave out a way to make a piece")
    worst = len(rank)
    return [
        -float(rank.get(token, worst)) if kind == NORMAL else 0.0 for token, kind in zip(tokens, types, strict=True)
    ]


def _refused(what: str) -> ConfigError:
    return ConfigError(f"GGUF has no words for this tokenizer: {what}", where="tokenizer", fix="format=hf")
