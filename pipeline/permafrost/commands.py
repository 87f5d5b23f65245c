"""Commands: those that are suggested next, and those that made a run."""

from __future__ import annotations

import logging
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.config.builder import build_verb_config
from permafrost.config.models import table_words
from permafrost.config.verbs import VERBS, PrecomputeConfig
from permafrost.core.errors import UserError
from permafrost.evaluation.inputs import trains_classifier
from permafrost.loading.subset import HOLDOUT, rows_of_split
from permafrost.models.resolve import resolve_precompute
from permafrost.models.saved import is_finished, read_description
from permafrost.models.trained_weights import read_entries
from permafrost.runs.folder import CONFIG_NAME, read_config, run_folder
from permafrost.runs.mirrors import RUNS
from permafrost.storage.signed_files import DamagedFileError
from permafrost.store.manifest import CANONICAL_VIEW, MANIFEST_NAME
from permafrost.training.student_passes import served_methods

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from permafrost.store.reader import Store, TeacherPass

logger = logging.getLogger("permafrost.commands")

_VERBS = ("teach", "precompute", "sweep", "distill", "evaluate", "report")
"""Verbs in the order in which a run uses them."""
_EVALUATED_SPLITS = ("test", "val", "validation", "valid", "holdout", "train")
"""Splits on which a student may be evaluated, in order of preference."""
_METHODS = ("e2kd", "cat_kd", "at", "features", "embedding", "kd")
"""Methods that are suggested for a pass, in order of preference: those that read most of what it stores first."""
_STUDENT_STAGES = 3
"""Number of stages of the default student."""
_PROBES = "evaluators=[knn,linear_probe]"


def teach_command(store: Store, run: str) -> str:
    """Return a command that trains a teacher on a store: its kind of records, labels and splits."""
    words = [f"store.path={store.path}", f"run={run}"]
    if store.is_table:
        words += [*table_words("teacher"), "teaching.augment=none"]
    if store.manifest.multi_label:
        words.append("teaching.loss=bce")
    split = _training_split(store)
    words += [] if split == "train" else [f"teaching.split={split}"]
    words += _split_words(set(store.manifest.records))
    return " ".join(["permafrost teach", *map(shlex.quote, words)])


def distill_command(store: Store, run: str, teacher: TeacherPass) -> str:
    """Return a command that trains a student on a pass of a store, by a method that the pass can serve."""
    words = [f"store.path={store.path}", f"run={run}"]
    split = _training_split(store)
    words += [] if split == "train" else [f"split={split}"]
    if store.is_table:
        words += ["method=kd", *table_words("student"), "augment=none"]
    else:
        words += _method_words(store, teacher, split)
    if len(store.pass_folders()) > 1:
        words.append(f"store.teacher={teacher.name}")
    return " ".join(["permafrost distill", *map(shlex.quote, words)])


def _method_words(store: Store, teacher: TeacherPass, split: str) -> list[str]:
    """Return words that choose a method for a pass over images, and what it needs besides; none if the default does."""
    from permafrost.loading.selected_records import SelectedRecords  # imports torch

    served = served_methods(teacher)
    has_logits, many = teacher.manifest.has_logits, store.manifest.multi_label
    labels_apply = not has_logits or teacher.num_classes == len(store.manifest.classes)
    rows = rows_of_split(store.index, split)
    has_labels = SelectedRecords(store, rows, labels_apply=labels_apply).has_labels
    if not has_labels and not (has_logits and not many):
        served = [name for name in served if name not in ("cat_kd", "at")]
    if many and teacher.manifest.temperatures:  # mld needs the logits of all classes
        served = [name for name in served if name not in ("e2kd", "kd")]
    method = next((name for name in _METHODS if name in served), "labels")
    words = [] if method == "e2kd" else [f"method={method}"]
    if method in ("e2kd", "kd"):
        words += ["method.logits=mld"] if many else []
    elif method == "at" and len(teacher.fields_of("attention")) != _STUDENT_STAGES:
        words.append("method.stages=[-1]")
    if method in ("cat_kd", "at") and not has_labels:
        words += ["method.lambda_ce=0", "method.lambda_kd=1"]
    if method in ("features", "embedding"):
        if many and has_labels:
            words.append("method.lambda_ce=1")
        elif has_logits and not many:
            words.append("method.lambda_kd=1")
    if method == "e2kd" and teacher.explainer == "bcos_weights":
        words += ["student=bcos", "student.name=resnet8"]
    return words


def _training_split(store: Store) -> str:
    return _named_like(store.manifest.records, ("train", "training"))


def _named_like(splits: Iterable[str], names: Sequence[str]) -> str:
    """Return the split that has one of the names, alone or as a part (imagenet1k-train), or else the first."""
    known = sorted(splits)
    for name in names:
        if name in known:
            return name
        parts = [split for split in known if name in re.split(r"[^a-z0-9]+", split.lower())]
        if parts:
            return parts[0]
    return known[0]


def _split_words(splits: set[str]) -> list[str]:
    """Words that choose a split to evaluate, none for the default."""
    return _words_of_splits([_named_like(splits, _EVALUATED_SPLITS)])


