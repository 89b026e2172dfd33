"""Which file every config group takes its values from: reads the folders, checks the spelling, asks Hydra to merge.

A recipe outside the config folders (``recipe=path/to/mine.yaml``) is read by ``yaml_file`` and handed to Hydra as an
option of the group ``recipe``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from llmkit.config.overrides import COMMAND_LINE, Override
from llmkit.config.suggest import did_you_mean, nearest
from llmkit.config.yaml_file import YamlFile, read_yaml
from llmkit.errors import ConfigError, Problem

USER_RECIPE = "the_users_own"  # the option's name inside Hydra


def recipes_dir() -> Path:
    """The config folder that belongs to this package: inside an installed wheel, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipes_of(command: str, group: str, option: str) -> Iterator[str]:
    """The packaged recipes of a command that choose ``option`` of ``group``, or leave it where it is the usual one."""

    def chosen(path: Path) -> str | None:
        choices: dict[str, str | None] = {}
        for entry in read_yaml(path).tree.get("defaults", []):
            choices |= entry if isinstance(entry, dict) else {}
        return choices.get(f"override /{group}", choices.get(group))

    usual = chosen(recipes_dir() / f"{command}.yaml")
    for path in sorted((recipes_dir() / "recipe").glob("*.yaml")):
        if (chosen(path) or usual) == option:
            yield path.stem


def config_folders(config_dir: Path | None) -> list[Path]:
    """Where groups and roots are looked for, the user's folder first."""
    if config_dir is None:
        return [recipes_dir()]
    if not config_dir.is_dir():
        raise ConfigError("no such folder", where=f"--config-dir {config_dir}")
    return [config_dir.resolve(), recipes_dir()]


class Choices:
    """The groups of one command, their options, and what the command line chose."""

    def __init__(self, command: str, config_dir: Path | None) -> None:
        self.command = command
        self.folders = config_folders(config_dir)
        self._files: dict[Path, YamlFile] = {}
        self.chosen = self._defaults(command)  # group -> option, None where nothing is chosen
        self.options = {group: self._options(group) for group in self.chosen}
        self.problems: list[Problem] = []
        self.incomplete = False  # something chosen cannot even be guessed
        self.hydra: list[str] = []
        self.recipe_file: YamlFile | None = None

    def find(self, config: str) -> Path | None:
        """The file of ``group/option`` or of a root."""
        paths = (folder / f"{config}.yaml" for folder in self.folders)
        return next((path for path in paths if path.is_file()), None)

    def read(self, path: Path) -> YamlFile:
        if path not in self._files:
            self._files[path] = read_yaml(path)
        return self._files[path]

    def _defaults(self, root: str) -> dict[str, str | None]:
        file = self.find(root)
        if file is None:
            raise ConfigError(f"no file {root}.yaml", where=", ".join(map(str, self.folders)))
        found: dict[str, str | None] = {}
        for entry in self.read(file).tree.get("defaults", []):
            if isinstance(entry, dict):
                found |= entry
            elif entry != "_self_":
                found |= self._defaults(entry)
        return found

    def _options(self, group: str) -> list[str]:
        found = set()
        for folder in self.folders:
            for path in (folder / group).rglob("*.yaml"):
                found.add(path.relative_to(folder / group).with_suffix("").as_posix())
                if folder != recipes_dir():
                    self.read(path)  # Hydra would load it without any limit
        return sorted(found)

    # -- the command line -------------------------------------------------------------------------------------------

    def takes(self, override: Override) -> bool:
        """Whether ``override`` chooses an option (``model=gpt2``) and is not a value."""
        if "@" in override.key or "/" in override.key:
            return True
        return override.key in self.chosen and override.kind == "set" and not isinstance(override.value, dict)

    def add(self, override: Override) -> None:
        group, option = override.key, override.value
        if group not in self.chosen:
            self.hydra.append(override.hydra)
        elif group == "recipe" and isinstance(option, str) and self._is_path(option):
            self._use_file(Path(option).expanduser())
        elif option is None and group == "recipe":
            return
        else:
            self._choose(group, option, override.raw)

    def _is_path(self, option: str) -> bool:
        return option not in self.options["recipe"] and (option.endswith((".yaml", ".yml")) or "/" in option)

    def _choose(self, group: str, option: Any, raw: str) -> None:
        """Take ``option``, or the nearest one so that the rest can still be checked."""
        taken = self._corrected(group, option if isinstance(option, str) else raw, COMMAND_LINE)
        if taken is not None:
            self.chosen[group] = taken
            self.hydra.append(f"{group}={taken}")

    def _corrected(self, group: str, option: str, origin: str) -> str | None:
        options = self.options[group]
        if option in options:
            return option
        guess = nearest(option, options)
        fix = did_you_mean(guess) or f"one of {', '.join(options)}"
        if group == "data" and ("/" in option or "." in option):
            fix = f"did you mean data.path={option}?"
        self.problems.append(Problem(group, f"no option {option[:80]!r}", origin, fix))
        self.incomplete |= guess is None
        return guess

    # -- a recipe of the user's own ---------------------------------------------------------------------------------

    def _use_file(self, path: Path) -> None:
        if not path.is_file():
            guess = nearest(path.stem, self.options["recipe"])
            self.problems.append(Problem("recipe", f"no such file: {path}", COMMAND_LINE, did_you_mean(guess)))
            self.incomplete = True
            return
        file = read_yaml(path)
        defaults = list(self._sound_defaults(file))
        file.tree["defaults"] = sorted(
            defaults, key=lambda entry: isinstance(entry, dict)
        )  # Hydra wants overrides last
        self.recipe_file = file
        self.chosen["recipe"] = str(path)
        self.hydra.append(f"recipe={USER_RECIPE}")

    def _sound_defaults(self, file: YamlFile) -> Iterator[Any]:
        """Entries of the recipe's defaults list, misspelt options replaced by the nearest."""
        entries = file.tree.get("defaults", [])
        origin = f"{file.path}:{file.lines.get('defaults', 1)}"
        if not isinstance(entries, list):
            self.problems.append(Problem("defaults", "must be a list", origin))
            return
        for entry in entries:
            yield from self._sound_entry(entry, origin)

    def _sound_entry(self, entry: Any, origin: str) -> Iterator[Any]:
        if isinstance(entry, str):
            option = entry if entry == "_self_" else self._corrected("recipe", entry, origin)
            yield from [option] if option else []
            return
        for key, option in entry.items() if isinstance(entry, dict) else []:
            group = key.removeprefix("override ").strip().lstrip("/")
            if group not in self.chosen or not isinstance(option, str):
                guess = nearest(group, self.chosen)
                fix = did_you_mean(guess and f"override /{guess}: ...")
                self.problems.append(Problem("defaults", f"no such group: {key}", origin, fix))
            elif taken := self._corrected(group, option, origin):
                yield {f"override /{group}": taken}


