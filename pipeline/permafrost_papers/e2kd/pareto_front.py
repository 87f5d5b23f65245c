"""The Pareto front of a guided teacher: epochs that are best in accuracy and localization.

Guidance trades accuracy against localization, so the choice between the epochs on the front is left to the user
(Rao et al. 2023: F1, EPG and IoU, in steps of 0.005).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from permafrost.config.teaching import TeachConfig
from permafrost.core.json_entries import from_dict
from permafrost.evaluation.forward import evaluate_training
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.random_views import trained_picture
from permafrost.loading.subset import rows_of_split
from permafrost.models.classifier import Classifier
from permafrost.store.reader import Store
from permafrost.training.kept_epochs import KeptEpochs, read_listed
from permafrost_papers.e2kd.options import GuidedTeachingConfig

STEP = 0.005
FOLDER = "pareto"
FRONT_NAME = "front.json"
_RIGHT = ("f1", "accuracy")
_REASONS = ("epg", "iou")


def pareto_front(points: Sequence[Sequence[float]], step: float = STEP) -> list[int]:
    """Return the positions of the points that no other point dominates, with values compared in steps of `step`.

    A point dominates another if it is at least as good in every value and better in one. Of equal points the first is
    kept.

    Args:
        points: Values of each point, of which higher ones are better.
        step: Width of the intervals in which values count as equal.
    """
    binned = [tuple(int(value / step + 1e-9) for value in point) for point in points]
    return [
        position
        for position, mine in enumerate(binned)
        if not any(
            all(first >= second for first, second in zip(other, mine, strict=True))
            and (other != mine or earlier < position)
            for earlier, other in enumerate(binned)
            if earlier != position
        )
    ]


class ParetoFront:
    """Keeper of the weights of the epochs on the front, in <run>/pareto/."""

    def __init__(self, folder: Path, evaluator: Callable[[Classifier], Mapping[str, Any]]) -> None:
        """Set the folder of the run and the evaluator.

        Args:
            folder: Folder of the run.
            evaluator: Function that returns a network's metrics on the split by which epochs are compared.

        Raises:
            DamagedFileError: If an earlier call has left a damaged front.
        """
        self.files = KeptEpochs(folder / FOLDER / FRONT_NAME, "front", "epoch-")
        self.evaluator = evaluator
        self.members()  # a damaged file is an error before the training, not after an epoch

    def __call__(self, model: Classifier, epoch: int) -> None:
        """Evaluate the network after an epoch, keep it if it is on the front, and delete epochs that left the front."""
        metrics = self.evaluator(model)
        right = next(name for name in _RIGHT if name in metrics)
        point = {name: float(metrics[name]) for name in (right, *_REASONS) if name in metrics}
        others = [member for member in self.members() if member["epoch"] != epoch]
        candidates: list[dict[str, Any]] = [*others, {"epoch": epoch, **point}]
        best = pareto_front([[candidate[name] for name in point] for candidate in candidates])
        front = [candidates[position] for position in best]
        self.files.write(model, epoch, front, {member["epoch"] for member in front})

    def members(self) -> list[dict[str, Any]]:
        """Read the members of the front so far, with epoch, metrics and the digest of their weights.

        Raises:
            DamagedFileError: If a digest or a type is wrong.
        """
        advice = "delete it; the epochs before the next one are then not on the front"
        return read_listed(self.files.path, "front", _check_front, advice)


def _check_front(values: dict[str, Any]) -> None:
    for member in from_dict(_FrontFile, values).front:
        from_dict(_Member, {"epg": None, "iou": None, "f1": None, "accuracy": None} | member)


@dataclass(frozen=True, kw_only=True)
class _Member:
    """Entry of an epoch in front.json, of whose metrics a data set has some."""

    epoch: int
    sha256: str
    f1: float | None
    accuracy: float | None
    epg: float | None
    iou: float | None


@dataclass(frozen=True, kw_only=True)
class _FrontFile:
    """Entries of front.json."""

    front: tuple[dict[str, Any], ...]


def keep_front(
    config: TeachConfig, folder: Path, store: Store, decode_threads: int
) -> ParetoFront | None:
    """Return the keeper of the front of a training, None if the teaching names no split for it."""
    teaching = config.teaching
    assert isinstance(teaching, GuidedTeachingConfig)
    if teaching.pareto_split is None:
        return None
    rows = rows_of_split(store.index, teaching.pareto_split)
    dataset = StoreDataset(store, rows, with_regions=True, decode_threads=decode_threads)
    size = store.size if teaching.augment.size is None else (teaching.augment.size,) * 2
    picture = trained_picture(store, teaching.augment)
    dataset = dataset.in_picture(picture and picture.on(config.evaluate.frame))
    options = replace(config.evaluate, region=teaching.region)
    return ParetoFront(folder, partial(evaluate_training, size, dataset, options))
