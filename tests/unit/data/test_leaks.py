"""Near-duplicates: the same text gives the same windows wherever it stands."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data import leaks
from llmkit.data.leaks import WINDOW_BYTES, ValidationWindows, WindowIndex, sampled_windows

quick = settings(max_examples=40, derandomize=True, deadline=None)


def prose(n_words: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(n_words))


def near(val: list[str], train: list[str], tmp_path: Path) -> tuple[int, int]:
    windows = ValidationWindows()
    windows.add([text.encode() for text in val])
    np.save(tmp_path / "windows.npy", windows.table())
    index = WindowIndex.load(tmp_path / "windows.npy")
    seen = np.zeros(windows.table().size, bool)
    seen[index.found_in([text.encode() for text in train])] = True
    return windows.near_duplicates(seen)


@quick
@given(st.lists(st.binary(max_size=200), max_size=6), st.integers(0, 50))
def test_windows_are_those_of_the_text_alone(texts: list[bytes], shift: int) -> None:
    """Each window lies in one text, and does not depend on the texts around it."""
    texts = [text.replace(b"\0", b"\1") for text in texts]
    owner, hashes = sampled_windows([b"x" * shift, *texts, b"y" * 70])
    for place, text in enumerate(texts, 1):
        alone = sampled_windows([text])[1]
        assert hashes[owner == place].tolist() == alone.tolist()
        assert len(alone) <= max(0, len(text) - WINDOW_BYTES + 1)


def test_about_a_sixteenth_of_the_windows_is_sampled_and_hashes_differ() -> None:
    text = prose(20_000, 0).encode()
    hashes = sampled_windows([text])[1]
    assert len(hashes) == pytest.approx(len(text) / 16, rel=0.1)
    distinct = {text[at : at + WINDOW_BYTES] for at in range(len(text) - WINDOW_BYTES + 1)}
    assert len(np.unique(hashes)) == pytest.approx(len(distinct) / 16, rel=0.1)


def test_blocks_give_what_one_pass_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [prose(2000, 1).encode()]
    whole = sampled_windows(texts)[1]
    monkeypatch.setattr(leaks, "_BLOCK_BYTES", 100)
    assert sampled_windows(texts)[1].tolist() == whole.tolist()


def test_near_duplicates_are_counted(tmp_path: Path) -> None:
    a, b, c, short = prose(300, 1), prose(300, 2), prose(300, 3), "only a few words"
    edited = a.replace(a[600:620], "something else", 1)
    half = a[: len(a) // 2] + prose(150, 4)
    assert near([a, short], ["before " + edited + " after", b], tmp_path) == (1, 1)
    assert near([a], [half], tmp_path) == (0, 1)
    assert near([a, b, c], [c, a], tmp_path) == (2, 3)
    assert near([short], [short], tmp_path) == (0, 0)
    assert near([], [a], tmp_path) == (0, 0)


def test_memory_is_bounded_and_the_counts_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for fewer windows than there are, both sides keep the same smaller sample."""
    monkeypatch.setattr(leaks, "_MAX_WINDOWS", 1000)
    val = [prose(400, seed) for seed in range(40)]
    windows = ValidationWindows()
    for text in val:
        windows.add([text.encode()])
        assert sum(map(len, windows.hashes)) <= 1000
    assert windows.thinning > 0
    assert near(val, [*val[:20], prose(400, 99)], tmp_path) == (20, 40)
