"""CRD: the loss against hand computation, the choice of negatives, and updates of the banks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F

from permafrost.core.batches import Targets
from permafrost.core.distributed import DistributedContext
from permafrost.core.errors import ConfigError
from permafrost.losses.base import build_loss
from permafrost_papers.interpretability.crd import Negatives, contrast_scores, nce_loss
from permafrost_papers.interpretability.options import CRDConfig
from tests.support.outputs import student_output
from tests.support.ranks import join_group, run_on_ranks
from tests.support.tensors import gaussian

LABELS = torch.arange(12) % 3


@dataclass
class Records:
    """Attributes of a dataset that a loss requires: twelve records of three classes, without stored values."""

    labels: torch.Tensor
    has_many_labels: bool = False
    passes: tuple = ()

    def __len__(self):
        return len(self.labels)

    def labels_at(self, at):
        return self.labels[torch.from_numpy(at)]


def crd_output(records, pooled):
    logits = torch.zeros(len(records), 3, dtype=torch.float64)
    student = student_output(logits=logits, pooled=pooled, record_index=torch.tensor(records))
    return student, Targets(
        teacher="t", logits=logits, intermediates={"pooled": gaussian(9, len(records), 5)}
    )


def crd_loss(**options):
    torch.manual_seed(0)
    loss = build_loss(CRDConfig(embedding_size=8, **options))
    loss.build(*crd_output([0], gaussian(0, 1, 4)))
    loss.on_train_start(Records(LABELS))
    return loss.double()


def test_nce_matches_hand_computation():
    probabilities = torch.tensor([[0.5, 0.1, 0.2]], dtype=torch.float64)

    loss = nce_loss(probabilities, num_records=10)

    noise = 2 / 10 + 1e-7
    expected = -(
        math.log(0.5 / (0.5 + noise))
        + math.log(0.2 / (0.1 + noise))
        + math.log(0.2 / (0.2 + noise))
    )
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    both = torch.cat([probabilities, torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)])
    alone = nce_loss(both[1:], num_records=10)
    assert nce_loss(both, num_records=10).item() == pytest.approx((loss + alone).item() / 2)


def test_the_loss_falls_as_the_cosine_of_a_pair_rises():
    negatives = F.normalize(gaussian(0, 20, 6), dim=1)
    own = F.normalize(gaussian(1, 1, 6), dim=1)
    away = F.normalize(gaussian(2, 1, 6) - (gaussian(2, 1, 6) @ own.T) * own, dim=1)
    chosen = torch.arange(21)[None]
    losses = []
    for cosine in (-1.0, -0.5, 0.0, 0.5, 0.9, 1.0):
        paired = cosine * own + math.sqrt(1 - cosine**2) * away
        scores = contrast_scores(own, torch.cat([paired, negatives]), chosen, tau=0.5)
        losses.append(nce_loss(scores / 60, num_records=21).item())

    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 6


def test_negatives_are_of_other_classes_and_each_is_as_likely():
    labels = torch.tensor([2, 0, 0, 1, 2, 2, 0, 7])
    negatives = Negatives(labels)
    records = torch.arange(8)
    torch.manual_seed(0)

    drawn = negatives.draw(records, 20_000)

    assert negatives.fewest == 5
    for record in records:
        others = (labels != labels[record]).nonzero()[:, 0]
        counts = drawn[record].bincount(minlength=8)
        assert counts.nonzero()[:, 0].equal(others)
        expected = 20_000 / len(others)
        assert (counts[others] - expected).abs().max() < 5 * expected**0.5


def test_both_directions_count_and_the_first_step_sets_the_normalizers_for_good():
    loss = crd_loss(negatives=3)
    step = crd_output([0, 4], gaussian(1, 2, 4))
    before = loss.student_bank.clone(), loss.teacher_bank.clone()
    torch.manual_seed(5)
    value = loss.compare(*step)

    torch.manual_seed(5)
    chosen = torch.cat([torch.tensor([[0], [4]]), loss.negatives.draw(torch.tensor([0, 4]), 3)], 1)
    own = F.normalize(loss.embed_student(step[0].output.pooled), dim=1)
    taught = F.normalize(loss.embed_teacher(step[1].intermediates["pooled"]), dim=1)
    expected, normalizers = 0.0, []
    for anchors, bank in ((own, before[1]), (taught, before[0])):
        scores = torch.exp((bank[chosen] * anchors[:, None]).sum(dim=2) / 0.07)
        normalizers.append(scores.mean() * 12)
        expected = expected + nce_loss(scores / normalizers[-1], 12)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)

    assert loss.normalizer.tolist() == [0, 0]  # unchanged until the end of the step
    loss.on_step_end()
    assert torch.allclose(loss.normalizer, torch.stack(normalizers))
    kept = loss.normalizer.clone()
    loss.compare(*crd_output([7, 2], gaussian(2, 2, 4)))
    loss.on_step_end()
    assert torch.equal(loss.normalizer, kept)


def test_a_bank_moves_by_its_momentum_where_the_step_was_and_nowhere_else():
    loss = crd_loss(negatives=3, momentum=0.75)
    before = loss.student_bank.clone()
    student, targets = crd_output([3, 8], gaussian(1, 2, 4))

    loss.compare(student, targets)
    loss.on_step_end()

    fresh = F.normalize(loss.embed_student(student.output.pooled), dim=1)
    expected = F.normalize(0.75 * before[[3, 8]] + 0.25 * fresh, dim=1)
    assert torch.allclose(loss.student_bank[[3, 8]], expected, atol=1e-12)
    others = [record for record in range(12) if record not in (3, 8)]
    assert torch.equal(loss.student_bank[others], before[others])
    assert torch.allclose(loss.teacher_bank.norm(dim=1), torch.ones(12, dtype=torch.float64))
    loss.on_step_end()  # without a step before it
    assert torch.allclose(loss.student_bank[[3, 8]], expected, atol=1e-12)


def test_steps_pull_a_record_to_its_own_place_in_the_teachers_bank():
    loss = crd_loss(tau_crd=0.2)
    pooled = gaussian(1, 4, 4).requires_grad_()
    optimizer = torch.optim.SGD([pooled, *loss.parameters()], 0.05)
    records = [0, 1, 2, 3]

    def cosine():
        own = F.normalize(loss.embed_student(pooled), dim=1)
        return (own * loss.teacher_bank[records]).sum(dim=1).mean().item()

    before = cosine()
    for _ in range(60):
        optimizer.zero_grad()
        loss.compare(*crd_output(records, pooled)).backward()
        optimizer.step()
        loss.on_step_end()

    assert cosine() > before + 0.3


def test_negatives_are_at_most_what_every_class_has():
    loss = crd_loss(negatives=16384)
    seen = []
    draw = loss.negatives.draw
    loss.negatives.draw = lambda records, count: seen.append(count) or draw(records, count)

    loss.compare(*crd_output([0], gaussian(1, 1, 4)))

    assert seen == [8]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (Records(torch.tensor([0, 1, -1])), "not every record of this selection has one label"),
        (Records(torch.tensor([0, 1]), has_many_labels=True), "not every record"),
        (Records(torch.tensor([1, 1])), "all records of this selection have the same class"),
        (Records(LABELS, passes=("a", "b")), "store.teacher names 2; name one"),
    ],
)
def test_records_that_it_cannot_tell_apart_are_refused(records, message):
    loss = build_loss(CRDConfig())
    loss.build(*crd_output([0], gaussian(0, 1, 4)))

    with pytest.raises(ConfigError, match=message):
        loss.on_train_start(records)


def test_options_out_of_range_are_refused_and_a_classifier_may_stand_still():
    for options in ({"tau_crd": 0}, {"negatives": 0}, {"momentum": 1}, {"embedding_size": 0}):
        with pytest.raises(ConfigError, match=f"method.{next(iter(options))}"):
            CRDConfig(**options)
    with pytest.raises(ConfigError, match="nothing is trained"):
        CRDConfig(lambda_ce=0, lambda_crd=0)

    loss = crd_loss(lambda_ce=0.0, lambda_crd=1.0)
    student, targets = crd_output([0, 4], gaussian(1, 2, 4))
    logits = student.logits.clone().requires_grad_()
    student = student_output(
        logits=logits, pooled=student.output.pooled, record_index=student.record_index
    )
    terms = loss(student, targets, LABELS[[0, 4]])
    terms.total.backward()

    assert set(terms.terms) == {"crd"}
    assert terms.total.item() == pytest.approx(terms.terms["crd"].item())
    assert not logits.grad.any()


# ---- ranks ---------------------------------------------------------------------------------------


def learn_a_step(distributed, records, pooled, **options):
    """Take a step on this rank's slice of the records, and return the state of the loss after it."""
    loss = crd_loss(negatives=3, **options)
    loss.distributed = distributed
    loss.compare(*slice_of(crd_output(records, pooled), distributed))
    loss.on_step_end()
    return loss.state_dict()


