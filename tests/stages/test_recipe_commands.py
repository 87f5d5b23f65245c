"""Commands that the recipes of KED and UniCAM print, run on small data in the files and the layout of the real set.

They are the recipes that were never run at full size. Only sizes and durations are reduced, by words that follow.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from permafrost.config.sections import section_names
from tests.support.commands import commands_in, header_of
from tests.support.composition import composed_of
from tests.support.image_sets import image_bytes, write_cifar, write_images, write_mnist
from tests.support.images import write_tar
from tests.support.unicauca import write_unicauca

SIDE = 64
"""Side of views in pixels in place of 224."""
KED = [
    *("cifar10_cnn", "cifar10_other_trunks", "cifar100", "fashion_mnist", "mnist"),
    *("tiny_imagenet", "unicauca"),
]
UNICAM = ["cats_and_dogs", "plant_disease", "cifar10", "resnet152_to_vgg", "vgg_to_resnet152"]


def write_tiny_imagenet(root: Path) -> None:
    """Write four classes in the layout of tiny-imagenet-200.zip, whose test images have no labels."""
    names = [f"n{number:08d}" for number in range(4)]
    root.mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(reversed(names)) + "\n")
    (root / "words.txt").write_text("".join(f"{name}\tthing {name}\n" for name in names))
    for place in ("val/images", "test/images", *(f"train/{name}/images" for name in names)):
        (root / place).mkdir(parents=True)
    for name in names:
        files = [f"{name}_{number}.JPEG" for number in range(6)]
        for number, file in enumerate(files):
            (root / f"train/{name}/images/{file}").write_bytes(image_bytes(number, (64, 64)))
        boxes = "".join(f"{file}\t4\t8\t50\t60\n" for file in files)
        (root / f"train/{name}/{name}_boxes.txt").write_text(boxes)
    rows = []
    for number in range(8):
        (root / f"val/images/val_{number}.JPEG").write_bytes(image_bytes(number, (64, 64)))
        (root / f"test/images/test_{number}.JPEG").write_bytes(image_bytes(number, (64, 64)))
        rows.append(f"val_{number}.JPEG\t{names[number % 4]}\t4\t8\t50\t60\n")
    (root / "val/val_annotations.txt").write_text("".join(rows))


def write_folders(root: Path, classes: tuple[str, ...], each: int = 40) -> None:
    """Write photographs of different sizes into a folder a class."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(each):
            photo = image_bytes(number, (96 + 8 * (number % 3), 80))
            (root / name / f"{number}.jpg").write_bytes(photo)


def write_tars(folder: Path) -> None:
    """Write the tars of docs/howto/datasets.md, {key}.jpg with {key}.cls, of two classes."""
    folder.mkdir(parents=True)
    for split, each in (("train", 50), ("test", 6)):
        members = {}
        for number in range(2 * each):
            members[f"{number:05d}.jpg"] = image_bytes(number, (32, 32))
            members[f"{number:05d}.cls"] = str(number % 2).encode()
        write_tar(folder / f"{split}-000000.tar", members)


def write_data(recipe: str, monkeypatch) -> None:
    """Write the data of a recipe to the place that it reads, below the current folder."""
    data = composed_of("sweep", f"experiment={recipe}")["data"]
    path = Path(data.get("path") or data["root"])
    match data["kind"], data.get("name"):
        case "torchvision", "mnist" | "fashion_mnist" as name:
            folder = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name]
            write_mnist(path, folder, train=1000, test=50)
        case "torchvision", name:
            write_cifar(path, monkeypatch, name, labels=2 * tuple(range(10)))
        case "tiny_imagenet", _:
            write_tiny_imagenet(path)
        case "table", _:
            path.parent.mkdir()
            write_unicauca(path, 600)
        case "webdataset", _:
            write_tars(path)
        case "image_folder", _ if path.name == "PetImages":
            write_folders(path, ("Cat", "Dog"))
            (path / "Cat/666.jpg").write_bytes(b"")  # as in the published archive
            write_images(path, "Dog/Thumbs.db.png")
        case "image_folder", _:
            write_folders(path, ("Apple___Apple_scab", "Apple___healthy", "Corn___healthy"))


