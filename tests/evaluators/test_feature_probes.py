"""Evaluators knn and linear_probe: votes and fits by hand, and the records that they learn from."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from permafrost.config.store import SubsetOptions
from permafrost.core.errors import ConfigError
from permafrost.evaluation.evaluate import evaluate_student
from permafrost.loading.subset import select_training_rows
from permafrost.models.providers import build_model
from permafrost.models.saved import SavedNetwork, TrainedModel, save_model
from permafrost_evaluators.feature_probes import fit_linear, linear_logits, neighbor_votes
from permafrost_evaluators.options import KNNOptions, LinearProbeOptions
from permafrost_papers.bcos.options import BcosModelConfig
from tests.support.runs import evaluation_of, save_student
from tests.support.tensors import gaussian


@pytest.fixture
def student(frozen):
    return save_student(frozen, "one")


def measured(frozen, name, folder=None, **options):
    config = evaluation_of(frozen, (name,), **{"splits": ("test",), **options})
    return evaluate_student(config, folder).splits["test"][name]


def test_votes_are_those_of_the_nearest_by_cosine():
    """Lengths do not count: the first training record is nearest although it is far away."""
    features = torch.tensor([[1.0, 0.0]])
    bank = torch.tensor([[100.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([2, 1, 1, 0])

    votes = neighbor_votes(features, bank, labels, (1, 3), tau=0.5, classes=3)

    assert torch.equal(votes[0], torch.tensor([[0.0, 0.0, 1.0]]))
    expected = math.exp(-0.2 / 0.5) + math.exp(-1 / 0.5)
    assert torch.allclose(votes[1], torch.tensor([[0.0, expected, 1.0]]))


def test_votes_do_not_overflow_at_a_low_temperature():
    votes = neighbor_votes(
        gaussian(0, 4, 8).float(),
        gaussian(1, 9, 8).float(),
        torch.arange(9) % 3,
        (5,),
        tau=1e-4,
        classes=3,
    )

    assert votes.isfinite().all()
    assert torch.equal(votes.amax(dim=2), torch.ones(1, 4))


def test_a_fit_is_where_the_gradient_is_zero():
    features, labels = gaussian(0, 60, 5), torch.arange(60) % 3

    weights = fit_linear(features, labels, 0.1, 3).requires_grad_()
    loss = F.cross_entropy(linear_logits(features, weights), labels)
    (loss + 0.05 * weights[:, :-1].square().sum()).backward()

    assert weights.grad.abs().max() < 1e-6
    assert torch.allclose(weights.detach().sum(dim=0), torch.zeros(6).double(), atol=1e-5)


def test_without_information_the_fit_answers_with_the_shares_of_the_classes():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])

    weights = fit_linear(torch.zeros(10, 4).double(), labels, 1.0, 3)

    probabilities = linear_logits(torch.zeros(1, 4).double(), weights).softmax(dim=1)
    assert torch.allclose(probabilities, torch.tensor([[0.6, 0.3, 0.1]]).double(), atol=1e-6)


@pytest.mark.parametrize("name", ["knn", "linear_probe"])
def test_the_size_of_a_batch_changes_nothing_but_roundings(frozen, student, name):
    whole = measured(frozen, name)
    parts = measured(frozen, name, "by-three", batch_size=3)

    assert whole == parts
    assert whole["train_records"] == 40


def test_features_that_say_the_class_are_recognized_and_shuffled_labels_are_not(
    frozen, student, monkeypatch
):
    """The features are replaced by the labels' one-hot codes, for the evaluated records only in the control."""
    from permafrost_evaluators import feature_probes

    def coded(context, dataset):
        labels = torch.from_numpy(dataset.label_numbers.astype(np.int64))
        shown = labels if is_right else (labels + 1) % 10
        is_training = len(labels) == 40
        return F.one_hot(labels if is_training else shown, 10).float(), labels

    monkeypatch.setattr(feature_probes, "_features", coded)
    for is_right, expected in ((True, 1.0), (False, 0.0)):
        options = {"knn": KNNOptions(k=(1,))}
        assert measured(frozen, "knn", f"knn-{is_right}", **options)["accuracy"] == {"1": expected}
        linear = measured(frozen, "linear_probe", f"linear-{is_right}")
        assert linear["accuracy"] == expected
        assert linear["l2"] == 1e-5  # codes without noise need no regularization


def test_both_evaluators_share_the_features(frozen, student, monkeypatch):
    from permafrost_evaluators import feature_probes

    compute, numbers = feature_probes._compute_features, []

    def counted(context, dataset):
        numbers.append(len(dataset))
        return compute(context, dataset)

    monkeypatch.setattr(feature_probes, "_compute_features", counted)
    config = evaluation_of(frozen, ("knn", "linear_probe"), splits=("test",))
    result = evaluate_student(config, None)
    both = result.splits["test"]

    printed = dict(line.split() for line in result.printed()["results"].splitlines()[2:])
    assert printed["knn.accuracy.20"] == f"{both['knn']['accuracy']['20']:.4f}"
    assert printed["linear_probe.accuracy"] == f"{both['linear_probe']['accuracy']:.4f}"
    assert len(numbers) == 2
    assert numbers[0] == both["linear_probe"]["train_records"]
    assert both["knn"] == measured(frozen, "knn", "alone")


