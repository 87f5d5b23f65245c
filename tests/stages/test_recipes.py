"""Recipes of conf/experiment/: their commands compose, and their variants train on small data of the same shape.

The networks, losses, grids and schedules of a recipe are kept. Sizes and durations are reduced.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from permafrost.config.data import DataConfig, ImageFolderDataConfig, ImageTableDataConfig
from permafrost.config.methods import LabelsConfig
from permafrost.config.points import iter_points, knows_option, point_arguments
from permafrost.config.sections import experiment_files
from permafrost.config.verbs import VERBS, build_verb_config
from permafrost.models.providers import build_model
from permafrost.store.reader import Store
from permafrost_papers.interpretability.concepts import DrawnConcepts
from permafrost_papers.interpretability.options import CellsDataConfig, SSKDConfig
from permafrost_sources.options import DemoDataConfig
from permafrost_sources.torchvision_sets import SETS
from tests.support.broden import write_broden
from tests.support.commands import commands_in, header_of
from tests.support.composition import composed_of
from tests.support.items import for_each
from tests.support.stores import TINY_DATA
from tests.support.verbs import distill, evaluate, precompute, teach

EVERY_RECIPE = sorted(experiment_files())
RECIPES = [name.removeprefix("e2kd/") for name in EVERY_RECIPE if name.startswith("e2kd/")]
TEACHERS = ["table4_teacher", "table5_sun_teacher"]
"""Recipes without students."""
TRAINED = [recipe for recipe in RECIPES if recipe not in TEACHERS]
SIDE = 64
"""Side of the views in pixels, which five stages of stride 2 reduce to 2x2 cells."""
FRAME = 72
SHORT = {"epochs": 1, "batch_size": 6, "warmup_epochs": 0, "loader_processes": 0}
"""Options of a training of two steps."""


def header(recipe: str) -> str:
    return header_of(recipe if recipe in EVERY_RECIPE else f"e2kd/{recipe}")


def student_of(paper, recipe, variant):
    experiment = f"experiment={paper}/{recipe}"
    overrides = composed_of("sweep", experiment)["variants"][variant]
    return build_verb_config("distill", composed_of("sweep", experiment, *overrides))


OPTIMIZER = attrgetter("optimizer.kind", "optimizer.lr", "optimizer.weight_decay")


# ---- commands and options ------------------------------------------------------------------------


@for_each("recipe", EVERY_RECIPE)
def test_every_command_of_a_recipe_composes(recipe):
    """All options exist and are consistent. No file is read."""
    typed = commands_in(header(recipe))

    assert typed or "make demo" in header(recipe)
    made: set[str] = set()
    for verb, *words in typed:
        if not made & {word.removeprefix("teacher.weights=") for word in words}:
            composed = composed_of(verb, *words)
            build_verb_config(verb, composed)
            made.add(f"runs/{composed['run']}/{verb}")  # which a later line may read


@for_each("recipe", EVERY_RECIPE)
def test_a_recipe_builds_for_every_verb(recipe):
    composed = composed_of("sweep", f"experiment={recipe}")  # the same for every verb

    for verb in VERBS:
        if verb == "sweep" and not composed["variants"]:
            continue  # the recipe of a teacher has no students
        if verb == "teach" and composed["teacher"]["kind"] == "none":
            continue  # the recipe of students of another recipe's teacher
        build_verb_config(verb, composed)


@for_each("recipe", EVERY_RECIPE)
def test_a_recipe_writes_into_a_run_of_its_own(recipe):
    assert composed_of("sweep", f"experiment={recipe}")["run"] == recipe


def splits_of_data(data: dict[str, Any]) -> set[str] | None:
    """Splits of the real data of a recipe, None where they are the user's own."""
    kind, own = data["kind"], data.get("test_fraction")
    if kind == "torchvision":
        splits = set(SETS[data["name"]].splits)
    elif kind == "tiny_imagenet" or (kind == "image_folder" and "imagenet" in data["path"]):
        splits = {"train", "val"}
    elif kind == "demo":
        splits = {"teacher", "train", "test", "test_swapped"}
    else:
        return None
    return splits | ({"test"} if own else set())


