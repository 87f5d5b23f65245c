"""Commands: those that are suggested next, and those that are equivalent to the ones that made a run.

A config does not contain the words that were typed. The words are found again: an experiment, the members of groups,
and every value that differs from what these give. They are stated only if they compose to the same config.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from permafrost.config.builder import build_verb_config
from permafrost.config.compose import compose, group_members, sections
from permafrost.config.environment import CONF
from permafrost.config.models import table_words
from permafrost.config.points import point_words
from permafrost.config.runs import CONFIG_NAME, RUNS, read_config, to_plain_dict
from permafrost.config.verbs import VERBS, PrecomputeConfig
from permafrost.core.errors import UserError
from permafrost.core.files import sha256_file
from permafrost.loading.selection import HOLDOUT
from permafrost.models.resolve import resolve_precompute
from permafrost.models.saved import read_description
from permafrost.store.manifest import CANONICAL_VIEW, MANIFEST_NAME

if TYPE_CHECKING:
    from permafrost.store.reader import Store, TeacherPass

_VERBS = ("teach", "precompute", "sweep", "distill", "evaluate", "report")
"""Verbs in the order in which a run uses them."""
_WHOLE = ("arms", "grid", "columns", "group_sets")
"""Options whose value is one mapping."""
_EMPTY: tuple[Any, ...] = ({}, [], None)
"""Values of an option that is not set, as YAML and dataclasses write it."""
_EVALUATED_SPLITS = ("test", "val", "validation", "valid", "holdout", "train")
"""Splits on which a student may be evaluated, in order of preference."""


def teach_command(store: Store, run: str) -> str:
    """Return a command that trains a teacher on a store: its kind of records, labels and splits."""
    words = [f"store.path={store.path}", f"run={run}"]
    if store.is_table:
        words += [*table_words("teacher"), "augment@teaching.augment=none"]
    if store.manifest.multi_label:
        words.append("teaching.loss=bce")
    words += _split_words(set(store.manifest.records))
    return " ".join(["permafrost teach", *map(shlex.quote, words)])


def distill_command(store: Store, run: str, teacher: str) -> str:
    """Return a command that trains a student on a pass of a store.

    teacher  name of the pass
    """
    words = [f"store.path={store.path}", f"run={run}"]
    if store.is_table:
        words += ["method=kd", *table_words("student"), "augment=none"]
    if store.manifest.multi_label:
        words.append("method.logits=mld")
    if len(store.pass_folders()) > 1:
        words.append(f"store.teacher={teacher}")
    return " ".join(["permafrost distill", *map(shlex.quote, words)])


def _split_words(splits: set[str]) -> list[str]:
    """Words that choose a split to evaluate, none for the default."""
    chosen = next((split for split in _EVALUATED_SPLITS if split in splits), min(splits))
    return [] if chosen == "test" else [f"evaluate.splits=[{chosen}]"]


def evaluate_command(run: str, store: Store, folder: Path) -> str:
    """Return the command that evaluates a student that was not evaluated yet.

    folder  folder of the trained student
    """
    splits = set(store.manifest.records)
    if read_description(folder).subset.holdout:
        splits.add(HOLDOUT)
    words = [f"store.path={store.path}", f"run={run}", *_split_words(splits)]
    return " ".join(["permafrost evaluate", *map(shlex.quote, words)])


def commands_of(run: str, passes: Sequence[TeacherPass] = ()) -> list[str]:
    """Return the commands that repeat a run, in the order of their use.

    Besides one command per verb whose config the run has, these are the commands that made the store, the passes and
    their teachers, in whichever run of this folder their configs are.

    passes  passes that the run's students used; without any, the run's own precompute is stated
    """
    made = [_find_making(teacher, run) for teacher in passes]
    before = [*_packing_commands(run, passes, made), *_own_commands(run, ("teach",))]
    for teacher, found in zip(passes, made, strict=True):
        before += _teaching_commands(teacher, found)
    for teacher, found in zip(passes, made, strict=True):
        before.append(
            f"permafrost precompute  # pass {teacher.name}: {teacher.folder / MANIFEST_NAME}"
            if found is None
            else _command("precompute", found)
        )
    verbs = _VERBS[2:] if passes else _VERBS[1:]
    return list(dict.fromkeys([*before, *_own_commands(run, verbs)]))


def _own_commands(run: str, verbs: Sequence[str]) -> list[str]:
    paths = {verb: _config_path(run, verb) for verb in verbs}
    return [_command(verb, path) for verb, path in paths.items() if path is not None]


def _command(verb: str, path: Path, *more: str) -> str:
    """Return a command that is equivalent to a config, or one that names the config.

    more  words to add
    """
    words = _equivalent_words(verb, read_config(path, VERBS[verb]), path)
    if words is None:
        return " ".join([f"permafrost {verb}", *more]) + f"  # options: {path}"
    return " ".join([f"permafrost {verb}", *map(shlex.quote, [*words, *more])])


def _precompute_configs(run: str) -> list[Path]:
    """Return the configs of precompute below runs/, those of the run first."""
    own = sorted((RUNS / run).glob("precompute*.yaml"))
    return [*own, *sorted(path for path in RUNS.glob("*/precompute*.yaml") if path not in own)]


def _find_making(teacher: TeacherPass, run: str) -> Path | None:
    """Find the config of the precompute that made a pass, None if it was overwritten or is elsewhere."""
    return next((path for path in _precompute_configs(run) if _makes(path, teacher)), None)


def _makes(path: Path, teacher: TeacherPass) -> bool:
    """Return whether a config of precompute is that of a pass, by the pass's fingerprint."""
    from permafrost.annotation.stored_views import plan_stored_views
    from permafrost.annotation.teacher_pass import plan_pass

    store = teacher.store
    values = _read_precompute(path)
    if not _is_of_store(values, store) or values["teacher"]["kind"] == "none":
        return False
    try:
        config = resolve_precompute(build_verb_config("precompute", values), store)
        views = None
        if teacher.views["sampler"] != CANONICAL_VIEW:
            views = plan_stored_views(
                store, config.views, config.augment, config.split, config.subset
            )
        return plan_pass(config, store, views).fingerprint == teacher.manifest.fingerprint
    except UserError:  # options of another version, or weights that are gone
        return False


