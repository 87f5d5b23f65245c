"""Cases as pictures: an image, the teacher's stored map of it, and the maps of two students, computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.config.explainers import explainer_of_line
from permafrost.core.batches import Batch
from permafrost.core.records import NO_GROUP
from permafrost.evaluation.map_colors import contributions, overlays
from permafrost.evaluation.saved_records import explained_pictures
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.regions import regions_of
from permafrost_report.cases import (
    MEASURE_WORDS,
    Case,
    CaseKind,
    CasePair,
    RecordRow,
    Variant,
    choose_cases,
    value_of,
)
from permafrost_report.options import ReportOptions
from permafrost_report.pictures import (
    PictureRow,
    TileRow,
    class_names,
    draw_outline,
    explained_rows,
    picture_grid,
    shown_name,
)


class CaseFigure(NamedTuple):
    """Figure of one kind of cases of a split, or of the first cases after a shift."""

    title: str
    found: int
    shown: int
    grid: Sequence[TileRow] = ()
    """Pictures, empty if no case is shown."""


class SplitCases(NamedTuple):
    """Cases of one split on the page."""

    split: str
    seed: int
    """Seed of both students."""
    total: str
    """Number of records, or classes of records, that the cases are selected from."""
    order: str
    """Quantity by which the cases are ordered, empty if the maps cannot be compared."""
    figures: list[CaseFigure]
    shifted: CaseFigure | None
    chosen: list[dict[str, Any]]
    """One row per case, for report.json."""


def show_cases(pair: CasePair, options: ReportOptions) -> list[SplitCases]:
    """Build the cases of every split on which both students were evaluated."""
    return [_split_cases(pair, split, options) for split in pair.datasets]


def _split_cases(pair: CasePair, split: str, options: ReportOptions) -> SplitCases:
    dataset = pair.datasets[split]
    many = dataset.has_many_labels
    choice = choose_cases(
        pair.baseline.rows[split],
        pair.candidate.rows[split],
        (pair.baseline.name, pair.candidate.name),
        options.cases,
        many=many,
    )

    def read(cases: Sequence[Case], records: StoreDataset = dataset) -> Batch:
        position = records.positions_of(case.key for case in cases)
        return records.__getitems__([position[case.key] for case in cases])

    moved = [case for kind in choice.kinds for case in kind.cases][:4]
    shift = options.case_shift
    return SplitCases(
        split=split,
        seed=pair.candidate.seed,
        total=f"{choice.total:,} {'classes of images that have both' if many else 'records'}",
        order=MEASURE_WORDS[choice.measure] if choice.measure else "",
        figures=[
            _figure(pair, kind, read(kind.cases)) if kind.cases else CaseFigure(kind.title, 0, 0)
            for kind in choice.kinds
        ],
        shifted=_shifted_figure(pair, moved, read(moved, dataset.in_picture(None)), shift)
        if shift and moved
        else None,
        chosen=[
            {
                "split": split,
                "kind": kind.title,
                "key": case.key,
                "class": shown_name(pair.classes[case.label]),
                "group": case.candidate["group"],
            }
            for kind in choice.kinds
            for case in kind.cases
        ],
    )


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Cases in the evaluation view of one student."""

    frames: NDArray[np.uint8]
    """Frames [n, H, W, 3]."""
    regions: NDArray[np.bool_]
    """Regions [n, H, W] of the cases' classes."""
    arrays: dict[str, NDArray[Any]]
    """Arrays of pictures.explained_pictures."""

    @property
    def teacher_arrays(self) -> dict[str, NDArray[Any]]:
        """Arrays of the teacher, without their prefix, empty if it has no maps."""
        prefix = "teacher_"
        return {
            name.removeprefix(prefix): array
            for name, array in self.arrays.items()
            if name.startswith(prefix)
        }


def _predict_with(pair: CasePair, variant: Variant, batch: Batch, labels: Tensor) -> _Seen:
    arrays = {
        name: tensor.numpy()
        for name, tensor in explained_pictures(variant.model, batch, labels).items()
    }
    return _Seen(
        frames=arrays["frames"].transpose(0, 2, 3, 1),
        regions=regions_of(batch, labels, pair.evaluation.region, variant.model.input_size).numpy(),
        arrays=arrays,
    )


