"""Does a student know which classes are alike? What soft targets may teach beside the labels (Han et al. 2023).

P[c, k] = mean over the records of class c of softmax_tau(z)_k. Off its diagonal it says which classes a network takes
for which; its Spearman correlation with the teacher's, or with a given similarity of classes, says how much of that a
student has. Label smoothing erases it. Logits are all that is needed: the teacher's are those of its stored pass.

Shape letters: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from pipeline.core.errors import ConfigError, require
from pipeline.core.files import sha256_file
from pipeline.core.records import NO_LABEL
from pipeline.evaluation.context import EvaluationContext, require_one_label
from pipeline.evaluation.evaluators.evaluator import Evaluator, Page, Quantity
from pipeline.evaluation.metrics import MORE

NAME = "class_similarity"
_OPTION = f"evaluate.{NAME}.similarity"


@dataclass(frozen=True)
class PredictionSums:
    """Over some records with labels; sums over parts of a split add up."""

    entropy: float
    """Of softmax_tau, in nats."""
    probabilities: Tensor
    """f64 [K, K]: row c sums over records of class c."""
    records: Tensor
    """i64 [K]: of each class."""

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, tau: float) -> PredictionSums:
        """Of raw logits [B, K] and labels i64 [B]; records without a label are left out."""
        there = labels != NO_LABEL
        log_p = F.log_softmax(logits[there].double() / tau, dim=1)
        p, classes = log_p.exp(), labels[there]
        number = logits.shape[1]
        return cls(
            entropy=float(-(p * log_p).sum()),
            probabilities=p.new_zeros(number, number).index_add_(0, classes, p),
            records=classes.bincount(minlength=number),
        )

    def __add__(self, other: PredictionSums) -> PredictionSums:
        return PredictionSums(
            self.entropy + other.entropy,
            self.probabilities + other.probabilities,
            self.records + other.records,
        )

    @property
    def mean_entropy(self) -> float:
        """In nats; log K where a network says nothing."""
        return self.entropy / int(self.records.sum())

    @property
    def matrix(self) -> Tensor:
        """P, f64 [K, K]; a row of nan for a class without records."""
        return self.probabilities / self.records[:, None]


def off_diagonal_spearman(first: Tensor, second: Tensor) -> float | None:
    """Of two matrices [K, K] off their diagonals, where both are defined; None where either does not vary.

    Equal values share the mean of their ranks.
    """
    wanted = ~torch.eye(len(first), dtype=torch.bool)
    wanted &= ~(first.isnan() | second.isnan())
    ranks = torch.from_numpy(rankdata(torch.stack([first[wanted], second[wanted]]), axis=1))
    ranks = ranks - ranks.mean(dim=1, keepdim=True)
    norms = ranks.norm(dim=1).prod()
    return float((ranks[0] * ranks[1]).sum() / norms) if norms > 0 else None


# ---- the evaluator -----------------------------------------------------------------------------------


def check_class_similarity(context: EvaluationContext) -> Mapping[str, str]:
    """ConfigError unless there are labels, and something to compare with; the file that is read."""
    require_one_label(context, NAME)
    path = context.options.class_similarity.similarity
    if path is None:
        require(
            len(context.dataset.passes) > 0,
            f"evaluators={NAME} compares with the teacher's own class means, and there is no teacher pass: run "
            f"stages.precompute with a teacher, or name a matrix or superclasses with {_OPTION}=",
        )
        return {}
    read_similarity(Path(path), len(context.store.manifest.classes))
    return {path: sha256_file(Path(path))}


def evaluate_class_similarity(context: EvaluationContext) -> dict[str, Any]:
    """entropy in nats, of a record's softmax_tau, and spearman.teacher, spearman.given: of the off-diagonal class
    means with those of the first teacher pass, and with evaluate.class_similarity.similarity; teacher_entropy and
    teacher_spearman.given are the teacher's own.
    """
    options, predictions = context.options.class_similarity, context.predictions
    own = PredictionSums.of(predictions.logits, predictions.labels, options.tau)
    metrics: dict[str, Any] = {"entropy": own.mean_entropy}
    spearman, of_teacher = {}, {}
    teacher = None
    if predictions.teacher_logits is not None:
        teacher = PredictionSums.of(predictions.teacher_logits, predictions.labels, options.tau)
        metrics["teacher_entropy"] = teacher.mean_entropy
        spearman["teacher"] = off_diagonal_spearman(own.matrix, teacher.matrix)
    if options.similarity is not None:
        given = read_similarity(Path(options.similarity), predictions.logits.shape[1])
        spearman["given"] = off_diagonal_spearman(own.matrix, given)
        if teacher is not None:
            of_teacher["given"] = off_diagonal_spearman(teacher.matrix, given)
    named = {"spearman": spearman, "teacher_spearman": of_teacher}
    defined = {
        name: {key: value for key, value in values.items() if value is not None}
        for name, values in named.items()
    }
    return metrics | {name: values for name, values in defined.items() if values}


def read_similarity(path: Path, classes: int) -> Tensor:
    """f64 [K, K] of a matrix (.npy), or of a text file with the superclass of each class in a line: 1 where equal."""
    require(path.is_file(), f"{_OPTION}={path} does not exist; correct it, or set it to null")
    if path.suffix == ".npy":
        try:
            matrix = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ConfigError(
                f"{_OPTION}={path} cannot be read: {error}; save a matrix of numbers"
            ) from error
        require(
            matrix.shape == (classes, classes) and matrix.dtype.kind in "biuf",
            f"{_OPTION}={path} has {matrix.dtype} {matrix.shape}, where {classes} classes want numbers "
            f"({classes}, {classes}); correct the file",
        )
        require(
            bool(np.isfinite(matrix).all()),
            f"{_OPTION}={path} has values that are not finite; correct the file",
        )
        return torch.from_numpy(matrix.astype(np.float64))
    names = path.read_text().split("\n")
    lines = [line.strip() for line in (names[:-1] if names[-1] == "" else names)]
    require(
        len(lines) == classes and all(lines),
        f"{_OPTION}={path} has {len(lines)} lines ({lines.count('')} of them empty), where {classes} classes want one "
        "superclass each, in label order; correct the file, or give a .npy matrix",
    )
    return torch.tensor([[float(a == b) for b in lines] for a in lines], dtype=torch.float64)


EVALUATOR = Evaluator(
    evaluate_class_similarity,
    check_class_similarity,
    Page(
        "Classes",
        "Does it know which classes are alike?",
        "Off the diagonal, class means of the softened answers say which classes a network takes for which: their"
        " rank correlation with the teacher's, and the mean entropy of an answer, in nats. Smoothed labels erase "
        "what soft targets teach here.",
        (
            Quantity("spearman", "Rank correlation of the class means", MORE),
            Quantity("entropy", "Entropy of an answer"),
            Quantity("teacher_entropy", "Entropy of the teacher's answer", is_main=False),
        ),
    ),
)
