"""Pictures of a page: tiles in a grid, maps over images, and the contact sheet of a store.

Text stays text, so that any class name can be shown, read aloud and searched for. A tile holds no more pixels than its
enlarged form shows.

On the contact sheet image and map are transformed by the same matrix, so a misplaced map is immediately visible.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from permafrost.config.augment import AugmentOptions
from permafrost.core.batches import Batch
from permafrost.evaluation.map_colors import contributions, overlays
from permafrost.loading.dataset import StoreDataset, covering_passes
from permafrost.loading.geometry import view_images, view_maps
from permafrost.loading.random_views import schedule_views
from permafrost.loading.recipes import PixelAugmentSchedule
from permafrost.loading.windows import in_views
from permafrost.models.explanations import picture_of
from permafrost.store.reader import Store, TeacherPass

DISPLAYED_PIXELS = 176
"""Largest width of a tile on the page (style.css.j2)."""
_MAX_PIXELS = 256
"""Longest side of a tile's picture; larger ones are reduced."""
_LOSSLESS_PIXELS = 48
"""Longest side up to which a picture is small without loss."""
_DOUBLED_PIXELS = 128
"""Longest side up to which pixels are doubled before a lossy encoding, which halves the resolution of colors."""


class PictureRow(NamedTuple):
    """A row of a grid, whose lists have one entry per record or are empty."""

    title: str
    pictures: Sequence[NDArray[Any]]
    """Pictures [height, width, 3]: u8, or float in [0, 1]."""
    captions: Sequence[str] = ()
    """Captions above the pictures."""
    wrong: Sequence[bool] = ()
    """True for captions in red."""
    aspects: Sequence[float] = ()
    """Displayed aspect ratios width / height, or empty for square pixels."""
    notes: Sequence[str] = ()
    """Notes below the pictures."""


class Tile(NamedTuple):
    """A picture of the grid with its text."""

    source: str
    """Picture as a data URI."""
    width: int
    height: int
    alt: str
    caption: str
    note: str
    is_wrong: bool
    is_enlarged: bool
    """True if the picture has fewer pixels than are displayed, which are then shown as squares."""


class TileRow(NamedTuple):
    """Tiles of a row."""

    title: str
    tiles: list[Tile]
    has_captions: bool


def picture_grid(rows: Sequence[PictureRow]) -> list[TileRow]:
    """Encode the pictures of all rows. Records are columns, named by the captions of the first row."""
    names = rows[0].captions
    return [
        TileRow(
            row.title,
            [_tile(row, column, names) for column in range(len(row.pictures))],
            any(row.captions),
        )
        for row in rows
    ]


def _tile(row: PictureRow, column: int, names: Sequence[str]) -> Tile:
    image = _image(row.pictures[column], row.aspects[column] if row.aspects else None)
    source, (width, height) = encode_picture(image)
    caption = row.captions[column] if row.captions else ""
    is_wrong = bool(row.wrong and row.wrong[column])
    return Tile(
        source=source,
        width=width,
        height=height,
        alt=_alt(row.title, caption, names[column] if names else "", is_wrong, column),
        caption=caption,
        note=row.notes[column] if row.notes else "",
        is_wrong=is_wrong,
        is_enlarged=max(image.size) < DISPLAYED_PIXELS,
    )


def _alt(title: str, caption: str, name: str, is_wrong: bool, column: int) -> str:
    """Describe a tile by its row, the name of its record and, for a network, its prediction."""
    words = [title.strip(), name or f"record {column + 1}"]
    if caption and caption != name:
        words.append(f"predicted {caption}" if is_wrong else caption)
    return ", ".join(" ".join(word.split()) for word in words)


def _image(picture: NDArray[Any], aspect: float | None) -> Image.Image:
    are_bytes = picture.dtype == np.uint8
    pixels = picture if are_bytes else (picture.clip(0, 1) * 255).round().astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if aspect is not None:
        side = min(max(*image.size, DISPLAYED_PIXELS), _MAX_PIXELS)
        shorter = max(1, round(side * aspect if aspect < 1 else side / aspect))
        size = (shorter, side) if aspect < 1 else (side, shorter)
        shrinks = size[0] <= image.width and size[1] <= image.height
        return image.resize(size, Image.Resampling.LANCZOS if shrinks else Image.Resampling.NEAREST)
    if max(image.size) > _MAX_PIXELS:
        image.thumbnail((_MAX_PIXELS, _MAX_PIXELS), Image.Resampling.LANCZOS)
    return image


def encode_picture(image: Image.Image) -> tuple[str, tuple[int, int]]:
    """Encode a picture as WebP.

    Small pictures keep every pixel; of larger ones the smaller of both encodings is taken.

    Returns:
        The data URI, and the picture's size in pixels (width, height), which may be twice that of `image`.
    """
    # Effort from 0 to 100; more takes four times as long and saves no byte in a thousand.
    lossless = _webp(image, lossless=True, quality=75)
    if max(image.size) <= _LOSSLESS_PIXELS:
        return _uri(lossless), image.size
    factor = 2 if max(image.size) <= _DOUBLED_PIXELS else 1
    size = (factor * image.width, factor * image.height)
    lossy = _webp(image.resize(size, Image.Resampling.NEAREST), quality=80)
    return (_uri(lossy), size) if len(lossy) < len(lossless) else (_uri(lossless), image.size)


