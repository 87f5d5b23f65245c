"""Facts in the folder of a trained student, and the command that evaluates it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.config.builder import build_config
from permafrost.config.distillation import DistillConfig
from permafrost.config.evaluation import TEST_SPLITS, feature_probes
from permafrost.config.methods import METHODS
from permafrost.core.errors import UserError
from permafrost.core.records import NO_LABEL
from permafrost.loading.subset import HOLDOUT, rows_of_split
from permafrost.models.saved import SavedNetwork
from permafrost.runs.folder import CONFIG_NAME, read_config

if TYPE_CHECKING:
    from permafrost.store.reader import Store

EVALUATED_SPLITS = (*TEST_SPLITS, HOLDOUT, "train")
"""Splits on which a student may be evaluated, in order of preference."""


UNTRAINED = "not trained, as the method compares features only: accuracy and maps mean nothing, its features do"
"""Description of the last layer of a student that no term of its method has reached."""


class TrainedStudent:
    """Facts about a student that its folder records."""

    def __init__(self, folder: Path) -> None:
        """Name the folder of the training, runs/<run>/distill."""
        self.folder = folder

    @property
    def _config(self) -> dict[str, Any]:
        path = self.folder / CONFIG_NAME
        return read_config(path, DistillConfig) if path.exists() else {}

    def epoch_metric(self, store: str) -> str | None:
        """Return the metric by which the epoch was chosen, if it was, on records of a store.

        Args:
            store: Fingerprint of the store.

        Returns:
            The metric as <split>.<metric>, None if the last epoch was kept or the records were those of another store.
        """
        values = self._config
        chosen: str | None = values.get("select_epoch")
        return chosen if values.get("inputs", {}).get("store") == store else None

    @property
    def trains_classifier(self) -> bool:
        """True if the training has reached the last layer, as far as its options are known."""
        method = self._config.get("method")
        try:
            return (
                method is None
                or build_config(METHODS[method["kind"]], method, "method").trains_classifier
            )
        except (KeyError, UserError):  # of another version, or of a plug-in that was not named
            return True

    def evaluate_command(self, run: str, store: Store, splits: Sequence[str] = ()) -> str:
        """Return the command that evaluates the student.

        A student whose last layer was not trained is evaluated by its features, if their records have labels. The
        command is empty if all labeled records are of the split that it was trained on.

        Args:
            run: Name of the run.
            store: Store of the records.
            splits: Splits to evaluate; empty chooses one.
        """
        trained = SavedNetwork(self.folder).describe()
        candidates = labeled_splits(store) | ({HOLDOUT} if trained.subset.holdout else set())
        if not splits and candidates == {trained.split} and store.manifest.classes:
            return ""  # an evaluation of what was trained on says nothing
        chosen = _arguments_of_splits(splits) if splits else split_arguments(candidates)
        arguments = [f"store.path={store.path}", f"run={run}", *chosen]
        if (probes := feature_probes()) and store.manifest.classes and not self.trains_classifier:
            arguments.append(f"evaluators=[{','.join(probes)}]")
            if trained.split != "train":
                arguments += [f"evaluate.{probe}.train_split={trained.split}" for probe in probes]
        return " ".join(["permafrost evaluate", *map(shlex.quote, arguments)])


def labeled_splits(store: Store) -> set[str]:
    """Return the splits of a store that have a label; all of them if none has."""
    labeled = set()
    for split in store.manifest.records:
        rows = rows_of_split(store.index, split) if store.manifest.records[split] else range(0)
        has_label = (
            store.index.list_lengths("labels", rows)
            if store.index.has_many_labels
            else store.index.values("label", rows) != NO_LABEL
        )
        if has_label.any():
            labeled.add(split)
    return labeled or set(store.manifest.records)


def split_arguments(splits: set[str]) -> list[str]:
    """Return the arguments that choose a split to evaluate, none for the default."""
    return _arguments_of_splits([named_like(splits, EVALUATED_SPLITS) or min(splits)])


def _arguments_of_splits(splits: Sequence[str]) -> list[str]:
    return [] if list(splits) == ["test"] else [f"evaluate.splits=[{','.join(splits)}]"]


def named_like(splits: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the split that has one of the names, alone or as a part (imagenet1k-train); None if there is none.

    Args:
        splits: Names of the splits.
        names: Names in order of preference.
    """
    known = sorted(splits)
    for name in names:
        if name in known:
            return name
        if parts := [split for split in known if name in re.split(r"[^a-z0-9]+", split.lower())]:
            return parts[0]
    return None