def load(picked: Choices) -> tuple[dict[str, Any], list[tuple[str, YamlFile]]]:
    """The merged tree, interpolations still in it, and its (package, file) layers, the last one winning.

    Hydra says which files, in which order and at which place; their content comes through ``yaml_file`` alone.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode

    tell_hydra(picked)
    try:
        with initialize_config_dir(str(recipes_dir()), **version_base()):
            loader = GlobalHydra.instance().config_loader()
            layers = loader.compute_defaults_list(picked.command, picked.hydra, RunMode.RUN).defaults
    except HydraException as error:
        raise _composition_error(error, picked) from None
    files = [(layer.package or "", _file_of(picked, layer.config_path)) for layer in layers if not _is_hydras(layer)]
    tree: dict[str, Any] = {}
    for package, file in files:
        content = {key: value for key, value in file.tree.items() if key != "defaults"}
        for name in reversed(package.split(".") if package else []):
            content = {name: content}
        merge(tree, content)
    return tree, files


def merge(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Write ``new`` over ``old``, section by section; ``new`` stays untouched."""
    for name, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            merge(old[name], value)
        else:
            old[name] = copy.deepcopy(value)


_FOREIGN = re.compile(r"In 'recipe/(.+)': Could not override '/?(\w+)'")


def _composition_error(error: Exception, picked: Choices) -> ConfigError:
    reason = str(error.__cause__ or error).splitlines()[0]
    foreign = _FOREIGN.match(reason)
    if foreign:  # a recipe of another command
        what = f"recipe={foreign[1]} is not for `llmkit {picked.command}`: it sets {foreign[2]}"
        return ConfigError(what, where="recipe", fix="leave recipe out", problems=tuple(picked.problems))
    return ConfigError(
        f"the configuration cannot be composed: {reason}",
        where=", ".join(picked.hydra),
        problems=tuple(picked.problems),
    )


def _is_hydras(layer: Any) -> bool:
    return layer.config_path is None or layer.config_path.startswith("hydra/")


def _file_of(picked: Choices, config: str) -> YamlFile:
    if config == f"recipe/{USER_RECIPE}" and picked.recipe_file is not None:
        return picked.recipe_file
    path = picked.find(config)
    if path is None:
        raise ConfigError(f"no file {config}.yaml", where=", ".join(map(str, picked.folders)))
    return picked.read(path)


def tell_hydra(picked: Choices) -> None:
    """Make the recipe file and the user's folder known to Hydra, which then looks in that folder first."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from omegaconf import OmegaConf

    if picked.recipe_file is not None:
        place = {"group": "recipe", "package": "_global_", "provider": str(picked.recipe_file.path)}
        again: dict[str, Any] = {} if version_base() else {"replace": True}  # 1.3 always replaces, 1.4 wants to be told
        ConfigStore.instance().store(USER_RECIPE, OmegaConf.create(picked.recipe_file.tree), **place, **again)
    _first_folder[:] = picked.folders[:-1]
    if _first_folder:
        Plugins.instance().register(_search_plugin())


_first_folder: list[Path] = []


@cache
def _search_plugin() -> type:
    from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class FirstFolder(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for folder in _first_folder:
                search_path.prepend("llmkit", f"file://{folder}", SearchPathQuery(provider="main"))

    return FirstFolder


def version_base() -> dict[str, Any]:
    """Hydra 1.3 wants to be told which behaviour is expected; 1.4 deprecates being told."""
    from hydra import __version__

    return {"version_base": "1.3"} if __version__.startswith("1.3.") else {}
