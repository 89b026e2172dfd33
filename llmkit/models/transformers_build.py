"""From a ``TransformersConfig`` to a module of ``transformers`` and back, and what can be counted on it.

The library is imported inside functions. None of its functions that read a folder is used: a config is made from plain
values, weights are handed over as tensors, so that no file can name code, other files or the network.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import nn

from llmkit.errors import ConfigError, missing_extra
from llmkit.models.transformers_config import NOT_SETTINGS, TransformersConfig

# Where architectures keep the length of their position tables.
LENGTHS = (
    "max_position_embeddings",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
    "max_seq_len",
)
AUTO = {"causal_lm": "AutoModelForCausalLM", "masked_lm": "AutoModelForMaskedLM", "seq2seq_lm": "AutoModelForSeq2SeqLM"}
MAPPINGS = {
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING",
    "seq2seq_lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
}


class Counts(NamedTuple):
    """What a module says of itself."""

    architecture: str
    d_model: int  # of the states that the output matrix reads
    width: int  # of the layers
    n_layers: int  # of both sides
    attention_width: int  # the layers' widths added up; 0 without attention
    n_params: int
    lookups: int  # parameters of embedding tables and the output matrix
    encoder_matrices: int  # parameters; 0 where there is one side only
    decoder_matrices: int


def library() -> Any:
    """The module ``transformers``; raises ``SetupError`` when it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise missing_extra("transformers", "hf") from error
    return transformers


def hf_config(config: TransformersConfig, *, as_they_are: bool = False) -> Any:
    """The architecture's own config object, its sizes those of ``config`` or ``as_they_are`` in the settings.

    Raises ``ConfigError`` for what ``transformers`` refuses.
    """
    if config.model_type is None:
        raise ConfigError("nothing says which architecture", where="model.model_type", fix="model.model_type=gpt_neo")
    transformers = library()
    if config.model_type not in transformers.CONFIG_MAPPING:
        close = get_close_matches(config.model_type, list(transformers.CONFIG_MAPPING), n=1)
        raise ConfigError(
            f"transformers {transformers.__version__} knows no architecture {config.model_type!r}",
            where="model.model_type",
            fix=f"did you mean {close[0]}?" if close else "see the list of models in its documentation",
        )
    settings = dict(config.settings)
    try:
        made = transformers.AutoConfig.for_model(config.model_type, **settings)
        text = text_of(made)
        if config.vocab_size is not None or not as_they_are:
            text.vocab_size = config.vocab_rows
        for name in () if as_they_are else LENGTHS:
            if hasattr(text, name) and name not in settings and text.attribute_map.get(name) not in settings:
                setattr(text, name, config.max_seq_len)
    except Exception as error:  # whatever the library's checks of one architecture raise
        raise _refused(config, error) from error
    return made


def check_settings(config: TransformersConfig) -> None:
    """Raise ``ConfigError`` for settings that the architecture's config class does not have."""
    made = hf_config(replace(config, settings={}), as_they_are=True)
    for name in config.settings:
        if not hasattr(made, name) and name not in made.attribute_map:
            close = get_close_matches(name, [known for known in made.to_dict() if not known.startswith("_")], n=1)
            raise ConfigError(
                f"{config.model_type} has no setting {name!r}",
                where=f"model.settings.{name}",
                fix=f"did you mean {close[0]}?" if close else f"see {type(made).__name__} of transformers",
            )


def new_module(config: TransformersConfig, made: Any = None) -> nn.Module:
    """A module with the library's initial weights, drawn from torch's own generator; of ``made`` where it is given."""
    made = hf_config(config) if made is None else made
    auto = getattr(library(), AUTO[config.task])
    if type(made) not in getattr(library(), MAPPINGS[config.task]):
        what = f"transformers has no {AUTO[config.task]} of the type {config.model_type}"
        raise ConfigError(what, where="model.task", fix=f"choose another of {', '.join(AUTO)}")
    try:
        with quiet():
            module: nn.Module = auto.from_config(made, dtype=torch.float32)
    except Exception as error:  # whatever the library's checks of one architecture raise
        raise _refused(config, error) from error
    return module


