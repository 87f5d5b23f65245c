"""The largest logits and the sum of the others: their divergence, and passes that store them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from permafrost import open_store
from permafrost.annotation.outputs import split_logits
from permafrost.config.methods import ATConfig, E2KDConfig, KDConfig
from permafrost.config.store import PassOptions, StoreOptions
from permafrost.core.batches import TopLogits, top_class
from permafrost.core.errors import ConfigError
from permafrost.core.json_entries import EntryError
from permafrost.evaluation.metrics import agreement, kl_to_teacher
from permafrost.loading.record_loader import RecordLoader
from permafrost.loading.transfer import move_batch, pack_batch, unpack_batch
from permafrost.losses.logit_distances import kd_loss, top_logits_divergence
from permafrost.runs.mirrors import RUNS
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost.training.metric_log import read_metrics
from permafrost_report.options import ReportConfig, ReportOptions
from tests.support.runs import PAD_CROP, distill_config, evaluate_config
from tests.support.slow import slow
from tests.support.stores import Frozen, precompute_config, train_dataset
from tests.support.verbs import distill, evaluate, precompute, report

TEMPERATURES = (1.0, 2.0, 4.0)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def largest(logits, k, temperatures=TEMPERATURES):
    values, classes, rest = split_logits(logits, k, temperatures)
    return TopLogits(
        values=values,
        classes=classes,
        rest=rest,
        temperatures=temperatures,
        num_classes=logits.shape[1],
    )


# ---- closed forms --------------------------------------------------------------------------------


def test_logits_are_split_as_computed_by_hand():
    logits = torch.tensor([[0.0, math.log(3), math.log(5), math.log(2)]])

    values, classes, rest = split_logits(logits, 2, (1.0, 0.5))

    assert classes.tolist() == [[2, 1]]
    assert values.exp().tolist() == [pytest.approx([5.0, 3.0])]
    assert rest.exp().tolist() == [pytest.approx([1 + 2, 1 + 4])]


def test_the_divergence_is_that_of_the_named_classes_and_the_rest():
    teacher = torch.tensor([[5.0, 3.0, 1.0, 1.0]]).log()
    student = torch.tensor([[1.0, 2.0, 4.0, 3.0]]).log()

    found = top_logits_divergence(student, largest(teacher, 2), tau=1.0).item()

    told, own = (0.5, 0.3, 0.2), (0.1, 0.2, 0.7)
    assert found == pytest.approx(
        sum(p * math.log(p / q) for p, q in zip(told, own, strict=True)), rel=1e-6
    )


@pytest.mark.parametrize("tau", TEMPERATURES)
def test_with_all_classes_value_and_gradient_are_those_of_kd(tau):
    teacher, student = draw(6, 7), draw(6, 7, seed=1).requires_grad_()

    pairs = []
    for logits in (teacher, largest(teacher, 7), largest(teacher, 100)):
        loss = kd_loss(student, logits, tau)
        pairs.append((loss.item(), torch.autograd.grad(loss, student)[0]))

    for value, gradient in pairs[1:]:
        assert value == pytest.approx(pairs[0][0], rel=1e-12)
        torch.testing.assert_close(gradient, pairs[0][1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tau", TEMPERATURES)
def test_the_divergence_rises_with_k_towards_that_of_all_logits(tau):
    teacher, student = draw(5, 8), draw(5, 8, seed=1)

    each = [top_logits_divergence(student, largest(teacher, k), tau) for k in range(1, 9)]

    dense = F.kl_div(
        F.log_softmax(student / tau, dim=1),
        F.log_softmax(teacher / tau, dim=1),
        reduction="none",
        log_target=True,
    ).sum(dim=1)
    for fewer, more in zip(each, [*each[1:], dense], strict=True):
        assert (fewer <= more + 1e-7).all()
    assert (each[0] > 0).all()
    assert (each[0] < 0.9 * dense).any()  # a control: the bound is not tight


def test_it_is_the_divergence_of_all_logits_if_the_student_divides_the_rest_as_the_teacher_does():
    teacher, student = draw(4, 6), draw(4, 6, seed=1)
    stored = largest(teacher, 2)
    apart = student.gather(1, stored.classes)
    student = (teacher + 0.7).scatter(1, stored.classes, apart)  # the rest up to a constant

    dense = kd_loss(student, teacher, tau=1.0)

    assert kd_loss(student, stored, tau=1.0).item() == pytest.approx(dense.item(), rel=1e-6)


def test_a_gradient_step_moves_the_mass_of_the_rest_and_not_its_division():
    teacher = largest(draw(3, 6), 2)
    student = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)

    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, tau=1.0), student)

    rest = torch.ones(3, 6, dtype=torch.bool).scatter(1, teacher.classes, False)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient.sum(dim=1), torch.zeros(3, dtype=torch.float64))
    for row, own in zip(gradient, rest, strict=True):
        assert row[own].unique().numel() == 1 or torch.allclose(row[own], row[own][0])


def test_logits_far_apart_stay_finite():
    teacher = largest(torch.tensor([[2e4, 0.0, -2e4, -2e4]]), 1)
    student = torch.tensor([[-1e4, 0.0, 1e4, 0.0]], requires_grad=True)

    loss = kd_loss(student, teacher, tau=1.0)
    (gradient,) = torch.autograd.grad(loss, student)

    assert loss.item() == pytest.approx(2e4)
    assert gradient.isfinite().all()


def test_a_temperature_that_is_not_stored_is_refused_with_those_that_are():
    with pytest.raises(
        ConfigError, match=r"tau=3: .*known at 1,2,4 only.*temperatures=\[1,2,3,4\]"
    ):
        kd_loss(draw(2, 5), largest(draw(2, 5), 2), tau=3.0)


def test_agreement_and_divergence_of_a_student_from_the_largest_logits():
    teacher, student = draw(50, 6), draw(50, 6, seed=1)

    stored = largest(teacher, 3)

    assert torch.equal(top_class(stored), teacher.argmax(dim=1))
    assert agreement(student, stored) == agreement(student, teacher)
    assert 0 < kl_to_teacher(student, stored) < kl_to_teacher(student, teacher)


# ---- passes --------------------------------------------------------------------------------------


def pass_name(result):
    return result.passes[0]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory, tiny_teacher):
    """Function of k -> store with a pass of all logits and one of the k largest, and the name of the latter."""
    stores = {}

    def build(k):
        if k not in stores:
            path = tmp_path_factory.mktemp("top") / "store"
            config = precompute_config(path, tiny_teacher)
            precompute.run(config)
            top = replace(config, annotate=PassOptions(batch_size=8, logits="topk", k=k))
            name = pass_name(precompute.run(top))
            stores[k] = Frozen(Store(path), top), name
        return stores[k]

    return build


@pytest.mark.parametrize("k", [3, slow(10)])
def test_a_pass_stores_the_largest_of_its_logits_and_verifies(frozen, k):
    store, name = frozen(k)[0].store, frozen(k)[1]
    (every,) = (store.open_pass(f.name) for f in store.pass_folders() if f.name != name)
    own = store.open_pass(name)
    specs = {spec.name: (spec.shape, spec.dtype) for spec in own.manifest.fields}

    assert specs["top_logits"] == ((k,), "float16")
    assert specs["top_class"] == ((k,), "uint16")
    assert specs["rest_logits"] == ((3,), "float32")
    assert "logits" not in specs
    assert own.manifest.temperatures == TEMPERATURES
    for shard in store.shards:
        logits = every.read_shard(shard)["logits"][:, 0]
        values = own.read_shard(shard)
        order = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")[:, :k]
        expected = np.take_along_axis(logits, order, axis=1)
        np.testing.assert_array_equal(values["top_logits"][:, 0], expected)
        at_class = np.take_along_axis(logits, values["top_class"][:, 0].astype(int), axis=1)
        np.testing.assert_array_equal(at_class, expected)
        total = np.exp(logits.astype(np.float64)).sum(axis=1)
        stored = np.exp(values["top_logits"][:, 0].astype(np.float64)).sum(axis=1)
        if k < 10:
            stored += np.exp(values["rest_logits"][:, 0, 0])
        np.testing.assert_allclose(stored, total, rtol=2e-3)  # float16
    assert list(verify_store(store.folder)) == []


def test_another_k_is_another_pass_and_all_logits_are_the_pass_that_they_were(frozen):
    base, name = frozen(3)
    every = replace(base.config, annotate=PassOptions(batch_size=8))
    unread = replace(every, annotate=PassOptions(batch_size=8, k=7, temperatures=(1.0, 9.0)))

    assert pass_name(precompute.run(every)) == pass_name(precompute.run(unread)) != name


def test_batches_have_the_largest_logits_through_packing_and_moving(frozen):
    base, name = frozen(3)
    batch = train_dataset(base, None, names=(name,)).__getitems__([0, 1, 2])
    logits = unpack_batch(move_batch(pack_batch(batch), torch.device("cpu"))).targets[0].logits

    assert isinstance(logits, TopLogits)
    assert [tuple(each.shape) for each in (logits.values, logits.classes, logits.rest)] == [
        *((3, 3), (3, 3), (3, 3))
    ]
    assert logits.num_classes == 10
    loaded = next(
        iter(RecordLoader(open_store(base.store.path).select("train"), teacher=name, batch_size=4))
    )
    assert loaded.targets()[0].logits.values.shape == (4, 3)
    with pytest.raises(ConfigError, match="all 10 classes, but the pass stores the 3 largest"):
        _ = loaded.logits


def test_students_of_all_classes_are_those_of_all_logits(frozen):
    base, name = frozen(10)
    (every,) = (f.name for f in base.store.pass_folders() if f.name != name)
    losses = []
    for run, chosen in (("every", every), ("top", name)):
        store = StoreOptions(path=str(base.store.path), teacher=(chosen,))
        distill.run(replace(distill_config(base, run=run), store=store))
        losses.append([line["total"] for line in read_metrics(RUNS / run / "distill")])

    assert losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_a_student_of_three_classes_is_trained_evaluated_and_reported(frozen):
    base, name = frozen(3)
    (every,) = (f.name for f in base.store.pass_folders() if f.name != name)
    store = StoreOptions(path=str(base.store.path), teacher=(name,))
    distill.run(
        replace(distill_config(base, method=ATConfig(lambda_at=0.0, lambda_kd=1.0)), store=store)
    )
    metrics = []
    for against, folder in ((None, "evaluate"), (every, f"evaluate-against-{every}")):
        options = evaluate_config(base, against=against)
        evaluate.run(replace(options, store=store))
        path = RUNS / "one" / folder / "metrics.json"
        metrics.append(json.loads(path.read_text())["splits"]["test"])

    assert metrics[0]["agreement"] == metrics[1]["agreement"]
    assert metrics[0]["teacher_accuracy"] == metrics[1]["teacher_accuracy"]
    assert 0 < metrics[0]["kl_to_teacher"] < metrics[1]["kl_to_teacher"]
    report.run(ReportConfig(store=store, augment=PAD_CROP, report=ReportOptions(), run="one"))
    assert (RUNS / "one" / "report.html").is_file()


@dataclass(frozen=True, kw_only=True)
class EveryLogitConfig(KDConfig):
    """Options of a method of one's own, which reads the logits of all classes."""

    all_logits_option = "method=every"


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (
            EveryLogitConfig(),
            r"method=every needs the logits of all classes, but .*annotate.logits=all",
        ),
        (E2KDConfig(tau=3.0), r"method.tau=3: .*temperatures 1, 2, 4 only; choose one"),
        (KDConfig(logits="mld"), r"method.logits=mld needs the logits of all classes"),
        (KDConfig(logits="softmax_mse"), r"method.logits=softmax_mse needs the logits of all"),
    ],
)
def test_methods_that_need_what_is_not_stored_are_refused_before_training(frozen, method, text):
    base, name = frozen(3)
    store = StoreOptions(path=str(base.store.path), teacher=(name,))

    with pytest.raises(StoreMismatchError, match=text):
        distill.run(replace(distill_config(base, method=method), store=store))

    assert not list(RUNS.glob("*/distill/*.safetensors"))


@pytest.mark.parametrize(
    ("temperatures", "text"),
    [
        ((2.0,), "must be positive, and 1 among them"),
        ((0.0, 1.0), "must be positive"),
        ((1.0, 4.0, 2.0), "must rise"),
        ((1.0, 1.0), "must rise"),
    ],
)
def test_temperatures_that_cannot_be_stored_are_refused(temperatures, text):
    with pytest.raises(ConfigError, match=text):
        PassOptions(temperatures=temperatures)


@pytest.mark.parametrize(
    "change",
    [
        {"temperatures": (1.0, math.nan, 4.0)},
        {"temperatures": (1.0, -2.0, 4.0)},
        {"temperatures": (1.0, 2.0)},
        {"temperatures": ()},
        {"teacher": {"classes": 2}},
    ],
)
def test_a_manifest_that_contradicts_its_fields_is_refused(frozen, change):
    manifest = frozen(3)[0].store.open_pass(frozen(3)[1]).manifest
    change = {"teacher": manifest.teacher | change["teacher"]} if "teacher" in change else change

    with pytest.raises(EntryError):
        replace(manifest, **change)
