"""Evaluators of a student's interpretability on a tiny store: results, requirements and errors."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from permafrost.core.errors import ConfigError
from permafrost.evaluation.evaluate import evaluate_student
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from permafrost_papers.interpretability import class_similarity as cifar100_coarse
from permafrost_papers.interpretability import dissection as dissection
from permafrost_papers.interpretability.concepts import DrawnConcepts
from permafrost_papers.interpretability.options import (
    CellsDataConfig,
    ClassSimilarityOptions,
    DiffroarOptions,
    DissectionOptions,
    FiveBandOptions,
    GradientAlignmentOptions,
)
from permafrost_papers.interpretability.study_pictures import gradient_figures, gradient_images
from permafrost_report.student_results import StudentResult
from tests.support.broden import write_broden
from tests.support.run_files import change_signed
from tests.support.runs import evaluation_of, save_student
from tests.support.stores import frozen_store, precompute_config
from tests.support.verbs import precompute


@pytest.fixture
def untrained_student(frozen):
    return save_student(frozen, "one")


def evaluator(frozen, name, folder=None, **options):
    config = evaluation_of(frozen, (name,), **{"splits": ("test",), **options})
    return evaluate_student(config, folder).splits["test"][name]


# ---- gradient_alignment --------------------------------------------------------------------------


def test_gradients_are_aligned_the_same_whatever_the_batches(frozen, untrained_student):
    whole = evaluator(frozen, "gradient_alignment")
    parts = evaluator(frozen, "gradient_alignment", "by-three", batch_size=3)

    assert parts == pytest.approx(whole, rel=1e-5)
    assert whole["mask_energy_records"] == whole["margin_alignment_records"] == 10
    assert -1 < whole["mask_energy"] < 1
    assert 0 <= whole["map_cosine"] <= 1
    assert whole["margin_alignment"] > 0


def test_pictures_are_the_loss_gradients_of_the_same_records_for_every_network(
    frozen, untrained_student
):
    options = {"gradient_alignment": GradientAlignmentOptions(pictures=3, records=4)}
    found = evaluator(frozen, "gradient_alignment", **options)
    teacher = {"model": "teacher", "teacher": frozen.config.teacher}
    evaluated = evaluator(frozen, "gradient_alignment", **teacher, **options)

    own, of_teacher = (
        load_file(RUNS / "one" / folder / "gradient_alignment-test.safetensors")
        for folder in ("evaluate", "evaluate-teacher")
    )
    network, _ = SavedNetwork(RUNS / "one" / "distill").load()
    images = (own["frames"].float() / 255).requires_grad_()
    loss = F.cross_entropy(network.eval()(images).logits, own["labels"], reduction="sum")
    (wanted,) = torch.autograd.grad(loss, images)

    assert {"mask_energy", "margin_alignment", "map_cosine"} <= set(evaluated)
    assert own["rows"].tolist() == of_teacher["rows"].tolist()
    assert len(set(own["labels"].tolist())) == 3
    assert own["gradients"].dtype == torch.float16
    assert own["gradients"].abs().amax(dim=(1, 2, 3)).tolist() == [1, 1, 1]
    cosine = F.cosine_similarity(own["gradients"].float().flatten(1), wanted.flatten(1))
    assert cosine.min() > 0.99  # frames are rounded to 8 bits
    other = of_teacher["gradients"].float().flatten(1)
    assert F.cosine_similarity(other, wanted.flatten(1)).max() < 0.9

    student = StudentResult(
        variant="one",
        label="one",
        seed=0,
        folder=RUNS / "one",
        metrics={"test": {"gradient_alignment": found}},
    )
    (figure,) = gradient_figures([student], replace(student, label="teacher"), frozen.store)
    assert [row.title for row in figure.grid] == ["image", "teacher", "one"]
    elsewhere = replace(student, metrics={"val": {"gradient_alignment": found}})
    assert gradient_figures([elsewhere], None, frozen.store) == []


def test_a_gradient_is_drawn_around_gray():
    gradients = torch.zeros(2, 3, 8, 8, dtype=torch.float16)
    gradients[0, 0, 2, 3], gradients[0, 1, 4, 4] = 1, -1

    drawn, empty = gradient_images(gradients)

    assert drawn.shape == (8, 8, 3)
    assert (drawn[2, 3].tolist(), drawn[4, 4].tolist()) == ([1, 0.5, 0.5], [0.5, 0, 0.5])
    assert (empty == 0.5).all()


# ---- class_similarity ----------------------------------------------------------------------------


def test_the_teachers_class_means_are_its_own_and_a_students_are_not(frozen, untrained_student):
    own = evaluator(frozen, "class_similarity", model="teacher", teacher=frozen.config.teacher)
    other = evaluator(frozen, "class_similarity")

    assert own["spearman"]["teacher"] > 0.999  # not 1: the pass stores logits as float16
    assert own["entropy"] == pytest.approx(own["teacher_entropy"], abs=1e-3)
    assert other["spearman"]["teacher"] < 0.9
    assert other["teacher_entropy"] == own["teacher_entropy"]


def test_class_means_are_compared_with_superclasses_of_a_file(frozen, untrained_student, tmp_path):
    path = tmp_path / "parity.txt"
    path.write_text("even\nodd\n" * 5)
    options = ClassSimilarityOptions(similarity=str(path), tau=2.0)

    found = evaluator(frozen, "class_similarity", class_similarity=options)

    assert set(found["spearman"]) == {"teacher", "given"}
    assert -1 <= found["teacher_spearman"]["given"] <= 1
    path.write_text("odd\neven\n" * 5)
    with pytest.raises(ConfigError, match=r"parity.txt has changed since class_similarity read it"):
        evaluator(frozen, "class_similarity", class_similarity=options)


def test_coarse_classes_are_of_the_stores_own_class_names(
    frozen, untrained_student, tmp_path, monkeypatch
):
    options = ClassSimilarityOptions(reference="cifar100_coarse", tau=2.0)
    with pytest.raises(ConfigError, match=r"reference=cifar100_coarse knows.*10 of the store's 10"):
        evaluator(frozen, "class_similarity", class_similarity=options)
    of_digits = {"a": "0 2 4 6 8", "b": "1 3 5 7 9"}
    own = {digit: name for name, digits in of_digits.items() for digit in digits.split()}
    monkeypatch.setattr(cifar100_coarse, "_COARSE_OF", own)
    path = tmp_path / "parity.txt"
    path.write_text("even\nodd\n" * 5)
    file = ClassSimilarityOptions(similarity=str(path), tau=2.0)

    by_name = evaluator(frozen, "class_similarity", class_similarity=options)

    assert by_name == evaluator(frozen, "class_similarity", "by-file", class_similarity=file)
    assert {"teacher", "given"} == set(by_name["spearman"])


def test_nothing_to_compare_class_means_with_is_refused(tmp_path, frozen, untrained_student):
    store = tmp_path / "bare"
    precompute.run(precompute_config(store))
    bare = replace(frozen, store=Store(store))
    folder = RUNS / "one" / "distill" / "model.json"
    change_signed(folder, {"teachers": []})

    with pytest.raises(
        ConfigError, match=r"there is no teacher pass.*class_similarity\.similarity="
    ):
        evaluator(bare, "class_similarity")


# ---- five_band -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cell_store(tmp_path_factory, tiny_teacher):
    """Store of cells with a pass of an untrained network."""
    data = CellsDataConfig(image_size=24, train_records=20, test_records=20)
    return frozen_store(tmp_path_factory.mktemp("cells") / "store", tiny_teacher, data=data)


def test_explanations_of_cells_are_scored_band_by_band(cell_store):
    save_student(cell_store, "one")

    found = evaluator(cell_store, "five_band")
    parts = evaluator(cell_store, "five_band", "by-three", batch_size=3)

    assert parts == found
    for name in ("accuracy", "recall", "precision", "fpr"):
        assert all(0 <= value <= 1 for value in found[name].values())
    assert found["accuracy"]["best"] >= found["accuracy"]["hard"]
    assert found["background_fraction"] > 0.6
    soft = evaluator(cell_store, "five_band", "v2", five_band=FiveBandOptions(thresholds="v2"))
    assert soft["accuracy"]["hard"] == found["accuracy"]["hard"]


def test_masks_without_two_levels_are_refused(frozen, untrained_student):
    with pytest.raises(ConfigError, match=r"needs masks of two levels.*test has one with 255"):
        evaluator(frozen, "five_band")


# ---- dissection ----------------------------------------------------------------------------------

DISSECTION = DissectionOptions(images=12, quantile=0.1, top_units=2, top_images=3)


def test_units_are_dissected_once_for_all_splits_and_shown(frozen, untrained_student, monkeypatch):
    passes = []
    dissect = dissection.dissect
    monkeypatch.setattr(dissection, "dissect", lambda *args: passes.append(1) or dissect(*args))

    splits = ("test", "test_swapped")
    found = evaluator(frozen, "dissection", dissection=DISSECTION, splits=splits)

    assert len(passes) == 1
    assert (found["units"], found["images"]) == (16, 12)
    assert found["detectors"] == sum(found["detectors_by_category"].values())
    assert found["unique_concepts"] <= found["detectors"]
    best, second = found["top_units"]
    assert best["iou"] >= second["iou"]
    for split in splits:
        shown = load_file(RUNS / "one" / "evaluate" / f"dissection-{split}.safetensors")
        assert shown["shown_frames"].shape == (2, 3, 3, 16, 16)
        # Every unit fires on some pixel.
        assert shown["shown_masks"].amax(dim=(1, 2, 3)).tolist() == [1, 1]
        assert shown["unit_iou"][best["unit"]].item() == pytest.approx(best["iou"])


def test_another_stage_has_its_own_units_and_one_too_many_is_refused(frozen, untrained_student):
    first = evaluator(frozen, "dissection", dissection=replace(DISSECTION, stage=1))

    assert first["units"] == 4
    with pytest.raises(ConfigError, match=r"stage=4: CifarResNet .* it has stages 1 to 3"):
        evaluator(frozen, "dissection", "again", dissection=replace(DISSECTION, stage=4))
    with pytest.raises(ConfigError, match=r"dissection\.path=nowhere has no index\.csv"):
        evaluator(frozen, "dissection", "again", dissection=replace(DISSECTION, path="nowhere"))


def test_a_set_on_disk_dissects_as_the_one_that_is_drawn(frozen, untrained_student, tmp_path):
    write_broden(DrawnConcepts(12, 64), tmp_path / "broden")
    on_disk = replace(DISSECTION, path=str(tmp_path / "broden"))

    drawn = evaluator(frozen, "dissection", dissection=DISSECTION)
    read = evaluator(frozen, "dissection", "disk", dissection=on_disk)

    assert read == drawn


# ---- diffroar ------------------------------------------------------------------------------------

RETRAINED = DiffroarOptions(
    keep=(0.1, 0.5),
    seeds=(0, 1),
    epochs=1,
    train_records=16,
    records_per_class=1,
    test_records=8,
    width=2,
)


@pytest.mark.parametrize("unit", ["coord", "pixel"])
def test_probes_are_retrained_the_same_again(frozen, untrained_student, unit):
    options = replace(RETRAINED, unit=unit)

    found = evaluator(frozen, "diffroar", diffroar=options)

    assert (found["train_records"], found["test_records"]) == (16, 8)
    assert set(found["difference"]) == set(found["mask_only"]) == {"10%", "50%"}
    for name, value in found["difference"].items():
        assert value == pytest.approx(
            found["power"]["top"][name] - found["power"]["bottom"][name], abs=1e-12
        )
    assert evaluator(frozen, "diffroar", "again", diffroar=options, batch_size=3) == found
    table = pq.read_table(RUNS / "one" / "evaluate" / "diffroar-test.parquet").to_pandas()
    sizes = table["set"].value_counts().to_dict()
    assert sizes == {name: found[f"{name}_records"] for name in ("train", "test")}
    assert table["key"].is_unique
    one_seed = evaluator(frozen, "diffroar", "one-seed", diffroar=replace(options, seeds=(0,)))
    assert ("sd" in found, "sd" in one_seed) == (True, False)


def test_probes_that_can_learn_nothing_are_refused(frozen, untrained_student):
    few = replace(RETRAINED, records_per_class=2)  # 16 records of ten classes
    with pytest.raises(
        ConfigError,
        match=r"train_records=16 is 1\.6 for each of the 10 classes of train.*fewer than 2.*train_records=20$",
    ):
        evaluator(frozen, "diffroar", diffroar=few)
    with pytest.raises(ConfigError, match=r"has only \d+ free records, so leave diffroar out"):
        evaluator(frozen, "diffroar", diffroar=replace(few, records_per_class=1000))
    assert (
        evaluator(frozen, "diffroar", diffroar=replace(few, train_records=20))["train_records"]
        == 20
    )


def test_probes_learn_from_no_record_that_is_evaluated(frozen, untrained_student):
    with pytest.raises(ConfigError, match=r"diffroar\.train_split=test has no labeled records"):
        evaluator(frozen, "diffroar", diffroar=replace(RETRAINED, train_split="test"))