@for_each("recipe", EVERY_RECIPE)
def test_a_recipe_names_splits_that_its_data_have(recipe):
    composed = composed_of("sweep", f"experiment={recipe}")
    splits = splits_of_data(composed["data"])
    if splits is None or composed["evaluate"]["store"] is not None:  # evaluated on other data
        return
    named = {composed["split"], *composed["evaluate"]["splits"], *composed["curve"]["splits"]}
    columns = composed_of("report", f"experiment={recipe}")["report"]["columns"] or {}
    named |= {source.partition(".")[0] for source in columns.values()} - {"all"}

    assert named <= splits | {"holdout"}


def test_recipes_that_share_a_store_make_the_same_one_and_large_ones_have_small_jpegs():
    made = {}
    for recipe in EVERY_RECIPE:
        store = composed_of("sweep", f"experiment={recipe}")["store"]
        made.setdefault(store["path"], set()).add((store["image_size"], store["format"]))

    assert all(len(forms) == 1 for forms in made.values())
    large = [path for path in made if path.startswith(("stores/imagenet", "stores/sun397"))]
    assert "stores/imagenet" in large
    assert all(made[path] == {(256, "jpeg95")} for path in large)


def test_recipes_that_share_a_store_name_the_pass_that_they_read_and_make():
    """A store with passes of several recipes is ambiguous without a name, and a name is one teacher's."""
    made: dict[str, dict[str, set[str]]] = {}
    for recipe in EVERY_RECIPE:
        composed = composed_of("sweep", f"experiment={recipe}")
        if composed["teacher"]["kind"] != "none":
            name = ", ".join(composed["store"]["teacher"])
            assert not name or composed["annotate"]["name"] in (None, name)
            names = made.setdefault(composed["store"]["path"], {})
            names.setdefault(name, set()).add(json.dumps(composed["teacher"], sort_keys=True))

    assert len(made["stores/imagenet"]) == 4
    assert "" not in made["stores/imagenet"]
    assert all(len(teachers) == 1 for teachers in made["stores/imagenet"].values())


def test_the_grids_are_the_papers():
    """Compare the grids with those of the supplement."""

    def grid(recipe):
        return composed_of("sweep", f"experiment=e2kd/{recipe}")["grid"]

    assert grid("table1") == {"method.tau": [1, 5], "method.lambda_map": [1, 5, 10]}
    assert grid("table2") == {"method.tau": [1, 5], "method.lambda_map": [1, 5]}
    assert grid("table3_frozen") == {"method.tau": [1, 5], "method.lambda_map": [0.2, 1, 5, 10]}
    for recipe in ("table3", "table4_epg", "table4_iou", "table5_sun_to_imagenet"):
        assert grid(recipe) == grid("table1")
    assert grid("waterbirds")["method.lambda_map"] == [1, 5, 10, 15]
    assert grid("table1_baselines") == {
        "method.lambda_at": [10, 100, 1000, 10000],
        "method.lambda_review": [1, 5],
        "method.lambda_cat": [1, 5, 10],
    }
    assert grid("table2_baselines")["method.lambda_at"] == [1, 10, 100, 1000]


def test_the_optimizers_are_the_papers():
    """Compare the optimizers with those of the supplement and the released code."""

    student = partial(student_of, "e2kd")
    standard, bcos = student("table1", "e2kd_50"), student("table2", "e2kd_200")
    assert OPTIMIZER(standard) == ("adamw", 0.01, 1e-4)
    assert (standard.trainer.clip_norm, standard.trainer.agc) == (1.0, None)
    assert (standard.trainer.batch_size, standard.trainer.epochs) == (32, 250)
    assert OPTIMIZER(bcos) == ("adam", 1e-3, 0)
    assert (bcos.trainer.clip_norm, bcos.trainer.agc) == (None, 0.01)
    assert (bcos.trainer.batch_size, bcos.trainer.epochs) == (64, 125)
    sgd = student("tableb1", "kd")
    assert (sgd.optimizer.kind, sgd.optimizer.lr, sgd.optimizer.momentum) == ("sgd", 0.1, 0.9)
    assert attrgetter("schedule", "decay", "decay_every_epochs")(sgd.trainer) == ("decay", 0.1, 30)
    vit = student("figure5", "kd_tau1")
    assert (vit.trainer.warmup_steps, vit.trainer.epochs) == (10_000, 150)
    (policy,) = vit.augment.on_pixels
    assert (policy.kind, policy.count, policy.magnitude) == ("randaugment", 2, 10)
    assert student("figure5", "e2kd_frozen").augment.operations == vit.augment.operations[:2]
    patient = student("waterbirds", "e2kd_patient")
    assert patient.trainer.epochs == 3500
    assert [each.kind for each in patient.augment.mix] == ["mixup"]


