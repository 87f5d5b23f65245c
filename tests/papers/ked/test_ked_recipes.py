"""Recipes of KED: every variant trains on small data of the recipe's shape, and comparisons are made at equal terms.

Methods, grids and the networks above a trunk are kept. Trunks, data and durations are reduced.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from permafrost.config.plugins import experiment_folders
from permafrost.config.points import iter_points, knows_option, point_arguments
from permafrost.config.verbs import build_verb_config
from permafrost.models.cost import count_parameters
from permafrost.models.providers import build_model
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from permafrost.training.metric_log import read_metrics
from permafrost_papers.ked.options import KEDConfig
from permafrost_papers.ked.partition import PARTITION_NAME, contiguous_partition, random_partition
from tests.support.composition import composed_of
from tests.support.stores import TINY_DATA
from tests.support.unicauca import write_unicauca
from tests.support.verbs import distill, evaluate, precompute

EXPERIMENTS = experiment_folders()["ked"]
RECIPES = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))
TEACHERS = {
    recipe: recipe.partition("_")[0]
    for recipe in RECIPES
    if recipe.endswith(("_levels", "_teachers", "_weights", "_retrained"))
}
"""Recipes that use the teacher of another one."""
IMAGE_SIZES = {"mnist": 28, "fashion": 28, "tiny": 64, "cifar10": 32, "cifar100": 32}
LEVELS = 16


def words_of(recipe, verb="precompute"):
    """Overrides of a verb, with a small trunk and a teacher of random weights."""
    words = [f"experiment=ked/{recipe}"]
    teacher = composed_of("precompute", *words)["teacher"]
    if teacher["kind"] == "additive":
        partition = composed_of("distill", *words)["student"]["partition"]
        words.append("teacher.weights=random")
        words += [] if partition is None else [f"teacher.partition={partition}"]
        if (
            teacher["name"] == "trunk" and teacher["trunk_kind"] == "cifar"
        ):  # the logits of 56 layers with random weights overflow
            words += ["teacher.trunk=resnet8"]
            words += [] if verb == "precompute" else ["student.trunk=resnet8"]
    return words


def pack(recipe, *words):
    """Write a small store with the images or rows of the recipe's shape, or its pass."""
    composed = composed_of("precompute", *words, "executor=serial")
    config = build_verb_config("precompute", composed)
    size = IMAGE_SIZES.get(recipe.partition("_")[0])
    if size is not None:
        small = replace(TINY_DATA, image_size=size, max_digit_size=24, train_digits=100)
        config = replace(config, data=small)
    elif config.data.kind == "table":
        path = Path(config.data.path)
        path.parent.mkdir(exist_ok=True)
        write_unicauca(path, 200)
    precompute.run(config)
    return Store(Path(config.store.path))


def write_partition(folder, config, store):
    """Write random groups of the network's features, as a search would find them."""
    grid = None if not store.form.has_places else config.grid
    features = store.size[1] if not store.form.has_places else config.features
    found = contiguous_partition(min(LEVELS, features), features, grid)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"assignments": random_partition(found).assignments}, folder / PARTITION_NAME)


def students_of(recipe):
    """Variant -> options of its students at the first and the last grid point that applies to it."""
    words = words_of(recipe, "sweep")
    sweep = build_verb_config("sweep", composed_of("sweep", *words))
    for variant, overrides in sweep.variants.items():
        composed = composed_of("sweep", *words, *overrides)
        grid = {o: v for o, v in sweep.grid.items() if knows_option(composed, o)}
        points = list(iter_points(grid))
        for point in [points[0], *points[1:][-1:]]:
            yield variant, composed_of("sweep", *words, *overrides, *point_arguments(point))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_variant_of_a_ked_recipe_trains_and_is_evaluated(recipe):
    teacher = TEACHERS.get(recipe, recipe)
    store = pack(teacher, f"experiment=ked/{teacher}", "teacher=none")

    passes = set()
    for number, (variant, composed) in enumerate(students_of(recipe)):
        student = build_verb_config("distill", composed)
        path, network = student.store.path, student.student
        if path not in passes:
            words = [*words_of(teacher), f"store.path={path}"]
            if network.partition is not None:
                write_partition(Path(network.partition), network, store)
                words.append(f"teacher.partition={network.partition}")
            if passes or recipe.endswith("_retrained"):  # a store for each kind of groups
                words += [
                    f"teacher.{option}={getattr(network, option)}"
                    for option in ("superfeatures", "partition_control", "partition_seed")
                ]
            pack(teacher, *words)
            passes.add(path)
        trainer = replace(
            student.trainer, epochs=1, batch_size=10, loader_processes=0, log_every_steps=1
        )
        shots = replace(student.subset, shots=None if not store.form.has_places else 2)
        run = f"{number}-{variant}"
        distill.run(replace(student, trainer=trainer, subset=shots, run=run))
        config = build_verb_config("evaluate", composed)
        # The stand-in for Tiny ImageNet has a split of another name.
        options = replace(config.evaluate, splits=("test",))
        metrics = evaluate.run(replace(config, evaluate=options, run=run))

        terms = list(read_metrics(RUNS / run / "distill"))[-1]
        method = student.method
        assert 0 <= metrics.splits["test"]["accuracy"] <= 1
        if isinstance(method, KEDConfig):
            assert ("ked" in terms) == (method.lambda_ked * method.mu > 0)
            assert ("hint" in terms) == (method.lambda_hint > 0)
        if "superfeatures" in composed["evaluators"]:
            assert metrics.splits["test"]["superfeatures"]["kl"] >= 0


@pytest.mark.parametrize(
    "recipe",
    [recipe for recipe in RECIPES if recipe.endswith(("_levels", "_teachers", "_retrained"))],
)
def test_networks_of_every_number_of_superfeatures_have_equal_sizes(recipe):
    experiment = f"experiment=ked/{recipe}"
    sweep, option = composed_of("sweep", experiment), "student.superfeatures"
    of_variants = {
        int(argument.partition("=")[2])
        for arguments in sweep["variants"].values()
        for argument in arguments
        if argument.startswith(option)
    }
    numbers = (sweep["grid"] or {}).get(option, sorted(of_variants))
    sizes = []
    for number in numbers:
        words = (experiment, f"student.superfeatures={number}", "student.partition=null")
        config = build_verb_config("distill", composed_of("sweep", *words)).student
        sizes.append(count_parameters(build_model(config, 10)))

    assert numbers[0] == 1
    assert max(sizes) < 1.05 * min(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_variants_of_one_recipe_have_one_network(recipe):
    """A gain of more parameters is not one of the method."""
    networks = set()
    for _, composed in students_of(recipe):
        config = build_verb_config("distill", composed).student
        networks.add(
            repr(
                replace(
                    config,
                    partition=None,
                    partition_control="none",
                    partition_seed=0,
                    superfeatures=1,
                )
            )
        )

    assert len(networks) == 1


def test_the_weights_are_those_of_the_paper_and_around_the_defaults():
    for recipe in ("digits_weights", "cifar10_weights"):
        assert composed_of("sweep", f"experiment=ked/{recipe}")["grid"] == {
            "method.mu": [0, 0.25, 0.5, 0.75, 1]
        }
    variants = composed_of("sweep", "experiment=ked/cifar10_trunk")["variants"]
    e2kd = [variant for variant in variants if variant.startswith("e2kd")]
    methods = [
        build_verb_config(
            "distill", composed_of("sweep", "experiment=ked/cifar10_trunk", *variants[variant])
        ).method
        for variant in e2kd
    ]
    assert [method.lambda_map for method in methods] == [1, 5, 10, 25, 50]
