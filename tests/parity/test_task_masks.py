"""What tasks train, on every kind of tokenizer and family: exactly the wanted answer, never merged with a prompt."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.errors import BadExample
from llmkit.task_interface import Question
from llmkit.tokenizers.hf_json import HFTokenizer
from tests.unit.tasks.support import ask, task, written
from tests.unit.tokenizers.strings import documents, trained, trained_byte_level, trained_wordpiece

pytest.importorskip("tokenizers")

WIDE = 1 << 20
TOKENIZERS = ("bpe", "unigram", "wordpiece", "byte_level", "byte_level_gpt4")
TEXT_TASKS = ("qa", "summarization", "translation", "code")
QUICK = settings(derandomize=True, max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@cache
def tokenizer_of(kind: str) -> Any:
    return {
        "bpe": lambda: trained("bpe"),
        "unigram": lambda: trained("unigram"),
        "wordpiece": trained_wordpiece,
        "byte_level": trained_byte_level,
        "byte_level_gpt4": trained_gpt4,
    }[kind]()


@cache
def trained_gpt4() -> HFTokenizer:
    """Byte-level BPE that is split as in Llama 3 and Qwen, where signs swallow the line ends behind them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    symbols = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=symbols, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(documents()[:40], trainer)
    return HFTokenizer(backend.to_str(), {}, {}, "byte level, GPT-4")


# Not U+2581, which stands for a space in SentencePiece, nor what records are refused for
_ODD = st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\u2581")
_NEAR = st.sampled_from(
    [*" \n\t.,:;()\"'@#_=<>/-+5", "\r\n", "é", "漢", "😀", "\u0301", "def f(x):\n    ", "</s>", "<s>"]
)
_REAL = st.builds(lambda n, k: documents()[n % 40][k : k + 60], st.integers(0, 39), st.integers(0, 500))
TEXTS = st.lists(st.one_of(_NEAR, _REAL, _ODD), min_size=1, max_size=8).map("".join).map(str.strip).filter(bool)


@st.composite
def records(draw: Any, name: str) -> dict[str, Any]:
    """The fields of a record of a task, by role."""
    texts = [draw(TEXTS) for _ in range(3)]
    if name == "qa":
        return {"question": texts[0], "context": f"{texts[1]} {texts[2]} {texts[0]}", "answers": texts[2]}
    if name == "summarization":
        return {"document": texts[0], "summary": texts[1:]}
    if name == "translation":
        return {"source": texts[0], "target": texts[1]}
    return {
        "instruction": texts[0],
        "code": f"def {texts[1]}",  # code begins with a word; a line end and signs may be one piece of a vocabulary
        "tests": draw(st.lists(TEXTS, max_size=2)),
        "signature": texts[2],
    }


def kept(tokenizer: Any, kind: str, text: str) -> str:
    """What the tokenizer keeps of a text: all of it, but for WordPiece's case, accents and spaces."""
    return str(tokenizer.decode(tokenizer.encode(text))).strip() if kind == "wordpiece" else text


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEXT_TASKS)
def test_decoded_targets_are_the_wanted_texts(name: str, kind: str, family: str) -> None:
    job, tokenizer = task(name, **({"train_on": "all"} if name == "summarization" else {})), tokenizer_of(kind)

    @QUICK
    @given(records(name))
    def check(fields: dict[str, Any]) -> None:
        question = ask(job, **fields)
        wanted = [kept(tokenizer, kind, text) for text in job.targets(question)]
        if "" in wanted:
            return  # WordPiece throws control characters away
        rows = job.rows(question, tokenizer, family, WIDE, cut=False)
        assert [written(row, tokenizer) for row in rows] == wanted
        given_ids = list(job.prompt(question, tokenizer, family, WIDE))
        for row in rows:
            n_read = len(row.ids) if row.answer.trained is None else int((~row.answer.trained).sum())
            assert row.ids[:n_read].tolist() == given_ids
            assert row.answer.trained is None or row.answer.trained[n_read:].all()
            read = tokenizer.decode(given_ids)
            assert kind == "wordpiece" or read == job.filled(question, family).text
            assert row.answer.n_cut == 0

    check()


