"""Several teachers of one student, records held out of training, and evaluation frames."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from permafrost.config.augment import AugmentOptions
from permafrost.config.data import ImageFolderDataConfig
from permafrost.config.distillation import DistillConfig
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.methods import E2KDConfig, LabelsConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import PassOptions, StoreOptions, SubsetOptions
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.errors import ConfigError
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.subset import rows_of_split, select_holdout_rows
from permafrost.losses.base import build_loss
from permafrost.models.providers import build_model
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import batch_loss
from tests.support.stores import precompute_config
from tests.support.verbs import distill, evaluate, precompute

FIRST = CifarModelConfig(name="resnet8", width=4, weights="random")
SECOND = CifarModelConfig(name="resnet14", width=4, weights="random")


def names_of(store):
    by_kind = {folder.name.split("-")[0]: folder.name for folder in store.pass_folders()}
    return by_kind["resnet8"], by_kind["resnet14"]


def student_of_teachers(store, teachers, **options):
    return DistillConfig(
        store=StoreOptions(path=str(store.path), teacher=teachers),
        student=replace(FIRST, weights=None),
        method=options.pop("method", E2KDConfig(tau=2.0, lambda_map=3.0)),
        augment=AugmentOptions(),
        optimizer=OptimizerOptions(),
        trainer=TrainerOptions(epochs=2, batch_size=8, num_threads=1),
        subset=options.pop("subset", SubsetOptions()),
        run=options.pop("run", "student"),
    )


def evaluation_config(store, /, *, run="student", teacher=(), **options):
    return EvaluateConfig(
        store=StoreOptions(path=str(store.path), teacher=teacher),
        evaluate=EvaluateOptions.from_values(options),
        run=run,
    )


def batch_loss_of(store, names, *, sums=False):
    torch.manual_seed(0)
    model = build_model(replace(FIRST, weights=None), 10)
    method = E2KDConfig(tau=2.0, lambda_map=3.0, lambda_ce=0.5)
    training = Training(
        model=model,
        loss=build_loss(method),
        optimizer=build_optimizer(OptimizerOptions(), list(model.parameters())),
        sums_teachers=sums,
    )
    dataset = StoreDataset(store, np.arange(8), store.open_passes(names))
    return batch_loss(training, dataset.__getitems__(list(range(8))), store.size)


@pytest.mark.parametrize(("sums", "weight"), [(False, 0.5), (True, 1.0)])
def test_the_loss_of_two_teachers_is_the_mean_or_the_sum_of_each_one_s(two_teachers, sums, weight):
    first, second = (batch_loss_of(two_teachers, [name]) for name in names_of(two_teachers))
    assert not torch.allclose(first.total, second.total)

    both = batch_loss_of(two_teachers, names_of(two_teachers), sums=sums)

    torch.testing.assert_close(both.total, weight * (first.total + second.total))
    for name, term in both.terms.items():
        torch.testing.assert_close(term, weight * (first.terms[name] + second.terms[name]))
    # The label term of a mean is counted once.
    torch.testing.assert_close(both.terms["ce"], 2 * weight * first.terms["ce"])


def test_a_student_of_two_teachers_is_trained_and_says_whose_it_is(two_teachers):
    names = names_of(two_teachers)

    distill.run(student_of_teachers(two_teachers, names, method=E2KDConfig()))

    assert SavedNetwork(RUNS / "student" / "distill").describe().teachers == names
    evaluated = evaluate.run(evaluation_config(two_teachers))
    assert "agreement" in evaluated.splits["test"]


def test_teachers_that_do_not_fit_together_are_refused(tmp_path):
    path = tmp_path / "store"
    for teacher in (FIRST, replace(SECOND, classes=12)):
        precompute.run(precompute_config(path, teacher))
    with pytest.raises(StoreMismatchError, match=r"differ in num_classes: .* has 10, .* has 12"):
        distill.run(student_of_teachers(Store(path), names_of(Store(path)), run="other"))


def test_a_teacher_of_other_classes_leaves_the_data_s_labels_unused(tmp_path, caplog):
    path = tmp_path / "store"
    precompute.run(precompute_config(path, replace(FIRST, classes=12)))
    store = Store(path)
    names = [folder.name for folder in store.pass_folders()]

    distill.run(student_of_teachers(store, names))

    config = evaluation_config(store, num_pictures=2)
    evaluated = evaluate.run(config).splits["test"]
    assert "accuracy" not in evaluated
    assert "teacher_accuracy" not in evaluated
    assert "because the network has 12 outputs" in caplog.text
    assert 0 <= evaluated["agreement"] <= 1
    with pytest.raises(ConfigError, match="none of the records has a label"):
        distill.run(
            student_of_teachers(store, names, method=E2KDConfig(lambda_ce=1.0), run="labeled")
        )
    # A student with the classes of the data is evaluated without that teacher.
    distill.run(student_of_teachers(store, (), method=LabelsConfig(), run="labels"))
    assert "agreement" not in evaluate.run(replace(config, run="labels")).splits["test"]


# ---- held-out records ----------------------------------------------------------------------------


def test_what_was_held_out_is_evaluated_as_a_split_of_its_own(two_teachers):
    subset = SubsetOptions(holdout=1, seed=3)
    distill.run(student_of_teachers(two_teachers, names_of(two_teachers)[:1], subset=subset))

    splits = evaluate.run(evaluation_config(two_teachers, splits=("holdout", "train"))).splits

    held_out = select_holdout_rows(two_teachers.index, "train", subset)
    assert splits["holdout"]["records"] == len(held_out) == 10
    assert splits["train"]["records"] == len(rows_of_split(two_teachers.index, "train"))


@pytest.mark.parametrize("named", [False, True])
def test_a_student_without_a_pass_of_its_own_says_that_its_agreement_is_missing(
    two_teachers, caplog, named
):
    caplog.set_level("WARNING", "permafrost.evaluate")
    config = student_of_teachers(two_teachers, (), method=LabelsConfig(), run="unnamed")
    distill.run(config)
    names = names_of(two_teachers)
    teacher = names[:1] if named else ()
    evaluated = evaluation_config(two_teachers, run="unnamed", teacher=teacher, splits=("test",))

    metrics = evaluate.run(replace(evaluated, evaluators=("accuracy",))).splits["test"]

    assert ("agreement" in metrics) == named
    assert ("agreement with a teacher is not measured" in caplog.text) == (not named)
    assert named or all(name in caplog.text for name in names)


def test_nothing_held_out_cannot_be_evaluated(two_teachers):
    distill.run(student_of_teachers(two_teachers, names_of(two_teachers)[:1]))

    with pytest.raises(ConfigError, match=r"subset\.holdout=0"):
        evaluate.run(evaluation_config(two_teachers, splits=("holdout",)))


# ---- frames and precision ------------------------------------------------------------------------


def test_half_precision_is_another_pass_close_to_the_full_one(tmp_path):
    passes = []
    for precision in ("float32", "bfloat16"):
        path = tmp_path / precision
        options = PassOptions(batch_size=8, precision=precision)
        precompute.run(precompute_config(path, FIRST, annotate=options))
        passes += Store(path).open_passes()

    full, half = passes
    shard = full.store.manifest.shards[0]
    exact, rounded = full.read_shard(shard), half.read_shard(shard)
    assert half.manifest.teacher["dtype"] == "bfloat16"
    assert full.name != half.name
    error = np.abs(exact["logits"].astype(float) - rounded["logits"].astype(float))
    assert 0 < error.max() < 0.05 * np.abs(exact["logits"]).max()


# ---- images of another set -----------------------------------------------------------------------


def other_images(folder: Path) -> ImageFolderDataConfig:
    """Write noise images of three classes that are unrelated to the digits."""
    generator = np.random.default_rng(0)
    for split, label, number in itertools.product(("train", "test"), "abc", range(8)):
        path = folder / split / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return ImageFolderDataConfig(path=str(folder))


def test_data_free_transfer_learns_on_other_images_and_is_evaluated_on_the_teachers_own(
    two_teachers, tmp_path
):
    path = tmp_path / "noise"
    teacher = replace(FIRST, classes=10)
    precompute.run(precompute_config(path, teacher, data=other_images(tmp_path / "images")))
    (name,) = (folder.name for folder in Store(path).pass_folders())
    distill.run(student_of_teachers(Store(path), (name,)))

    def evaluator(**options):
        return evaluate.run(evaluation_config(Store(path), **options))

    own = evaluator(store=str(two_teachers.path)).splits["test"]

    assert own["records"] == len(rows_of_split(two_teachers.index, "test"))
    assert 0 <= own["accuracy"] <= 1
    assert 0 <= own["agreement"] <= 1  # the other store has a pass of the same teacher
    assert own["teacher_accuracy"] > 0
    with pytest.raises(ConfigError, match="is a different store; name a split of that store"):
        evaluator(store=str(two_teachers.path), splits=("holdout",))
    packed = precompute_config(tmp_path / "packed")
    precompute.run(packed)
    with pytest.raises(StoreMismatchError, match="has no canonical pass of the teacher of"):
        evaluator(store=packed.store.path)
