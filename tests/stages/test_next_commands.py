"""The `next:` lines of a pass, a training and an evaluation: each runs as it is printed, for every kind of pass."""

from __future__ import annotations

import csv
import shlex
import shutil
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from permafrost.config.methods import METHODS, KDConfig
from permafrost.config.store import PassOptions
from permafrost.library import open_store
from permafrost.training.student_passes import served_methods
from tests.support.papers import needs_papers
from tests.support.slow import slow
from tests.support.stores import TINY_DATA, precompute_config
from tests.support.verbs import precompute

TEACHER = "teacher=cifar teacher.name=resnet8 teacher.width=4 teacher.weights=random"
QUICK = ("trainer.epochs=1", "trainer.batch_size=8", "trainer.num_threads=1")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Store of images of ten classes without a pass, which tests must not change."""
    config = precompute_config(tmp_path_factory.mktemp("packed") / "store", data=TINY_DATA)
    precompute.run(config)
    return config.store.path


def write_images(folder, splits, labels=lambda number: f"class{number % 3}"):
    """Write images of noise with a table of their splits and labels."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(24):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(
            folder / f"{number}.png"
        )
        row = {"path": f"{number}.png", "split": splits[number % 4 == 3], "name": labels(number)}
        rows.append(row)
    with (folder / "images.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "split", "name"])
        writer.writeheader()
        writer.writerows(rows)


def printed_next(output):
    """Words of the last line, the next command, without its program."""
    last = output.splitlines()[-1]
    assert last.startswith("next: permafrost "), output
    return shlex.split(last)[2:]


def printed_by(permafrost, verb, *words):
    code, printed, errors = permafrost(verb, *words)
    assert code == 0, f"{verb} {shlex.join(words)}\n{errors}"
    return printed


def run_next(permafrost, output):
    """Run the printed command, with short trainings, and return its words and output."""
    verb, *words = printed_next(output)
    return words, printed_by(permafrost, verb, *words, *(QUICK if verb == "distill" else ()))


def follow(permafrost, output):
    """Run the printed commands up to the report, and return the words of `distill` and of `evaluate`."""
    trained, printed = run_next(permafrost, output)
    evaluated, printed = run_next(permafrost, printed)
    assert printed_next(printed)[0] == "report"
    return trained, evaluated


def methods_of(words):
    return [word for word in words if word.startswith("method")]


KINDS = [
    slow("annotate.outputs=[logits]", ["method=kd"]),
    ("", ["method=e2kd"]),
    slow("annotate.outputs=[logits,class_maps]", ["method=cat_kd"]),
    slow("annotate.outputs=[logits,attention]", ["method=at"]),
    slow("annotate.outputs=[attention]", ["method=at"]),
    ("annotate.outputs=[pooled]", ["method=embedding"]),
    slow("annotate.outputs=[logits,pooled]", ["method=embedding", "method.lambda_kd=1"]),
    slow("annotate.outputs=[features]", ["method=features"]),
    slow("annotate.outputs=[logits,features]", ["method=features", "method.lambda_kd=1"]),
    slow("annotate.outputs=[logits] annotate.logits=topk annotate.k=3", ["method=kd"]),
    slow("annotate.logits=topk annotate.k=3", ["method=e2kd"]),
    ("views=random views.count=2 augment=pad_crop", ["method=e2kd"]),
    slow(
        "views=random views.count=2 augment=pad_crop_flip_randaugment annotate.outputs=[logits]",
        ["method=kd"],
    ),
    slow("views=random views.count=2 'views.mix=[{kind: mixup}]'", ["method=kd"]),
    slow(
        "teacher=bcos teacher.name=resnet8 teacher.weights=random explainer=bcos_weights",
        ["method=e2kd"],
    ),
    slow(
        "teacher=additive teacher.name=conv teacher.superfeatures=4 teacher.grid=[4,4] teacher.input_size=16 "
        "teacher.weights=random annotate.outputs=[logits,superfeature_logits]",
        ["method=ked"],
    ),
]


def test_a_method_of_others_is_not_built_for_a_suggestion(frozen, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class NeedsAnOption(KDConfig):
        implementation: ClassVar[str] = "a_package_of_others:Loss"
        number: int

    monkeypatch.setitem(METHODS._members, "needs_an_option", NeedsAnOption)

    served = served_methods(frozen.store.open_passes()[0])

    assert "kd" in served
    assert "needs_an_option" not in served


@needs_papers
@pytest.mark.parametrize(("words", "methods"), KINDS)
def test_what_follows_a_pass_runs_as_printed(permafrost, packed, tmp_path, words, methods):
    shutil.copytree(packed, tmp_path / "stores" / "tiny")
    base = ["store.path=stores/tiny", *TEACHER.split(), "annotate.batch_size=8"]
    if "teacher=" in words:
        base = ["store.path=stores/tiny", "annotate.batch_size=8"]

    printed = printed_by(permafrost, "precompute", *base, *shlex.split(words))
    trained, evaluated = follow(permafrost, printed)

    assert methods_of(trained) == methods
    assert ("mode=replay" in trained) == ("views=random" in words)
    # Without labels or logits the last layer is as it was initialized.
    alone = methods in (["method=embedding"], ["method=features"])
    assert ("evaluators=[knn,linear_probe]" in evaluated) == alone


def test_a_pass_that_is_added_is_named_with_a_method_of_its_own(permafrost, frozen, tmp_path):
    shutil.copytree(frozen.store.path, tmp_path / "stores" / "tiny")
    words = ["store.path=stores/tiny", *TEACHER.split(), "annotate.batch_size=8"]

    _, printed, _ = permafrost("precompute", *words, "annotate.outputs=[pooled]")
    trained, _ = follow(permafrost, printed)

    assert methods_of(trained) == ["method=embedding"]
    assert sum(word.startswith("store.teacher=resnet8-") for word in trained) == 1


def test_what_follows_a_pass_over_other_splits_names_them(permafrost, tmp_path):
    write_images(tmp_path, ("imagenet1k-train", "imagenet1k-validation"))
    data = ["data=image_table", "data.path=images.csv", "data.label=name", "data.split=split"]

    words = ["store.path=stores/own", *data, *TEACHER.split(), "preview.all=true"]
    trained, evaluated = follow(permafrost, printed_by(permafrost, "precompute", *words))

    assert "split=imagenet1k-train" in trained
    assert "evaluate.splits=[imagenet1k-validation]" in evaluated


@pytest.mark.parametrize(
    ("labels", "outputs", "methods"),
    [
        ("data.labels=name", "logits,maps", ["method=e2kd", "method.logits=mld"]),
        slow("data.labels=name", "logits", ["method=kd", "method.logits=mld"]),
        ("data.labels=name", "logits,attention", ["method=at"]),
        slow("data.labels=name", "logits,pooled", ["method=embedding", "method.lambda_ce=1"]),
        ("data.labels=null", "attention,pooled", ["method=embedding"]),
    ],
)
def test_what_follows_a_pass_over_many_labels_or_none_runs(
    permafrost, tmp_path, labels, outputs, methods
):
    write_images(tmp_path, ("train", "test"), lambda n: f"class{n % 3} class{(n + n // 3) % 3}")
    data = ["data=image_table", "data.path=images.csv", "data.label=null", labels]
    words = ["store.path=stores/many", *data, "data.split=split", *TEACHER.split()]

    printed = printed_by(permafrost, "precompute", *words, f"annotate.outputs=[{outputs}]")
    trained, evaluated = follow(permafrost, printed)

    assert methods_of(trained) == methods
    if labels == "data.labels=null":  # there are none to predict
        assert "evaluators=[knn,linear_probe]" not in evaluated


@needs_papers
def test_what_follows_a_pass_over_a_table_runs(permafrost):
    words = ["store.path=stores/table", "data=sklearn_table", "run=table", "teacher=additive"]
    words += ["teacher.name=mlp", "teacher.weights=random"]
    words += ["annotate.outputs=[logits,superfeature_logits]"]

    trained, _ = follow(permafrost, printed_by(permafrost, "precompute", *words))

    assert methods_of(trained) == ["method=ked"]


@needs_papers
def test_what_follows_the_training_of_a_teacher_of_ked_runs(permafrost, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "stores" / "tiny")
    words = ["store.path=stores/tiny", *TEACHER.split(), "run=one"]
    printed_by(permafrost, "precompute", *words)
    refused = ["method=ked", "student=additive", "augment=none"]
    code, _, errors = permafrost("distill", words[0], "run=two", *refused)
    assert (code, errors.count("\n")) == (1, 1)
    assert "no output superfeature_logits, which only additive teachers have" in errors
    assert "teacher=additive and annotate.outputs=[logits,superfeature_logits] and" in errors
    shutil.rmtree(tmp_path / "stores" / "tiny" / "teachers")

    network = [f"black_box.{word.removeprefix('teacher.')}" for word in TEACHER.split()[1:]]
    teaching = ["teaching=ked", "black_box=cifar", *network, "teaching.records=8"]
    additive = ["teacher=additive", "teacher.name=mlp", "teacher.superfeatures=3"]
    sizes = ["teacher.grid=[2,4]", "teacher.input_size=16", "teaching.augment=none"]
    quick = [f"teaching.{word}" for word in QUICK]
    words = [words[0], "run=ked", *teaching, *additive, *sizes, *quick]
    passed, printed = run_next(permafrost, printed_by(permafrost, "teach", *words))
    trained, _ = follow(permafrost, printed)

    assert "annotate.outputs=[logits,superfeature_logits]" in passed
    assert methods_of(trained) == ["method=ked"]
    assert {"student.partition=runs/ked/teach", "student.grid=[2, 4]"} <= set(trained)


@needs_papers
def test_a_pass_without_maps_names_the_methods_that_it_can_serve(permafrost, packed, tmp_path):
    config = precompute_config(
        shutil.copytree(packed, tmp_path / "stores" / "tiny"),
        annotate=PassOptions(batch_size=8, outputs=("pooled",)),
    )
    words = [f"store.path={config.store.path}", *TEACHER.split(), "annotate.outputs=[pooled]"]
    permafrost("precompute", *words)

    code, _, errors = permafrost("distill", words[0], "run=one", "method=e2kd")

    assert code == 1
    assert "holds no maps, but method=e2kd needs them" in errors
    assert "it can serve method=embedding, crd" in errors


def test_the_method_of_a_pass_is_kept_beside_an_experiment(permafrost, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "stores" / "tiny")
    words = ["experiment=demo", "store.path=stores/tiny", "data=none", *TEACHER.split()]

    _, printed, _ = permafrost("precompute", *words, "annotate.outputs=[logits]")

    assert "method=kd" in printed_next(printed)
    _, printed, _ = permafrost("precompute", *words, "annotate.outputs=[logits,maps]")
    assert methods_of(printed_next(printed)) == ["method=e2kd"]


def test_the_accuracies_of_a_teacher_name_their_pictures(permafrost, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "stores" / "tiny")
    network = ["teacher=cifar", "teacher.name=resnet8", "teacher.width=4"]
    quick = [f"teaching.{word}" for word in QUICK]

    words = ["store.path=stores/tiny", "run=one", *network, *quick, "teaching.augment.size=24"]
    printed = printed_by(permafrost, "teach", *words)
    _, made = run_next(permafrost, printed)

    side = TINY_DATA.image_size
    shown = f"picture: whole image at 24x24, bilinear from frames of {side}x{side}\n"
    assert f"\n{shown}" in printed
    assert open_store("stores/tiny").facts()["teacher"]["input"].value == shown[9:-1]
    assert printed_next(made)[0] == "distill"
