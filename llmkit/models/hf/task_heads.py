"""Task heads in Hugging Face files: their classes, tensors and keys, family by family. Free of torch.

A head is known by the end of the class name in ``architectures``. Where transformers has no class that computes ours
(encoder-decoders, whose classes there read the decoder's last token; LSTMs) the model is in llmkit's own format.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkit.interfaces import ModelConfig
from llmkit.models.head_config import HeadConfig, HeadShape, Kind, numbered_labels
from llmkit.models.hf.families import FAMILIES, family_of
from llmkit.models.hf.family import Family, Keys
from llmkit.models.hf.rows import Row
from llmkit.models.transformers_config import TransformersConfig

log = logging.getLogger("llmkit.models")

ENDINGS: dict[str, Kind] = {"ForSequenceClassification": "class", "ForQuestionAnswering": "span"}
OUTPUT_LAYERS = ("transform.", "head.", "output_bias", "pooler.", "pair_head.")  # of the language model
MODULE = "task_head"
LEFT_ASIDE = ("score.", "qa_outputs.")  # heads of other classes, in any family
ACTIVATION = "classifier_activation"  # key of the own format, and of ModernBERT
DROPOUT = "classifier_dropout"
MAX_LABELS = 100_000  # that a file may only count, without naming them


PLAIN, POOLED = HeadShape(), HeadShape("tanh")


@dataclass(frozen=True)
class HeadTable:
    """A head in the files of one family. ``backbone``: our modules that files without this head may have too."""

    architecture: str
    modules: Mapping[str, str]  # ours -> theirs
    shape: HeadShape = PLAIN
    dropout: str = DROPOUT
    backbone: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # keys that decide what is computed

    def rows(self, names: Iterable[str]) -> list[Row]:
        """Of the head's parameters among ``names``, which are those of the whole model."""
        rows = []
        for name in names:
            module, _, kind = name.removeprefix(f"{MODULE}.").rpartition(".")
            if name.startswith(f"{MODULE}."):
                rows.append(Row(f"{self.modules[module]}.{kind}", (name,)))
        return rows

    def backbone_rows(self, names: Iterable[str]) -> list[Row]:
        """Those of the modules in ``backbone``."""
        beginnings = tuple(f"{self.modules[module]}." for module in self.backbone)
        return [row for row in self.rows(names) if row.name.startswith(beginnings)]


DEEP = {"dense": "classifier.dense", "out": "classifier.out_proj"}
MODERN = {"dense": "head.dense", "norm": "head.norm", "out": "classifier"}
SPAN = {"out": "qa_outputs"}
MODERN_SHAPE = HeadShape("gelu", norm_eps=1e-5)  # the config has biases and epsilon: ``shape_in``
MODERN_BACKBONE = ("dense", "norm")  # those of masked LM have the same names
DECODERS = {
    "gpt2": "GPT2",
    "gpt_neox": "GPTNeoX",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "olmo2": "Olmo2",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "phi3": "Phi3",
}
TABLES: dict[tuple[str, Kind], HeadTable] = {
    ("bert", "class"): HeadTable(
        "BertForSequenceClassification",
        {"dense": "bert.pooler.dense", "out": "classifier"},
        POOLED,
        backbone=("dense",),
    ),
    ("roberta", "class"): HeadTable("RobertaForSequenceClassification", DEEP, HeadShape("tanh", drop_input=True)),
    ("distilbert", "class"): HeadTable(
        "DistilBertForSequenceClassification",
        {"dense": "pre_classifier", "out": "classifier"},
        HeadShape("relu"),
        dropout="seq_classif_dropout",
    ),
    ("electra", "class"): HeadTable("ElectraForSequenceClassification", DEEP, HeadShape("gelu", drop_input=True)),
    ("modernbert", "class"): HeadTable(
        "ModernBertForSequenceClassification",
        MODERN,
        MODERN_SHAPE,
        backbone=MODERN_BACKBONE,
        settings={"classifier_pooling": "cls"},
    ),
    ("bert", "span"): HeadTable("BertForQuestionAnswering", SPAN),
    ("roberta", "span"): HeadTable("RobertaForQuestionAnswering", SPAN),
    ("distilbert", "span"): HeadTable("DistilBertForQuestionAnswering", SPAN, dropout="qa_dropout"),
    ("electra", "span"): HeadTable("ElectraForQuestionAnswering", SPAN),
    ("modernbert", "span"): HeadTable("ModernBertForQuestionAnswering", MODERN, MODERN_SHAPE, backbone=MODERN_BACKBONE),
    **{
        (model_type, "class"): HeadTable(
            f"{name}ForSequenceClassification", {"out": "score"}, HeadShape(out_bias=False)
        )
        for model_type, name in DECODERS.items()
    },
}


def table_of(family: Family, kind: Kind) -> HeadTable | None:
    """None where transformers has no class that computes such a head."""
    return TABLES.get((family.model_types[0], kind))


