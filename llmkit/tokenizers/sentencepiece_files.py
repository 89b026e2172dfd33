"""A SentencePiece model of others, and the files beside it, as a ``tokenizer.json``.

A class named in ``tokenizer_config.json`` brings rules of its own, which differ from the library's in small things: the
one for Llama puts no space before a text that begins with one; the one for T5 adds the symbols ``<extra_id_N>`` and
cuts text at whitespace. Where no class is named, the model's own settings are the rules.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.errors import DataError
from llmkit.safe_files import read_bytes
from llmkit.tokenizers.added_tokens import entry, special_entries, stated_tokens, with_added
from llmkit.tokenizers.ends import template
from llmkit.tokenizers.hf_files import ModelProto, tokenizer_json
from llmkit.tokenizers.sentencepiece import MODEL_FILE, opened
from llmkit.tokenizers.vocabulary import SPACE

MODEL_FILES = (MODEL_FILE, "spiece.model")
_GENERAL = ("None", "PreTrainedTokenizer", "TokenizersBackend", "SentencePieceBackend")
_OF_MODEL_TYPE = {  # the others go by the model's own settings
    **dict.fromkeys(("t5", "mt5"), "T5Tokenizer"),
    **{"xlm-roberta": "XLMRobertaTokenizer", "camembert": "CamembertTokenizer", "mbart": "MBartTokenizer"},
    **{"pegasus": "PegasusTokenizer", "marian": "MarianTokenizer", "m2m_100": "M2M100Tokenizer"},
    **{"deberta-v2": "DebertaV2Tokenizer", "xglm": "XGLMTokenizer", "albert": "AlbertTokenizer"},
}
_N_SENTINELS = 100  # of T5, where no file says otherwise
_MAX_SENTINELS = 10_000
_NEVER = -1e6  # a score that no path through a text is worth


def read_sentencepiece(
    file: Path, settings: Mapping[str, Any], model_type: str, old_file: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(``tokenizer.json``, the settings with the model's own names of special tokens).

    ``old_file`` is the content of ``added_tokens.json``. Raises ``DataError`` for damaged files and for classes that
    give other ids than the model.
    """
    _, model = opened(read_bytes(file), str(file))
    kind = rules(settings, model_type)
    roles = {f"{role}_token": model.symbol(role) for role in model.ids}
    complete = {**roles, **{key: value for key, value in settings.items() if value is not None}}
    stated = stated_tokens(settings, old_file, str(file.parent))
    model = _with_new_names(model, {int(token["id"]): str(token["content"]) for token in stated})
    if kind == "LlamaTokenizer":
        content = {**_llama(model, settings), "post_processor": _ends(model, settings)}
    elif kind in ("T5Tokenizer", "MT5Tokenizer"):
        content = _t5(model, complete, str(file))
    elif kind in ("None", "GemmaTokenizer") and not model.space_after:
        content = {**_own(model), "post_processor": _ends(model, settings)}
    else:
        what = f"this SentencePiece model goes by rules that llmkit does not know ({kind})"
        fix = "let transformers write a tokenizer.json: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        raise DataError(what, where=str(file), fix=fix)
    vocabulary = {item[0] if isinstance(item, list) else item: i for i, item in enumerate(content["model"]["vocab"])}
    return with_added(content, special_entries(complete, vocabulary), str(file)), complete


def rules(settings: Mapping[str, Any], model_type: str) -> str:
    """The class whose rules a model of others goes by; ``None`` is the model's own settings."""
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    return _OF_MODEL_TYPE.get(model_type, "None") if kind in _GENERAL else kind


def _with_new_names(model: ModelProto, names: Mapping[int, str]) -> ModelProto:
    """Unused pieces that an added token took over carry its name."""
    known = {piece for piece, _, _ in model.pieces}
    new = {index: name for index, name in names.items() if index < len(model.pieces) and name not in known}
    pieces = [(new.get(index, piece), score, kind) for index, (piece, score, kind) in enumerate(model.pieces)]
    return replace(model, pieces=pieces)


def _own(model: ModelProto) -> dict[str, Any]:
    """The library's steps: characters changed, spaces trimmed, one put before the text, and all of them marked."""
    content = tokenizer_json(model)
    first: list[dict[str, Any]] = [_charsmap(model.charsmap)] if model.charsmap else []
    if model.trims:
        one = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
        first += [{"type": "Strip", "strip_left": True, "strip_right": True}, one]
    content["normalizer"]["normalizers"][:0] = first
    return content


def _charsmap(charsmap: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode("ascii")}


def _llama(model: ModelProto, settings: Mapping[str, Any]) -> dict[str, Any]:
    content = tokenizer_json(model)
    prefix = settings.get("add_prefix_space") is not False
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unescape = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    content["normalizer"] = None
    content["pre_tokenizer"] = _metaspace(scheme, split=False)
    content["decoder"]["decoders"] = [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return content


def _ends(model: ModelProto, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``transformers`` (5.23) puts around a text for every class but T5's: what the settings ask for, no more."""
    return template(
        *(
            [token] if (token := model.named(role)) is not None and settings.get(f"add_{role}_token") else []
            for role in ("bos", "eos")
        )
    )


def _metaspace(scheme: str, *, split: bool) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}


def _t5(model: ModelProto, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Sentinels follow the model's pieces, the last one first."""
    content = tokenizer_json(model)
    n = settings.get("extra_ids", _N_SENTINELS)
    if type(n) is not int or not 0 <= n <= _MAX_SENTINELS:
        raise DataError(f"extra_ids must be a number up to {_MAX_SENTINELS}, not {n!r}", where=where)
    known = {piece for piece, _, _ in model.pieces}
    new = [name for number in reversed(range(n)) if (name := f"<extra_id_{number}>") not in known]
    first = len(model.pieces)
    content["model"]["vocab"] += [[name, _NEVER] for name in new]
    content["added_tokens"] += [entry(first + place, name) for place, name in enumerate(new)]
    content["normalizer"] = _charsmap(model.charsmap) if model.charsmap else None
    steps = [{"type": "WhitespaceSplit"}, _metaspace("always", split=True)]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    content["decoder"] = _metaspace("always", split=True)
    if model.byte_fallback:
        content["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, content["decoder"]]}
    content["post_processor"] = template([], [(model.symbol("eos"), model.ids["eos"])] if "eos" in model.ids else [])
    return content
