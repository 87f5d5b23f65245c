"""A fixed, class-balanced set of a split's records: the same whoever is judged, however the records are ordered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import ConfigError
from pipeline.geometry import judged_view, view_images
from pipeline.labels import multi_hot
from pipeline.records import NO_LABEL
from pipeline.seeds import derive_seed
from pipeline.store.files import sha256_keys
from pipeline.stream import move_batch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from pipeline.config import EvaluateOptions
    from pipeline.dataset import StoreDataset
    from pipeline.evaluation.judge import Subject


@dataclass(frozen=True)
class ProbeSet:
    """Positions in the dataset, in blocks of records that are compared with each other."""

    blocks: tuple[NDArray[np.int64], ...]
    keys_sha256: str
    """Of the keys in their order."""

    @property
    def num_records(self) -> int:
        return sum(map(len, self.blocks))


def probe_set(dataset: StoreDataset, records: int, block_records: int, *seed: object) -> ProbeSet:
    """The first `records` of a balanced order, in near-equal blocks of at most `block_records`.

    seed  parts of what the order is drawn from
    """
    order = balanced_order(dataset, *seed)[:records]
    blocks = np.array_split(order, -(-len(order) // block_records)) if len(order) else []
    return ProbeSet(tuple(blocks), sha256_keys(dataset.keys.take(order).to_pylist()))


def balanced_order(dataset: StoreDataset, *seed: object) -> NDArray[np.int64]:
    """Positions of all records with labels, the classes taking turns, each permuted by (seed, class).

    Any consecutive part is as balanced as the classes' sizes allow; a record of many classes comes once.
    """
    keys = np.asarray(dataset.keys.to_pylist())
    members = {}
    for label, positions in _by_class(dataset).items():
        positions = positions[np.argsort(keys[positions])]
        generator = np.random.default_rng(derive_seed(*seed, label))
        members[label] = list(generator.permutation(positions))
    order: list[int] = []
    taken: set[int] = set()
    while any(members.values()):
        for waiting in members.values():
            while waiting and waiting[0] in taken:
                waiting.pop(0)
            if waiting:
                order.append(int(waiting.pop(0)))
                taken.add(order[-1])
    return np.array(order, np.int64)


def _by_class(dataset: StoreDataset) -> dict[int, NDArray[np.int64]]:
    """Positions of the records of each class."""
    if dataset.label_lists is not None:
        lists = dataset.label_lists.to_pylist()
        owners = np.repeat(np.arange(len(lists)), [len(labels) for labels in lists])
        labels = np.array([label for labels in lists for label in labels], np.int64)
    else:
        owners = np.flatnonzero(dataset.columns["label"] != NO_LABEL)
        labels = dataset.columns["label"][owners]
    return {int(label): np.unique(owners[labels == label]) for label in np.unique(labels)}


def check_probes(judge: str, dataset: StoreDataset, split: str, least: int) -> None:
    """ConfigError unless the split has labels of two classes and as many records as it takes at least.

    judge  for the message
    """
    classes = _by_class(dataset)
    labelled = len(np.unique(np.concatenate(list(classes.values())))) if classes else 0
    if len(classes) < 2 or labelled < least:
        raise ConfigError(
            f"judges={judge} compares with labels, and {split} has {labelled} labelled records in {len(classes)} "
            f"class(es); it takes at least {least} in 2: name another of the store's splits in evaluate.splits"
        )


def iter_views(
    subject: Subject, dataset: StoreDataset, positions: Sequence[int], options: EvaluateOptions
) -> Iterator[Tensor]:
    """Images f32 [b, 3, H, W] of these positions in the subject's judged view, on its device."""
    for start in range(0, len(positions), options.batch_size):
        rows = list(positions[start : start + options.batch_size])
        batch = move_batch(dataset.__getitems__(rows), subject.device)
        batch = judged_view(batch, options.frame, subject.input_size)
        yield view_images(batch, subject.input_size)


def hot_labels(dataset: StoreDataset, positions: Sequence[int]) -> Tensor:
    """Labels of records, hot f32 [n, K]; no image is read."""
    num_classes = len(dataset.store.manifest.classes)
    return multi_hot(dataset.labels_at(np.asarray(positions, np.int64)), num_classes)
