"""Comparison of what a student receives here from the files of this folder with what the second reader says.

python -m tests.exchange.conformance.measure            prints the table
python -m tests.exchange.conformance.measure --write    writes it to table.json, from which the page is made
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

import permafrost
from permafrost.config.augment import AugmentOptions
from permafrost.store.codecs import decode_unit
from permafrost.store.reader import Store
from tests.exchange.conformance import second_reader
from tests.exchange.conformance.make_files import (
    CLASSES,
    DATACOMPDR,
    FILES,
    FKD_KINDS,
    IMAGENET_PLUS,
    RELABEL_CLASSES,
    SIDE,
    TINYVIT_TOP,
    VIEWS,
    unpack,
)
from tests.support.exchange import run_ingest, run_precompute, values_by_key
from tests.support.view_matrices import matrices_of_fields

TABLE = Path(__file__).parent / "table.json"
FRAME = 48
"""Side of the store's frames, less than that of the photographs, so that windows are cut from these."""
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
UPRIGHT = {
    # EXIF orientation -> (x, y) of the upright image -> (x, y) of the stored one, in [-1, 1]
    1: ((1, 0), (0, 1)),
    2: ((-1, 0), (0, 1)),
    3: ((-1, 0), (0, -1)),
    4: ((1, 0), (0, -1)),
    5: ((0, 1), (1, 0)),
    6: ((0, 1), (-1, 0)),
    7: ((0, -1), (-1, 0)),
    8: ((0, -1), (1, 0)),
}


@dataclass
class Workplace:
    """The photographs and files, unpacked, and a store of the photographs."""

    folder: Path

    def __post_init__(self) -> None:
        for path in sorted(FILES.glob("*.zip")):
            unpack(path.stem, self.folder)
        words = (f"data.path={self.folder / 'photographs'}", f"store.image_size={FRAME}")
        run_precompute(
            self.store, "data=image_folder", *words, "store.shard_size=5", "teacher=none"
        )

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @cached_property
    def photographs(self) -> list[Path]:
        return sorted((self.folder / "photographs/train").rglob("*.jpg"))

    @property
    def orientations(self) -> list[int]:
        return [int(path.stem.rpartition("_")[2]) for path in self.photographs]

    def upright(self, maps) -> np.ndarray:
        """Turn the map of each photograph upright."""
        turned = (upright_map(m, o) for m, o in zip(maps, self.orientations, strict=True))
        return np.stack(list(turned))

    def ingest(self, name: str, *words: str, views: bool = True) -> Ingested:
        result = run_ingest(self.store, f"path={self.folder / name}", *words)
        pass_name = result.ingested_pass.partition(" ")[0]
        store = Store(self.store)
        by_key = values_by_key(store, pass_name, stored_views=views)
        keys = [
            next(k for k in by_key[next(iter(by_key))] if p.stem in k) for p in self.photographs
        ]
        values = {field: np.stack([of[key] for key in keys]) for field, of in by_key.items()}
        manifest = store.open_pass(pass_name, stored_views=views).manifest
        return Ingested(pass_name, keys, values, manifest)

    def student_views(self, ingested: Ingested) -> np.ndarray:
        """Return the images of a student that replays the pass, f32 [n, V, side, side, 3] of 0 to 255."""
        records = permafrost.open_store(self.store).select("train")
        loader = permafrost.RecordLoader(
            records,
            teacher=ingested.name,
            replay=True,
            augment=AugmentOptions(size=SIDE),
            batch_size=len(ingested.keys),
        )
        rows = {key: row for row, key in enumerate(ingested.keys)}
        images = np.full((len(rows), VIEWS, SIDE, SIDE, 3), np.nan, np.float32)
        while np.isnan(images).any():
            for batch in loader:
                shown = batch.images.permute(0, 2, 3, 1).numpy() * 255
                for key, view, image in zip(
                    batch.keys, batch.stored.view_index, shown, strict=True
                ):
                    images[rows[key], int(view)] = image
        return images


@dataclass
class Ingested:
    """A pass, its values in the order of the photographs, and its manifest."""

    name: str
    keys: list[str]
    values: dict[str, np.ndarray]
    manifest: object


def dense(values: dict[str, np.ndarray], classes: int, temperature: float) -> np.ndarray:
    """Probabilities [n, V, classes] of stored largest logits, the rest of which is spread evenly."""
    outcomes = np.concatenate([values["top_logits"] / temperature, values["rest_logits"]], axis=-1)
    shares = np.exp(outcomes.astype(np.float64))
    shares /= shares.sum(axis=-1, keepdims=True)
    k = values["top_class"].shape[-1]
    even = np.repeat(shares[..., k:] / max(1, classes - k), classes, axis=-1)
    np.put_along_axis(even, values["top_class"].astype(int), shares[..., :k], -1)
    return even