SUBSET = SubsetOptions(shots=1, seed=3)


def trained_on(student, split="train", subset=SUBSET):
    """Describe the student as one of a subset."""
    model, trained = SavedNetwork(student).load()
    save_model(student, model, replace(trained, split=split, subset=subset))


def test_the_subset_of_the_student_is_learned_from_if_it_is_asked_for(frozen, student, monkeypatch):
    from permafrost_evaluators import feature_probes

    compute, seen = feature_probes._compute_features, []

    def recorded(context, dataset):
        seen.append(np.asarray(dataset.rows).tolist())
        return compute(context, dataset)

    monkeypatch.setattr(feature_probes, "_compute_features", recorded)
    trained_on(student)
    options = {
        "knn": KNNOptions(k=(1,), train_subset="student"),
        "linear_probe": LinearProbeOptions(train_subset="student"),
    }
    for name in options:
        seen.clear()
        found = measured(frozen, name, f"{name}-own", **options)
        rows = select_training_rows(frozen.store.index, "train", SUBSET)
        assert seen[0] == rows.tolist()
        assert found["train_records"] == len(rows) == 10
        assert measured(frozen, name, f"{name}-all")["train_records"] == 40


def test_a_subset_of_other_records_than_the_students_is_refused(frozen, student):
    options = {"knn": KNNOptions(k=(1,), train_subset="student")}
    trained_on(student, split="test")
    with pytest.raises(ConfigError, match=r"train_split=train is not the split test that"):
        measured(frozen, "knn", **options)

    config = evaluation_of(frozen, ("knn",), splits=("test",), **options)
    with pytest.raises(
        ConfigError, match=r"knn\.train_subset=student .* model=teacher is not a st"
    ):
        evaluate_student(replace(config, model="teacher", teacher=frozen.config.teacher))


def test_results_of_the_whole_split_and_of_the_students_records_are_not_mixed(frozen, student):
    plain = evaluation_of(frozen, ("knn",), splits=("test",), knn=KNNOptions(k=(1,)))
    own = evaluation_of(
        frozen, ("knn",), splits=("test",), knn=KNNOptions(k=(1,), train_subset="student")
    )
    trained_on(student)

    evaluate_student(plain)
    assert evaluate_student(plain).splits["test"]["knn"]["train_records"] == 40
    with pytest.raises(ConfigError, match=r"knn\.train_subset=all, but this one has student"):
        evaluate_student(own)

    of_student = evaluate_student(own, "of-the-student").splits
    assert evaluate_student(plain, "of-the-student").splits == of_student  # as the first call named
    typed = replace(plain, command=("evaluate", "evaluate.knn.train_subset=all"))
    with pytest.raises(ConfigError, match=r"knn\.train_subset=student, but this one has all"):
        evaluate_student(typed, "of-the-student")


def test_evaluated_records_are_never_learned_from(frozen, student):
    with pytest.raises(ConfigError, match=r"knn\.train_split=test has only records of .* test;"):
        measured(frozen, "knn", knn=KNNOptions(train_split="test"))


@pytest.mark.slow
def test_a_limit_draws_the_same_training_records_every_time(frozen, student):
    options = {"linear_probe": LinearProbeOptions(train_records=24)}

    first = measured(frozen, "linear_probe", "first", **options)

    assert first["train_records"] == 24
    assert measured(frozen, "linear_probe", "second", **options) == first


def test_more_neighbors_than_records_are_refused(frozen, student):
    with pytest.raises(ConfigError, match=r"knn\.k=\[1, 41\], but train has 40 labeled records"):
        measured(frozen, "knn", knn=KNNOptions(k=(1, 41)))
    with pytest.raises(ConfigError, match=r"evaluate\.knn\.k must list numbers .* got \[0\]"):
        KNNOptions(k=(0,))
    with pytest.raises(ConfigError, match=r"linear_probe\.l2 must list numbers above 0, got \[\]"):
        LinearProbeOptions(l2=())


def test_a_network_without_pooled_features_is_refused_before_anything_runs(frozen, student):
    config = BcosModelConfig(name="simple_vit_ti", width=64, depth=1, patch=8)
    torch.manual_seed(0)
    save_model(
        student,
        build_model(config, 10),
        TrainedModel(
            config=config,
            num_classes=10,
            input_size=(16, 16),
            classes=tuple(frozen.store.manifest.classes),
            teachers=(frozen.store.pass_folders()[0].name,),
        ),
    )

    with pytest.raises(ConfigError, match="evaluators=knn reads pooled features: a B-cos ViT"):
        measured(frozen, "knn")