def _words_of_splits(splits: Sequence[str]) -> list[str]:
    return [] if list(splits) == ["test"] else [f"evaluate.splits=[{','.join(splits)}]"]


def evaluate_command(run: str, store: Store, folder: Path, splits: Sequence[str] = ()) -> str:
    """Return the command that evaluates a student.

    A student whose last layer was not trained is evaluated by its features, if their records have labels.

    folder  folder of the trained student
    splits  splits to evaluate; empty chooses one
    """
    known = set(store.manifest.records)
    trained = read_description(folder)
    if trained.subset.holdout:
        known.add(HOLDOUT)
    chosen = _words_of_splits(splits) if splits else _split_words(known)
    words = [f"store.path={store.path}", f"run={run}", *chosen]
    if store.manifest.classes and not trains_classifier(folder):
        words.append(_PROBES)
        if trained.split != "train":
            words += [
                f"evaluate.{probe}.train_split={trained.split}" for probe in ("knn", "linear_probe")
            ]
    return " ".join(["permafrost evaluate", *map(shlex.quote, words)])


def commands_of(
    run: str, passes: Sequence[TeacherPass] = (), other_runs: Sequence[str] = ()
) -> list[str]:
    """Return the commands that made a run, in the order of their use.

    Besides one command per verb whose config the run has, these are the commands that made the store, the passes and
    their teachers, in whichever run of this folder their configs are.

    passes      passes that the run's students used; without any, the run's own precompute is stated
    other_runs  runs whose students are on the run's page, too
    """
    calls = list(_precompute_calls(run, passes[0].store)) if passes else []
    packing = [_command("precompute", path) for path, values in calls if _only_packs(values)][:1]
    taught, made = _own_commands(run, ("teach",)), []
    for teacher in passes:
        path, values = next((call for call in calls if _makes(call[1], teacher)), (None, {}))
        weights = values.get("teacher", teacher.manifest.made_with).get("weights")
        taught += _teaching_commands(teacher, Path(str(weights)).parent)
        made.append(
            f"permafrost precompute  # pass {teacher.name}: {teacher.folder / MANIFEST_NAME}"
            if path is None
            else _command("precompute", path)
        )
    verbs = _VERBS[2:] if passes else _VERBS[1:]
    for other in other_runs:
        made += _own_commands(other, [verb for verb in verbs if verb != "report"])
    return list(dict.fromkeys([*packing, *taught, *made, *_own_commands(run, verbs)]))


def _own_commands(run: str, verbs: Sequence[str]) -> list[str]:
    """Return the commands whose options are in the run's folder or next to results in it."""
    folder = run_folder(run)
    paths = {verb: (folder / f"{verb}.yaml", folder / verb / CONFIG_NAME) for verb in verbs}
    existing = {verb: [path for path in pair if path.exists()] for verb, pair in paths.items()}
    return [_command(verb, found[0]) for verb, found in existing.items() if found]


def _command(verb: str, path: Path) -> str:
    """Return the command that a file of options records, or one that names the file."""
    words = read_config(path, VERBS[verb]).get("command")
    return f"permafrost {shlex.join(words) if words else f'{verb}  # options: {path}'}"


def _precompute_calls(run: str, store: Store) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Iterate over the options of precompute on a store that are below runs/, those of the run first.

    A damaged file of another run is a warning; one of the run itself raises DamagedFileError.
    """
    paths = [*(run_folder(run)).glob("precompute*.yaml"), *RUNS.glob("*/precompute*.yaml")]
    for path in dict.fromkeys(
        sorted(paths, key=lambda path: (path.parent != run_folder(run), path))
    ):
        try:
            values = read_config(path, PrecomputeConfig, "store", "data", "teacher")
        except DamagedFileError as error:
            if path.parent == run_folder(run):
                raise
            logger.warning("%s", error)
            continue
        if Path(values["store"].get("path", "")).absolute() == store.path.absolute():
            yield path, values


def _only_packs(values: dict[str, Any]) -> bool:
    return bool(values["teacher"].get("kind", "none") == "none")


def _makes(values: dict[str, Any], teacher: TeacherPass) -> bool:
    """Return whether options of precompute are those of a pass, by the pass's fingerprint."""
    from permafrost.annotation.pass_plan import plan_pass
    from permafrost.annotation.stored_views import plan_stored_views

    if _only_packs(values):
        return False
    store, views = teacher.store, None
    try:
        config = resolve_precompute(build_verb_config("precompute", values), store)
        if teacher.views["sampler"] != CANONICAL_VIEW:
            views = plan_stored_views(
                store, config.views, config.augment, config.split, config.subset
            )
        return plan_pass(config, store, views).fingerprint == teacher.manifest.fingerprint
    except UserError:  # options of another version, or weights that are gone
        return False


def _teaching_commands(teacher: TeacherPass, folder: Path) -> list[str]:
    """Return the command that trained the teacher of a pass, none if it is not the network of a run's folder."""
    described = teacher.manifest.teacher.get("weights_sha256")
    path = folder / CONFIG_NAME
    if folder.name not in _VERBS or not is_finished(folder) or not path.is_file():
        return []
    is_same = read_entries(folder).weights_sha256 == described
    return [_command(folder.name, path)] if is_same else []
