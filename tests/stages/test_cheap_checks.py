"""Checks of a teacher and of sizes before records are packed, and before torch is imported."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.support.image_sets import write_images

DATA = ["data=image_folder", "data.path=photos", "store.path=stores/new"]


@pytest.fixture
def photos(tmp_path):
    """Photographs of two classes in splits train and val, larger than networks for small images are meant for."""
    for split in ("train", "val"):
        write_images(
            tmp_path / "photos", *(f"{split}/{name}/{i}.png" for name in "ab" for i in range(4))
        )
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "teacher=torchvision teacher.weights=no.pth": "teacher.weights=no.pth does not exist",
        "teacher=torchvision": "teacher=none to pack the records without a pass",
        "teacher=torchvision teacher.name=resnet19 teacher.weights=random": "no classifier 'resnet19'",
        "teacher=torchvision teacher.name=resnet18 teacher.weights=head.safetensors": "does not fit ResNet",
        "teacher=torchvision teacher.weights=pretrained": "has 1000 outputs, but 2 are needed",
    }.items(),
)
def test_a_teacher_is_checked_before_the_first_record_is_packed(
    permafrost, photos, tmp_path, words, message
):
    save_file({"fc.weight": torch.zeros(1000, 512)}, tmp_path / "head.safetensors")

    code, _, err = permafrost("precompute", *DATA, *words.split(), "executor=serial")

    assert code in (1, 2)
    assert message in err
    assert not [
        path for path in (tmp_path / "stores").rglob("*") if path.is_file() and path.name != ".lock"
    ]


def test_weights_that_are_not_there_are_missed_without_torch(photos, tmp_path):
    program = """if True:
        import sys
        from permafrost.core.errors import ConfigError
        from permafrost.cli import run_typed_command
        try:
            run_typed_command("precompute", sys.argv[1:])
        except ConfigError as error:
            print(error, "torch" in sys.modules)
    """
    words = [*DATA, "teacher=torchvision", "teacher.weights=no.pth"]

    run = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=True
    )

    assert run.stdout.startswith("teacher.weights=no.pth does not exist")
    assert run.stdout.endswith("False\n")


def test_a_network_for_small_images_is_refused_above_64_pixels_unless_asked_for(permafrost, photos):
    code, _, _ = permafrost(
        "precompute", *DATA, "store.image_size=96", "teacher=none", "executor=serial"
    )
    assert code == 0
    store, quick = ["store.path=stores/new"], ["trainer.epochs=1", "trainer.batch_size=4"]
    teaching = [
        *(f"teaching.{word}" for word in quick),
        "evaluate.splits=[val]",
        *("teacher=cifar", "teacher.name=resnet8"),
    ]

    code, _, err = permafrost("teach", *store, "run=t", *teaching)
    assert code == 2
    assert "is a network for images of 32 pixels, and the frames of stores/new are 96x96" in err
    assert (
        "choose teacher=torchvision teacher.name=resnet18, or set teaching.augment.size=32" in err
    )
    code, _, err = permafrost("distill", *store, "run=d", "method=labels", *quick)
    assert code == 2
    assert "or set augment.size=32" in err

    code, _, err = permafrost("teach", *store, "run=t", *teaching, "teaching.augment.size=32")
    assert code == 0, err


def test_a_teacher_is_not_trained_at_another_size_than_the_options_name(permafrost, photos):
    permafrost("precompute", *DATA, "store.image_size=96", "teacher=none", "executor=serial")

    code, _, err = permafrost(
        "teach",
        *("store.path=stores/new", "run=t", "teacher=cifar", "teacher.input_size=64"),
        "evaluate.splits=[val]",
    )

    assert code == 2
    assert "set teaching.augment.size=64" in err
