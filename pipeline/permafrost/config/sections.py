"""Sections of configs with their members and options, by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from permafrost.config.augment import AugmentOptions
from permafrost.config.environment import CONF
from permafrost.config.families import FAMILIES
from permafrost.config.options import Option, Options, Role, options_of
from permafrost.config.plugins import Family, experiment_folders
from permafrost.config.store import StoreOptions
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.config.verbs import VERBS, option_classes

GROUPS: dict[str, type[Options]] = {
    "store": StoreOptions,
    "trainer": TrainerOptions,
    "optimizer": OptimizerOptions,
    "augment": AugmentOptions,
}
"""Sections whose members are files of conf/ and share one class."""
DEFAULT_MEMBERS: Family[str] = Family(
    {
        **{
            "data": "none",
            "store": "zarr",
            "teacher": "none",
            "black_box": "none",
            "student": "cifar",
        },
        **{
            "explainer": "gradcam",
            "augment": "pad_crop",
            "views": "canonical",
            "teaching": "labels",
        },
        **{"method": "kd", "optimizer": "adamw", "trainer": "default", "cluster": "local"},
    }
)
"""Members that sections have unless one is chosen."""
OF_CLASS = {"store": "zarr", "trainer": "default", "augment": "none"}
"""Members that are the defaults of their class, and have no file."""


def section_names(verb: str) -> list[str]:
    """Return the names of the sections and options that a verb reads; for a sweep also those of its students."""
    return list(
        dict.fromkeys(
            option.name
            for cls in option_classes(verb)
            for option in options_of(cls)
            if Role.SET_BY_STAGE not in option.roles
        )
    )


def sections_of_verb(verb: str, composed: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a composed config that the verb reads."""
    return {name: value for name, value in composed.items() if name in section_names(verb)}


def section_of(argument: str) -> str:
    """Return the name of the section that an argument changes."""
    return argument.split("=", 1)[0].split(".")[0]


def group_members(section: str) -> list[str]:
    """Return the members that a section may choose, such as the methods of `method=`; empty if it has none."""
    if section == "experiment":
        return sorted(experiment_files())
    if section not in GROUPS:
        return sorted(FAMILIES.get(section, ()))
    defaults = {OF_CLASS[section]} if section in OF_CLASS else set()
    return sorted({*defaults, *(path.stem for path in (CONF / section).glob("*.yaml"))})


def experiment_files() -> dict[str, Path]:
    """Return the experiments of conf/ and of installed packages, by name; a package's begin with its entry point's."""
    return {
        (PurePath(name) / path.relative_to(folder).with_suffix("")).as_posix(): path
        for name, folder in _experiment_folders().items()
        for path in sorted(folder.rglob("*.yaml"))
    }


def experiment_file(name: str) -> Path | None:
    """Return the file of the experiment of a name, as `experiment_files` has it, without listing the others."""
    if (pure := PurePath(name)).as_posix() != name or pure.is_absolute() or ".." in pure.parts:
        return None
    paths = [
        folder / f"{name.removeprefix(prefix).removeprefix('/')}.yaml"
        for prefix, folder in _experiment_folders().items()
        if not prefix or name.startswith(f"{prefix}/")
    ]
    # A name may be too long for a file.
    return next((path for path in reversed(paths) if os.path.isfile(path)), None)  # noqa: PTH113


def _experiment_folders() -> dict[str, Path]:
    return {"": CONF / "experiment", **experiment_folders()}


def top_options() -> dict[str, Option]:
    """Return the options of all verbs by name: sections, and options outside sections."""
    return _options_by_name(tuple(verb.options for verb in VERBS.values()))


@cache  # by the classes, as a plug-in may add a verb later
def _options_by_name(classes: tuple[type[Options], ...]) -> dict[str, Option]:
    every = (option for cls in classes for option in options_of(cls))
    named = {option.name: option for option in every if Role.SET_BY_STAGE not in option.roles}
    return {"plugins": Option("plugins", tuple[str, ...], (), frozenset(), ()), **named}


def is_section(option: Option) -> bool:
    return isinstance(option.hint, type) and issubclass(option.hint, Options)


def with_kinds(section: str, value: Any) -> Any:
    """Write the member of a section, and of the sections in it, as {kind: member}."""
    if isinstance(value, str) and (section in FAMILIES or section in GROUPS):
        return {"kind": value}
    if isinstance(value, dict) and section in FAMILIES:
        return {
            name: with_kinds(name, inner) if name in GROUPS else inner
            for name, inner in value.items()
        }
    return value


def option_paths(verb: str) -> list[str]:
    """Return the full names of all options of a verb, of every member of its families, and of a sweep's students."""
    return list(
        dict.fromkeys(place for cls in option_classes(verb) for place in _paths_in(cls, ""))
    )


def _paths_in(cls: type[Options], prefix: str) -> Iterator[str]:
    for option in options_of(cls):
        if Role.SET_BY_STAGE in option.roles:
            continue
        where = f"{prefix}{option.name}"
        members = () if prefix else FAMILIES.get(option.name, {}).values()
        for member in members or ([option.hint] if is_section(option) else []):
            yield from _paths_in(member, f"{where}.")
        if not members and not is_section(option):
            yield where