def _read_precompute(path: Path) -> dict[str, Any]:
    values = read_config(path, PrecomputeConfig, "store", "data", "teacher")
    for section in ("data", "teacher"):
        values[section] = {"kind": "none", **values[section]}
    return values


def _is_of_store(values: dict[str, Any], store: Store) -> bool:
    return Path(values["store"].get("path", "")).absolute() == store.path.absolute()


def _packing_commands(
    run: str, passes: Sequence[TeacherPass], made: Sequence[Path | None]
) -> list[str]:
    """Return the command that packs the store before a teacher is trained on it, if a config of it is found."""
    if not passes:
        return []
    packing = []
    for path in _precompute_configs(run):
        values = _read_precompute(path)
        packs = _is_of_store(values, passes[0].store) and values["data"]["kind"] != "none"
        if packs and values["teacher"]["kind"] == "none":
            return [_command("precompute", path)]
        if packs and path in made:
            packing.append(path)
    words = (
        _equivalent_words("precompute", _read_precompute(packing[0]), packing[0])
        if packing
        else None
    )
    if words is None:
        return []
    of_pass = ("teacher", "explainer", "annotate")
    words = [word for word in words if re.split("[.=]", word)[0] not in of_pass]
    return [" ".join(["permafrost precompute", *map(shlex.quote, [*words, "teacher=none"])])]


def _teaching_commands(teacher: TeacherPass, made: Path | None) -> list[str]:
    """Return the command that trained the teacher of a pass, if its weights are those of a run of this folder.

    made  config of the precompute that made the pass
    """
    weights = teacher.manifest.made_with.get("weights")
    if made is not None:
        weights = _read_precompute(made)["teacher"].get("weights")
    folder = Path(str(weights)).parent
    path, verb = folder / CONFIG_NAME, folder.name
    described = teacher.manifest.teacher.get("weights_sha256")
    if verb not in _VERBS or not path.is_file() or not Path(str(weights)).is_file():
        return []
    return [_command(verb, path)] if sha256_file(Path(str(weights))) == described else []


def _config_path(run: str, verb: str) -> Path | None:
    """Return the file of a verb's config: next to its results, or in the run's folder."""
    paths = (RUNS / run / f"{verb}.yaml", RUNS / run / verb / CONFIG_NAME)
    return next((path for path in paths if path.exists()), None)


def _compose(verb: str, words: list[str], *, is_built: bool) -> dict[str, Any]:
    """Compose words to plain values.

    is_built  with the defaults of all options, as next to results; otherwise as written by the command line
    """
    composed = compose(verb, words)
    if is_built:
        return to_plain_dict(build_verb_config(verb, composed))
    return sections(verb, composed)


def _equivalent_words(verb: str, values: dict[str, Any], path: Path) -> list[str] | None:
    """Return the shortest words found that compose to the values of a file, None if there are none."""
    is_built = path.name == CONFIG_NAME
    values = {name: value for name, value in values.items() if name != "inputs"}
    candidates = []
    for base in _bases(values):
        try:
            words = _words(verb, values, base, is_built=is_built)
            composed = _compose(verb, words, is_built=is_built)
        except UserError:  # an option of another version
            continue
        if not list(_different(values, composed)):
            candidates.append(words)
    return min(candidates, key=lambda words: len(" ".join(words)), default=None)


def _bases(values: dict[str, Any]) -> Iterator[list[str]]:
    """Iterate over the experiments that the values may come from, then no experiment."""
    for name, experiment in _experiments():
        if experiment.get("run") == values.get("run") or (
            "arms" in values and list(experiment.get("arms") or ()) == list(values["arms"] or ())
        ):
            yield [f"experiment={name}"]
    yield []


@cache
def _experiments() -> list[tuple[str, dict[str, Any]]]:
    folder = CONF / "experiment"
    return [
        (path.relative_to(folder).with_suffix("").as_posix(), yaml.safe_load(path.read_text()))
        for path in sorted(folder.rglob("*.yaml"))
    ]


def _words(verb: str, values: dict[str, Any], base: list[str], *, is_built: bool) -> list[str]:
    """Return the base with the members of groups and the values that differ from it."""
    words = list(base)
    known = _compose(verb, words, is_built=is_built)
    for name, value in values.items():
        kind = value.get("kind") if isinstance(value, dict) else None
        is_group = kind in group_members(name) and name not in ("optimizer",)
        if is_group and (known.get(name) or {}).get("kind") != kind:
            words.append(f"{name}={kind}")
    known = _compose(verb, words, is_built=is_built)
    return [*words, *(_word(option, value) for option, value in _different(values, known))]


def _word(option: str, value: Any) -> str:
    """Write an override, without quotes around a name or a path."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_/.][\w./:-]*", value):
        return f"{option}={value}"
    return point_words({option: value})[0]


def _different(values: Any, expected: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the options, by their dotted names, whose values differ."""
    if (
        isinstance(values, dict)
        and isinstance(expected, dict)
        and path.split(".")[-1] not in _WHOLE
    ):
        for name, value in values.items():
            yield from _different(value, expected.get(name), f"{path}.{name}" if path else name)
    elif values != expected and not (values in _EMPTY and expected in _EMPTY):
        yield path, values
