"""BLEU and chrF by sacreBLEU, with the signatures that make them comparable (Post 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkit.errors import missing_extra

_TOKENIZERS = {"zh": "zh", "yue": "zh", **dict.fromkeys(("bo", "ja", "km", "lo", "my", "th"), "char")}


def sacre_bleu(
    predictions: Sequence[str], references: Sequence[Sequence[str]], language: str = ""
) -> tuple[float, float, tuple[str, str]]:
    """(BLEU, chrF2, their signatures), both 0 .. 100, of the whole corpus; a prediction may have several references.

    ``language``: the code of what is written. BLEU's words are those of the tokenizer ``13a``; in languages that put
    no space between words they are characters (``char``; ``zh`` for Chinese). The signature says which. Without
    predictions both scores are 0 and have no signature. Raises ``SetupError`` where the package ``sacrebleu`` is not
    installed, ``ValueError`` for a prediction without a reference.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ModuleNotFoundError as error:
        raise missing_extra("sacrebleu", "metrics") from error
    if len(predictions) != len(references) or not all(references):
        raise ValueError("every prediction needs a reference, and every reference a prediction")
    if not predictions:
        return 0.0, 0.0, ("", "")
    bleu, chrf = BLEU(tokenize=tokenizer_for(language)), CHRF()
    n = max(map(len, references))
    columns: list[Any] = [[texts[i] if i < len(texts) else None for texts in references] for i in range(n)]
    scores = [metric.corpus_score(list(predictions), columns).score for metric in (bleu, chrf)]
    return scores[0], scores[1], (str(bleu.get_signature()), str(chrf.get_signature()))


def tokenizer_for(language: str) -> str:
    """The name of sacreBLEU's tokenizer for a language, which may have a region or script (``zh-TW``, ``zh_Hant``)."""
    return _TOKENIZERS.get(language.strip().lower().replace("_", "-").split("-")[0], "13a")