def row_or_reason(job: Any, question: Question, tokenizer: Any, family: str, limit: int) -> Any:
    """The row, cut to fit, or why there is none."""
    try:
        return job.rows(question, tokenizer, family, limit, cut=True)[0]
    except BadExample as bad:
        return str(bad)


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEXT_TASKS)
def test_a_cut_leaves_the_answer_whole(name: str, kind: str, family: str) -> None:
    """At the length of the row less 1 to 8 ids, the row either fits, with its whole answer, or is called too long."""
    job, tokenizer = task(name), tokenizer_of(kind)

    @QUICK
    @given(records(name), st.integers(1, 8))
    def check(fields: dict[str, Any], less: int) -> None:
        question = ask(job, **fields)
        try:
            (whole,) = job.rows(question, tokenizer, family, WIDE, cut=False)
        except BadExample:
            return  # the other test says which
        limit = max(len(whole.ids), 0 if whole.answer.target is None else len(whole.answer.target)) - less
        with pytest.raises(BadExample, match="too long"):
            job.rows(question, tokenizer, family, limit, cut=False)
        row = row_or_reason(job, question, tokenizer, family, limit)
        if isinstance(row, str):
            assert row in ("too long", "answer cut away")
            return
        assert len(row.ids) <= limit
        assert row.answer.n_cut == len(whole.ids) - len(row.ids) > 0
        assert written(row, tokenizer) == written(whole, tokenizer)

    check()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_spans_are_the_wanted_answers(kind: str) -> None:
    """An encoder's answer is found at its place, in one window at least, and no id of it stands for more.

    Neighbouring windows share as many ids as the answer has: less would lose answers on the seam.
    """
    tokenizer = tokenizer_of(kind)
    words = st.sampled_from(["Anna", "37", "naïve", "漢字", "the", "x", "😀", "don't", "$5.00", "İstanbul", "e\u0301a"])
    phrase = st.lists(words, min_size=1, max_size=3).map(" ".join)

    @QUICK
    @given(st.lists(phrase, max_size=12).map(" ".join), phrase, st.lists(phrase, max_size=12).map(" ".join), TEXTS)
    def check(before: str, answer: str, after: str, asked: str) -> None:
        context = f"{before} {answer} {after}"
        answers = {"text": [answer], "answer_start": [len(before) + 1]}
        n_ids = len(tokenizer.encode(f" {answer}")) + 2
        job = task("qa", stride=n_ids)
        question = ask(job, question=asked[:20], context=context, answers=answers)
        limit = len(tokenizer.encode(question.fields["question"])) + 3 + 2 * n_ids + 8
        windows = job.windows(question, tokenizer, limit)
        rows = job.rows(question, tokenizer, "encoder", limit, cut=False)
        found = [w.characters(*r.answer.span) for w, r in zip(windows, rows, strict=True) if r.answer.span != (0, 0)]
        assert found
        assert {context[start:stop].strip() for start, stop in found} == {answer}
        assert {start for start, _ in found} <= {len(before) + 1, len(before)}  # with the space before it, or without

    check()


@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder_decoder"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_labels_are_the_wanted_ones(kind: str, family: str) -> None:
    job, tokenizer = task("sentiment", labels=["negative", "neutral", "positive"]), tokenizer_of(kind)

    @QUICK
    @given(TEXTS, st.sampled_from(["negative", "Neutral", 2]))
    def check(text: str, label: Any) -> None:
        question = ask(job, text=text, label=label)
        (row,) = job.rows(question, tokenizer, family, WIDE, cut=False)
        assert job.labels[row.answer.label] == {"Neutral": "neutral", 2: "positive"}.get(label, label)
        first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        assert row.ids.tolist() == [*first, *tokenizer.encode(text), tokenizer.eos_id]
        assert list(job.prompt(question, tokenizer, family, WIDE)) == row.ids.tolist()

    check()


def test_no_seam_merges_in_real_code(data_dir: Path) -> None:
    """Prompts that end a line are the hard ones: some vocabularies join signs to the line end after them."""
    import json

    job, n_rows = task("code"), 0
    lines = (data_dir / "code" / "stdlib_docstrings.valid.jsonl").read_text(encoding="utf-8").splitlines()
    lines += (data_dir / "code" / "mbpp.train.jsonl").read_text(encoding="utf-8").splitlines()
    lines = lines[::4]
    for number, line in enumerate(lines):
        record = json.loads(line)
        fields = {"instruction": record.get("text") or record["docstring"], "code": record["code"]}
        fields |= {"signature": record.get("signature"), "tests": record.get("test_list")}
        (example,) = job.read(fields, answered=True)
        for kind in TOKENIZERS:
            tokenizer = tokenizer_of(kind)
            (row,) = job.rows(Question(example, "", number), tokenizer, "decoder", WIDE, cut=False)
            assert written(row, tokenizer) == kept(tokenizer, kind, example["code"])
            n_rows += 1
    assert n_rows == len(lines) * len(TOKENIZERS) == 191 * len(TOKENIZERS)
