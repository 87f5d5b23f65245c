"""Evaluators `knn` and `linear_probe`: what a network's pooled features tell about the labels, whatever its head is.

Both learn from records of another split and are tested on the evaluated one. They also evaluate networks whose head was
not trained on the labels, or has other classes.

Shape letters: N training records, B evaluated records, d features, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.config.evaluation import FeatureProbeOptions
from permafrost.core.digests import derive_seed
from permafrost.core.errors import ConfigError, require
from permafrost.core.interrupts import check_interrupted
from permafrost.core.records import NO_LABEL
from permafrost.evaluation.context import EvaluationContext, require_one_label
from permafrost.evaluation.evaluator import PLAIN, Evaluator, Metric, Page, Quantity
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.subset import rows_of_split, select_training_rows
from permafrost.models.classifier import Intermediates, to_float32
from permafrost.models.resolve import require_images
from permafrost.store.index import RowNumbers
from permafrost_evaluators.options import KNNOptions, LinearProbeOptions

_HELD_OUT = 0.2
"""Fraction of the training records used to choose the regularization of the linear probe."""
_MAX_STEPS = 500
"""Maximum number of steps of L-BFGS."""
_QUERIES = 256
"""Records whose neighbors are searched at once."""


def _check(context: EvaluationContext, evaluator: str) -> None:
    require_images(context.store, f"evaluators={evaluator}", "remove it from evaluators")
    require_one_label(context, evaluator)
    blank = torch.zeros(1, 3, *context.model.input_size, device=context.model.device)
    try:
        with torch.no_grad():
            context.model.network(blank, Intermediates(pooled=True))
    except ConfigError as error:
        raise ConfigError(f"evaluators={evaluator} reads pooled features: {error}") from error
    options = getattr(context.options, evaluator)
    training = _training_records(context, options, evaluator)
    classes = np.unique(training.label_numbers[_labeled(training)])
    require(
        len(classes) > 1,
        f"evaluators={evaluator} learns from evaluate.{evaluator}.train_split={options.train_split}, whose records "
        f"that are not in {context.split} have {len(classes)} class(es), and 2 are needed; name another split",
    )


def _training_records(
    context: EvaluationContext, options: FeatureProbeOptions, evaluator: str
) -> StoreDataset:
    """Open at most `train_records` records of the training split that are not evaluated, drawn with a fixed seed."""
    known = (
        _rows_of_student(context, options, evaluator)
        if options.train_subset == "student"
        else rows_of_split(context.store.index, options.train_split)
    )
    rows = np.setdiff1d(np.asarray(known), np.asarray(context.dataset.rows), assume_unique=True)
    if len(rows) > options.train_records:
        generator = np.random.default_rng(derive_seed(0, "feature probes"))
        rows = np.sort(generator.choice(rows, options.train_records, replace=False))
    require(
        len(rows) > 0,
        f"evaluate.{evaluator}.train_split={options.train_split} has only records of the evaluated split "
        f"{context.split}; name another split",
    )
    return context.open_rows(rows)


def _rows_of_student(
    context: EvaluationContext, options: FeatureProbeOptions, evaluator: str
) -> RowNumbers:
    """Select the records that the student was trained on."""
    section, trained = f"evaluate.{evaluator}", context.trained
    other = context.options.store
    if trained is None or other is not None:
        what = "a student" if trained is None else f"records of {other}"
        raise ConfigError(
            f"{section}.train_subset=student learns from the records that a student of this store was trained on, but "
            f"model={context.config.model} {'is not' if trained is None else 'is evaluated on'} {what}; set it to all"
        )
    require(
        options.train_split == trained.split,
        f"{section}.train_subset=student, but {section}.train_split={options.train_split} is not the split "
        f"{trained.split} that the student was trained on; set it to that split",
    )
    return select_training_rows(context.store.index, trained.split, trained.subset)


def _labeled(dataset: StoreDataset) -> Any:
    """Positions of the records with a label, i64."""
    return np.flatnonzero(dataset.label_numbers != NO_LABEL)


def _features(context: EvaluationContext, dataset: StoreDataset) -> tuple[Tensor, Tensor]:
    """Return pooled features f32 [n, d] and labels i64 [n] of the labeled records, computed once for all evaluators."""
    digest = hashlib.sha256(np.asarray(dataset.rows, np.int64).tobytes()).hexdigest()
    if digest not in context.pooled_features:
        context.pooled_features[digest] = _compute_features(context, dataset)
    return context.pooled_features[digest]


@torch.no_grad()
def _compute_features(context: EvaluationContext, dataset: StoreDataset) -> tuple[Tensor, Tensor]:
    """Compute pooled features f32 [n, d] and labels i64 [n] of the labeled records, both on the CPU."""
    positions = _labeled(dataset)
    parts = []
    for images in context.iter_views(positions.tolist(), dataset):
        check_interrupted()
        pooled = context.model.network(images, Intermediates(pooled=True)).require("pooled")
        parts.append(to_float32(pooled).cpu())
    return torch.cat(parts), torch.from_numpy(dataset.label_numbers[positions].astype(np.int64))


# ---- nearest neighbors -----------------------------------------------------------------------------


def neighbor_votes(
    features: Tensor, bank: Tensor, labels: Tensor, k: Sequence[int], tau: float, classes: int
) -> Tensor:
    """Sum the votes exp(cosine / tau) of the k nearest neighbors for each class, [len(k), B, K].

    Neighbors are nearest by cosine (Wu et al. 2018, section 3.4). The votes of a record are divided by the first
    neighbor's, so that none overflows.

    Args:
        features: [B, d].
        bank: Features of the training records, [N, d].
        labels: Labels of the training records, i64 [N].
        k: Numbers of neighbors, none above N.
        tau: Temperature > 0.
        classes: Number K of classes.
    """
    similarity = F.normalize(features, dim=1) @ F.normalize(bank, dim=1).T
    cosine, nearest = similarity.topk(max(k), dim=1)
    weights = ((cosine - cosine[:, :1]) / tau).exp()
    chosen = labels[nearest]
    votes = [
        weights.new_zeros(len(features), classes).scatter_add_(
            1, chosen[:, :count], weights[:, :count]
        )
        for count in k
    ]
    return torch.stack(votes)


def _evaluate_knn(context: EvaluationContext) -> dict[str, Any]:
    options = context.options.of(KNNOptions)
    bank, bank_labels = _features(context, _training_records(context, options, "knn"))
    require(
        max(options.k) <= len(bank),
        f"evaluate.knn.k={list(options.k)}, but {options.train_split} has {len(bank)} labeled records that are not "
        "evaluated; choose fewer neighbors, or another evaluate.knn.train_split",
    )
    features, labels = _features(context, context.dataset)
    classes = int(max(bank_labels.max(), labels.max())) + 1
    correct = torch.zeros(len(options.k), dtype=torch.int64)
    for start in range(0, len(features), _QUERIES):
        part = slice(start, start + _QUERIES)
        votes = neighbor_votes(features[part], bank, bank_labels, options.k, options.tau, classes)
        correct += (votes.argmax(dim=2) == labels[part]).sum(dim=1)
    accuracy = (correct.double() / len(labels)).tolist()
    return {
        "accuracy": dict(zip(map(str, options.k), accuracy, strict=True)),
        "train_records": len(bank),
    }


# ---- linear probe ----------------------------------------------------------------------------------


def fit_linear(
    features: Tensor, labels: Tensor, l2: float, classes: int, start: Tensor | None = None
) -> Tensor:
    """Minimize mean cross-entropy + l2 / 2 * ||W||^2 by L-BFGS.

    Args:
        features: f64 [N, d].
        labels: i64 [N].
        l2: Weight of the squared norm, which leaves out the bias.
        classes: Number K of classes.
        start: Weights to start from, None for zeros.

    Returns:
        The weights f64 [K, d + 1], the bias last.
    """
    initial = features.new_zeros(classes, features.shape[1] + 1) if start is None else start
    weights = initial.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=_MAX_STEPS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        check_interrupted()
        optimizer.zero_grad()
        logits = linear_logits(features, weights)
        value = F.cross_entropy(logits, labels) + l2 / 2 * weights[:, :-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach()


def linear_logits(features: Tensor, weights: Tensor) -> Tensor:
    """Compute the logits [n, K] of features [n, d] for the weights of `fit_linear`."""
    return features @ weights[:, :-1].T + weights[:, -1]


def _evaluate_linear_probe(context: EvaluationContext) -> dict[str, Any]:
    options = context.options.of(LinearProbeOptions)
    train, train_labels = _features(context, _training_records(context, options, "linear_probe"))
    test, labels = _features(context, context.dataset)
    train, test = train.double(), test.double()
    mean, deviation = train.mean(dim=0), train.std(dim=0, unbiased=False)
    scale = torch.where(deviation > 0, deviation, 1.0)
    train, test = (train - mean) / scale, (test - mean) / scale
    classes = int(max(train_labels.max(), labels.max())) + 1
    generator = torch.Generator().manual_seed(derive_seed(0, "linear probe"))
    order = torch.randperm(len(train), generator=generator)
    count = max(1, int(_HELD_OUT * len(order)))
    held_out, kept = order[:count], order[count:]
    scores, weights = [], None
    for l2 in sorted(options.l2, reverse=True):
        weights = fit_linear(train[kept], train_labels[kept], l2, classes, weights)
        logits, held_out_labels = linear_logits(train[held_out], weights), train_labels[held_out]
        accuracy = float((logits.argmax(dim=1) == held_out_labels).double().mean())
        scores.append((accuracy, -float(F.cross_entropy(logits, held_out_labels)), l2))
    chosen = max(scores)[-1]
    weights = fit_linear(train, train_labels, chosen, classes)
    correct = linear_logits(test, weights).argmax(dim=1) == labels
    return {
        "accuracy": float(correct.double().mean()),
        "l2": chosen,
        "train_records": len(train),
    }


_TRAIN_RECORDS = Quantity(
    "train_records",
    "Training records",
    "Number of labeled records that are learned from, whatever the student was trained on.",
    Metric(higher_is_better=None, scale=1.0, digits=0),
    is_main=False,
)


# ---- evaluators ------------------------------------------------------------------------------------


KNN = Evaluator(
    _evaluate_knn,
    lambda context: _check(context, "knn"),
    Page(
        "Neighbors",
        "Nearest neighbors of the features",
        "Accuracy of the labels of the training records whose pooled features are nearest by cosine. No head is read, "
        "so it also compares networks that were trained without labels.",
        (
            Quantity(
                "accuracy",
                "Accuracy of k neighbors",
                "Fraction of records whose class has most votes of the k nearest training records.",
                Metric(),
            ),
            _TRAIN_RECORDS,
        ),
    ),
)
LINEAR_PROBE = Evaluator(
    _evaluate_linear_probe,
    lambda context: _check(context, "linear_probe"),
    Page(
        "Linear probe",
        "Linear probe of the features",
        "Accuracy of a linear classifier that is fitted to the pooled features of training records. The network and "
        "its own head are not changed.",
        (
            Quantity(
                "accuracy",
                "Accuracy of the linear probe",
                "Fraction of records that a logistic regression on the pooled features classifies correctly.",
                Metric(),
            ),
            Quantity(
                "l2",
                "Regularization of the linear probe",
                "Weight of the squared norm, chosen on a fifth of the training records.",
                PLAIN,
                is_main=False,
            ),
            _TRAIN_RECORDS,
        ),
    ),
)
