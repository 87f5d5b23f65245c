"""Similarity of classes in a network's outputs, compared with the groups that people see.

P[c, k] = mean over the records of class c of softmax_tau(z)_k. Its off-diagonal entries show which classes a network
confuses. Their Spearman correlation with those of the teacher, or with a given class similarity, measures how much of
this structure a student has. Label smoothing erases it. Only logits are needed, and the teacher's are read from its
stored pass.

Shape letters: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from permafrost.core.batches import require_all_logits
from permafrost.core.digests import derive_seed
from permafrost.core.errors import ConfigError, require, shorten
from permafrost.core.records import NO_LABEL
from permafrost.evaluation.context import EvaluationContext, require_one_label
from permafrost.evaluation.evaluator import MORE, Evaluator, Page, Quantity
from permafrost.storage.files import file_at, iter_lines
from permafrost.storage.untrusted import FormatError, parse_npy
from permafrost_papers.interpretability.options import ClassSimilarityOptions

COARSE = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}
"""Fine classes of each coarse class, separated by spaces."""
_COARSE_OF = {fine: coarse for coarse, names in COARSE.items() for fine in names.split()}


def coarse_similarity(classes: Sequence[str], option: str) -> Tensor:
    """Return the similarity f64 [K, K] of CIFAR-100's classes: 1 within a coarse class, 0 otherwise.

    Args:
        classes: Names of the classes, in any order.
        option: Option and value that asked for it, for the message.

    Raises:
        ConfigError: If a class is not one of CIFAR-100's, or all pairs are equally similar.
    """
    names = [name.strip().lower().replace(" ", "_").replace("-", "_") for name in classes]
    unknown = [
        class_name
        for class_name, name in zip(classes, names, strict=True)
        if name not in _COARSE_OF
    ]
    require(
        not unknown,
        f"{option} knows the 100 classes of CIFAR-100 by name, but {len(unknown)} of the store's {len(classes)} are "
        f"others: {shorten(unknown)}; name a file with evaluate.class_similarity.similarity= instead",
    )
    coarse = [_COARSE_OF[name] for name in names]
    require(
        len(set(coarse)) < len(coarse) and len(set(coarse)) > 1,
        f"{option}: the store's {len(classes)} classes belong to {len(set(coarse))} coarse classes, so all pairs are "
        "equally similar; set it to null, or keep more classes with data.only_classes=",
    )
    return torch.tensor(
        [[float(one == other) for other in coarse] for one in coarse], dtype=torch.float64
    )


# ---- class similarity ------------------------------------------------------------------------------


NAME = "class_similarity"
_OPTION = f"evaluate.{NAME}.similarity"
_DRAWS = 200
"""Draws of the bootstrap."""


def mean_predictions(logits: Tensor, labels: Tensor, tau: float) -> tuple[float, Tensor]:
    """Compute the mean entropy of softmax_tau in nats, log K if uniform, and the matrix P, f64 [K, K].

    Records without a label are left out.

    Args:
        logits: Raw, [B, K].
        labels: i64 [B].
        tau: Temperature > 0.
    """
    there = labels != NO_LABEL
    log_p = F.log_softmax(logits[there].double() / tau, dim=1)
    entropy = -(log_p.exp() * log_p).sum() / len(log_p)
    return float(entropy), _class_means(log_p.exp(), labels[there], torch.ones(len(log_p)))


def _class_means(p: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
    """Compute P, f64 [K, K], from probabilities f64 [B, K] of weighted records; nan for a class without any."""
    number, weights = p.shape[1], weights.double()
    sums = p.new_zeros(number, number).index_add_(0, classes, p * weights[:, None])
    return sums / classes.bincount(weights, minlength=number)[:, None]


def spearman_interval(
    logits: Tensor, labels: Tensor, tau: float, other: Tensor, *, is_similarity: bool
) -> tuple[float, float] | None:
    """Compute the 95 % interval over records of a Spearman correlation, by the Bayesian bootstrap (Rubin 1981).

    Args:
        logits: Raw, [B, K].
        labels: i64 [B].
        tau: Temperature > 0.
        other: Logits [B, K] of another network for the same records, whose class means are weighted alike, or a
            similarity [K, K].
        is_similarity: Whether `other` is a similarity.

    Returns:
        Both ends, None if a draw has no correlation.
    """
    there = labels != NO_LABEL
    p = F.softmax(logits[there].double() / tau, dim=1)
    q = other if is_similarity else F.softmax(other[there].double() / tau, dim=1)
    generator = torch.Generator().manual_seed(derive_seed(0, NAME))
    draws = []
    for _ in range(_DRAWS):
        weights = torch.empty(len(p)).exponential_(generator=generator)
        second = q if is_similarity else _class_means(q, labels[there], weights)
        draws.append(off_diagonal_spearman(_class_means(p, labels[there], weights), second))
    if None in draws:
        return None
    low, high = np.quantile(np.array(draws, float), [0.025, 0.975])
    return float(low), float(high)


def off_diagonal_spearman(first: Tensor, second: Tensor) -> float | None:
    """Compute the Spearman correlation of the off-diagonal entries of two matrices, where both are defined.

    Equal values share the mean of their ranks.

    Args:
        first: [K, K], nan where undefined.
        second: [K, K], nan where undefined.

    Returns:
        The correlation, None if either is constant.
    """
    wanted = ~torch.eye(len(first), dtype=torch.bool)
    wanted &= ~(first.isnan() | second.isnan())
    pair = torch.stack([first[wanted], second[wanted]])
    is_constant = (pair == pair[:, :1]).all(dim=1).any()
    return None if is_constant else float(spearmanr(*pair.numpy()).statistic)


# ---- the evaluator -----------------------------------------------------------------------------------


def check_class_similarity(context: EvaluationContext) -> Mapping[str, str]:
    """Check that there are labels and something to compare with.

    Returns:
        SHA-256 of the file that is read, by its path.

    Raises:
        ConfigError: If there are no labels, nothing to compare with, or the file does not fit the classes.
    """
    require_one_label(context, NAME)
    require(
        _given_similarity(context) is not None or len(context.dataset.passes) > 0,
        f"evaluators={NAME} compares with the teacher's class means, but there is no teacher pass; run "
        f"permafrost precompute with a teacher, or name a file with a matrix or superclasses with {_OPTION}=",
    )
    path = context.options.of(ClassSimilarityOptions).similarity
    return {} if path is None else {path: file_at(Path(path)).sha256()}


def evaluate_class_similarity(context: EvaluationContext) -> dict[str, Any]:
    """Evaluate the class similarity of the predictions.

    The metrics are:

    - entropy: mean entropy of a record's softmax_tau, in nats;
    - spearman.teacher: correlation of the off-diagonal class means with those of the first teacher pass;
    - spearman.given: correlation of the off-diagonal class means with evaluate.class_similarity.similarity, or
      .reference;
    - spearman_low and spearman_high: ends of their 95 % intervals over records;
    - teacher_entropy and teacher_spearman.given: the same for the teacher.

    Returns:
        The metrics by name, without those that are not defined.
    """
    options, predictions = context.options.of(ClassSimilarityOptions), context.predictions
    entropy, class_means = mean_predictions(predictions.logits, predictions.labels, options.tau)
    metrics: dict[str, Any] = {"entropy": entropy}
    spearman, of_teacher = {}, {}
    teacher, intervals = None, {}
    measured = predictions.logits, predictions.labels, options.tau
    if predictions.teacher_logits is not None:
        logits = require_all_logits(predictions.teacher_logits, f"evaluators={NAME}")
        metrics["teacher_entropy"], teacher = mean_predictions(logits, *measured[1:])
        spearman["teacher"] = off_diagonal_spearman(class_means, teacher)
        intervals["teacher"] = spearman_interval(*measured, logits, is_similarity=False)
    if (similarities := _given_similarity(context)) is not None:
        spearman["given"] = off_diagonal_spearman(class_means, similarities)
        intervals["given"] = spearman_interval(*measured, similarities, is_similarity=True)
        if teacher is not None:
            of_teacher["given"] = off_diagonal_spearman(teacher, similarities)
    defined = {
        name: {key: value for key, value in values.items() if value is not None}
        for name, values in {"spearman": spearman, "teacher_spearman": of_teacher}.items()
    }
    for end, name in enumerate(("spearman_low", "spearman_high")):
        defined[name] = {key: values[end] for key, values in intervals.items() if values}
    return metrics | {name: values for name, values in defined.items() if values}


def _given_similarity(context: EvaluationContext) -> Tensor | None:
    """Class similarity f64 [K, K] of evaluate.class_similarity.similarity or .reference, None without either."""
    options, classes = context.options.of(ClassSimilarityOptions), context.store.manifest.classes
    if options.reference is not None:
        return coarse_similarity(classes, f"evaluate.{NAME}.reference={options.reference}")
    path = options.similarity
    return None if path is None else read_similarity(Path(path), len(classes))


def read_similarity(path: Path, classes: int) -> Tensor:
    """Read a class similarity f64 [K, K] from a matrix (.npy) or from a text file with one superclass per class.

    The text file has one line per class, in label order. The similarity of two classes is 1 if their lines are equal,
    0 otherwise.

    Args:
        path: The file.
        classes: Number K of classes.

    Raises:
        ConfigError: If the file does not exist, or does not fit the classes.
    """
    require(path.is_file(), f"{_OPTION}={path} does not exist; correct it, or set it to null")
    if path.suffix == ".npy":
        try:
            matrix = parse_npy(file_at(path).read(), "biuf", (classes, classes))
        except FormatError as error:
            raise ConfigError(
                f"{_OPTION}={path} is not a matrix of numbers of shape ({classes}, {classes}): {error}; save one with "
                "numpy.save"
            ) from error
        return torch.from_numpy(matrix.astype(np.float64))
    lines = [line.strip() for line in iter_lines(path, f"{_OPTION}={path}")]
    require(
        len(lines) == classes and all(lines),
        f"{_OPTION}={path} has {len(lines)} lines ({lines.count('')} of them empty), but {classes} classes need one "
        "superclass each, in label order; correct the file, or name a .npy matrix",
    )
    return torch.tensor(
        [[float(one == other) for other in lines] for one in lines], dtype=torch.float64
    )


EVALUATOR = Evaluator(
    evaluate_class_similarity,
    check_class_similarity,
    Page(
        "Classes",
        "Similarity of classes",
        "The off-diagonal class means of the softened predictions show which classes a network confuses. Reported are"
        " their rank correlation with the teacher's and the mean entropy of a prediction, in nats. Label smoothing "
        "erases this similarity, which soft targets convey.",
        (
            Quantity(
                "spearman",
                "Rank correlation of the class means",
                "Rank correlation with the teacher's class means: 1 is the same order, 0 is an unrelated one.",
                MORE,
            ),
            Quantity(
                "entropy",
                "Entropy of a prediction",
                "Mean entropy of a softened prediction in nats; 0 is certainty about one class.",
            ),
            Quantity(
                "teacher_entropy",
                "Entropy of the teacher's prediction",
                "The same entropy of the teacher's predictions, to compare with.",
                is_main=False,
            ),
        ),
    ),
)
