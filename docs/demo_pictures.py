"""Make the pictures of the pages.

python -m docs.demo_pictures            writes docs/figures/demo-maps.png from a run of `make demo`
python -m docs.demo_pictures photos     writes docs/figures/one-geometry.png, after

    python -m docs.demo_pictures sample     (writes photos/, a photograph that scikit-learn brings)
    permafrost precompute data=image_folder data.path=photos store.path=stores/photos store.image_size=256 \\
        teacher=timm teacher.name=tf_efficientnet_lite0 teacher.weights=pretrained teacher.classes=1000 \\
        teacher.frame=full teacher.input_size=256

The digits are the first of the test split, and the views those of the first epochs, without any choice by how well they
look. The photograph is CC BY 2.0 (https://www.flickr.com/photos/danielbuechele/6061409035/).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from docs.figures import FIGURES
from permafrost.config.augment import AugmentOptions, OperationConfig
from permafrost.config.compose import compose
from permafrost.config.verbs import build_verb_config
from permafrost.evaluation.saved_records import explained_pictures
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import view_images, view_maps
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.windows import Views, in_views
from permafrost.store.reader import Store
from permafrost_report.cases import CasePair, open_pair
from permafrost_report.pictures import overlays
from permafrost_report.student_results import load_results

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SPLITS = {"test": "as in training", "test_swapped": "swapped"}
_DIGITS = 2
_VIEWS = 4
_RIGHT, _WRONG = "0.25", "#c00000"
_CREDIT = "photograph: danielbuechele, CC BY 2.0"


def demo_maps(pair: CasePair) -> Figure:
    """Draw images, the teacher's maps and both students' maps, with the photograph as in training and swapped."""
    columns = ("image", "teacher", "KD student", "e2KD student")
    figure = Figure(figsize=(1.15 * _DIGITS * len(columns), 2.75), layout="constrained")
    axes = figure.subplots(len(_SPLITS), _DIGITS * len(columns), squeeze=False)
    first = [row["key"].removeprefix("test_") for row in pair.baseline.rows["test"][:_DIGITS]]
    for line, (split, title) in zip(axes, _SPLITS.items(), strict=True):
        dataset = pair.datasets[split]
        keys = [f"{split}_{digit}" for digit in first]
        position = dataset.positions_of(keys)
        batch = dataset.__getitems__([position[key] for key in keys])
        pictures = [_explained(pair, number, batch) for number in range(2)]
        kd, _e2kd = pictures
        labels = batch.labels.tolist()
        frames = kd["frames"].transpose(0, 2, 3, 1)
        cells = [
            (list(frames), labels),
            (overlays(frames, kd["teacher_maps"]), kd["teacher_predictions"].tolist()),
            *((overlays(frames, of["maps"]), of["predictions"].tolist()) for of in pictures),
        ]
        for digit in range(_DIGITS):
            for number, (shown, answers) in enumerate(cells):
                axis = line[digit * len(cells) + number]
                axis.imshow(shown[digit], interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                is_right = answers[digit] == labels[digit]
                text = f"a {answers[digit]}" if number == 0 else f"says {answers[digit]}"
                axis.set_xlabel(text, fontsize=9, color=_RIGHT if is_right else _WRONG)
                if title == "as in training":
                    axis.set_title(columns[number], fontsize=9)
        line[0].set_ylabel(title, fontsize=9)
    return figure


def _explained(pair: CasePair, number: int, batch: Any) -> dict[str, NDArray[Any]]:
    variant = pair.variants[number]
    pictures = explained_pictures(variant.model, batch, batch.labels)
    return {name: values.numpy() for name, values in pictures.items()}


def one_geometry(store: Path) -> Figure:
    """Draw the first image of a store and its stored map, and both under the same random views."""
    opened = Store(store)
    dataset = StoreDataset(opened, np.arange(1), passes=opened.open_passes())
    batch = dataset.__getitems__([0])
    operations = (
        OperationConfig(kind="resized_crop", scale=(0.4, 0.9)),
        OperationConfig(kind="horizontal_flip"),
        OperationConfig(kind="rotation", degrees=20.0),
    )
    schedule = ViewSchedule(AugmentOptions(operations=operations), dataset.store.size, seed=0)
    views: list[Views | None] = [None]
    views += [schedule.views(epoch, 0, batch.original_size) for epoch in range(_VIEWS)]
    figure = Figure(figsize=(1.6 * len(views), 3.3), layout="constrained")
    axes = figure.subplots(2, len(views))
    size = dataset.store.size
    for number, view in enumerate(views):
        moved = in_views(batch, view, schedule.rendering)
        pixels = (view_images(moved, size) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        maps = view_maps(moved, batch.targets[0], size)[:, 0].sum(dim=1).numpy()
        for axis, picture in zip(
            axes[:, number], (pixels[0], overlays(pixels, maps)[0]), strict=True
        ):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[0, number].set_title("stored" if view is None else f"view {number}", fontsize=14)
    axes[0, 0].set_ylabel("image", fontsize=14)
    axes[1, 0].set_ylabel("map", fontsize=14)
    figure.supxlabel(_CREDIT, fontsize=8, color="0.45", x=0.99, ha="right")
    return figure


def write_sample() -> None:
    """Write a photograph of scikit-learn as a folder of images."""
    from sklearn.datasets import load_sample_image

    folder = Path("photos/palace")
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(load_sample_image("china.jpg")).save(folder / "china.jpg", quality=95)


def main() -> None:
    """Write the picture that the argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "demo"
    if name == "sample":
        write_sample()
        return
    if name == "photos":
        figure, file = one_geometry(Path("stores/photos")), "one-geometry"
    else:
        config = build_verb_config("report", compose("report", ["experiment=demo"]))
        pair = open_pair(config, load_results("demo"))
        if pair is None:
            raise SystemExit(
                "runs/demo has no evaluated students of both variants: run make demo first"
            )
        figure, file = demo_maps(pair), "demo-maps"
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130)
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(128).save(FIGURES / f"{file}.png", optimize=True)


if __name__ == "__main__":
    main()