STUDY = sorted(n for n in EVERY_RECIPE if n.startswith(("interpretability/", "unicam/")))


@pytest.mark.slow
@for_each("recipe", STUDY)
def test_every_variant_of_a_study_composes(recipe):
    """Check that modes and views fit the methods."""
    variants = composed_of("sweep", f"experiment={recipe}")["variants"]
    kinds = {variant.rstrip("0123456789"): variant for variant in variants}
    for variant in kinds.values():  # students of one kind differ only in their network or tau
        student = student_of(*recipe.split("/"), variant)
        assert (student.mode == "live") == (student.teacher.kind != "none")


def test_the_fourteen_variants_have_a_common_baseline_and_columns_in_every_recipe_of_the_study():
    """Students of all recipes are shown in one report, so each recipe measures what its columns name."""
    named = {
        recipe.partition("/")[2]: composed_of("report", f"experiment={recipe}")["report"]["columns"]
        for recipe in EVERY_RECIPE
        if recipe.startswith("interpretability/") and "_variants" in recipe
    }
    for prefix in ("imagenet", "cifar10"):
        of_size = [columns for name, columns in named.items() if name.startswith(prefix)]
        assert all(columns == of_size[0] for columns in of_size)
        assert {"detectors", "concepts", "class_similarity"} <= set(of_size[0])
    for recipe in named:
        composed = composed_of("sweep", f"experiment=interpretability/{recipe}")
        measured = {source.split(".")[1] for source in named[recipe].values()}
        assert measured - {"accuracy", "agreement", "epg"} <= set(composed["evaluators"])
    variants = [
        list(composed_of("sweep", f"experiment=interpretability/{recipe}")["variants"])
        for recipe in ("imagenet_variants", "cifar10_variants", "cells_variants")
    ]
    assert variants[0] == variants[1] == variants[2]
    assert len(variants[0]) == 14


def test_the_studys_schedules_and_weights_are_those_of_its_code():
    student = partial(student_of, "interpretability")
    at, ft, crd = (student("imagenet_variants", variant) for variant in ("at", "ft", "crd"))
    assert OPTIMIZER(at) == ("sgd", 0.1, 1e-4)
    assert attrgetter("epochs", "decay_every_epochs", "batch_size")(at.trainer) == (100, 30, 512)
    assert (at.method.stages, at.method.lambda_at, at.method.lambda_ce) == ((3, 4), 1000, 0.1)
    assert (ft.trainer.epochs, ft.method.paraphraser_epochs, ft.method.lambda_ft) == (90, 1, 1000)
    assert (crd.method.lambda_ce, crd.method.lambda_crd, crd.trainer.batch_size) == (0, 1, 85)
    assert (crd.method.tau_crd, crd.method.negatives, crd.method.momentum) == (0.07, 16384, 0.5)
    sskd = student("imagenet_variants_sskd", "sskd")
    weights = [getattr(sskd.method, f"lambda_{name}") for name in ("ce", "kd", "ss", "tf")]
    assert weights == [1, 0, 10, 2.7]
    assert (sskd.method.head_epochs, sskd.trainer.batch_size, sskd.views.per_step) == (30, 340, 4)
    live = student("imagenet_variants", "sskd_logits")
    assert (live.mode, live.views.kind, live.views.per_step) == ("live", "rotations", 4)
    assert (live.trainer.batch_size, live.optimizer.weight_decay) == (340, 5e-4)
    assert live.method == student("imagenet_variants_sskd", "sskd_logits").method
    assert live.trainer.epochs == 100
    taus = [student("imagenet_variants", f"kd_tau{tau}").method.tau for tau in (1, 2, 4, 8)]
    assert taus == [1, 2, 4, 8]


