"""``llmkit recipes``: the recipes there are, and what one of them composes to."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from llmkit.config.check import config_error
from llmkit.config.choices import config_folders
from llmkit.config.compose import compose
from llmkit.config.suggest import did_you_mean, nearest
from llmkit.config.yaml_file import dump, header_of
from llmkit.errors import ConfigError


def run(cfg: None, args: argparse.Namespace) -> int:
    """``recipes`` lists; ``recipes show NAME`` prints the file and the composed configuration."""
    folder = Path(args.config_dir) if args.config_dir else None
    words = args.overrides
    if words and words[0] != "show":
        fix = f"llmkit recipes show {words[0]}" if words[0] in recipe_files(folder) else "llmkit recipes [show NAME]"
        raise ConfigError(f"no such word: {' '.join(words)[:80]}", fix=fix)
    if len(words) == 1 or len(words) > 2:
        raise ConfigError("`recipes show` takes one name", fix="`llmkit recipes` lists them")
    for line in show(words[1], folder) if words else listing(folder):
        print(line)
    return 0


def recipe_files(config_dir: Path | None) -> dict[str, Path]:
    """Recipe name to file; a recipe of ``config_dir`` hides a packaged one of the same name."""
    found: dict[str, Path] = {}
    for folder in reversed(config_folders(config_dir)):
        found |= {path.stem: path for path in sorted((folder / "recipe").glob("*.yaml"))}
    return dict(sorted(found.items()))


def listing(config_dir: Path | None) -> Iterator[str]:
    files = recipe_files(config_dir)
    width = max(map(len, files), default=0)
    for name, path in files.items():
        yield f"{name:<{width}}  {header_of(path.read_text(encoding='utf-8'))}"
    yield ""
    yield "llmkit recipes show NAME; llmkit pretrain recipe=NAME"


def show(name: str, config_dir: Path | None) -> Iterator[str]:
    files = recipe_files(config_dir)
    if name not in files:
        known = f"the recipes are: {', '.join(files)}"
        raise ConfigError(f"no recipe {name[:80]!r}", fix=did_you_mean(nearest(name, files)) or known)
    composed = compose("pretrain", [f"recipe={name}"], config_dir)
    if composed.problems:
        raise config_error(composed.problems)
    yield f"# -- {files[name]}"
    yield files[name].read_text(encoding="utf-8").rstrip()
    yield ""
    yield f"# -- llmkit pretrain recipe={name}"
    yield dump(composed.plain).rstrip()
