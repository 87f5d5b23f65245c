"""A fixed, class-balanced set of a split's records, and the layers in which networks are compared on it.

    layer1, layer2, ...   ends of the stages, if they are known (models/classifier.py); for VGG before each pool
    features              the explained layer, for networks whose stages are not known (EfficientNet, a ViT)
    pooled                spatial average of the deepest of these layers
    logits                for networks that have neither (a perceptron, a B-cos ViT)

A comparison of features with labels needs several records per class: if all records have different classes, their
labels are all equally far apart and carry no information. If a block of the set has no room for LEAST_OF_A_CLASS
records of every class, it contains that many of some classes, drawn at random. The results are then conditional on
these classes.

Shape letters: B records, C channels, h w grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.core.digests import derive_seed, sha256_keys
from permafrost.core.errors import ConfigError, require
from permafrost.core.label_forms import multi_hot
from permafrost.core.records import NO_LABEL
from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.subset import members_of_classes, rows_at, rows_of_split
from permafrost.models.classifier import Classifier, Intermediates
from permafrost.store.arrow_files import write_table
from permafrost.store.index import RecordIndex

POOLED = "pooled"
_LOGITS = "logits"


def activations(model: Classifier, images: Tensor) -> dict[str, Tensor]:
    """Compute the activations [B, C, h, w] of each layer except `pooled`, or logits [B, K].

    Args:
        model: Network in eval mode.
        images: f32 [B, 3, H, W] in [0, 1].
    """
    try:
        output = model(images, Intermediates(stages=True))
    except ConfigError:  # the stages of this network are not known
        output = model(images)
    if output.stages:
        return {
            f"layer{number}": stage.output.detach()
            for number, stage in enumerate(output.stages, start=1)
        }
    if model.explainer == "gradcam":
        return {"features": output.features.detach()}
    return {_LOGITS: output.logits.detach()}  # the features of such a network are its input


def layer_features(layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the features [B, p] of every layer: the flattened activations, and `pooled`."""
    features = {name: values.flatten(1) for name, values in layers.items()}
    deepest = list(layers.values())[-1]
    return features if deepest.dim() == 2 else features | {POOLED: deepest.mean(dim=(2, 3))}


@torch.no_grad()
def layer_names(model: EvaluatedModel) -> list[str]:
    """Return the names of a network's layers from the finest to the deepest, by a forward pass of one blank image."""
    blank = torch.zeros(1, 3, *model.input_size, device=model.device)
    return list(layer_features(activations(model.network, blank)))


def pair_layers(layers: Sequence[str], other_layers: Sequence[str]) -> dict[str, str]:
    """Pair layers of one network with those of another, starting at the deepest.

    If one network has more layers, its finest ones are left out.

    Args:
        layers: Layers of one network, from the finest to the deepest.
        other_layers: Layers of the other network, from the finest to the deepest.

    Returns:
        Layer of the other network by that of the first, from the finest to the deepest.
    """
    paired = zip(reversed(layers), reversed(other_layers), strict=False)
    return dict(reversed(list(paired)))


def check_layers(
    option: str,
    pairs: Mapping[str, str],
    student_layers: Sequence[str],
    teacher_layers: Sequence[str],
) -> None:
    """Check that both networks have the layers that an option names.

    Args:
        option: Name of the option, for the message.
        pairs: Layer of the teacher for each layer of the student.
        student_layers: Layers that the student has.
        teacher_layers: Layers that the teacher has.

    Raises:
        ConfigError: If a network does not have a layer.
    """
    for title, names, known in (
        ("the student", pairs.keys(), student_layers),
        ("the teacher", pairs.values(), teacher_layers),
    ):
        for name in names:
            require(
                name in known,
                f"{option} names {name}, which {title} does not have; its layers are: {', '.join(known)}",
            )


# ---- probe set -------------------------------------------------------------------------------------


LEAST_OF_A_CLASS = 4
"""Minimum number of records of each class in a block."""


@dataclass(frozen=True)
class ProbeSet:
    """Positions of records in the dataset, in blocks within which records are compared."""

    blocks: tuple[NDArray[np.int64], ...]
    keys_sha256: str
    """Hash of the record keys in their order."""

    classes: int = 0
    """Number of classes among its records."""