# ---- training ------------------------------------------------------------------------------------


def write_image_folders(
    folder: Path, splits: tuple[str, ...], classes: int = 3, each: int = 6
) -> None:
    """Write noise images of various aspect ratios in ImageNet's layout."""
    generator = np.random.default_rng(0)
    for split in splits:
        for label in range(classes):
            path = folder / split / f"n{label:08d}"
            path.mkdir(parents=True)
            for number in range(each):
                pixels = generator.integers(0, 256, (80, 96 + 8 * number, 3), np.uint8)
                Image.fromarray(pixels).save(path / f"{number}.png")


def write_metadata(folder: Path, *, many: bool) -> None:
    """Write the metadata of Waterbirds, or with `many` a table in the form of VOC. Both contain boxes."""
    write_image_folders(folder, ("images",), classes=2, each=18)
    rows = ["img_filename,y,place,split,boxes,labels"]
    boxes = [{"x0": 8, "y0": 4, "x1": 60, "y1": 50}]
    for number, path in enumerate(sorted(folder.glob("images/*/*.png"))):
        label, place, split = number % 2, number // 2 % 2, number % 3
        own = [box | ({"label": "ab"[label]} if many else {}) for box in boxes]
        cells = [str(path.relative_to(folder)), label, place, split, json.dumps(own)]
        cells.append("a b" if many and place else "ab"[label])
        quoted = ['"' + str(cell).replace('"', '""') + '"' for cell in cells]
        rows.append(",".join(quoted))
    (folder / "metadata_boxes.csv").write_text("\n".join(rows) + "\n")
    (folder / "classes.txt").write_text("a\nb\n")


def small_data(recipe: str, folder: Path) -> DataConfig:
    """Write small data of the recipe's shape into `folder`, and return its config."""
    if recipe.startswith(("waterbirds", "table4")):
        many = recipe.startswith("table4")
        write_metadata(folder, many=many)
        return ImageTableDataConfig(
            path=str(folder / "metadata_boxes.csv"),
            image="img_filename",
            label=None if many else "y",
            labels="labels" if many else None,
            classes=str(folder / "classes.txt") if many else None,
            split="split",
            split_names={"0": "train", "1": "val", "2": "test"},
            group=() if many else ("y", "place"),
            boxes="boxes",
        )
    write_image_folders(folder, ("train", "val"))
    return ImageFolderDataConfig(path=str(folder))


def pack_recipe(words: list[str], data: DataConfig) -> None:
    """Write a small store with the recipe's pass, or of images alone if `words` has no teacher."""
    size = (
        [] if isinstance(data, (CellsDataConfig, DemoDataConfig)) else [f"store.image_size={FRAME}"]
    )
    small = [*words, *size, "store.shard_size=16", "executor=serial"]
    config = build_verb_config("precompute", composed_of("precompute", *small))
    precompute.run(replace(config, data=data))


