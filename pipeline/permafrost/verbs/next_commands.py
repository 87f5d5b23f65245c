"""Commands that are suggested after a store is packed, and after a teacher pass is made."""

from __future__ import annotations

import logging
import shlex
from itertools import chain, count
from pathlib import Path
from pkgutil import resolve_name

import numpy as np

from permafrost.config.explainers import EXPLAINERS, ExplainerConfig
from permafrost.config.methods import METHODS
from permafrost.config.models import CifarModelConfig, table_arguments
from permafrost.config.store import OUTPUTS
from permafrost.core.records import NO_LABEL
from permafrost.evaluation.trained_student import (
    EVALUATED_SPLITS,
    labeled_splits,
    named_like,
    split_arguments,
)
from permafrost.loading.subset import rows_of_split
from permafrost.models.trained_weights import DESCRIPTION_NAME, MODEL_NAME, read_entries
from permafrost.runs.folder import RunFolder
from permafrost.sources.classes import find_mirrored
from permafrost.storage.addresses import Bucket
from permafrost.store.manifest import CANONICAL_VIEW
from permafrost.store.reader import Store, TeacherPass
from permafrost.training.student_passes import served_methods

logger = logging.getLogger("permafrost.precompute")

_METHODS = ("e2kd", "cat_kd", "at", "features", "embedding", "kd")
"""Methods that are suggested for a pass, in order of preference: those that read most of what it stores first."""
_OF_CLASSES = ("target_classes", "max_classes")
"""Entries of a manifest that say which classes are explained."""
_STUDENT_STAGES = 3
"""Number of stages of the default student, one fewer than that of a student for photographs."""
_PHOTOGRAPHS = "teacher=torchvision", "teacher.name=resnet18"
"""Teacher for frames that are too large for the default one."""