@pytest.fixture
def published_weights(monkeypatch):
    """Weights of ImageNet by torchvision's addresses, drawn anew, because tests download nothing."""
    import torchvision

    def draw(url, **_):
        name = re.search(r"([a-z0-9_]+)-[0-9a-f]+\.pth$", url)[1]
        return getattr(torchvision.models, name)(weights=None).state_dict()

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", draw)


def reducing_arguments(verb: str, words: list[str]) -> list[str]:
    """Words that keep everything but sizes and durations."""
    composed = composed_of(verb, *words)
    recipe = next((w.removeprefix("experiment=") for w in words if w.startswith("experiment=")), "")
    large = recipe.startswith("unicam/")
    sizes = {
        "teacher": f"teacher.input_size={SIDE}",
        "augment": f"augment.size={SIDE}",
        "teaching": f"teaching.augment.size={SIDE}",
    }
    if verb == "distill":
        del sizes["teacher"]  # it reads the pass
    if verb == "evaluate":
        sizes = {"teacher": sizes["teacher"]}  # it has no views
    less = [word for section, word in sizes.items() if large and section in section_names(verb)]
    if verb == "precompute":
        return [*less, "executor=serial"]
    if verb == "teach":
        # A learning rate for the batches and images of the real set diverges on noise.
        rate = "teaching.optimizer.lr=0.0001"
        return [*less, "teaching.trainer.epochs=1", "teaching.trainer.batch_size=8", rate]
    if verb == "distill":
        return [*less, "trainer.epochs=1", "trainer.batch_size=8"]
    if verb == "sweep":
        grid = {
            option: [10, 100] if 100 in values else values[-1:]
            for option, values in (composed["grid"] or {}).items()
        }
        if recipe == "unicam/resnet152_to_vgg":
            grid["student.name"] = ["vgg11"]
        less += ["trainer.epochs=1", "trainer.batch_size=8", "optimizer.lr=0.0001"]
        less += [f"seeds=[{composed['seeds'][0]}]"]
        less += [f"grid={json.dumps(grid)}", "executor=serial"]
    return less


@pytest.fixture
def run_command(permafrost):
    """Function that runs the words of a command in this process, and returns what it printed."""

    def run(verb: str, *words: str) -> str:
        code, output, errors = permafrost(verb, *words)
        assert not code, f"{verb} {shlex.join(words)}: exit {code}: {errors}"
        return output

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [*(f"ked/{name}" for name in KED), *(f"unicam/{name}" for name in UNICAM)]
)
def test_every_command_of_a_recipe_runs_as_printed(
    recipe, tmp_path, monkeypatch, published_weights, run_command
):
    monkeypatch.chdir(tmp_path)
    write_data(recipe, monkeypatch)
    printed = commands_in(header_of(recipe))
    if recipe in ("ked/mnist", "ked/fashion_mnist"):
        printed += commands_in(header_of(f"{recipe}_full"))

    for verb, *words in printed:
        run_command(verb, *words, *reducing_arguments(verb, words))

    sweeps = [
        json.loads(path.read_text()) for path in tmp_path.glob(f"runs/{recipe}*/**/sweep.json")
    ]
    metrics = list(tmp_path.glob(f"runs/{recipe}/**/evaluate/metrics.json"))
    variants = composed_of("sweep", f"experiment={recipe}")["variants"]
    assert sweeps
    assert len(metrics) >= len(variants)
    assert (tmp_path / f"runs/{recipe}/report.html").exists()


@pytest.mark.slow
def test_the_commands_of_the_assistant_run_as_printed(
    tmp_path, monkeypatch, published_weights, run_command
):
    """Its first commands are those of cats_and_dogs, and its last one names a student."""
    monkeypatch.chdir(tmp_path)
    write_data("unicam/cats_and_dogs", monkeypatch)
    first = commands_in(header_of("unicam/cats_and_dogs"))[:3]
    *printed, last = commands_in(header_of("unicam/assistant"))

    for verb, *words in (*first, *printed):
        run_command(verb, *words, *reducing_arguments(verb, words))
    (student,) = (tmp_path / "runs/unicam/assistant/students").glob("*assistant*")
    verb, *words = [word.replace("<student>", student.name) for word in last]
    run_command(verb, *words, *reducing_arguments(verb, words))

    results = json.loads((student / "evaluate/metrics.json").read_text())
    assert np.isfinite(results["splits"]["test"]["agreement"])
