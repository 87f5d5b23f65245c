"""One picture of a store and a pass: facts, records with maps and features, how confident and how wide the maps are."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from numpy.typing import NDArray

from permafrost.core.batches import Logits, TopLogits
from permafrost.core.errors import printable
from permafrost.core.label_forms import classes_of, has_many, predict_labels
from permafrost.evaluation.map_colors import (
    deepest_features,
    feature_colors,
    overlays,
    stored_features,
)
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import decode_maps, view_images, view_maps
from permafrost.loading.target_sheet import sheets_of
from permafrost.losses.logit_distances import outcome_log_probs
from permafrost.models.explanations import explainer_of_maps
from permafrost.store.facts import FactSheet
from permafrost.store.reader import Store, TeacherPass
from permafrost_report.figures import styled
from permafrost_report.pictures import readable_classes

_DRAWN = ("data", "teacher", "targets")
"""Subjects of the facts that are drawn."""
_BATCH = 256
_COLUMNS = 16
"""Pictures in a row: images, each followed by its map and by the colors of its features."""
_SIDE = (112, 112)
_TITLE_SIZE = 7
_FILLED = 0.95
"""Part of a picture's width that a title may have, as hinted letters are wider than their outlines."""
_MAX_TITLE = 40
"""Number of characters that are wider than a picture in any case, from which a title is shortened."""


@dataclass(frozen=True)
class StoreSheet:
    """The picture, which a notebook displays, and its facts as text by name."""

    figure: Figure
    facts: dict[str, str]
    """The store, the pass and the records that are drawn, as text by name."""
    sheets: dict[str, FactSheet]
    """Facts about the data, the teacher and its targets, by subject."""

    def encoded(self, file_format: str, dpi: int = 150) -> bytes:
        """Return the picture as a file; the same picture has the same bytes.

        Args:
            file_format: png, svg or pdf.
            dpi: Pixels per inch of a png.
        """
        data = io.BytesIO()
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(file_format, {})
        self.figure.savefig(data, format=file_format, dpi=dpi, metadata=dates)
        return data.getvalue()

    def _repr_png_(self) -> bytes:
        return self.encoded("png", dpi=80)


class _Sample(NamedTuple):
    confidence: NDArray[np.float32]
    """Highest softmax probability of each record, [n]."""
    coverage: NDArray[np.float32]
    """Mean of |map| over its maximum of each record whose map is not zero, [m]."""


def show_records(
    store: Store, split: str | None = None, *, teacher: str | None = None, records: int = 24
) -> StoreSheet:
    """Draw records next to their maps, with facts and histograms; a notebook displays the picture.

    It is the method `show` of `permafrost.open_store(...)`.

    Args:
        store: The store.
        split: Name of the split; None shows train, or the first split of a store without it.
        teacher: Name of a pass; None shows the only one, or images alone if there is none.
        records: Number of pictures.

    Raises:
        StoreMismatchError: If the store does not have such a pass, or several and none is named.
    """
    passes = store.open_passes([teacher] if teacher else ()) if store.pass_folders() else []
    return draw_store(store, passes[0] if passes else None, split, records)


