"""Reduction of every loss term over several ranks, which average the gradients of their slices.

Each row of the table names the reduction of a quantity over a batch and the resulting mean of the ranks' values:
"whole", the value of one process on the whole batch, or "slice", a mean over a part of the batch (for the quantities
that depend on the slice, see core/distributed.py). A sum that ignores the number of ranks would be neither.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from permafrost.annotation.teacher_fields import fields_of_outputs
from permafrost.config.methods import (
    METHODS,
    ATConfig,
    CatKDConfig,
    DKDConfig,
    E2KDConfig,
    FeaturesConfig,
    KDConfig,
    LabelsConfig,
    SeveralConfig,
    TeacherTermOptions,
)
from permafrost.core.batches import MapTargets
from permafrost.core.distributed import DistributedContext
from permafrost.core.records import NO_LABEL
from permafrost.losses.base import build_loss
from permafrost.models.classifier import ModelOutput, Stage
from permafrost_papers.e2kd.guided import Guidance
from permafrost_papers.e2kd.options import GuidedTeachingConfig
from permafrost_papers.ked.options import KEDConfig
from permafrost_papers.ked.subnets import HIDDEN, LOGITS
from tests.support.outputs import student_output

B, K, M, RANKS = 8, 5, 3, 2


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def stages(seed):
    shapes = ((6, 8, 8), (8, 4, 4), (10, 2, 2))
    found = []
    for number, shape in enumerate(shapes):
        output = normal(seed + number, B, *shape)
        found.append(Stage(output=output, preactivation=output))
    return tuple(found)


def reduction_batch(unknown=()):
    """Student output, teacher targets and labels of B records."""
    labels = torch.arange(B) % K
    labels[list(unknown)] = NO_LABEL
    student = student_output(
        logits=normal(0, B, K),
        maps=normal(1, B, 2, 1, 4, 4),
        input_size=(16, 16),
        stages=stages(10),
        class_maps=normal(2, B, K, 4, 4),
        extras={LOGITS: normal(3, B, M, K), HIDDEN: normal(4, B, M, 7)},
        pooled=normal(31, B, 9),
    )
    intermediates = {
        f"attention_{n}": normal(20 + n, B, 8 // 2 ** (n - 1), 8 // 2 ** (n - 1)) for n in (1, 2, 3)
    }
    intermediates |= {
        "class_maps": normal(5, B, K, 4, 4),
        "superfeature_logits": normal(6, B, M, K),
        "ft": normal(7, B, 9, 2, 2),
    }
    intermediates |= {"superfeature_hidden": normal(8, B, M, 7)}
    targets = MapTargets(
        teacher="t",
        logits=normal(9, B, K),
        target_class=torch.zeros(B, 2, dtype=torch.int64),
        maps=normal(30, B, 2, 1, 4, 4),
        map_valid=torch.ones(B, 2, dtype=torch.bool),
        intermediates=intermediates,
    )
    return student, targets, labels


def sliced(values, rows):
    """Select the records `rows` of a nested value."""
    if isinstance(values, torch.Tensor):
        return values[rows]
    if isinstance(values, dict):
        return {name: sliced(value, rows) for name, value in values.items()}
    if isinstance(values, (Stage, ModelOutput)):
        return type(values)(*(sliced(value, rows) for value in values))
    if isinstance(values, tuple) and values and isinstance(values[0], Stage):
        return tuple(sliced(value, rows) for value in values)
    if hasattr(values, "__dataclass_fields__"):
        return type(values)(
            **{name: sliced(getattr(values, name), rows) for name in values.__dataclass_fields__}
        )
    return values


def reduced_terms(loss, student, targets, labels, world_size):
    """Every term and the total, as the mean over `world_size` ranks with slices of equal size."""
    loss.distributed = DistributedContext(world_size=world_size)
    parts = []
    for rank in range(world_size):
        rows = slice(rank * B // world_size, (rank + 1) * B // world_size)
        found = loss(sliced(student, rows), sliced(targets, rows), labels[rows])
        parts.append({**found.terms, "total": found.total})
    return {name: float(sum(part[name] for part in parts)) / world_size for name in parts[0]}


# quantity, its loss, the reduction over a batch, and the meaning of the mean over ranks
TABLE = [
    ("ce", LabelsConfig(), "mean over known labels", "whole"),
    ("bce", LabelsConfig(loss="bce"), "mean over known labels", "whole"),
    ("bce", LabelsConfig(loss="bce_offlabel"), "mean over known labels", "whole"),
    ("kd", KDConfig(tau=2.0), "mean over records", "whole"),
    ("kd", KDConfig(tau=2.0, logits="mld"), "mean over records", "whole"),
    ("others", DKDConfig(tau=2.0), "mean over known labels", "whole"),
    ("map", E2KDConfig(), "mean over records", "whole"),
    ("map", E2KDConfig(normalize_by="valid"), "mean over records with a valid map", "whole"),
    ("ked", KEDConfig(), "mean over records and superfeatures", "whole"),
    ("at", ATConfig(), "mean over records and places", "whole"),
    ("at", ATConfig(norm="l2"), "mean over records of a norm", "whole"),
    ("cat", CatKDConfig(), "mean over records, classes and places", "whole"),
    *[
        ("localization", GuidedTeachingConfig(localization=name), "sum over records", "whole")
        for name in ("energy", "l1", "rrr", "ppce")
    ],
]


@pytest.mark.parametrize(("quantity", "config", "reduction", "under_ranks"), TABLE)
def test_the_mean_over_ranks_is_the_value_of_the_whole_batch(
    quantity, config, reduction, under_ranks
):
    loss = build_loss(config).double()
    student, targets, labels = reduction_batch()
    fields = {n: v for n, v in targets.intermediates.items() if n.startswith(loss.needs.outputs)}
    targets = replace(targets, intermediates=fields)
    if isinstance(config, GuidedTeachingConfig):
        targets = Guidance(
            target_class=torch.zeros(B, 1, dtype=torch.int64), regions=normal(9, B, 16, 16) > 0
        )
    loss.build(student, targets)

    alone = reduced_terms(loss, student, targets, labels, 1)
    ranks = reduced_terms(loss, student, targets, labels, RANKS)

    assert alone[quantity] != 0
    assert ranks == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(
    ("quantity", "config"),
    [("ce", LabelsConfig()), ("bce", LabelsConfig(loss="bce")), ("others", DKDConfig())],
)
def test_means_over_known_labels_are_the_slices_own(quantity, config):
    """Control: the means of slices with unknown labels differ from the whole, so the comparison above can fail."""
    loss = build_loss(config).double()
    student, targets, labels = reduction_batch(unknown=(0, 1, 2))

    alone = reduced_terms(loss, student, targets, labels, 1)
    ranks = reduced_terms(loss, student, targets, labels, RANKS)

    assert ranks[quantity] != pytest.approx(alone[quantity], rel=1e-3)


def test_means_over_the_covered_cells_of_moved_features_are_the_slices_own():
    """As a record of which much is outside of the frame has less weight only among those of its slice."""
    torch.manual_seed(0)  # of the map that the loss creates
    loss = build_loss(FeaturesConfig())
    student, targets, labels = reduction_batch()
    coverage = torch.ones(B, 1, 2, 2).double()
    whole = replace(targets, intermediates={"features_3": normal(40, B, 9, 2, 2)})
    loss.build(student, whole)
    loss = loss.double().requires_grad_(requires_grad=False)

    def both(covered):
        moved = replace(whole, coverage={"features_3": covered})
        return [reduced_terms(loss, student, moved, labels, n)["features"] for n in (1, RANKS)]

    alone, ranks = both(coverage)
    assert ranks == pytest.approx(alone, rel=1e-9)
    coverage[:3] = 0.1
    alone, ranks = both(coverage)
    assert ranks != pytest.approx(alone, rel=1e-3)


COMPARES_RECORDS = {"crd", "sskd"}
"""Methods that compare the records of a batch with each other, tested in test_crd and test_sskd."""


NEEDS_TERMS = {
    "several": SeveralConfig(
        terms=tuple(
            TeacherTermOptions(teacher="t", method=method, weight=2.0)
            for method in (KDConfig(), ATConfig())
        )
    )
}
"""Methods that compare nothing by default."""


@pytest.mark.parametrize("kind", sorted(set(METHODS) - COMPARES_RECORDS))
def test_every_term_of_every_method_is_that_of_the_whole_batch(kind):
    loss = build_loss(NEEDS_TERMS.get(kind) or METHODS[kind]())
    student, targets, labels = reduction_batch()
    fields = loss.needs.target_fields or partial(fields_of_outputs, loss.needs.outputs)
    if kind not in NEEDS_TERMS:
        teacher = student.output._replace(stages=stages(40))
        targets = replace(targets, intermediates=fields(teacher))
    loss.build(student, targets)
    loss = loss.double().eval()  # for the batch norms of review_kd

    with torch.no_grad():
        alone = reduced_terms(loss, student, targets, labels, 1)
        ranks = reduced_terms(loss, student, targets, labels, RANKS)

    assert any(alone.values())
    assert ranks == pytest.approx(alone, rel=1e-6)