def empty_module(config: TransformersConfig) -> nn.Module:
    """The same without memory, its position table long enough for ``max_seq_len``."""
    made = hf_config(config)
    with torch.device("meta"):
        module = new_module(config, made)
        lost = lost_positions(module)
        if lost and made.max_position_embeddings == config.max_seq_len:
            made.max_position_embeddings += lost
            module = new_module(config, made)
    length = known_length(module)
    if length is not None and length < config.max_seq_len:
        what = f"{config.max_seq_len} is longer than the {length} positions that the settings give"
        raise ConfigError(what, where="model.max_seq_len", fix=f"set it to {length} or less")
    return module


def text_of(made: Any) -> Any:
    """The config with the sizes of the text model: its own, or one inside of it."""
    return made if hasattr(made, "vocab_size") else made.get_text_config()


def lost_positions(module: Any) -> int:
    """Rows at the beginning of a position table that no token has: RoBERTa's relatives count from the pad id + 1."""
    length = getattr(module.config, "max_position_embeddings", None)
    for name, table in module.named_modules():
        if "position" in name and isinstance(table, nn.Embedding) and table.num_embeddings == length:
            return 0 if table.padding_idx is None else int(table.padding_idx) + 1
    return 0


def known_length(module: Any) -> int | None:
    """The longest sequence the module has positions for; None when nothing limits it."""
    text = text_of(module.config)
    found = [getattr(text, name, None) for name in LENGTHS]
    lengths = [length for length in found if isinstance(length, int) and length > 0]
    return min(lengths) - lost_positions(module) if lengths else None


def output_matrix(module: Any) -> nn.Linear:
    """The layer that gives the logits. Raises ``ConfigError`` where there is none."""
    head = module.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), torch.Tensor) or head.weight.dim() != 2:
        what = f"{type(module).__name__} has no output matrix over the vocabulary"
        raise ConfigError(what, where="model", fix="choose another architecture or another model.task")
    return head  # type: ignore[no-any-return]


def counts_of(config: TransformersConfig) -> Counts:
    """Counted on a module without memory."""
    module: Any = empty_module(config)
    head, text = output_matrix(module), text_of(module.config)
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)} | {id(head.weight)}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    encoder = module.get_encoder() if config.kind == "encoder_decoder" else nn.Module()
    in_encoder = {id(parameter) for parameter in encoder.parameters()}
    matrices = [p for p in trained if p.dim() > 1 and id(p) not in tables]
    width = _size(text, "hidden_size") or head.weight.shape[1]
    n_layers = _size(text, "num_hidden_layers") or 1
    if config.kind == "encoder_decoder":
        n_layers += _size(text, "decoder_layers") or _size(text, "num_decoder_layers") or n_layers
    return Counts(
        architecture=type(module).__name__,
        d_model=head.weight.shape[1],
        width=width,
        n_layers=n_layers,
        attention_width=n_layers * width if _size(text, "num_attention_heads") else 0,
        n_params=sum(parameter.numel() for parameter in trained),
        lookups=sum(parameter.numel() for parameter in trained if id(parameter) in tables),
        encoder_matrices=sum(p.numel() for p in matrices if id(p) in in_encoder),
        decoder_matrices=sum(p.numel() for p in matrices if id(p) not in in_encoder),
    )


def settings_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a ``config.json``: all but what chooses code, files or number formats, at any depth."""
    kept = {}
    for name, value in raw.items():
        if name in NOT_SETTINGS or name.endswith(("attn_implementation", "experts_implementation")):
            continue
        kept[name] = settings_of(value) if isinstance(value, Mapping) else value
    return kept


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's progress bars and reports; llmkit says what matters of them itself."""
    reporting = library().utils.logging
    level, bars = reporting.get_verbosity(), reporting.is_progress_bar_enabled()
    reporting.set_verbosity(logging.ERROR)
    reporting.disable_progress_bar()
    try:
        yield
    finally:
        reporting.set_verbosity(level)
        if bars:
            reporting.enable_progress_bar()


def _size(text: Any, name: str) -> int:
    value = getattr(text, name, None)
    return value if isinstance(value, int) else 0


def _refused(config: TransformersConfig, error: Exception) -> ConfigError:
    why = " ".join(str(error).split())[:300] or type(error).__name__
    return ConfigError(
        f"transformers does not make a {config.task} model {config.model_type!r} of these settings: {why}",
        where="model",
        fix="see the documentation of its config class in transformers",
    )