def slice_of(step, distributed):
    student, targets = step
    size = len(student.logits) // distributed.world_size
    rows = slice(distributed.rank * size, (distributed.rank + 1) * size)
    own = student_output(
        logits=student.logits[rows],
        pooled=student.output.pooled[rows],
        record_index=student.record_index[rows],
    )
    intermediates = {"pooled": targets.intermediates["pooled"][rows]}
    return own, Targets(teacher="t", logits=targets.logits[rows], intermediates=intermediates)


def update_banks_of_rank(rank, folder):
    distributed = join_group(rank, folder)
    torch.manual_seed(rank)
    state = learn_a_step(distributed, [1, 5, 6, 8], gaussian(3, 4, 4))
    torch.save(state, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_keep_the_banks_of_one_process_and_one_normalizer(tmp_path):
    run_on_ranks(update_banks_of_rank, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))

    alone = learn_a_step(DistributedContext(), [1, 5, 6, 8], gaussian(3, 4, 4))

    for name in ("student_bank", "teacher_bank"):
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], alone[name], atol=1e-12)
        assert not torch.equal(
            first[name][[1, 8]], crd_loss(negatives=3).state_dict()[name][[1, 8]]
        )
    assert torch.equal(first["normalizer"], second["normalizer"])
    assert (first["normalizer"] > 0).all()