def corners_here(matrices: np.ndarray, orientation: int) -> np.ndarray:
    """Corners [V, 2, 2] of views of an upright image as fractions of the sides of the stored one."""
    points = np.array([[-1, -1, 1], [1, 1, 1]]).T
    upright = np.swapaxes(matrices[..., :2, :] @ points, -1, -2)
    return (upright @ np.array(UPRIGHT[orientation]).T + 1) / 2


def corners_there(views: list[second_reader.View]) -> np.ndarray:
    """Corners [V, 2, 2] (x, y) of what the upper left and the lower right of a view show."""
    rows = []
    for view in views:
        top, left, height, width = view.box
        first, last = (left, top), (left + width, top + height)
        if view.is_mirrored:
            first, last = (left + width, top), (left, top + height)
        rows.append((first, last))
    return np.array(rows)


def correlations(here: np.ndarray, there: list[list[second_reader.View]]) -> np.ndarray:
    """Correlations [n, V] of the pixels of views; of one whose pixels are all the same, 1 if both are."""
    result = np.empty(here.shape[:2])
    for row, views in enumerate(there):
        for number, view in enumerate(views):
            shown = Image.fromarray(view.pixels)
            if shown.size != (SIDE, SIDE):
                shown = shown.resize((SIDE, SIDE), Image.Resampling.BOX)
            one, other = here[row, number].ravel(), np.asarray(shown, np.float32).ravel()
            if min(one.std(), other.std()) < 1:
                result[row, number] = 1.0 if abs(one.mean() - other.mean()) < 3 else 0.0
            else:
                result[row, number] = np.corrcoef(one, other)[0, 1]
    return result


def has_geometry(view: second_reader.View) -> bool:
    return any(name in GEOMETRIC and magnitude for name, magnitude in view.operations)


def measure_views(
    place: Workplace, ingested: Ingested, there: list[list[second_reader.View]]
) -> dict:
    """Compare boxes and pixels of views."""
    matrices, geometry = (
        matrices_of_fields(ingested.values),
        np.array([[has_geometry(v) for v in r] for r in there]),
    )
    boxes = 0.0
    for row, views in enumerate(there):
        plain = ~geometry[row]
        here = corners_here(matrices[row], place.orientations[row])
        boxes = max(boxes, np.abs(here - corners_there(views))[plain].max(initial=0.0))
    alike = correlations(place.student_views(ingested), there)
    numbers = {"boxes": boxes, "pixels": sorted(alike[~geometry])}
    if geometry.any():
        numbers["beyond"] = sorted(alike[geometry])
    return numbers


def measure_fkd(place: Workplace, name: str) -> dict:
    _, kind, temperature, _ = FKD_KINDS[name]
    renormalized = f"format.renormalized={str(kind == 'marginal_renorm').lower()}"
    words = (f"format.classes={CLASSES}", f"format.temperature={temperature}", renormalized)
    done = place.ingest(name, "format=fkd", *words)
    there = second_reader.fkd(place.folder / name, place.photographs, kind, CLASSES, SIDE)
    targets = np.stack([[view.probabilities for view in views] for views in there])
    largest = np.abs(dense(done.values, CLASSES, temperature) - targets).max()
    return {"targets": largest} | measure_views(place, done, there)


def measure_imagenet_plus(place: Workplace, name: str) -> dict:
    done = place.ingest(name, "format=imagenet_plus", f"format.classes={CLASSES}")
    there = second_reader.imagenet_plus(place.folder / name, place.photographs, CLASSES)
    targets = np.stack([[view.probabilities for view in views] for views in there])
    largest = np.abs(dense(done.values, CLASSES, 1.0) - targets).max()
    return {"targets": largest} | measure_views(place, done, there)


def measure_datacompdr(place: Workplace, name: str) -> dict:
    done = place.ingest(name, "format=datacompdr", f"format.size={SIDE}")
    tar = place.folder / name / "00000000.tar"
    there, embeddings = second_reader.datacompdr(tar, place.photographs, DATACOMPDR)
    largest = np.abs(done.values["pooled"] - np.stack(embeddings)).max()
    return {"targets": largest} | measure_views(place, done, there)


def measure_tinyvit(place: Workplace, name: str) -> dict:
    words = ("format.join=position", f"format.classes={CLASSES}")
    done = place.ingest(name, "format=tinyvit", *words, views=False)
    count = len(place.photographs)
    targets = second_reader.tinyvit(place.folder / name, count, TINYVIT_TOP, CLASSES)
    return {"targets": np.abs(dense(done.values, CLASSES, 1.0)[:, 0] - targets).max()}


