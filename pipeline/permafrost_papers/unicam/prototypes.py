"""Prototypes of classes: means of a stored pass's pooled features over the records of each class.

UniCAM's released code takes the class means of CLIP's image embeddings as the features of labels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from permafrost.core.errors import require
from permafrost.core.records import FOLD, NO_LABEL
from permafrost.evaluation.context import EvaluationContext
from permafrost.store.reader import TeacherPass
from permafrost.store.shard_records import shard_table
from permafrost_papers.probe_set import POOLED
from permafrost_papers.unicam.options import ComparedFeaturesOptions


def prototype_pass(context: EvaluationContext, options: ComparedFeaturesOptions) -> TeacherPass:
    """Open the pass that the options name.

    Args:
        context: Evaluation of the split.
        options: Options of the evaluator, with `prototypes`.

    Raises:
        ConfigError: If it has no pooled features of one network, or records have many labels.
        StoreMismatchError: If the store does not have the pass.
    """
    option = f"{options.section}.prototypes={options.prototypes}"
    (teacher,) = context.store.open_passes([str(options.prototypes)])
    require(
        not context.dataset.has_many_labels,
        f"{option} needs one label per record, but records of {context.store.path} have many; set it to null",
    )
    require(
        bool(teacher.fields_of(POOLED)),
        f"{option}: {teacher.name} has no output {POOLED}; make a pass with annotate.outputs=[{POOLED}] and name it",
    )
    require(
        not teacher.fields_of(FOLD),
        f"{option}: {teacher.name} is of the networks of several folds, whose channels mean different things; name a "
        "pass of one network",
    )
    return teacher


def class_means(context: EvaluationContext, options: ComparedFeaturesOptions) -> Tensor:
    """Average pooled features over the records of each class, f64 [K, d], reading one shard at a time.

    Args:
        context: Evaluation of the split, whose records are left out.
        options: Options of the evaluator, with `prototypes`.

    Raises:
        ConfigError: If the pass does not fit, or a class has no record.
    """
    teacher, store = prototype_pass(context, options), context.store
    (size,) = next(spec.shape for spec in teacher.manifest.fields if spec.name == POOLED)
    split, classes = options.prototypes_split, store.manifest.classes
    sums, counts = np.zeros((len(classes), size)), np.zeros(len(classes), np.int64)
    for number in map(int, store.shards.splits.get(split, ())):
        table = shard_table(store, number, teacher, [POOLED])
        labels, values = table["label"].to_numpy(), table[POOLED].combine_chunks()
        counted = values.is_valid().to_numpy(zero_copy_only=False) & (labels != NO_LABEL)
        counted &= ~np.isin(store.rows_of_shard(number), context.dataset.rows)
        np.add.at(sums, labels[counted], values.values.to_numpy().reshape(-1, size)[counted])
        np.add.at(counts, labels[counted], 1)
    absent = [title for title, count in zip(classes, counts.tolist(), strict=True) if not count]
    require(
        not absent,
        f"{options.section}.prototypes={options.prototypes}: {len(absent)} of {len(classes)} classes, such as "
        f"{', '.join(absent[:3])}, have no labeled record of split {split} that the pass covers and that is not "
        f"evaluated; name another {options.section}.prototypes_split, or evaluate another split",
    )
    return torch.from_numpy(sums / counts[:, None])