class NextCommands:
    """Commands to run on a store next."""

    def __init__(self, store: Store, path: Path | Bucket) -> None:
        """Name the store.

        Args:
            store: The store.
            path: Its folder or address, as its user named it.
        """
        self.store = store
        self.path = path

    def after_packing(self, run: str, teacher: str = "") -> str:
        """Return a command that completes a pass that lacks appended records, or else one that trains a student.

        The student learns from the pass `teacher`, named by its folder or by the part before its last hyphen, if any.
        Without a pass it is one that trains a teacher. It is empty if only the commands that made passes would
        complete them, which is logged.
        """
        generations = self.store.num_generations
        numbers = [
            (made, len(self.store.manifest.classes_of(made.num_classes)))
            for made in self.store.usable_passes()
        ]
        most = max((known for _, known in numbers), default=0)
        # Of passes of classes, those whose teacher knows the most.
        passes = [made for made, known in numbers if known in (0, most)]
        passes.sort(key=lambda made: teacher not in (made.name, made.name.rpartition("-")[0]))
        incomplete = [made for made in passes if made.num_generations < generations]
        if not incomplete:
            return self.distill(run, passes[0]) if passes else self.teach(run)
        for made in incomplete:
            if command := self._teach_later_classes(run, made):
                return command
            weights = Path(made.manifest.made_with.get("weights", ""))
            if (weights.parent / DESCRIPTION_NAME).exists():
                arguments = [f"store.path={self.path}", *_arguments_of_pass(made, weights.parent)]
                return " ".join(["permafrost precompute", *map(shlex.quote, arguments)])
        logger.warning(
            "the appended records have no targets in %s; the command that made a pass, typed again, adds them",
            ", ".join(made.name for made in incomplete),
        )
        return ""

    def _teach_later_classes(self, run: str, made: TeacherPass) -> str:
        """Return a command that trains the teacher of a pass on classes that were appended, empty without any.

        It is also empty if no run has trained the teacher.
        """
        manifest, weights = self.store.manifest, Path(made.manifest.made_with.get("weights", ""))
        known = manifest.classes_of(made.num_classes) if made.manifest.has_logits else ()
        is_of_run = weights.name == MODEL_NAME and (weights.parent / DESCRIPTION_NAME).exists()
        if not is_of_run or not 0 < len(known) < len(manifest.classes):
            return ""
        side = f"teaching.augment.size={read_entries(weights.parent).input_size[0]}"
        usual = self.teach("" if (RunFolder(run).path / "teach").exists() else run)
        arguments = [
            side if word.startswith("teaching.augment.size=") else word
            for word in shlex.split(usual)
            if not word.startswith("teacher")
        ]
        start = [f"{option}={weights.parent}" for option in ("teacher.weights", "teaching.start")]
        return shlex.join([*arguments[:4], "teacher=saved", *start, *arguments[4:]])

    def teach(self, run: str) -> str:
        """Return a command that trains a teacher on the store's kind of records, labels and splits.

        Without another split it is evaluated on the records that it has learned, which is logged.
        """
        arguments = [f"store.path={self.path}", f"run={self._name(run, 'teacher')}"]
        if not self.store.form.has_places:
            arguments += [*table_arguments("teacher"), "teaching.augment=none"]
        elif is_large(self.store.size):
            arguments += [
                *_PHOTOGRAPHS,
                *self._augment_arguments("teaching.augment", self.store.size),
            ]
        else:
            arguments.append("teacher=cifar")
        if self.store.manifest.multi_label:
            arguments.append("teaching.loss=bce")
        split = _training_split(self.store)
        arguments += [] if split == "train" else [f"teaching.split={split}"]
        others = labeled_splits(self.store) - {split}
        if not others:
            logger.warning(
                "all labeled records of %s are of split %s, so a teacher is evaluated only on what it has learned; "
                "pack the data with data.test_fraction=0.2 into a new store.path, which leaves a split test",
                self.path,
                split,
            )
        arguments += split_arguments(others or {split})
        return " ".join(["permafrost teach", *map(shlex.quote, arguments)])

    def distill(self, run: str, teacher: TeacherPass) -> str:
        """Return a command that trains a student on a pass, by a method that the pass can serve.

        It replays the views of a pass that stores them. Of a teacher that does not know all classes, and was trained by
        a run, it is a command that trains it on all of them.
        """
        if command := self._teach_later_classes(run, teacher):
            return command
        replays = teacher.views["sampler"] != CANONICAL_VIEW
        arguments = [f"store.path={self.path}", f"run={self._name(run, 'student')}"]
        arguments += ["mode=replay"] if replays else []
        split = _training_split(self.store)
        arguments += [] if split == "train" else [f"split={split}"]
        if suggested := _suggested_arguments(self.store, teacher):
            arguments += suggested
        elif self.store.form.has_places:
            side = teacher.manifest.teacher["preprocessing"].get("input_size")
            size = (side, side) if side else self.store.size
            arguments += _method_arguments(self.store, teacher, split, is_large(size))
            if is_large(self.store.size):
                arguments += self._augment_arguments("augment", size)
        else:
            arguments += ["method=kd", *table_arguments("student"), "augment=none"]
        if self.store.form.has_places:
            arguments += self._holdout_arguments(split)
        if replays or len(self.store.pass_folders()) > 1:
            arguments.append(f"store.teacher={teacher.name}")
        return " ".join(["permafrost distill", *map(shlex.quote, arguments)])

    def _name(self, run: str, network: str) -> str:
        """Return the name of a run, or a new one, with the store's name if there is a run of the usual one."""
        of_store = f"{str(self.path).rpartition('/')[2]}-{network}"
        names = chain((f"my-{network}", of_store), (f"{of_store}-{n}" for n in count(2)))
        return run or next(name for name in names if not RunFolder(name).path.exists())

    def _augment_arguments(self, section: str, size: tuple[int, int]) -> list[str]:
        """Return arguments for views of large frames, at the usual size of classifiers or below."""
        twins = find_mirrored(self.store.manifest.classes)
        if twins:
            logger.info(
                "the next command has %s=pad_crop, without horizontal flips, as a flip makes class %r look like %r",
                *(section, *twins),
            )
        recipe = "pad_crop" if twins else "pad_crop_flip"
        return [f"{section}={recipe}", f"{section}.size={min(224, *size)}"]

    def _holdout_arguments(self, split: str) -> list[str]:
        """Return arguments that hold out a fifth of the smallest class if no other split is left to evaluate on."""
        index = self.store.index
        has_classes = bool(self.store.manifest.classes) and not self.store.manifest.multi_label
        if not has_classes or labeled_splits(self.store) != {split}:
            return []
        labels = index.values("label", rows_of_split(index, split))
        counts = np.bincount(labels[labels != NO_LABEL])
        held_out = int(counts[counts > 0].min()) // 5
        return [f"subset.holdout={held_out}"] if held_out and (labels != NO_LABEL).all() else []


