"""Pareto front of the epochs of a guided teacher: epochs that no other epoch dominates in all metrics.

Guidance trades accuracy against localization, so the choice between the epochs on the front is left to the user
(Rao et al. 2023: F1, EPG and IoU, in steps of 0.005).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permafrost.core.files import write_atomically
from permafrost.core.signed_files import damaged, read_json, write_json
from permafrost.models.classifier import Classifier
from permafrost.store.entries import EntryError, from_dict

STEP = 0.005
FOLDER = "pareto"
FRONT_NAME = "front.json"
_RIGHT = ("f1", "accuracy")
_REASONS = ("epg", "iou")


def pareto_front(points: Sequence[Sequence[float]], step: float = STEP) -> list[int]:
    """Positions of the points that no other point dominates, with values compared in steps of `step`.

    A point dominates another if it is at least as good in every value and better in one. Of equal points the first is
    kept.
    """
    binned = [tuple(int(value / step + 1e-9) for value in point) for point in points]
    front = []
    for position, mine in enumerate(binned):
        beaten = any(
            all(theirs >= own for theirs, own in zip(other, mine, strict=True))
            and (other != mine or earlier < position)
            for earlier, other in enumerate(binned)
            if earlier != position
        )
        if not beaten:
            front.append(position)
    return front


class ParetoFront:
    """Keeper of the weights of the epochs on the front, in <run>/pareto/."""

    def __init__(self, folder: Path, evaluator: Callable[[Classifier], Mapping[str, Any]]) -> None:
        """Set the folder of the run and the evaluator.

        evaluator  function that returns a network's metrics on the split by which epochs are compared
        """
        self.folder = folder / FOLDER
        self.evaluator = evaluator
        self.members()  # a damaged file is an error before the training, not after an epoch

    def __call__(self, model: Classifier, epoch: int) -> None:
        """Evaluate the network after an epoch, keep it if it is on the front, and delete epochs that left the front."""
        from safetensors.torch import save

        metrics = self.evaluator(model)
        right = next(name for name in _RIGHT if name in metrics)
        point = {name: float(metrics[name]) for name in (right, *_REASONS) if name in metrics}
        candidates = [c for c in self.members() if c["epoch"] != epoch]
        own: dict[str, Any] = {"epoch": epoch, **point}
        candidates.append(own)
        kept = pareto_front([[c[name] for name in point] for c in candidates])
        if len(candidates) - 1 in kept:
            state = {k: v.contiguous().cpu() for k, v in model.network.state_dict().items()}
            own["sha256"] = write_atomically(self.folder / weights_name(epoch), save(state))
        front = [candidates[position] for position in kept]
        write_json(self.folder / FRONT_NAME, {"front": front})
        wanted = {weights_name(c["epoch"]) for c in front}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in wanted:
                path.unlink()

    def members(self) -> list[dict[str, Any]]:
        """Members of the front so far, with epoch, metrics and the digest of their weights.

        Raises DamagedFileError for wrong digests and types.
        """
        path = self.folder / FRONT_NAME
        if not path.exists():
            return []
        advice = "delete it; the epochs before the next one are then not on the front"
        values = read_json(path, advice)
        try:
            from_dict(_FrontFile, values)
            for member in values["front"]:
                from_dict(
                    _Member, {"epg": None, "iou": None, "f1": None, "accuracy": None} | member
                )
        except EntryError as error:
            raise damaged(path, error, advice) from error
        front: list[dict[str, Any]] = values["front"]
        return front


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


def weights_name(epoch: int) -> str:
    """Name of the file of an epoch's weights."""
    return f"epoch-{epoch:04d}.safetensors"
