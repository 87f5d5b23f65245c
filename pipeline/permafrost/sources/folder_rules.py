"""Rules of findings about folders and files: what stands where a class or an image is expected."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from permafrost.config.data import FileDataConfig
from permafrost.core.errors import quote, shorten
from permafrost.sources import image_files, image_folder
from permafrost.sources.splits import SPELLED_SPLITS, known_split
from permafrost.sources.tally import REST, describe_items

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from permafrost.sources.data_preview import Doubt, Preview

_OTHER_THINGS = re.compile(
    "masks|segmentations?|annotations?|groundtruth|gt|labels|thumbnails|thumbs|trimaps|bboxes|boundingboxes|overlays|"
    "heatmaps|contours|edges|(label|mask)images|(image|seg|segmentation)masks|metadata"
)
"""Names of folders of something else than the images of a class, in lower case without separators."""
_OTHER_THINGS_INSIDE = re.compile(
    f"{_OTHER_THINGS.pattern}|mask|label|thumbnail|thumb|seg|trimap|bbox|overlay|heatmap|contour|depths?|depthmaps|"
    "previews?|disparity|normals|saliency|edge"
)
"""Such names inside of a class folder, where none of them is a class."""
_MANY_PICTURES = 0.1
"""Share of the pictures that are left out from which that is an error."""
_REPEATING = 0.8
"""Share of the folders inside of class folders that repeat from which their structure is doubtful."""
_NAMED_FILES = 50
"""Largest number of damaged files that are named."""


def _nested_folders(
    preview: Preview,
) -> Iterator[tuple[str, Mapping[str, tuple[int, str]], int, int]]:
    """Yield each folder of class folders, with the folders in them, their number, and that of those without images."""
    for folder, (classes, _) in preview.tally[image_folder.CLASS_FOLDERS].items():
        nested = preview.tally[f"{image_folder.NESTED_FOLDERS}:{folder}"]
        only, _ = preview.tally[image_folder.FOLDERS_ONLY].get(folder, (0, ""))
        yield folder, nested, classes, only


def find_repeating_folders(preview: Preview) -> Iterator[Doubt]:
    for folder, nested, classes, only in _nested_folders(preview):
        repeating = {name for name, (count, _) in nested.items() if count > 1 and name != REST}
        covered = sum(nested[name][0] for name in repeating)
        if (
            classes < 2
            or only < classes
            or covered < _REPEATING * sum(c for c, _ in nested.values())
        ):
            continue
        outer = sorted({path.split("/")[-2] for _, path in nested.values()})
        splits = "{" + ", ".join(f"{name}: ..." for name in outer[:3]) + "}"
        yield (
            "error",
            f"the class folders{_in_folder(folder)}, such as {shorten(outer, 3)}, contain no images but folders "
            f"that repeat in them: {shorten(sorted(repeating), 5)}. If they are splits: 'data.splits={splits}'. "
            "If the folders inside are views or masks of the same images, list them in a table (data=image_table)",
        )


def find_folders_too_deep(preview: Preview) -> Iterator[Doubt]:
    for folder, nested, classes, only in _nested_folders(preview):
        if classes == 1 and only == 1:
            ((_, example), *_) = nested.values()
            wrapper = example.rpartition("/")[0]
            splits = {
                f"{other}/{wrapper.rpartition('/')[2]}": known_split(other) or other
                for other in preview.tally[image_folder.CLASS_FOLDERS]
            }
            yield (
                "error",
                f"{quote(wrapper)} is the only class folder{_in_folder(folder)}, and its images are in folders "
                f"inside of it ({shorten(sorted(nested), 3)}). If those are the classes or splits, they are one level "
                f"too deep: {_path_option(folder, wrapper, splits)}",
            )


def _path_option(folder: str, wrapper: str, splits: Mapping[str, str]) -> str:
    if not folder:
        return f"data.path=<data.path>/{wrapper}"
    named = ", ".join(f"{path}: {split}" for path, split in splits.items())
    return f"'data.splits={{{named}}}'"


def find_nested_folders(preview: Preview) -> Iterator[Doubt]:
    for folder, nested, classes, only in _nested_folders(preview):
        is_repeating = any(True for _ in find_repeating_folders(preview))
        if classes > 1 and only == classes and len(nested) > classes and not is_repeating:
            example = next(iter(nested.values()))[1]
            yield (
                "warning",
                f"all images{_in_folder(folder)} are in folders inside of the class folders, such as {quote(example)}. "
                f"The {classes} outer folders are taken as classes; if the {len(nested)} inner ones are, name the "
                "outer ones as parts of a split: 'data.splits={<outer folder>: train, ...}'",
            )


def find_other_things(preview: Preview) -> Iterator[Doubt]:
    inside = {
        path: count
        for topic in preview.tally.topics
        if topic.startswith(f"{image_folder.NESTED_FOLDERS}:")
        for name, (count, path) in preview.tally[topic].items()
        if _OTHER_THINGS_INSIDE.fullmatch(_plain(name))
    }
    if inside:
        yield (
            "error",
            f"folders inside of class folders ({sum(inside.values()):,}, such as {quote(next(iter(inside)))}) have "
            "names of something else than images of the class, and their files became records; move them away, or "
            "list images and masks in a table (data=image_table data.mask=...)",
        )
    beside = [name for name in preview.classes if _OTHER_THINGS.fullmatch(_plain(name))]
    if beside and len(preview.classes) > len(beside) and preview.tally[image_folder.CLASS_FOLDERS]:
        yield (
            "error",
            f"the folders {shorten(beside, 5)} stand beside class folders and are classes by that; move them away, or "
            "choose classes with data.only_classes",
        )
    companions = preview.tally[image_files.COMPANIONS]
    if companions:
        word, (_, example) = next(iter(companions.items()))
        yield (
            "error",
            f"images ({preview.tally.total(image_files.COMPANIONS):,}, such as {example}) are named after another "
            f"one in their folder with {quote(word)} added: masks, labels or thumbnails became records; move them "
            "away, or list images and masks in a table (data=image_table data.mask=...)",
        )


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


def find_same_names(preview: Preview) -> Iterator[Doubt]:
    same = preview.tally[image_files.SAME_STEMS]
    if same:
        _, example = next(iter(same.values()))
        yield (
            "warning",
            f"images ({preview.tally.total(image_files.SAME_STEMS):,}, such as {example}) have the name of another one "
            "with another suffix; if they are masks or copies, move them away",
        )


def find_files_left_out(preview: Preview) -> Iterator[Doubt]:
    for topic in (image_files.LEFT_OUT, image_files.HIDDEN, image_files.LEFTOVERS):
        if preview.tally[topic]:
            yield "note", f"{topic}: {describe_items(preview.tally[topic])}"


def find_pictures_left_out(preview: Preview) -> Iterator[Doubt]:
    pictures = preview.tally[image_files.OTHER_PICTURES]
    if not pictures:
        return
    count = preview.tally.total(image_files.OTHER_PICTURES)
    share = count / (count + preview.num_records)
    needs_decoder = any(item.lstrip(".") in image_files.HEIF_SUFFIXES for item in pictures)
    decoder = (
        "; HEIC is read once its decoder is installed: pip install pillow-heif"
        if needs_decoder
        else ""
    )
    yield (
        "error" if share >= _MANY_PICTURES else "warning",
        f"pictures of kinds that are not read are left out, {100 * share:.1f} % of all: {describe_items(pictures)}; "
        f"convert or rename them{decoder}",
    )


def find_damaged_files(preview: Preview) -> Iterator[Doubt]:
    damaged = dict(preview.sample.damaged) if preview.sample is not None else {}
    count = preview.sample.num_damaged if preview.sample is not None else 0
    for topic, reason in (
        (image_files.EMPTY_FILES, "has no bytes"),
        (image_files.BROKEN_LINKS, "is a link to a missing file"),
    ):
        new = {name: reason for name in preview.tally[topic] if name not in damaged}
        count += preview.tally.total(topic) - (len(preview.tally[topic]) - len(new))
        damaged |= new
    if not count:
        return
    named = "; ".join(
        f"{quote(name, 200)[1:-1]} {reason}"
        for name, reason in sorted(damaged.items())[:_NAMED_FILES]
    )
    more = f"; and {count - _NAMED_FILES:,} more" if count > _NAMED_FILES else ""
    skips = isinstance(preview.data, FileDataConfig) and preview.data.on_error == "skip"
    yield (
        "warning" if skips else "error",
        f"files that cannot be read ({count:,}): {named}{more}. "
        + (
            "They are left out"
            if skips
            else "Repair or remove them, or leave them out with data.on_error=skip"
        ),
    )


def find_split_spellings(preview: Preview) -> Iterator[Doubt]:
    spellings = preview.tally[SPELLED_SPLITS]
    if spellings:
        text = ", ".join(
            f"{name} is split {split}" for name, (_, split) in list(spellings.items())[:5]
        )
        yield (
            "note",
            f"{text}; other splits: data.splits (folders), data.split_names (tables) or data.split (tars)",
        )


def _in_folder(folder: str) -> str:
    return f" in {folder}" if folder else ""