def _figure(pair: CasePair, kind: CaseKind, batch: Batch) -> CaseFigure:
    """Figure with images, the teacher's maps and both students' maps, predictions above and scores of maps below."""
    cases = kind.cases
    labels = torch.tensor([case.label for case in cases])
    baseline, candidate = (_predict_with(pair, variant, batch, labels) for variant in pair.variants)
    images = PictureRow(
        "image",
        _draw_outline(list(candidate.frames), candidate.regions),
        class_names(labels.numpy(), pair.class_names),
    )
    rows = [images._replace(notes=[_name(case) for case in cases])]
    if candidate.teacher_arrays:
        explained = candidate.teacher_arrays["classes"]
        notes = [
            _worth("EPG", value_of(case.candidate, "teacher_epg", case.label))
            if label == case.label
            else f"map of {name}"
            for case, label, name in zip(
                cases, explained.tolist(), class_names(explained, pair.class_names), strict=True
            )
        ]
        rows += _explained(pair, "teacher", candidate, candidate.teacher_arrays, notes)
    for variant, views, of_variant in (
        (pair.baseline, baseline, [case.baseline for case in cases]),
        (pair.candidate, candidate, [case.candidate for case in cases]),
    ):
        notes = [_note(row, case.label) for row, case in zip(of_variant, cases, strict=True)]
        rows += _explained(pair, variant.name, views, views.arrays, notes)
    return CaseFigure(
        kind.title,
        kind.found,
        len(cases),
        picture_grid(rows),
    )


def _shifted_figure(pair: CasePair, cases: Sequence[Case], batch: Batch, shift: int) -> CaseFigure:
    """Figure with images and both students' maps before and after a shift, and the teacher's unshifted map."""
    from permafrost_evaluators.shift import check_shift, shifted_maps

    labels = torch.tensor([case.label for case in cases])
    rows: list[PictureRow] = []
    for variant in pair.variants:
        check_shift("report.case_shift", shift, variant.model.input_size)
        shifted = shifted_maps(variant.model, batch.inputs, shift, labels)
        frames = (shifted.images * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).numpy()
        if variant is pair.baseline:
            rows += [
                PictureRow("image", list(frames[0]), class_names(labels.numpy(), pair.class_names)),
                PictureRow(f"moved by {shift}", list(frames[1])),
            ]
            rows += _unmoved_teacher(pair, batch, labels, shift, frames[0])
        draw = contributions if explainer_of_line(variant.model.explainer).contribution else None
        titles = (variant.name, f"{variant.name}, moved")
        rows += [
            PictureRow(title, draw(maps) if draw else overlays(images, maps))
            for title, images, maps in zip(titles, frames, shifted.maps.numpy(), strict=True)
        ]
        rows[-1] = rows[-1]._replace(
            notes=[_worth("cosine", value) for value in shifted.cosine.tolist()]
        )
    return CaseFigure(
        f"Moved by {shift} pixels",
        len(cases),
        len(cases),
        picture_grid(rows),
    )


def _unmoved_teacher(
    pair: CasePair, batch: Batch, labels: Tensor, shift: int, frames: NDArray[np.uint8]
) -> list[PictureRow]:
    """Row of the teacher's stored maps in the unshifted window, empty if it has none."""
    from permafrost_evaluators.shift import window_view

    frame = (batch.inputs.shape[-2], batch.inputs.shape[-1])
    view = window_view(frame, pair.baseline.model.input_size, shift).expand(len(labels), 3, 3)
    pictures = explained_pictures(
        pair.baseline.model, replace(batch, canonical_from_view=view), labels
    )
    if "teacher_maps" not in pictures:
        return []
    maps = pictures["teacher_maps"].numpy()
    return [
        PictureRow(
            "teacher",
            contributions(maps) if ("teacher_colors" in pictures) else overlays(frames, maps),
        )
    ]


def _explained(
    pair: CasePair, title: str, views: _Seen, arrays: dict[str, NDArray[Any]], notes: list[str]
) -> list[PictureRow]:
    first, *more = explained_rows(
        title, views.frames, arrays, views.arrays["labels"], pair.class_names
    )
    first = first._replace(pictures=_draw_outline(first.pictures, views.regions), notes=notes)
    return [first, *more]


def _draw_outline(
    pictures: Sequence[NDArray[Any]], regions: NDArray[np.bool_]
) -> list[NDArray[np.float64]]:
    return [
        draw_outline(picture, region) for picture, region in zip(pictures, regions, strict=True)
    ]


def _name(case: Case) -> str:
    group = case.candidate["group"]
    return shown_name(unquote(case.key)) + (f"\ngroup {group}" if group > NO_GROUP else "")


def _note(row: RecordRow, label: int) -> str:
    """Scores of a student's map of a class, from its table."""
    where = [_worth(word, value_of(row, word.lower(), label)) for word in ("EPG", "IoU")]
    cosine = _worth("cosine", value_of(row, "map_cosine", label))
    return "\n".join(filter(None, ["  ".join(filter(None, where)), cosine]))


def _worth(word: str, value: float | None) -> str:
    """Format EPG and IoU in per cent and a cosine as it is, empty if there is no value."""
    if value is None or value != value:
        return ""
    return f"{word} {value:.2f}" if word == "cosine" else f"{word} {100 * value:.0f}"