def _webp(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", method=2, **options)
    return buffer.getvalue()


def _uri(data: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


# ---- pictures --------------------------------------------------------------------------------------


MAX_CHARACTERS = 300
"""Largest number of characters of a class or of a column of a table on the page."""


def map_rows(
    pictures: Mapping[str, Mapping[str, Any]], classes: Sequence[str], keys: Sequence[str] = ()
) -> list[TileRow]:
    """Show images, the teacher's maps and those of one student per variant, with predictions above.

    Args:
        pictures: By variant, the tensors written by evaluate: frames, labels, predictions, maps, optionally colors, and
            those of the teacher under names that start with teacher_.
        classes: Names of the classes.
        keys: Keys of the records, which are below their images.
    """
    first = {name: tensor.numpy() for name, tensor in next(iter(pictures.values())).items()}
    labels = first["labels"]
    frames = first["frames"].transpose(0, 2, 3, 1)
    rows = [PictureRow("image", list(frames), class_names(labels, classes), notes=keys)]
    if "teacher_maps" in first:
        teacher = {
            name.removeprefix("teacher_"): array
            for name, array in first.items()
            if "teacher_" in name
        }
        rows += explained_rows("teacher", frames, teacher, labels, classes)
    for variant, tensors in pictures.items():
        rows += explained_rows(
            variant,
            frames,
            {name: tensor.numpy() for name, tensor in tensors.items()},
            labels,
            classes,
        )
    return picture_grid(rows)


def feature_rows(
    pictures: Mapping[str, Mapping[str, Any]], classes: Sequence[str], keys: Sequence[str] = ()
) -> list[TileRow]:
    """Show images with the colors of the teacher's features and of those of one student per variant.

    Args:
        pictures: By variant, the tensors written by evaluate, with features.
        classes: Names of the classes.
        keys: Keys of the records, which are below their images.
    """
    first = next(iter(pictures.values()))
    return picture_grid(
        [
            PictureRow(
                "image",
                list(first["frames"].permute(0, 2, 3, 1).numpy()),
                class_names(first["labels"].numpy(), classes),
                notes=keys,
            ),
            PictureRow("teacher", list(first["teacher_features"].numpy())),
            *(PictureRow(name, list(each["features"].numpy())) for name, each in pictures.items()),
        ]
    )


def explained_rows(
    title: str,
    frames: NDArray[np.uint8],
    arrays: Mapping[str, NDArray[Any]],
    labels: NDArray[Any],
    classes: Sequence[str],
) -> list[PictureRow]:
    """Build the rows of a network's maps, for a B-cos network its contributions and the colors of its weights.

    Args:
        title: Title of the rows.
        frames: u8 [n, H, W, 3].
        arrays: Maps, their classes, predictions and optionally colors, as returned by explained_pictures.
        labels: Labels of the records, which mark wrong predictions; in the form of the predictions.
        classes: Names of the classes.
    """
    predictions = arrays["predictions"]
    captions = class_names(predictions, classes)
    meant = zip(
        class_names(arrays["classes"], classes), class_names(labels, classes), captions, strict=True
    )
    notes = [
        "" if explained in (label or says, "") else f"map of {explained}"
        for explained, label, says in meant
    ]
    wrong = ((predictions != labels) & (labels >= 0)).reshape(len(labels), -1).any(axis=1).tolist()
    if "colors" not in arrays:
        return [PictureRow(title, overlays(frames, arrays["maps"]), captions, wrong, notes=notes)]
    return [
        PictureRow(title, contributions(arrays["maps"]), captions, wrong, notes=notes),
        PictureRow("colors", composite_on_white(arrays["colors"])),
    ]


def class_names(labels: NDArray[Any], classes: Sequence[str]) -> list[str]:
    """Return the names of the records' classes; a number if a teacher's classes are not those of the data.

    The name of an unknown class is empty.

    Args:
        labels: i64 [n], or f32 [n, K] for many labels per record, whose names are joined by line breaks.
        classes: Names of the classes of the data.
    """
    if labels.ndim == 2:
        return [
            "\n".join(classes[label] for label in np.flatnonzero(row > 0).tolist())
            for row in labels
        ]
    named = labels.max(initial=0) < len(classes)
    names = [classes[label] if named else str(label) for label in labels]
    return [name if label >= 0 else "" for name, label in zip(names, labels, strict=True)]


def shown_name(name: str) -> str:
    """Return a name as the page shows it: what no encoder takes is escaped, and a long one is cut in its middle."""
    if len(name) > MAX_CHARACTERS:
        cut = f" ... ({len(name):,} characters) ... "
        name = f"{name[: MAX_CHARACTERS // 2]}{cut}{name[-MAX_CHARACTERS // 4 :]}"
    return name.encode(errors="backslashreplace").decode()


def readable_classes(classes: Sequence[str]) -> list[str]:
    """Return the names of the classes on the page.

    Before a WordNet id, such as n01443537, is the name of its noun.
    """
    classes = [shown_name(name) for name in classes]
    if not any(re.fullmatch(r"n\d{8}", name) for name in classes):
        return classes
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")  # a table of timm's package
    known = set(classes) & set(info.label_names())  # type: ignore[no-untyped-call]
    nouns = {name: info.label_name_to_description(name, detailed=False) for name in known}
    return [
        f"{nouns[name].partition(',')[0]} ({name})" if name in nouns else name for name in classes
    ]


def draw_outline(picture: NDArray[Any], region: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Convert a picture to floats in [0, 1], and outline a region in green on its inner edge.

    Args:
        picture: [h, w, 3], u8 or in [0, 1].
        region: bool [H, W] of any size, which is scaled to the picture; an empty one is not drawn.
    """
    height, width = picture.shape[:2]
    shown = picture / 255 if picture.dtype == np.uint8 else picture.astype(np.float64)
    rows, columns = (
        np.arange(length) * full // length
        for length, full in zip((height, width), region.shape, strict=True)
    )
    inside = region[np.ix_(rows, columns)]
    core = inside.copy()
    for _ in range(max(1, round(min(height, width) / 80))):
        padded = np.pad(core, 1)
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.where((inside & ~core)[..., None], np.array([0.0, 0.65, 0.2]), shown)


def composite_on_white(colors: NDArray[np.uint8]) -> list[NDArray[np.float64]]:
    """Composite RGBA pictures u8 [n, h, w, 4] on white."""
    values = colors / 255
    alpha = values[..., 3:]
    return list(values[..., :3] * alpha + 1 - alpha)


# ---- contact sheet ---------------------------------------------------------------------------------


VIEW_SIZE = (112, 112)
"""Size (height, width) in pixels of a view's picture."""


def contact_sheet(
    store: Store,
    passes: Sequence[TeacherPass],
    augment: AugmentOptions,
    *,
    num_records: int,
    num_views: int,
) -> list[TileRow]:
    """Show records spread over the store in columns.

    Whole images are shown in their original aspect ratio, views as the student's input.

    Args:
        store: The store.
        passes: Passes whose maps are shown.
        augment: Options of the random views.
        num_records: Largest number of records.
        num_views: Number of random views of each record.
    """
    rows = _spread_rows(store, passes, num_records)
    dataset = StoreDataset(store, rows, covering_passes(store, rows, passes))
    batch = dataset.__getitems__(list(range(len(dataset))))
    schedule = schedule_views(dataset, augment, seed=0, sampled=True)
    names = class_names(batch.labels.numpy(), readable_classes(store.manifest.classes))
    sizes = dataset.sizes()
    keys = [shown_name(unquote(key)) for key in batch.keys]
    pictures = _rows(batch, "image", names, (sizes[:, 1] / sizes[:, 0]).tolist(), keys)
    pixels = PixelAugmentSchedule(replace(augment, mix=()), seed=0)  # maps are those of one record
    for view in range(num_views):
        drawn = schedule.views(epoch=view, positions=0, sizes=sizes)
        changes = pixels.draw(view, 0, len(sizes))
        if drawn is not None or changes is not None:
            moved = replace(in_views(batch, drawn, schedule.rendering), pixel_augment=changes)
            pictures += _rows(moved, f"view {view + 1}", [""] * len(names), [1.0] * len(names))
    return picture_grid(pictures)


def _spread_rows(store: Store, passes: Sequence[TeacherPass], count: int) -> NDArray[np.int64]:
    """Return up to `count` rows spread over the store, or over the shards that all passes have."""
    partial = [teacher for teacher in passes if teacher.is_partial]
    numbers = [
        number
        for number, entry in enumerate(store.shards if partial else ())
        if all(teacher.covers_shard(entry) for teacher in partial)
    ]
    total = sum(len(store.rows_of_shard(number)) for number in numbers) or store.index.num_rows
    rows = np.linspace(0, total - 1, min(count, total)).astype(np.int64)
    if numbers:
        rows = np.concatenate([np.asarray(store.rows_of_shard(number)) for number in numbers])[rows]
    return np.unique(rows)


def _rows(
    batch: Batch,
    title: str,
    captions: list[str],
    aspects: list[float],
    notes: Sequence[str] = (),
) -> list[PictureRow]:
    images = view_images(batch, VIEW_SIZE)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    shown = [PictureRow(title, list(pixels), captions, aspects=aspects, notes=notes)]
    for stored in batch.targets:
        if stored.maps is not None:
            maps = view_maps(batch, stored, VIEW_SIZE)
            colors = picture_of(maps, lambda: images)
            drawn = (
                overlays(pixels, maps[:, 0].sum(dim=1).numpy())
                if colors is None
                else composite_on_white(colors.numpy())
            )
            shown.append(PictureRow(stored.teacher.rsplit("-", 1)[0], drawn, aspects=aspects))
    return shown
