"""A number lives in YAML or nowhere: a group's file lists every field of its class, no other, each with its meaning."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_type_hints

import pytest

from llmkit.config.build import TARGET, is_node
from llmkit.config.check import known_keys
from llmkit.config.choices import Choices, recipes_dir
from llmkit.config.compose import compose
from llmkit.config.schema import ROOTS
from llmkit.config.targets import config_fields, fields_of, resolve
from llmkit.config.yaml_file import YamlFile, read_yaml

N_GROUP_FILES = 46
N_FIELDS = 431
N_CLASSES = 33

GROUPS = [path for path in sorted(recipes_dir().glob("*/*.yaml")) if path.parent.name != "recipe"]
ROOT_FILES = sorted(recipes_dir().glob("*.yaml"))


def nodes_of(file: YamlFile) -> dict[str, dict[str, object]]:
    """Nodes of a group file by their place in it: the whole file, or its entries."""
    if is_node(file.tree):
        return {"": file.tree}
    return {f"{name}.": node for name, node in file.tree.items() if is_node(node)}


def expected_fields(path: Path) -> dict[str, set[str]]:
    """Place in the file -> the fields that must stand there."""
    file = read_yaml(path)
    if nodes := nodes_of(file):
        return {place: set(config_fields(resolve(node[TARGET]))[0]) for place, node in nodes.items()}
    if not file.tree:
        return {}
    cls = get_type_hints(ROOTS["generate" if path.parent.name == "generation" else "pretrain"])[path.parent.name]
    return {"": {field.name for field in dataclasses.fields(cls)}}


TARGETS = sorted({str(node[TARGET]) for path in GROUPS for node in nodes_of(read_yaml(path)).values()})


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_group_lists_every_field_of_its_class_with_a_meaning(path: Path) -> None:
    file = read_yaml(path)
    assert file.header, "the first line says what the option is"
    for place, fields in expected_fields(path).items():
        listed = {key.removeprefix(place) for key in file.lines if key.startswith(place)} - {TARGET}
        assert listed == fields
        assert [field for field in fields if len(file.comments[f"{place}{field}"]) < 5] == []


@pytest.mark.parametrize("path", ROOT_FILES, ids=lambda path: path.stem)
def test_a_root_lists_every_field_that_no_group_gives(path: Path) -> None:
    file = read_yaml(path)
    groups = set(Choices(path.stem, None).options)
    if path.stem == "prepare":
        assert set(file.tree) == {"defaults"}, "prepare is composed like pretrain"
        return
    expected = set()
    for name, hint in get_type_hints(ROOTS[path.stem]).items():
        if name in groups:
            continue
        section = dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ()
        expected |= {f"{name}.{field.name}" for field in section} or {name}
    keys = [key for key in file.lines if key.partition(".")[0] != "defaults"]
    listed = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    assert expected <= listed
    assert listed - expected <= set(known_keys(compose(path.stem, []))), "the rest are values for a group"
    assert [key for key in expected if len(file.comments[key]) < 5] == []


def test_a_group_option_differs_from_its_sisters_only_in_values() -> None:
    """The same class is described in the same words wherever it is listed."""
    words: dict[tuple[str, str], set[str]] = {}
    for path in GROUPS:
        file = read_yaml(path)
        for place, node in (nodes_of(file) or {"": {TARGET: path.parent.name}}).items():
            for key, comment in file.comments.items():
                if key.startswith(place) and TARGET not in key:
                    words.setdefault((str(node[TARGET]), key.removeprefix(place)), set()).add(comment)
    assert {field: found for field, found in words.items() if len(found) > 1} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_the_class_has_no_default_but_for_what_only_code_can_give(target: str) -> None:
    cls = resolve(target)
    given_by_code = set(fields_of(cls)[0]) - set(config_fields(cls)[0])
    assert given_by_code <= {"tokenizer"}


def test_the_sections_have_no_defaults() -> None:
    for root in ROOTS.values():
        for hint in (root, *get_type_hints(root).values()):
            if dataclasses.is_dataclass(hint):
                assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(hint))


def test_none_was_overlooked() -> None:
    counted = sum(len(fields) for path in GROUPS for fields in expected_fields(path).values())
    assert (len(GROUPS), counted, len(TARGETS)) == (N_GROUP_FILES, N_FIELDS, N_CLASSES)
