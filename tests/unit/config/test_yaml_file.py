"""Files are plain data within limits; lines and comments are found; dump and read agree."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from llmkit.config.yaml_file import dump, header_of, read_yaml
from llmkit.errors import ConfigError

TEXT = """\
# @package _global_
# What it is.
a: 1e-4  # first
b:  # section
  c: "x # y"  # second
  d: [1,
      2]  # after a list
e: 2024-01-01
f: off
g: &many [1, 2]
h: *many
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "file.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_values_lines_and_comments(tmp_path: Path) -> None:
    file = read_yaml(write(tmp_path, TEXT))
    assert file.tree == {
        "a": 1e-4, "b": {"c": "x # y", "d": [1, 2]}, "e": "2024-01-01", "f": False, "g": [1, 2], "h": [1, 2],
    }  # fmt: skip
    assert file.tree["g"] is not file.tree["h"]
    assert (file.lines["a"], file.lines["b.c"], file.lines["h"]) == (3, 5, 11)
    assert (file.comments["a"], file.comments["b"], file.comments["b.c"], file.comments["e"]) == (
        "first", "section", "second", "",
    )  # fmt: skip
    assert file.header == header_of(TEXT) == "What it is."


SCALAR_TEXTS = """\
1 -1 +1 1_000 0x10 010 1.0 1. .5 1e3 1e-3 1.5e3 -1.5E+3 .5e1 .5e+1 1e 1.2.3 on off yes null ~ .nan-no 2001-01-01 12:30
'1e3' true False e5 1_0e1"""


def test_reads_scalars_as_hydra_does(tmp_path: Path) -> None:
    text = "\n".join(f"k{i}: {scalar}" for i, scalar in enumerate(SCALAR_TEXTS.split()))
    assert read_yaml(write(tmp_path, text)).tree == OmegaConf.to_container(OmegaConf.create(text))


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ('a: !!python/object/apply:os.system ["touch canary"]', "tags", 1),
        ("a: 1\nb: !mine 2", "tags", 2),
        ("a: &a\n  b: *a", "refers to nothing", 2),
        ("a: 1\nb:\n  c: 2\n  c: 3", "twice", 4),
        ("- 1\n- 2", "key: value", 1),
        ("a: [1\nb: 2", "not valid YAML", 2),
        ("a: " + "[" * 500, "deeper", 1),
        ("a: 1\n---\nb: 2", "not valid YAML", 2),
    ],
)
def test_refused(tmp_path: Path, text: str, what: str, line: int) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        read_yaml(write(tmp_path, text))
    assert caught.value.where.endswith(f"file.yaml:{line}")
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60)),
        "a: &a [x]\nb: [" + "*a," * 200_000 + "]",
        "x" * 1_000_001,
        "[" * 900_000,
    ],
    ids=["doubling", "many aliases", "large", "deep"],
)
def test_bombs_are_refused_in_a_second(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    start = time.perf_counter()
    with pytest.raises(ConfigError):
        read_yaml(path)
    assert time.perf_counter() - start < 1


def test_not_text_and_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="UTF-8"):
        read_yaml(write(tmp_path, b"a: \xff"))
    with pytest.raises(ConfigError, match="cannot read"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        read_yaml(tmp_path)


def test_an_empty_file_is_an_empty_section(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, "# only a comment\n")).tree == {}


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=20)
KEYS = st.sampled_from(["a", "b", "run", "max_steps"])
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(tree=st.dictionaries(KEYS, TREES, min_size=1, max_size=3))
def test_what_is_dumped_is_read_back_equal(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object]) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert read_yaml(write(folder, dump(tree))).tree == tree
