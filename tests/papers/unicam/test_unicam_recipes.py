"""Recipes of UniCAM: every variant trains on small data and is compared with teacher and baseline at five depths.

Variants, pairs of networks and evaluators are kept. Networks keep their kinds of blocks and stages, with few of them.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VGG, ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import make_layers

from permafrost.config.plugins import experiment_folders
from permafrost.config.verbs import build_verb_config
from permafrost.evaluation.evaluate import evaluate_student
from permafrost.evaluation.inputs import without_unknown_variants
from permafrost.evaluation.results import evaluation_folder
from permafrost.models import torchvision as networks
from permafrost.models.providers import build_model
from permafrost.runs.mirrors import RUNS
from tests.support.composition import composed_of
from tests.support.stores import TINY_DATA
from tests.support.sweeps import read_sweep, run_sweep
from tests.support.verbs import precompute

EXPERIMENTS = experiment_folders()["unicam"]
RECIPES = sorted({path.stem for path in EXPERIMENTS.glob("*.yaml")} - {"cifar10_assistant"})
MIXED = ["resnet152_to_vgg", "vgg_to_resnet152"]
DEPTHS = [f"depth{depth}" for depth in range(1, 6)]
EVALUATED = (
    "evaluate.unicam.records=2",
    "evaluate.unicam.bank_records=12",
    "evaluate.distance_correlation.permutations=19",
    "evaluate.num_pictures=0",
)


class NarrowBottleneck(Bottleneck):
    """A bottleneck of 512 instead of 2048 channels in the last stage, whose factors take most of the time."""

    expansion = 1


def small_network(config, outputs):
    """Build a VGG or ResNet of the same stages, with one block or few channels in each."""
    if config.name.startswith("resnet"):
        block = BasicBlock if config.name in ("resnet18", "resnet34") else NarrowBottleneck
        return ResNet(block, [1, 1, 1, 1], num_classes=outputs)
    with torch.device("meta"):  # the classifier of a VGG has 120 million weights
        network = VGG(nn.Identity(), init_weights=False)
    network.features = make_layers([8, "M", 8, "M", 8, 8, "M", 8, 8, "M", 8, 8, "M"])
    network.classifier = nn.Sequential(
        nn.Linear(8 * 7 * 7, 16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, outputs)
    )
    return network


def side_of(recipe):
    return 48 if recipe == "cifar10_small" else 64


def commands_of(recipe):
    """Words of each command in a recipe's header, without its verb and experiment."""
    text = (EXPERIMENTS / f"{recipe}.yaml").read_text()
    joined = re.sub(r" \\\n# +", " ", text)
    typed = re.findall(r"^#   permafrost \w+ experiment=\S+(.*)$", joined, re.MULTILINE)
    return [shlex.split(words) for words in typed]


def write_weights(config, path):
    """Write random weights of a network."""
    torch.manual_seed(0)
    model = build_model(replace(config, weights=None), 10)
    save_file(model.network.state_dict(), path)


def packed(recipe, tmp_path):
    """Write a small store with the recipe's pass, and return its words and those of its teacher."""
    weights, side = tmp_path / "teacher.safetensors", side_of(recipe)
    words = [
        f"experiment=unicam/{recipe}",
        f"store.path={tmp_path}/store",
        f"teacher.weights={weights}",
        f"teacher.input_size={side}",
    ]
    config = build_verb_config("precompute", composed_of("precompute", *words, "executor=serial"))
    write_weights(config.teacher, weights)
    data = replace(TINY_DATA, image_size=side, max_digit_size=24, train_digits=100)
    precompute.run(replace(config, data=data))
    if recipe == "assistant":  # its pass is added to that of the first teacher
        assistant = replace(
            config.teacher, name="resnet34", weights=str(tmp_path / "assistant.safetensors")
        )
        write_weights(assistant, assistant.weights)
        precompute.run(replace(config, data=data, teacher=assistant))
    return words


