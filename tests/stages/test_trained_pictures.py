"""One picture of an image: a student is measured, reported, exported and loaded on what its training showed it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import permafrost
from tests.support.pages import blocks_of
from tests.support.paths import ROOT
from tests.support.slow import slow

FRAME = 24
RECIPES = {
    "pad_crop": ("[{kind: pad_crop, padding: 2}]", None),
    "resized_crop": ("[{kind: resized_crop}, {kind: horizontal_flip}]", 0.875),
}
TINY = "teacher=cifar", "teacher.name=resnet8", "teacher.width=4", "teacher.weights=random"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Folder of images of three sizes, whose class is told by a rim that no center crop has."""
    root, generator = tmp_path_factory.mktemp("rim"), np.random.default_rng(0)
    for number in range(40):
        split, label = "test" if number % 4 == 0 else "train", number % 8 // 4
        pixels = generator.integers(0, 256, ((36, 36), (30, 44), (40, 32))[number % 3] + (3,))
        pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:] = [[255 * label, 0, 255]] * 4
        path = root / split / "ab"[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def packed(photographs, tmp_path_factory):
    """Function that fills stores/<name> with the photographs and a pass of a tiny teacher, packed once per options."""
    made = {}

    def copy(name, *options, frame=FRAME):
        key = (frame, *options)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "store"
            permafrost.precompute(
                f"store.path={made[key]}", "data=image_folder", f"data.path={photographs}",
                f"store.image_size={frame}", "executor=serial", "annotate.name=t", *TINY, *options,
            )  # fmt: skip
        shutil.copytree(made[key], f"stores/{name}")
        return f"store.path=stores/{name}"

    return copy


def train(store, recipe, size, epochs=1):
    permafrost.distill(
        store, "run=one", "student=cifar", "student.name=resnet8", "student.width=4", "method=labels",
        f"augment.operations={RECIPES[recipe][0]}", f"augment.size={size}", "optimizer.lr=0.01",
        f"trainer.epochs={epochs}", "trainer.batch_size=10", "trainer.num_threads=1",
    )  # fmt: skip


def own_pixels(path, crop, size, *, is_cut):
    """Return the picture of an image file f32 [3, size, size] by torch alone."""
    image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
    height, width = image.shape[-2:]
    shorter = min(height, width)
    if not is_cut:  # a bilinear sample of the frame, without antialiasing
        frame = F.interpolate(image, (FRAME, FRAME), mode="bilinear", antialias=True)
        scales = [1.0 if crop is None else crop * shorter / side for side in (width, height)]
        places = (2 * torch.arange(size) + 1) / size - 1
        down, across = torch.meshgrid(scales[1] * places, scales[0] * places, indexing="ij")
        grid = torch.stack([across, down], dim=-1)[None]
        return F.grid_sample(frame / 255, grid, padding_mode="border", align_corners=False)[0]
    if crop is not None:
        side = int(crop * shorter + 0.5)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[..., top : top + side, left : left + side]
    return F.interpolate(image, (size, size), mode="bilinear", antialias=True)[0] / 255


@pytest.mark.parametrize(
    ("form", "size", "recipe"),
    [
        ("original", 16, "resized_crop"),
        ("raw", 32, "pad_crop"),
        slow("original", 16, "pad_crop"),
        slow("raw", 32, "resized_crop"),
        slow("raw", FRAME, "pad_crop"),
        slow("raw", FRAME, "resized_crop"),
    ],
)
def test_a_student_is_measured_on_what_its_recipe_shows(photographs, packed, form, recipe, size):
    store = packed("photos", f"store.format={form}")
    train(store, recipe, size)

    done = permafrost.evaluate(store, "run=one", "evaluators=[accuracy]")
    page = permafrost.report(store, "run=one")

    network, paths = permafrost.load_student("one"), sorted(photographs.glob("test/*/*.png"))
    records = permafrost.open_store("stores/photos").select("test")
    (batch,) = permafrost.RecordLoader(records, frame=network.picture, batch_size=10, teacher=())
    crop, labels = RECIPES[recipe][1], torch.tensor([path.parent.name == "b" for path in paths])
    images = [own_pixels(path, crop, size, is_cut=form == "original") for path in paths]
    order = torch.tensor([batch.keys.index(key_of(path)) for path in paths])
    torch.testing.assert_close(batch.images[order], torch.stack(images), rtol=0, atol=1e-6)
    right = (network(torch.stack(images)).logits.argmax(dim=1) == labels).float().mean()
    assert done.splits["test"]["accuracy"] == pytest.approx(float(right))
    part = "whole image" if crop is None else "center crop of 0.875"
    assert done.picture == str(network.picture)
    assert done.picture.startswith(f"{part} at {size}x{size}, bilinear")
    row = json.loads(Path(page.json).read_text())["runs"][0]
    assert (row["picture"], row["accuracy"]) == (done.picture, done.splits["test"]["accuracy"])


def key_of(path):
    return f"test/{path.parent.name}/{path.name}".replace("/", "%2F").replace(".", "%2E")


def test_a_rim_is_seen_by_all_that_reads_the_student(packed, capsys):
    store = packed("photos")
    train(store, "pad_crop", 16, epochs=12)

    whole = permafrost.evaluate(store, "run=one", "evaluators=[accuracy]")
    cropped = permafrost.evaluate(
        store, "run=one", "evaluators=[accuracy]", "evaluate.frame=center_crop"
    )
    *_, load, loop, _ = blocks_of(ROOT / "docs/howto/own-loop.md", "python")
    exec(load.code, names := {"student": "one"})
    exec(loop.code, names | {"store": "stores/photos"})

    assert whole.splits["test"]["accuracy"] == 1.0 > cropped.splits["test"]["accuracy"]
    assert capsys.readouterr().out.endswith(f"{whole.picture}: accuracy 1.000\n")
    assert cropped.picture == "center crop of 0.875 at 16x16, bilinear, antialiased"


@pytest.mark.parametrize("view", [(), ("teacher.frame=center_crop", "teacher.input_size=16")])
def test_a_teacher_agrees_with_its_own_pass_on_every_record(packed, view):
    store = packed("photos", *view)

    done = permafrost.evaluate(store, "run=one", "model=teacher", *TINY, *view)

    numbers = done.splits["test"]
    assert numbers["agreement"] == 1.0
    assert numbers["map_cosine"] == pytest.approx(1.0, abs=1e-3)  # of float16
    assert done.picture == done.teacher_picture


def test_a_program_of_another_picture_has_no_accuracy_until_it_is_measured(packed):
    store = packed("photos")
    train(store, "pad_crop", 16)
    permafrost.evaluate(store, "run=one", "evaluators=[accuracy]")

    def card(*options):
        done = permafrost.export(store, "run=one", *options)
        names = sorted(path.suffix for path in Path(done.card).parent.iterdir())
        return Path(done.card).read_text(), names

    own, _ = card("export.formats=[onnx,torch]")
    other, programs = card("export.formats=[torch]", "export.frame=center_crop")
    permafrost.evaluate(store, "run=one", "evaluators=[accuracy]", "evaluate.frame=center_crop")
    measured, _ = card("export.formats=[torch]", "export.frame=center_crop")

    assert "whole image at 16x16" in own
    assert "center crop of 0.875" in other
    assert ["test " in text for text in (own, other, measured)] == [True, False, True]
    assert ".onnx" not in programs  # of the whole image


def test_a_store_of_other_frames_says_that_it_shows_another_picture(packed, caplog):
    train(packed("photos", "store.format=raw"), "pad_crop", 16)
    other = packed("larger", "store.format=raw", frame=32)

    done = permafrost.evaluate(
        "store.path=stores/photos",
        "run=one",
        "evaluators=[accuracy]",
        f"evaluate.{other.replace('.path', '')}",
    )
    records = permafrost.open_store("stores/larger").select("test")
    loader = permafrost.RecordLoader(records, frame=permafrost.load_student("one").picture)

    assert done.picture == "whole image at 16x16, bilinear from frames of 32x32"
    assert caplog.text.count("the network's training as whole image at 16x16, bilinear from") == 2
    assert next(iter(loader)).images.shape[-2:] == (16, 16)


def test_a_student_of_originals_is_measured_on_frames_where_there_is_nothing_else(packed):
    train(packed("photos", "store.format=original"), "pad_crop", 16)
    packed("frames", "store.format=raw")

    done = permafrost.evaluate(
        "store.path=stores/photos", "run=one", "evaluators=[accuracy]",
        "evaluate.store=stores/frames",
    )  # fmt: skip

    assert done.picture == "whole image at 16x16, bilinear from frames of 24x24"


def test_a_loader_refuses_a_word_for_a_picture(packed):
    packed("photos")
    records = permafrost.open_store("stores/photos").select("test")

    with pytest.raises(permafrost.UserError, match=r"must be a permafrost\.Picture"):
        permafrost.RecordLoader(records, frame="full")


@pytest.mark.parametrize(
    "values",
    [
        {"size": (16,)},
        {"size": (16, 16), "crop": 0.0},
        {"size": (16, 16), "crop": 1.5},
        {"size": (8, 8), "frames": (0, 8)},
    ],
)
def test_a_picture_of_no_size_is_refused(values):
    with pytest.raises(ValueError, match=r"sizes are \(height, width\) in pixels"):
        permafrost.Picture(**values)


def test_a_teacher_is_measured_again_in_another_frame(packed):
    store = packed("photos")

    def taught(*options):
        return permafrost.teach(
            store, "run=one", "teacher=cifar", "teacher.name=resnet8", "teacher.width=4",
            "teaching.trainer.epochs=8", "teaching.trainer.batch_size=10", "teaching.optimizer.lr=0.01",
            "teaching.augment=pad_crop", *options,
        )  # fmt: skip

    whole, cropped = taught(), taught("evaluate.frame=center_crop")

    assert (cropped.last_epoch, cropped.picture[:11]) == ("", "center crop")
    assert whole.accuracy["test"] > cropped.accuracy["test"]
    assert taught().accuracy == whole.accuracy


def test_an_input_size_that_no_view_has_is_refused(packed):
    store = packed("photos")
    options = store, "run=one", "method=labels", "augment=pad_crop", "trainer.epochs=1"

    def refused(verb, section, option):
        with pytest.raises(permafrost.UserError) as error:
            verb(
                *options, f"{section}=cifar", f"{section}.name=resnet8", f"{section}.input_size=16"
            )
        assert str(error.value) == (
            f"{section}.input_size=16 is not the size of the views that it is trained on, 24x24; set {option}=16, or "
            f"{section}.input_size to the size of the views"
        )

    refused(permafrost.distill, "student", "augment.size")
    options = store, "run=one"
    refused(permafrost.teach, "teacher", "teaching.augment.size")


def test_weights_of_a_run_are_measured_as_their_run_is(packed):
    store = packed("photos")
    train(store, "resized_crop", FRAME)

    student = permafrost.evaluate(store, "run=one", "evaluators=[accuracy]")
    network = permafrost.evaluate(
        store, "run=two", "model=network", "student=saved", "evaluators=[accuracy]",
        "student.weights=runs/one/distill",
    )  # fmt: skip

    assert network.picture == student.picture
    assert network.splits["test"]["accuracy"] == student.splits["test"]["accuracy"]