def is_large(size: tuple[int, int]) -> bool:
    """Return whether images of (height, width) `size` are too large for the default network."""
    return max(size) > CifarModelConfig.largest_side


def _arguments_of_pass(made: TeacherPass, network: Path) -> list[str]:
    """Return arguments that repeat a pass of a network of a run."""
    outputs = ",".join(name for name in OUTPUTS if made.fields_of(name))
    explained = made.manifest.explainer
    kind, *options = (made.explainer or "gradcam").split()
    options += [f"{name}={explained[name]}" for name in _OF_CLASSES if name in explained]
    return [
        *("teacher=saved", f"teacher.weights={network}", f"annotate.outputs=[{outputs}]"),
        *([] if kind == "gradcam" else [f"explainer={kind}"]),
        *(f"explainer.{option}" for option in options if option != "target_classes=top1"),
    ]


def _suggested_arguments(store: Store, teacher: TeacherPass) -> list[str]:
    """Return arguments of the first method that suggests a student for a pass by itself, [] if none does."""
    return next(
        (
            [f"method={kind}", *words]
            for kind, options in METHODS.items()
            if options.suggestion and (words := resolve_name(options.suggestion)(store, teacher))
        ),
        [],
    )


def _method_arguments(
    store: Store, teacher: TeacherPass, split: str, needs_large: bool
) -> list[str]:
    """Return arguments that choose a method for a pass over images, and a student unless the default one suits."""
    from permafrost.loading.selected_records import SelectedRecords  # imports torch

    served = served_methods(teacher) if not teacher.views.get("mix") else ["kd"]
    has_logits, many = teacher.manifest.has_logits, store.manifest.multi_label
    labels_apply = not has_logits or bool(store.manifest.classes_of(teacher.num_classes))
    rows = rows_of_split(store.index, split)
    has_labels = SelectedRecords(store, rows, labels_apply=labels_apply).has_labels
    if not has_labels and not (has_logits and not many):
        served = [name for name in served if name not in ("cat_kd", "at")]
    if many and teacher.manifest.temperatures:  # mld needs the logits of all classes
        served = [name for name in served if name not in ("e2kd", "kd")]
    if teacher.explainer is not None and not has_logits and has_labels:
        served = ["e2kd"]
    method = next((name for name in _METHODS if name in served), "labels")
    arguments = [f"method={method}"]
    if method in ("e2kd", "kd"):
        arguments += ["method.logits=mld"] if many else []
    elif method == "at" and len(teacher.fields_of("attention")) != _STUDENT_STAGES + needs_large:
        arguments.append("method.stages=[-1]")
    if method in ("cat_kd", "at") and not has_labels:
        arguments += ["method.lambda_ce=0", "method.lambda_kd=1"]
    if method in ("features", "embedding"):
        if many and has_labels:
            arguments.append("method.lambda_ce=1")
        elif has_logits and not many:
            arguments.append("method.lambda_kd=1")
    student: tuple[str, ...] = ()
    if method == "e2kd" and teacher.explainer is not None:
        arguments += [] if has_logits else ["method.lambda_kd=0", "method.lambda_ce=1"]
        arguments += ["method.explainer=gradcam"] if teacher.explainer == "other" else []
        kind = teacher.explainer.split()[0]
        student = EXPLAINERS.get(kind, ExplainerConfig).student_arguments
    if needs_large:  # B-cos networks have the same names
        kind = student[0] if student else "student=torchvision"
        student = kind, "student.name=resnet18"
    return [*arguments, *student]


def _training_split(store: Store) -> str:
    """Return the split to train on: one that is named so, or else the largest one that is not for evaluation."""
    sizes = {split: count for split, count in store.manifest.records.items() if count}
    split = named_like(sizes, ("train", "training"))
    rest = sizes.keys() - set(EVALUATED_SPLITS) or sizes.keys()
    return split or max(rest, key=lambda name: (sizes[name], name))