@pytest.mark.parametrize("recipe", RECIPES)
def test_students_are_compared_with_labels_at_five_depths_and_reported(recipe):
    composed = composed_of("sweep", f"experiment=unicam/{recipe}")

    options = build_verb_config("evaluate", composed).evaluate
    columns = composed["report"]["columns"].values()
    sources = [str(source).partition("@")[0] for source in columns]

    assert composed["variants"]["labels"] == ["method=labels"]
    assert (options.distance_correlation.baseline, options.unicam.baseline) == ("labels", "labels")
    assert options.unicam.depths == (1, 2, 3, 4, 5)
    for name in ("fss", "rs.student_given_baseline", "rs.teacher_given_student"):
        assert f"test.distance_correlation.{name}.pooled" in sources


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r not in ("assistant", "cifar10_small")])
def test_teacher_and_students_are_trained_as_in_the_released_code(recipe):
    words = f"experiment=unicam/{recipe}"
    teaching = build_verb_config("teach", composed_of("teach", words)).teaching
    student = build_verb_config("distill", composed_of("distill", words, "method=labels"))

    rotation, flip, crop, jitter = student.augment.operations
    assert (rotation.kind, rotation.degrees, rotation.p) == ("rotation", 15, 1)
    assert (flip.kind, flip.p) == ("horizontal_flip", 0.5)
    assert (crop.kind, crop.scale) == ("resized_crop", (0.8, 1))
    assert (jitter.kind, jitter.p) == ("color_jitter", 1)
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (
        0.4,
        0.4,
        0.4,
        0.1,
    )
    assert teaching.augment == student.augment
    assert teaching.optimizer == student.optimizer
    optimizer = student.optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (
        "sgd",
        0.001,
        0.9,
        0,
    )
    assert (teaching.trainer.epochs, student.trainer.epochs) == (20, 25)
    assert (teaching.trainer.batch_size, student.trainer.batch_size) == (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_variant_trains_and_is_compared_with_its_own_baseline(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "_build_network", small_network)
    words = packed(recipe, tmp_path)
    names = (composed_of("sweep", *words)["grid"] or {}).get("student.name", [])
    grid = [f"grid={{student.name: [{names[0]}, {names[-1]}]}}"] if names else []

    run_sweep(
        [
            *words,
            *grid,
            *EVALUATED,
            *("student.weights=null", f"augment.size={side_of(recipe)}", "subset.shots=2"),
            *("trainer.epochs=1", "trainer.batch_size=10", "trainer.warmup_epochs=0"),
            *("seeds=[5]", "executor=serial", "run=small"),
        ]
    )

    students = read_sweep("small")["runs"]
    assert {s["variant"] for s in students} == set(composed_of("sweep", *words)["variants"])
    labels = {str(s["point"]): s["run"] for s in students if s["variant"] == "labels"}
    for student in students:
        folder = evaluation_folder("resnet50" if recipe == "assistant" else None)
        found = json.loads((RUNS / student["run"] / folder / "metrics.json").read_text())
        distances, maps = (
            found["splits"]["test"][name] for name in ("distance_correlation", "unicam")
        )
        beyond = "teacher_given_student"
        assert len(distances["fss"]) == 5
        assert list(maps["objective"][beyond]) == DEPTHS
        assert set(maps["empty_fraction"][beyond]) == {*DEPTHS, "mean"}
        if student["variant"] == "labels":
            assert "student_given_baseline" not in distances["rs"]
            continue
        assert len(distances["rs"]["student_given_baseline"]) == 5
        assert list(maps["objective"]["student_given_baseline"]) == DEPTHS
        for evaluator in ("distance_correlation", "unicam"):
            (weights,) = found["evaluators"][evaluator]["files"]
            assert labels[str(student["point"])] in weights


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MIXED)
def test_the_released_pair_of_networks_is_compared_without_a_run_or_pass(
    recipe, tmp_path, monkeypatch
):
    """Both networks have classes of their own, as those of ImageNet."""
    monkeypatch.setattr(networks, "_build_network", small_network)
    files = {
        network: tmp_path / f"given_{network}.safetensors" for network in ("teacher", "student")
    }
    command = next(words for words in commands_of(recipe) if "model=network" in words)
    words = [
        *packed(recipe, tmp_path),
        *(word for word in command if "weights" not in word and "classes" not in word),
        *(f"{network}.weights={path}" for network, path in files.items()),
        *("teacher.classes=5", "student.classes=7", "student.input_size=64", *EVALUATED),
    ]
    config = build_verb_config("evaluate", composed_of("evaluate", *words))
    for network, path in files.items():
        write_weights(getattr(config, network), path)

    result = evaluate_student(without_unknown_variants(config, words))

    found = result.splits["test"]
    assert config.run in result.metrics
    assert len(found["distance_correlation"]["fss"]) == 5
    assert list(found["unicam"]["objective"]["student_given_teacher"]) == DEPTHS
    assert not (RUNS / config.run / "distill").exists()