def probe_set(
    dataset: StoreDataset,
    records: int,
    block_records: int,
    *seed: object,
    classes_differ: bool = False,
) -> ProbeSet:
    """Select the first `records` of a balanced order, in near-equal blocks of at most `block_records`.

    Args:
        dataset: Records of the split.
        records: Maximum number of records.
        block_records: Maximum number of records of a block.
        *seed: Parts of the seed that the order is drawn from.
        classes_differ: Classes are compared by embeddings, so a block may contain one record of each.
    """
    order = balanced_positions(dataset, *seed)
    count = -(-min(records, len(order)) // block_records)
    blocks = np.array_split(order[:records], count) if len(order) else []
    if not classes_differ:
        blocks = class_blocks(dataset, order, [len(block) for block in blocks], *seed) or blocks
    chosen = np.concatenate([np.empty(0, np.int64), *blocks])
    known = sum(np.isin(positions, chosen).any() for positions in _group_by_class(dataset).values())
    return ProbeSet(tuple(blocks), sha256_keys(dataset.keys_at(chosen)), int(known))


def class_blocks(
    dataset: StoreDataset,
    order: NDArray[np.int64],
    sizes: Sequence[int],
    *seed: object,
    least: int = LEAST_OF_A_CLASS,
) -> list[NDArray[np.int64]] | None:
    """Select blocks of about these sizes with `least` records of each of their classes.

    Classes take turns in an order drawn from `seed`, so that consecutive blocks have different classes if possible.
    Classes with one record are left out, and a class with fewer than `least` records contributes all of them. Blocks
    end when less than half of the next one could be filled.

    Args:
        dataset: Records of the split.
        order: Balanced positions; the records of a class are taken in this order.
        sizes: Sizes of the blocks.
        *seed: Parts of the seed that the turns are drawn from.
        least: Number of records of each class in a block.

    Returns:
        The positions of each block; None if none are needed, because all classes fit into each block, or because
        records have many labels.
    """
    labels = dataset.label_numbers[order]
    known = np.unique(labels)
    if dataset.has_many_labels or len(known) * least <= min(sizes, default=0):
        return None
    generator = np.random.default_rng(derive_seed(*seed, "classes"))
    waiting = {int(label): order[labels == label] for label in generator.permutation(known)}
    blocks: list[NDArray[np.int64]] = []
    for size in sizes:
        parts: list[NDArray[np.int64]] = []
        filled = 0
        for label in list(waiting):
            if filled >= size - 1:
                break
            taken, waiting[label] = np.split(waiting[label], [min(least, size - filled)])
            if len(taken) > 1:
                parts.append(taken)
                filled += len(taken)
            waiting[label] = waiting.pop(label)  # to the end of the queue
        if len(parts) < 2 or filled < size / 2:
            break
        blocks.append(np.concatenate(parts))
    return blocks


def balanced_positions(dataset: StoreDataset, *seed: object) -> NDArray[np.int64]:
    """Order the positions of all labeled records so that classes take turns, each class permuted by (seed, class).

    Any consecutive part is as balanced as the class sizes allow. A record with many classes occurs once.
    """
    members = {}
    for label, positions in _group_by_class(dataset).items():
        positions = positions[np.argsort(np.asarray(dataset.keys_at(positions)))]
        members[label] = list(
            np.random.default_rng(derive_seed(*seed, label)).permutation(positions)
        )
    order: dict[int, None] = {}  # in the order of insertion
    while any(members.values()):
        for waiting in members.values():
            while waiting and waiting[0] in order:
                waiting.pop(0)
            if waiting:
                order[int(waiting.pop(0))] = None
    return np.array(list(order), np.int64)


def _group_by_class(dataset: StoreDataset) -> dict[int, NDArray[np.int64]]:
    """Positions of the records of each class."""
    if dataset.has_many_labels:
        labels, lengths = dataset.label_lists()
        return members_of_classes(labels, np.repeat(np.arange(len(lengths)), lengths))
    owners = np.flatnonzero(dataset.label_numbers != NO_LABEL)
    return members_of_classes(dataset.label_numbers[owners], owners)


def write_keys(
    context: EvaluationContext, evaluator: str, keys: Mapping[str, Sequence[str]]
) -> None:
    """Write keys of records, in order, as `set` and `key` to <evaluator>-<split>.parquet of the evaluation.

    Args:
        context: Evaluation of the split.
        evaluator: Name of the evaluator.
        keys: Keys of the records of each set, such as a bank.
    """
    name = f"{evaluator}-{context.split}.parquet"
    tables = [
        pa.table({"set": [title] * len(members), "key": members}) for title, members in keys.items()
    ]
    context.written[name] = write_table(context.folder / name, pa.concat_tables(tables))


def check_probes(
    evaluator: str, dataset: StoreDataset, split: str, least: int, embeddings: str | None = None
) -> None:
    """Check that the split has labels of two classes and at least `least` records.

    Args:
        evaluator: Name of the evaluator, for the message.
        dataset: Records of the split.
        split: Name of the split, for the message.
        least: Minimum number of labeled records.
        embeddings: Name of the option for class embeddings; if given, two classes need two records each, because
            without embeddings the labels of records of different classes are all equally far apart.

    Raises:
        ConfigError: If there are too few.
    """
    classes = _group_by_class(dataset)
    labeled = len(np.unique(np.concatenate(list(classes.values())))) if classes else 0
    require(
        len(classes) >= 2 and labeled >= least,
        f"evaluators={evaluator} compares with labels, but {split} has {labeled} labeled records in {len(classes)} "
        f"class(es), and at least {least} in 2 classes are needed; name another split in evaluate.splits",
    )
    repeated = sum(len(members) > 1 for members in classes.values())
    require(
        embeddings is None or dataset.has_many_labels or repeated >= 2,
        f"evaluators={evaluator} compares with labels, but {repeated} of the {len(classes)} classes of {split} "
        "have more than one record, and at least 2 must; name another split in evaluate.splits, or set class "
        f"embeddings with {embeddings}",
    )


def multi_hot_labels(dataset: StoreDataset, positions: Sequence[int]) -> Tensor:
    """Read the multi-hot labels f32 [n, K] of records, without reading images."""
    labels = dataset.labels_at(np.asarray(positions, np.int64))
    return multi_hot(labels, len(dataset.store.manifest.classes))


def balanced_order(index: RecordIndex, split: str, seed: int) -> NDArray[np.int64]:
    """Order all rows of a split so that every prefix has nearly the same number of records of each class.

    The order depends only on the keys and the seed. Records without a label, or with many, count as one class.
    """
    rows = rows_of_split(index, split)
    labels = index.values("label", rows)
    turns = np.empty(len(rows), np.int64)
    for label, members in members_of_classes(labels).items():
        members = members[index.key_order(rows_at(rows, members))]
        random = np.random.default_rng(derive_seed(seed, "balanced order", label))
        turns[random.permutation(members)] = np.arange(len(members))
    return rows_at(rows, np.lexsort((labels, turns)))