@styled
def draw_store(
    store: Store, teacher: TeacherPass | None = None, split: str | None = None, records: int = 24
) -> StoreSheet:
    """Draw records of a split, each next to its map, and histograms of a sample of the split.

    Args:
        store: The store.
        teacher: Pass whose maps and logits are shown, None for images alone.
        split: Split to draw; None is train, or the first split of a store without it.
        records: Number of pictures.
    """
    generations = store.num_generations
    if teacher is not None:
        store = store.part(0, teacher.num_generations)
    facts = {"store": str(store.path), "pass": teacher.name if teacher is not None else "none"}
    sheets = sheets_of(store, teacher)
    if generations > 1:
        facts["generations"] = f"{store.num_generations} of {generations}"
    splits = store.manifest.records
    chosen = split or ("train" if "train" in splits else next(iter(splits)))
    rows = _spread(store, chosen, records)
    facts["shown"] = f"{chosen}, {len(rows)} of {splits[chosen]:,} records"
    passes = [] if teacher is None else [teacher]
    field = next(map(deepest_features, passes), None)
    width = 2 + (field is not None and bool(passes[0].fields_of("maps")))
    facts |= {"colors": f"3 principal components of {field} in these pictures"} if field else {}
    lines = -(-store.form.pictures(len(rows)) // (_COLUMNS // width))
    # Inches: the facts, each line of records below its titles, and the histograms below theirs.
    text_lines = [f"{name}: {value}" for name, value in facts.items()]
    text_lines += "\n".join(str(sheets[name]) for name in _DRAWN if name in sheets).split("\n")
    heights = [
        0.17 * len(text_lines) + 0.1,
        *[0.95] * lines,
        0.45,
        1.4 if teacher is not None else 0.01,
    ]
    height = sum(heights) + 0.5
    figure = Figure(figsize=(12, height))
    grid = figure.add_gridspec(
        *(len(heights), _COLUMNS),
        height_ratios=heights,
        wspace=0.05,
        hspace=0,
        left=0.02,
        right=0.98,
        bottom=0.35 / height,
        top=1 - 0.15 / height,
    )
    text = figure.add_subplot(grid[0, :])
    text.set_axis_off()
    text.text(0, 1, "\n".join(text_lines), va="top", family="monospace", fontsize=8)
    if lines:
        _draw_pictures(figure, grid, store, rows, passes, field, width)
    if teacher is not None:
        sample = _measure(store, teacher, chosen)
        for column, values, title in (
            (0, sample.confidence, f"confidence: {_CONFIDENCE[store.manifest.multi_label]}"),
            (_COLUMNS // 2 + 1, sample.coverage, "energy of the map: mean of |map| / max |map|"),
        ):
            axis = figure.add_subplot(grid[-1, column : column + _COLUMNS // 2 - 1])
            axis.hist(values, bins=40, range=(0, 1))
            axis.set_title(f"{title} ({len(values):,} records)", fontsize=8, loc="left")
            axis.set_yticks([])
    return StoreSheet(figure, facts, sheets)


def _spread(store: Store, split: str, count: int) -> NDArray[np.int64]:
    """Return rows of a split, spread evenly."""
    from permafrost.loading.subset import rows_of_split

    rows = rows_of_split(store.index, split)
    places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64))
    return np.asarray(rows)[places] if not isinstance(rows, range) else places + rows.start


def _draw_pictures(
    figure: Figure,
    grid: object,
    store: Store,
    rows: NDArray[np.int64],
    passes: list[TeacherPass],
    field: str | None,
    width: int,
) -> None:
    """Draw the records, each in `width` columns, with the colors of a field of features in the last one."""
    batch = StoreDataset(store, rows, passes, output=field).__getitems__(list(range(len(rows))))
    colors = feature_colors(stored_features(batch, field)).numpy() if field else None
    images = (view_images(batch, _SIDE) * 255).round().to(torch.uint8)
    pixels = images.permute(0, 2, 3, 1).numpy()
    heats: Sequence[NDArray[np.float64]] = []
    if passes and batch.targets[0].maps is not None:
        maps = view_maps(batch, batch.targets[0], _SIDE)[:, 0]
        is_sum = not explainer_of_maps(maps[:, None]).contribution
        heats = overlays(pixels, (maps.sum(dim=1) if is_sum else maps.abs().sum(dim=1)).numpy())
    classes = readable_classes(store.manifest.classes)
    stored = batch.targets[0] if passes else None
    names = classes if passes and passes[0].num_classes == len(classes) else None
    logits, targeted = (stored.logits, stored.target_class) if stored is not None else (None, None)
    predicted = (
        None
        if logits is None
        else classes_of(predict_labels(logits, many=has_many(batch.labels))).tolist()
    )
    explained = None if targeted is None else targeted[:, 0].tolist()
    of_records = classes_of(batch.labels).tolist()
    for number, picture in enumerate(pixels):
        line, column = divmod(number, _COLUMNS // width)
        left = _axis(figure, grid, line + 1, width * column)
        left.imshow(picture)
        _entitle(left, _names(of_records[number], classes))
        if colors is not None:
            _axis(figure, grid, line + 1, width * (column + 1) - 1).imshow(colors[number])
        if len(heats):
            right = _axis(figure, grid, line + 1, width * column + 1)
            right.imshow(heats[number])
            if predicted is not None and explained is not None:
                says, meant = _names(predicted[number], names), _names([explained[number]], names)
                _entitle(
                    right, f"says {says}" if says == meant else f"{meant}; says {says or 'none'}"
                )


def _axis(figure: Figure, grid: object, line: int, column: int) -> Axes:
    axis: Axes = figure.add_subplot(grid[line, column])  # type: ignore[index]
    axis.set_axis_off()
    axis.set_anchor("S")
    return axis


def _names(labels: Sequence[int], classes: Sequence[str] | None) -> str:
    """Return the names of the first classes, or their numbers if they are not those of the data."""
    known = [label for label in labels if label >= 0]
    return ", ".join(f"class {label}" if classes is None else classes[label] for label in known[:2])


def _entitle(axis: Axes, text: str) -> None:
    """Write a title above a picture, with an ellipsis if it is wider than the picture's place."""
    line = printable(" ".join(text.split()))
    points = _FILLED * 72 * axis.get_position().width * axis.figure.get_figwidth()  # type: ignore[union-attr]

    def width(text: str) -> float:
        return float(TextPath((0, 0), text, size=_TITLE_SIZE).get_extents().width) if text else 0.0

    def cut(length: int) -> str:
        return f"{line[:length].rstrip()}…"

    if len(line) > _MAX_TITLE or width(line) > points:
        lengths = range(min(len(line), _MAX_TITLE))
        line = cut(max(bisect_right(lengths, points, key=lambda length: width(cut(length))) - 1, 0))
    axis.set_title(line, fontsize=_TITLE_SIZE, loc="left", pad=2)


def _measure(store: Store, teacher: TeacherPass, split: str) -> _Sample:
    """Measure confidence and coverage on a sample of a split, from the pass alone."""
    # Records of the histograms, spread evenly over the split.
    rows = _spread(store, split, 1024)
    dataset = StoreDataset(store, rows, [teacher])
    confidence, coverage = [], []
    for start in range(0, len(rows), _BATCH):
        (stored,) = dataset.__getitems__(list(range(start, min(start + _BATCH, len(rows))))).targets
        if stored.logits is not None:
            confidence.append(_confidence(stored.logits, many=dataset.has_many_labels).numpy())
        if stored.maps is not None:
            maps = decode_maps(stored)[:, 0].abs().flatten(1)
            highest = maps.amax(dim=1)
            coverage.append((maps.mean(dim=1) / highest)[highest > 0].numpy())
    empty = np.empty(0, np.float32)
    return _Sample(*(np.concatenate(parts) if parts else empty for parts in (confidence, coverage)))


def _confidence(logits: Logits, *, many: bool) -> torch.Tensor:
    """Probability of each record's largest logit, [n]; of many labels the mean of max(p, 1 - p) over them."""
    if many and isinstance(logits, torch.Tensor):
        return logits.abs().sigmoid().mean(dim=1)
    if isinstance(logits, TopLogits):
        return outcome_log_probs(logits, logits, tau=1.0)[:, 0].exp()
    return logits.softmax(dim=1).amax(dim=1)


_CONFIDENCE = {
    False: "highest probability of the teacher",
    True: "mean over labels of the teacher's max(p, 1 - p)",
}
"""Meaning of the confidence, by whether records have many labels."""