def measure_theia(place: Workplace, name: str) -> dict:
    done = place.ingest(name, "format=theia", views=False)
    read = second_reader.theia(place.folder / name)
    rows = [read[path.stem] for path in place.photographs]
    tokens = np.stack([token for _, token in rows])
    features = place.upright([maps for maps, _ in rows])
    stored = decode_unit(done.values["features_1"][:, 0])
    units = stored * done.values["features_1_scale"][:, 0, :, None, None]
    largest = np.abs(features).max(axis=(2, 3), keepdims=True)
    return {
        "targets": np.abs(done.values["pooled"][:, 0] - tokens).max(),
        "maps": (np.abs(units - features) / largest).max(),
    }


def measure_e2kd(place: Workplace, name: str) -> dict:
    done = place.ingest(name, "format=e2kd", "format.frame=full", views=False)
    logits, maps = second_reader.e2kd(place.folder / name, len(place.photographs))
    turned = place.upright(maps)
    stored = decode_unit(done.values["map"][:, 0, 0])
    units = stored * done.values["map_scale"][:, 0][:, :, None, None]
    return {
        "targets": np.abs(done.values["logits"][:, 0] - logits).max(),
        "maps": np.abs(units - turned).max() / np.abs(maps).max(),
    }


def upright_map(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turn a map [..., h, w] of the stored pixels upright, cell by cell."""
    height, width = values.shape[-2:]
    rows, columns = (width, height) if orientation >= 5 else (height, width)
    turned = np.empty((*values.shape[:-2], rows, columns), values.dtype)
    for row in range(rows):
        for column in range(columns):
            x, y = 2 * (column + 0.5) / columns - 1, 2 * (row + 0.5) / rows - 1
            (a, b), (c, d) = UPRIGHT[orientation]
            there_x, there_y = a * x + b * y, c * x + d * y
            source_y, source_x = int((there_y + 1) / 2 * height), int((there_x + 1) / 2 * width)
            turned[..., row, column] = values[..., source_y, source_x]
    return turned


def measure_relabel(place: Workplace, name: str) -> dict:
    """Compare the label of the whole image, or of crops that are drawn here."""
    has_crops = name == "relabel_crops"
    words = ("views=random", f"views.count={VIEWS}", "augment=resized_crop_flip")
    done = place.ingest(
        "relabel", "format=relabel", f"name={name}", *(words if has_crops else ()), views=has_crops
    )
    distances, divergences, same = [], [], []
    for row, path in enumerate(place.photographs):
        boxes = np.array([[0.0, 0.0, 1.0, 1.0]])
        if has_crops:
            matrices = matrices_of_fields(done.values)[row]
            corners = corners_here(matrices, place.orientations[row])
            low, high = corners.min(axis=1), corners.max(axis=1)
            # Without the rounding of a side, which decides about the number of points.
            boxes = np.concatenate([low[:, ::-1], (high - low)[:, ::-1] - 1e-5 / 15], axis=1)
        file = place.folder / "relabel" / path.parent.name / f"{path.stem}.pt"
        targets = second_reader.relabel(file, boxes, RELABEL_CLASSES)
        here = dense({f: each[row] for f, each in done.values.items()}, RELABEL_CLASSES, 1.0)
        distances.append(np.abs(here - targets).max())
        divergences += list((targets * np.log(targets / here)).sum(axis=1))
        same += list(here.argmax(axis=1) == targets.argmax(axis=1))
    return {"targets": max(distances), "nats": max(divergences), "top1": float(np.mean(same))}


MEASURED = {
    **dict.fromkeys(FKD_KINDS, measure_fkd),
    **{name: measure_imagenet_plus for name in IMAGENET_PLUS if name != "imagenet_plus_mixing"},
    **dict.fromkeys(("datacompdr", "datacompdr_bfloat16"), measure_datacompdr),
    "tinyvit": measure_tinyvit,
    **dict.fromkeys(("relabel", "relabel_crops"), measure_relabel),
    "theia": measure_theia,
    **dict.fromkeys(("e2kd_gradcam", "e2kd_bcos"), measure_e2kd),
}
"""Measure of each set of files: the largest difference of targets and of corners of boxes, and the correlations of
the pixels of views, `beyond` for those with a shear, translation or rotation."""


def summary(numbers: dict) -> dict:
    """Return numbers for a table: largest differences, and of correlations the lowest and the median."""
    return {
        name: [round(float(np.min(value)), 3), round(float(np.median(value)), 3)]
        if np.ndim(value)
        else float(f"{value:.1e}")
        for name, value in numbers.items()
    }


def main() -> None:
    """Print the table, or write it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder))
        rows = {name: summary(function(place, name)) for name, function in MEASURED.items()}
    text = json.dumps(rows, indent=1) + "\n"
    if "--write" in sys.argv:
        TABLE.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