def shape_of(config: ModelConfig, kind: Kind) -> HeadShape:
    """The layers of a new head: those of the family that the model is saved as."""
    table = None if isinstance(config, TransformersConfig) else table_of(family_of(config), kind)
    return shape_in(table, config, kind)


def shape_in(table: HeadTable | None, config: Any, kind: Kind) -> HeadShape:
    """The layers of a head in a file with this table; None is the own format, where classes are BERT's or GPT's."""
    if table is None:
        return HeadShape("tanh", drop_input=True) if kind == "class" and config.kind != "decoder" else HeadShape()
    if table.shape.norm_eps is None:
        return table.shape
    return HeadShape(
        table.shape.activation,
        dense_bias=config.transform_bias,
        norm_eps=config.norm_eps,
        norm_bias=config.norm_bias,
    )


def saved_as(config: ModelConfig, kind: Kind, shape: HeadShape) -> tuple[Family, HeadTable | None]:
    """The family and the table that a model with this head is written with; not of a wrapped model, which has none."""
    family = family_of(config)
    table = table_of(family, kind)
    if table is not None and shape_in(table, config, kind).same_function(shape):
        return family, table
    own = next(family for family in FAMILIES if family.own_names and isinstance(config, family.config))
    return own, None


def is_output_layer(name: str) -> bool:
    """Whether a parameter of ours belongs to the output layers of the language model, which no task head reads."""
    return name.startswith(OUTPUT_LAYERS)


# -- config.json ----------------------------------------------------------------------------------------------------


def write_head(head: HeadConfig, shape: HeadShape, table: HeadTable | None, class_name: str) -> dict[str, Any]:
    """The keys of a head, to stand over those of the family. ``class_name`` is that of our model."""
    ending = next(ending for ending, kind in ENDINGS.items() if kind == head.kind)
    keys: dict[str, Any] = {"architectures": [class_name + ending if table is None else table.architecture]}
    if head.kind == "class":
        keys["id2label"] = {str(i): label for i, label in enumerate(head.labels)}
        keys["label2id"] = {label: i for i, label in enumerate(head.labels)}
        keys["problem_type"] = "single_label_classification"
    if table is None:
        return {**keys, ACTIVATION: shape.activation, DROPOUT: head.dropout}
    return {**keys, **table.settings, table.dropout: head.dropout}


def read_head(keys: Keys, family: Family, config: ModelConfig) -> tuple[HeadConfig, HeadTable | None] | None:
    """The head that ``architectures`` names, and its table (None: own format). None without a head that is computed
    here; one that is computed otherwise (regression, several labels at once, other pooling) is named and left aside.
    """
    kind = head_kind(keys)
    if kind is None:
        return None
    table = table_of(family, kind)
    if table is None and not family.own_names:
        log.warning("%s: the head of %s is left aside: llmkit computes another", keys.where, keys.raw["architectures"])
        return None
    if reason := _unlike(keys, table, kind):
        log.warning("%s: the head is left aside: %s", keys.where, reason)
        return None
    if table is None:
        keys.expect(ACTIVATION, shape_in(None, config, kind).activation)
    labels = _labels(keys) if kind == "class" else ()
    head = HeadConfig(kind, labels, keys.number_or_none(DROPOUT if table is None else table.dropout))
    if problems := head.problems():
        raise keys.error("id2label", "; ".join(f"{name} {what}" for name, what in problems))
    return head, table


def head_kind(keys: Keys) -> Kind | None:
    """Of the head that ``architectures`` names, computed here or not."""
    names = keys.raw.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    return next((kind for ending, kind in ENDINGS.items() if name.endswith(ending)), None)


def _unlike(keys: Keys, table: HeadTable | None, kind: Kind) -> str | None:
    """Why a head of the file is not one that llmkit computes."""
    n_labels, problem = _n_labels(keys), keys.raw.get("problem_type")
    for name, value in ({} if table is None else table.settings).items():
        if keys.raw.get(name, value) != value:
            return f"{name} is {keys.raw[name]!r}, not {value!r}"
    if kind == "class" and (n_labels < 2 or problem not in (None, "single_label_classification")):
        return f"it has {n_labels} labels and problem_type {problem!r}, and llmkit chooses one label of several"
    return f"it has {n_labels} outputs, and a span has a start and an end" if kind == "span" and n_labels != 2 else None


def _n_labels(keys: Keys) -> int:
    labels = keys.inner("id2label").raw
    return len(labels) if labels else keys.integer("num_labels", 2)


def _labels(keys: Keys) -> tuple[str, ...]:
    inner = keys.inner("id2label")
    if not inner.raw:
        if _n_labels(keys) > MAX_LABELS:
            raise keys.error("num_labels", f"is above {MAX_LABELS}")
        return numbered_labels(_n_labels(keys))
    names = [inner.raw.get(str(i)) for i in range(len(inner.raw))]
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise inner.error(str(i), f"must be a label, got {name!r}")
    return tuple(str(name) for name in names)
