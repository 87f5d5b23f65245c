"""SSKD: order of the rows, selection of the rows that are learned, and the terms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from permafrost.core.batches import Moves, Targets
from permafrost.core.errors import ConfigError
from permafrost.loading.geometry import view_images
from permafrost.losses.base import build_loss
from permafrost.losses.logit_distances import kd_loss
from permafrost.models.classifier import NO_INTERMEDIATES
from permafrost_papers.interpretability.options import SSKDConfig
from permafrost_papers.interpretability.rotations import turn_views
from permafrost_papers.interpretability.sskd import (
    kept_kd_loss,
    kept_rows,
    rotated_similarities,
    views_in_order,
)
from tests.support.geometry import float_noise, make_batch
from tests.support.outputs import student_output
from tests.support.tensors import gaussian

INDEX = torch.tensor([2, 3, 0, 1, 0, 1, 2, 3, 3, 0, 1, 2])


def sskd_loss(**options):
    torch.manual_seed(0)
    loss = build_loss(SSKDConfig(**options))
    loss.build(*rotated_example())
    return loss.double()


def rotated_example(seed=0, order=None):
    """Three records with four views each, in the order of a stream unless `order` is given."""
    order = torch.arange(12) if order is None else order
    student = student_output(
        logits=gaussian(seed, 12, 5)[order],
        pooled=gaussian(seed + 1, 12, 6)[order],
        view_index=INDEX[order],
    )
    feature = gaussian(seed + 3, 12, 8)[order]
    return student, Targets(
        teacher="t", logits=gaussian(seed + 2, 12, 5)[order], intermediates={"pooled": feature}
    )


LABELS = torch.tensor([1, 1, 1, 1, 4, 4, 4, 4, 0, 0, 0, 0])


def test_views_come_upright_first_whatever_their_order():
    rows = 10 * torch.arange(3).repeat_interleave(4) + INDEX

    ordered = views_in_order(rows, INDEX)

    assert ordered.tolist() == [[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]]


def test_similarities_are_cosines_of_turned_and_upright_records():
    embeddings = gaussian(0, 3, 4, 6)

    similarities = rotated_similarities(embeddings)

    assert similarities.shape == (9, 3)
    for row in range(9):
        for record in range(3):
            expected = F.cosine_similarity(
                embeddings[row // 3, 1 + row % 3], embeddings[record, 0], dim=0
            )
            assert similarities[row, record].item() == pytest.approx(expected.item(), abs=1e-12)


def test_every_row_that_the_teacher_ranks_right_is_kept_and_the_best_ranked_of_the_others():
    scores = torch.tensor(
        [
            [9.0, 1.0, 2.0, 3.0],  # correct
            [4.0, 1.0, 2.0, 3.0],  # true column 1: ranked last of four
            [4.0, 1.0, 2.0, 3.0],  # true column 3: ranked second
            [4.0, 1.0, 2.0, 3.0],  # true column 2: ranked third
            [0.0, 1.0, 2.0, 3.0],  # correct
            [4.0, 1.0, 2.0, 3.0],  # true column 3: ranked second
        ]
    )
    true = torch.tensor([0, 1, 3, 2, 3, 3])

    kept = {keep: kept_rows(scores, true, keep).tolist() for keep in (0.0, 0.5, 0.75, 1.0)}

    assert kept[0.0] == [True, False, False, False, True, False]
    assert kept[0.5] == [True, False, True, False, True, True]
    assert kept[0.75] == [True, False, True, True, True, True]
    assert kept[1.0] == [True] * 6
    unknown = kept_rows(scores, torch.tensor([0, -1, 3, 2, 3, 3]), 0.75)
    assert unknown.tolist() == [True, False, True, True, True, True]


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.75, 1.0])
def test_the_selection_keeps_every_correct_row_and_the_share_of_the_wrong(keep):
    scores, true = gaussian(0, 200, 7), torch.arange(200) % 7

    kept = kept_rows(scores, true, keep)

    right = scores.argmax(dim=1) == true
    assert kept[right].all()
    assert int(kept.sum()) == int(right.sum()) + int(keep * int((~right).sum()))


def test_a_divergence_over_kept_rows_is_the_kd_loss_of_those_rows():
    student, teacher = gaussian(0, 6, 4), gaussian(1, 6, 4)
    kept = torch.tensor([True, False, True, True, False, False])

    loss = kept_kd_loss(student, teacher, 0.5, kept)

    assert loss.item() == pytest.approx(
        kd_loss(student[kept], teacher[kept], 0.5).item(), rel=1e-12
    )
    assert kept_kd_loss(student, teacher, 0.5, torch.zeros(6, dtype=torch.bool)).item() == 0
    assert kept_kd_loss(student, student, 0.5, kept).item() == 0


def test_its_four_terms_are_weighed_by_their_options():
    loss = sskd_loss(lambda_ce=0.5, lambda_kd=2.0, lambda_ss=3.0, lambda_tf=5.0)
    student, targets = rotated_example()

    terms = loss(student, targets, LABELS)

    own, taught = (views_in_order(o.logits, INDEX) for o in (student, targets))
    expected = {
        "ce": F.cross_entropy(own[:, 0], LABELS[::4]),
        "kd": kd_loss(own[:, 0], taught[:, 0], 4.0),
        "tf": kd_loss(own[:, 1:].flatten(0, 1), taught[:, 1:].flatten(0, 1), 4.0),
    }
    assert set(terms.terms) == {"ce", "kd", "ss", "tf"}
    for name, value in expected.items():
        assert terms.terms[name].item() == pytest.approx(value.item(), rel=1e-12)
    named = terms.terms
    total = 0.5 * named["ce"] + 2 * named["kd"] + 3 * named["ss"] + 5 * named["tf"]
    assert terms.total.item() == pytest.approx(total.item(), rel=1e-12)
    assert named["ss"].item() > 0


def test_the_order_of_records_and_of_their_views_makes_no_difference():
    loss = sskd_loss(keep_wrong_ss=1.0)  # keep all rows, as ties are broken by order
    order = torch.cat([4 * record + torch.randperm(4) for record in (2, 0, 1)])
    plain = loss(*rotated_example(), LABELS)
    shuffled = loss(*rotated_example(order=order), LABELS[order])

    for name, value in plain.terms.items():
        assert shuffled.terms[name].item() == pytest.approx(value.item(), rel=1e-10)


def test_a_student_that_is_its_teacher_has_a_similarity_term_of_zero():
    loss = sskd_loss()
    feature = gaussian(5, 12, 8)
    loss.student_head = loss.teacher_head
    student = student_output(logits=gaussian(0, 12, 5), pooled=feature, view_index=INDEX)
    targets = Targets(teacher="t", logits=student.logits, intermediates={"pooled": feature})

    terms = loss(student, targets, LABELS).terms

    assert abs(terms["ss"].item()) < 1e-15
    assert abs(terms["tf"].item()) < 1e-15
    other = Targets(
        teacher="t", logits=student.logits, intermediates={"pooled": feature.roll(4, dims=0)}
    )
    assert loss(student, other, LABELS).terms["ss"].item() > 1e-3


def test_the_teachers_head_learns_the_task_and_the_student_never_moves_it():
    loss = sskd_loss()
    student, targets = rotated_example()
    phase = loss.pretraining
    optimizer = torch.optim.Adam(phase.parameters, 0.01)
    before = loss.pretraining.loss(targets, INDEX).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss.pretraining.loss(targets, INDEX).backward()
        optimizer.step()
    optimizer.zero_grad()

    loss(student, targets, LABELS).total.backward()

    assert loss.pretraining.loss(targets, INDEX).item() < 0.7 * before
    assert all(parameter.grad is None for parameter in phase.parameters)
    assert all(p.grad is not None and p.grad.any() for p in loss.student_head.parameters())


def test_without_similarities_no_feature_is_read_and_no_head_trained():
    loss = build_loss(SSKDConfig(lambda_ss=0.0))

    assert (loss.needs.intermediates, loss.needs.outputs) == (NO_INTERMEDIATES, ())
    assert not loss.before_first_step(None)


def test_options_out_of_range_are_refused():
    for options in (
        {"lambda_ss": -1},
        {"lambda_tf": -1},
        {"tau_ss": 0},
        {"keep_wrong_ss": 1.5},
        {"keep_wrong_tf": -0.1},
        {"head_epochs": -1},
        {"head_lr": 0},
    ):
        with pytest.raises(ConfigError, match=f"method.{next(iter(options))}"):
            SSKDConfig(**options)


def test_windows_are_turned_as_their_images():
    """Windows of original images have no frame to sample: what they show is turned, and what moves it."""
    windows = (float_noise(4, 3, 24, 24) * 255).round().byte()
    angle = torch.tensor(0.3)
    step = torch.eye(3)
    step[:2, :2] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    moves = Moves(
        rows=torch.tensor([1, 3]),
        window_from_view=(step @ step).repeat(2, 1, 1),
        between=(step[None],),
    )
    for batch in (
        replace(make_batch(windows), has_windows=True),
        replace(make_batch(windows), has_windows=True, moves=moves),
    ):
        upright = view_images(batch, (24, 24))

        turned = view_images(turn_views(batch), (24, 24)).view(4, 4, 3, 24, 24)

        for quarter in range(4):
            wanted = torch.rot90(upright, quarter, (2, 3))
            assert ((turned[:, quarter] - wanted).abs() > 1e-3).float().mean() < 0.01
        assert not torch.allclose(turned[:, 0], turned[:, 1], atol=0.1)