def small_teacher(words: list[str], classes: int, path: Path) -> list[str]:
    """Write random weights of the recipe's teacher, and return options that make its logits differ between records.

    The logits of an untrained B-cos network hardly depend on the image and would be constant in float16.
    """
    config = build_verb_config("precompute", composed_of("precompute", *words)).teacher
    model = build_model(replace(config, weights="random"), classes).eval()
    save_file(model.network.state_dict(), path)
    if config.kind != "bcos":
        return []
    plain = build_model(replace(config, weights="random", logit_bias=0.0), classes).eval()
    images = torch.rand(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        spread = plain(images).logits.std(dim=0).max().item()
    return [f"teacher.logit_temperature={spread * config.logit_temperature}"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TRAINED)
def test_every_variant_of_a_recipe_trains_for_two_steps_and_is_evaluated(recipe, tmp_path):
    weights = tmp_path / "teacher.safetensors"
    base = [
        f"experiment=e2kd/{recipe}",
        *(f"teacher.weights={weights}", f"teacher.input_size={SIDE}"),
        f"store.path={tmp_path}/store",
    ]
    classes = 2 if recipe.startswith(("waterbirds", "table4")) else 3
    if recipe.startswith("table5"):  # the teacher's classes belong to another set
        base.append("teacher.classes=5")
        classes = 5
    base += small_teacher(base, classes, weights)
    # Baselines read the pass of another recipe, which has a name.
    names = composed_of("sweep", *base)["store"]["teacher"]
    named = [f"annotate.name={name}" for name in names]
    pack_recipe([*base, *named], small_data(recipe, tmp_path / "data"))
    splits = {shard.split for shard in Store(tmp_path / "store").manifest.shards}
    reported = "test" if "test" in splits else "val"
    words = [*base, f"augment.size={SIDE}", f"evaluate.splits=[{reported}]"]
    if recipe.startswith("table5"):
        # Evaluation on the other store is tested in test_several_teachers.py.
        words.append("evaluate.store=null")
    sweep = build_verb_config("sweep", composed_of("sweep", *words))

    for variant, overrides in sweep.variants.items():
        variant_arguments = [*words, *overrides]
        known = composed_of("sweep", *variant_arguments)
        points = [
            point
            for point in iter_points({o: v[-1:] for o, v in sweep.grid.items()})
            if all(knows_option(known, option) for option in point)
        ]
        composed = composed_of(
            "sweep", *variant_arguments, *point_arguments(points[0] if points else {})
        )
        student = build_verb_config("distill", composed)
        assert (student.mode == "live") == (student.teacher.kind != "none")
        trainer = replace(student.trainer, **SHORT, warmup_steps=None)
        held_out = 0 if student.select_epoch is None else 1
        subset = replace(student.subset, shots=None, holdout=held_out)
        result = distill.run(replace(student, trainer=trainer, subset=subset, run=variant))
        evaluated = replace(build_verb_config("evaluate", composed), run=variant)
        shift = evaluated.evaluate.shift
        shift = replace(shift, pixels=shift.pixels and 4)
        options = replace(evaluated.evaluate, added=evaluated.evaluate.added | {"shift": shift})
        metrics = evaluate.run(replace(evaluated, evaluate=options)).splits[reported]

        assert result.trained_epochs == 1
        if not recipe.startswith("table5"):  # the labels of table5 belong to other classes
            assert 0 <= metrics["f1" if recipe.startswith("table4") else "accuracy"] <= 1
        if options.group_sets:
            assert 0 <= metrics["ood_accuracy"] <= 1
        if shift.pixels:
            assert len(metrics["shift"]["map"]) == 5
        if not isinstance(student.method, LabelsConfig):
            assert 0 <= metrics["agreement"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [*TEACHERS, "table4_epg", "table4_iou", "waterbirds", "waterbirds_bcos"]
)
def test_every_teacher_of_a_recipe_trains_from_where_it_starts(recipe, tmp_path):
    start = tmp_path / "imagenet.safetensors"
    base = [f"experiment=e2kd/{recipe}", f"store.path={tmp_path}/store"]
    small_teacher(base, 7, start)
    pack_recipe([*base, "teacher=none"], small_data(recipe, tmp_path / "data"))

    evaluated_on = "val" if recipe.startswith("table5") else "test"
    taught = build_verb_config("teach", composed_of("teach", *base))
    teaching = replace(
        taught.teaching,
        start=str(start) if taught.teaching.start else None,
        trainer=replace(taught.teaching.trainer, **SHORT),
        augment=replace(taught.teaching.augment, size=SIDE),
    )
    evaluation = replace(taught.evaluate, splits=(evaluated_on,))
    result = teach.run(replace(taught, teaching=teaching, evaluate=evaluation))

    assert Path(result.weights).exists()
    evaluated = result.f1 if recipe.startswith("table4") else result.accuracy
    assert set(evaluated) == {evaluated_on}
    if recipe in ("table4_epg", "table4_iou"):
        assert (Path(result.weights).parent / "pareto/front.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [f"imagenet_variants{suffix}" for suffix in ("", "_frozen", "_ls_teacher", "_sskd")],
)
def test_every_variant_of_the_study_trains_on_images_of_its_shape_and_is_dissected(
    recipe, tmp_path
):
    """Live, frozen and replayed students of ResNet-34, evaluated on concepts in Broden's layout."""
    weights = tmp_path / "teacher.safetensors"
    write_broden(DrawnConcepts(8, 64), tmp_path / "broden")
    words = [
        f"experiment=interpretability/{recipe}",
        *(f"store.path={tmp_path}/store", f"teacher.weights={weights}"),
    ]
    small_teacher(words, 3, weights)
    pack_recipe(words, small_data(recipe, tmp_path / "data"))
    words += [f"evaluate.dissection.path={tmp_path}/broden", f"augment.size={SIDE}"]
    variants = composed_of("sweep", *words)["variants"]

    for variant, overrides in variants.items():
        composed = composed_of("sweep", *words, *overrides)
        student = build_verb_config("distill", composed)
        method = student.method
        if isinstance(method, SSKDConfig):
            method = replace(method, head_epochs=1)
        trainer = replace(
            student.trainer, epochs=1, batch_size=6 * student.views.per_step, loader_processes=0
        )
        distill.run(replace(student, method=method, trainer=trainer, run=variant))
        evaluated = replace(build_verb_config("evaluate", composed), run=variant)
        metrics = evaluate.run(evaluated).splits["val"]

        assert 0 <= metrics["accuracy"] <= 1
        assert (metrics["dissection"]["units"], metrics["dissection"]["images"]) == (512, 8)
        assert metrics["gradient_alignment"]["margin_alignment_records"] == 18
        assert -1 <= metrics["class_similarity"]["spearman"]["teacher"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "data"),
    [
        *(
            (recipe, replace(TINY_DATA, image_size=32, max_digit_size=24, train_digits=100))
            for recipe in (
                "unicam/cifar10_assistant",
                "cifar10_equal_terms",
                "cifar10_features",
                "interpretability/cifar10_variants",
                "interpretability/cifar10_variants_ls_teacher",
            )
        ),
        (
            "interpretability/cells_variants",
            CellsDataConfig(image_size=40, train_records=100, test_records=20),
        ),
    ],
)
def test_every_variant_of_a_small_recipe_trains_for_an_epoch_and_is_evaluated(
    recipe, data, tmp_path
):
    """Frozen, replayed and live students share one store, of demo digits at CIFAR-10's size or of cells."""
    weights = tmp_path / "teacher.safetensors"
    words = [
        f"experiment={recipe}",
        *(f"store.path={tmp_path}/store", f"teacher.weights={weights}", "subset.shots=2"),
        "teacher.name=resnet8",  # the logits of 56 layers with random weights exceed float16
    ]
    small_teacher(words, 10, weights)
    if recipe == "unicam/cifar10_assistant":
        own = tmp_path / "assistant.safetensors"
        assistant = [*words, f"teacher.weights={own}", "teacher.width=8", "annotate.name=assistant"]
        pack_recipe([*words, "annotate.name=first"], data)
        small_teacher(assistant, 10, own)
        pack_recipe(assistant, data)
    elif recipe == "cifar10_features":
        forms = {
            "canonical": "mirror=false",
            "mirror": "",
            "framed": "margin=0.125",
            "pooled": "size=4",
        }
        for name, form in forms.items():
            option = [f"annotate.features_{form}"] if form else []
            pack_recipe([*words, f"annotate.name={name}", *option], data)
        pack_recipe([*words, "annotate.name=embeddings", "annotate.outputs=[pooled]"], data)
    else:
        pack_recipe(words, data)
    variants = composed_of("sweep", *words)["variants"]

    for variant, overrides in variants.items():
        composed = composed_of("sweep", *words, *overrides)
        student = build_verb_config("distill", composed)
        size = 8 * student.views.per_step
        trainer = replace(
            student.trainer, epochs=1, warmup_epochs=0, batch_size=size, loader_processes=0
        )
        distill.run(replace(student, trainer=trainer, run=variant))
        metrics = evaluate.run(
            replace(build_verb_config("evaluate", composed), run=variant)
        ).splits["test"]

        assert 0 <= metrics["accuracy"] <= 1
        assert 0 <= metrics.get("agreement", 0) <= 1
        if recipe == "interpretability/cells_variants":
            assert 0 <= metrics["five_band"]["recall"]["best"] <= 1
