"""BLEU and chrF of small corpora, and how references reach sacreBLEU."""

from __future__ import annotations

import sys
from math import exp

import pytest

from llmkit.errors import SetupError
from llmkit.metrics.translation import sacre_bleu, tokenizer_for


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    if "without" not in request.node.name:
        pytest.importorskip("sacrebleu", reason="BLEU and chrF are those of the package sacrebleu")


def test_bleu_by_hand() -> None:
    """Four of the five words, three of four pairs, two of three triples, one of two quadruples; as long."""
    bleu, _, _ = sacre_bleu(["a b c d x"], [["a b c d e"]])
    assert bleu == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_brevity_penalty() -> None:
    bleu, _, _ = sacre_bleu(["a b c d"], [["a b c d e f"]])
    assert bleu == pytest.approx(100 * exp(1 - 6 / 4))


def test_chrf_by_hand() -> None:
    """One letter of two right: precision and recall 1/2 of letters, 0 of pairs; longer ones there are none."""
    _, chrf, _ = sacre_bleu(["ab"], [["ac"]])
    assert chrf == pytest.approx(25.0)


def test_the_whole_corpus_and_not_the_mean() -> None:
    bleu, _, _ = sacre_bleu(["a b c d", "x"], [["a b c d"], ["y"]])
    assert bleu == pytest.approx(100 * (4 / 5) ** 0.25)


def test_equal_texts_in_any_script() -> None:
    texts = ["Der Hund, er läuft schnell.", "кошка сидит на ковре", "naïve 🙂 e\u0301 ½ x"]
    assert sacre_bleu(texts, [[text] for text in texts])[:2] == pytest.approx((100.0, 100.0))


def test_references_of_varying_number() -> None:
    said = ["a b c d", "p q r s"]
    bleu, chrf, signatures = sacre_bleu(said, [["x x x x", "a b c d"], ["p q r s"]])
    assert (bleu, chrf) == pytest.approx((100.0, 100.0))
    assert all(signature.startswith("nrefs:var|") for signature in signatures)


def test_signatures() -> None:
    _, _, (bleu, chrf) = sacre_bleu(["a"], [["b"]], "de")
    assert bleu.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert chrf.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


@pytest.mark.parametrize("said", ["", " ", "\n"])
def test_an_empty_prediction_scores_nothing(said: str) -> None:
    assert sacre_bleu([said], [["a b c d"]])[:2] == (0.0, 0.0)


def test_an_empty_reference() -> None:
    assert sacre_bleu(["a b c d"], [[""]])[:2] == (0.0, 0.0)
    assert sacre_bleu([""], [[""]])[0] == 0.0


def test_no_predictions() -> None:
    assert sacre_bleu([], []) == (0.0, 0.0, ("", ""))


@pytest.mark.parametrize("references", [[["a"], []], [["a"]], [["a"], ["b"], ["c"]]])
def test_a_prediction_that_lacks_a_reference_is_refused(references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="needs a reference"):
        sacre_bleu(["a", "b"], references)


def test_languages_without_spaces_are_cut_into_characters() -> None:
    """One of nine characters is wrong; as one word nothing is right."""
    said, wanted = ["今日は天気が良い日"], [["今日は天気が悪い日"]]
    assert sacre_bleu(said, wanted)[0] == 0.0
    bleu, _, (signature, _) = sacre_bleu(said, wanted, "ja")
    assert bleu == pytest.approx(100 * (8 / 9 * 6 / 8 * 4 / 7 * 3 / 6) ** 0.25)
    assert "|tok:char|" in signature


@pytest.mark.parametrize(
    ("language", "name"),
    [("de", "13a"), ("", "13a"), ("ko", "13a"), ("zh", "zh"), ("zh_Hant", "zh"), ("ZH-tw", "zh"), ("th", "char")],
)
def test_tokenizers(language: str, name: str) -> None:
    assert tokenizer_for(language) == name


def test_without_sacrebleu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without predictions, so that it can be asked for before hours of training."""
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(SetupError, match="sacrebleu is not installed") as caught:
        sacre_bleu([], [])
    assert "llmkit[metrics]" in str(caught.value)
