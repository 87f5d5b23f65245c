"""Rules of findings about folders and files: what stands where a class or an image is expected."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from permafrost.config.data import FileDataConfig
from permafrost.core.errors import quote, shorten
from permafrost.sources.data_preview import Preview, Remark
from permafrost.sources.image_files import (
    BROKEN_LINKS,
    COMPANIONS,
    EMPTY_FILES,
    HEIF_SUFFIXES,
    HIDDEN_FILES,
    LEFT_OUT,
    LEFTOVERS,
    OTHER_PICTURES,
    SAME_STEMS,
)
from permafrost.sources.image_folder import CLASS_FOLDERS, FOLDERS_ONLY, NESTED_FOLDERS
from permafrost.sources.several_files import ABSENT_PARTS, OTHER_FILES, OTHER_FOLDERS
from permafrost.sources.splits import SPELLED_SPLITS, known_split
from permafrost.sources.tally import REST
from permafrost.store.facts import Level
from permafrost_findings.thresholds import MIN_LEFT_OUT, MIN_LEFT_OUT_SHARE, MIN_REPEATING_SHARE
from permafrost_sources.tar_members import LINK_MEMBER, PASSED_OVER_MEMBERS, UNNAMED_MEMBER
from permafrost_sources.webdataset import OTHER_KEYS, OTHER_MEMBERS

_OTHER_THINGS = re.compile(
    "(image|seg)?masks|.*segmentation.*|.*annotations?|annotations?.*|.*groundtruth.*|gt|labels|thumbnails|thumbs|"
    "trimaps|bboxes|boundingboxes|overlays|heatmaps|contours|edges|(label|mask)images|metadata"
)
"""Names of folders of something else than the images of a class, in lower case without separators."""
_OTHER_THINGS_INSIDE = re.compile(
    f"{_OTHER_THINGS.pattern}|mask|label|thumbnail|thumb|seg|trimap|bbox|overlay|heatmap|contour|depths?|depthmaps|"
    "previews?|disparity|normals|saliency|edge|old|backups?|rejected|deleted|unused|trash|discarded|duplicates?"
)
"""Such names inside of a class folder, where none of them is a class."""
_IMAGES = re.compile("images?|imgs?|jpegimages|pictures?|photos?|rgb|frames")
"""Names of image folders, next to which other folders are masks."""
_SPLIT_OR_IMAGES = re.compile(
    rf"({_IMAGES.pattern}|(train|training|val|valid|validation|test|testing|unlabell?ed|all|dummy)(images?|set|data)?)"
    r"\d*"
)
_NAMED_SPLITS = 10
_NAMED_FILES = 50
"""Largest number of damaged files that are named."""


def _inner_folders(
    preview: Preview,
) -> Iterator[tuple[str, Mapping[str, tuple[int, str]], int, int]]:
    """Yield each folder of class folders, with the folders in them, their number, and that of those without images."""
    for folder, (classes, _) in preview.tally[CLASS_FOLDERS].items():
        inner = preview.tally[f"{NESTED_FOLDERS}:{folder}"]
        only, _ = preview.tally[FOLDERS_ONLY].get(folder, (0, ""))
        yield folder, inner, classes, only


def _repeating(inner: Mapping[str, tuple[int, str]], classes: int, only: int) -> list[str]:
    """Return the names of folders inside of class folders if most of them repeat and no class has images itself."""
    names = sorted(name for name, (count, _) in inner.items() if count > 1 and name != REST)
    repeats = sum(inner[name][0] for name in names)
    total = sum(count for count, _ in inner.values())
    return (
        names if classes > 1 and only == classes and repeats >= MIN_REPEATING_SHARE * total else []
    )


def find_repeating_folders(preview: Preview) -> Iterator[Remark]:
    """Find class folders that contain only folders of the same names."""
    for folder, inner, classes, only in _inner_folders(preview):
        names = _repeating(inner, classes, only)
        if not names or all(known_split(name) for name in names):
            continue
        remedy = ""
        if not folder:  # then the class folders are the top-level ones
            splits = ", ".join(f"{name}: ..." for name in preview.classes[:_NAMED_SPLITS])
            more = ", ..." if len(preview.classes) > _NAMED_SPLITS else ""
            remedy = (
                f" If they are splits or folds, name all of them: 'data.splits={{{splits}{more}}}'."
            )
        yield (
            "error",
            f"the {classes:,} class folders{_in_folder(folder)} contain no images but folders that repeat in them: "
            f"{shorten(names, 5)}.{remedy} If the folders inside are views or masks of the same images, list them "
            "in a table (data=image_table)",
        )


def find_splits_in_classes(preview: Preview) -> Iterator[Remark]:
    """Find folders named like splits inside of class folders."""
    for folder, inner, _, _ in _inner_folders(preview):
        names = sorted(name for name in inner if known_split(name) is not None)
        if names:
            yield (
                "error",
                f"class folders{_in_folder(folder)} contain folders named like splits ({shorten(names, 4)}, such as "
                f"{quote(inner[names[0]][1])}), whose images are all in one split here; move them to "
                "<path>/<split>/<class>",
            )


def find_folders_too_deep(preview: Preview) -> Iterator[Remark]:
    """Find a single folder around the class folders."""
    wrappers = {}
    for folder, inner, classes, only in _inner_folders(preview):
        is_wrapped = classes == 1 and only == 1 and not any(map(known_split, inner))
        wrappers[folder] = (
            next(iter(inner.values()))[1].rpartition("/")[0] if is_wrapped else folder
        )
    for folder, wrapper in wrappers.items():
        if wrapper == folder:
            continue
        names = sorted(preview.tally[f"{NESTED_FOLDERS}:{folder}"])
        pairs = ", ".join(f"{path}: {known_split(name) or name}" for name, path in wrappers.items())
        option = f"'data.splits={{{pairs}}}'" if folder else f"data.path=<data.path>/{wrapper}"
        yield (
            "error",
            f"{quote(wrapper)} is the only class folder{_in_folder(folder)}, and its images are in folders inside of "
            f"it ({shorten(names, 3)}). If those are the classes or splits, they are one level too deep: {option}",
        )


def find_single_folder(preview: Preview) -> Iterator[Remark]:
    """Find a single class folder that is named like a split or like images, as in sets with a list of labels."""
    if preview.source != "image_folder" or len(preview.classes) != 1:
        return
    (name,) = preview.classes
    if _SPLIT_OR_IMAGES.fullmatch(_plain(name)):
        yield (
            "error",
            f"{quote(name)} is the only class folder and is named like a split or a folder of all images, so that "
            "every label would be the same; list the images and their labels in a table (data=image_table)",
        )


def find_nested_folders(preview: Preview) -> Iterator[Remark]:
    """Find class folders whose images are all in folders of different names."""
    for folder, inner, classes, only in _inner_folders(preview):
        is_nested = classes > 1 and only == classes and len(inner) > classes
        if is_nested and not _repeating(inner, classes, only):
            example = next(iter(inner.values()))[1]
            yield (
                "error",
                f"all images{_in_folder(folder)} are in folders inside of the class folders, such as {quote(example)}. "
                f"The {classes} outer folders are taken as classes; if the {len(inner)} inner ones are, name the "
                "outer ones as parts of a split: 'data.splits={<outer folder>: train, ...}'",
            )


def find_other_things(preview: Preview) -> Iterator[Remark]:
    """Find masks, thumbnails and the like among classes and images."""
    inside = {
        path: count
        for topic in preview.tally.topics
        if topic.startswith(f"{NESTED_FOLDERS}:")
        for name, (count, path) in preview.tally[topic].items()
        if _OTHER_THINGS_INSIDE.fullmatch(_plain(name))
    }
    if inside:
        yield (
            "error",
            f"folders inside of class folders ({sum(inside.values()):,}, such as {quote(next(iter(inside)))}) are "
            "named like something other than images of the class, and their files became records; move them away, or "
            "list images and masks in a table (data=image_table data.mask=...)",
        )
    has_images = any(_IMAGES.fullmatch(_plain(name)) for name in preview.classes)
    pattern = _OTHER_THINGS_INSIDE if has_images else _OTHER_THINGS
    folders = [name for name in preview.classes if pattern.fullmatch(_plain(name))]
    if 0 < len(folders) < len(preview.classes) and preview.tally[CLASS_FOLDERS]:
        yield (
            "error",
            f"the folders {shorten(folders, 5)} are next to class folders and were therefore taken as classes; move "
            "them away, or choose classes with data.only_classes",
        )
    if companions := preview.tally[COMPANIONS]:
        word, (_, example) = next(iter(companions.items()))
        yield (
            "error",
            f"images ({preview.tally.total(COMPANIONS):,}, such as {example}) are named after another "
            f"one in their folder with {quote(word)} added: masks, labels or thumbnails became records; move them "
            "away, or list images and masks in a table (data=image_table data.mask=...)",
        )


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


def find_same_names(preview: Preview) -> Iterator[Remark]:
    """Find images that differ from another one in their suffix only."""
    if same := preview.tally[SAME_STEMS]:
        _, example = next(iter(same.values()))
        yield (
            "warning",
            f"images ({preview.tally.total(SAME_STEMS):,}, such as {example}) have the name of another one "
            "with another suffix; if they are masks or copies, move them away",
        )


def find_members_left_out(preview: Preview) -> Iterator[Remark]:
    """Find members of tars that belong to no sample."""
    members = preview.tally[PASSED_OVER_MEMBERS]
    if not members:
        return
    text = f"members of tars are left out: {describe_items(members)}"
    if LINK_MEMBER in members:
        yield (
            "error",
            f"{text}. Links have no bytes of their own, and webdataset skips them, too; write the tars again with "
            "tar --hard-dereference --dereference",
        )
    else:
        level: Level = "warning" if UNNAMED_MEMBER in members else "note"
        yield level, text


def find_files_left_out(preview: Preview) -> Iterator[Remark]:
    """Find files that are not images, are hidden, or were left by a program."""
    if folders := preview.tally[OTHER_FOLDERS]:
        first, (_, example) = next(iter(folders.items()))
        yield (
            "warning",
            "folders next to the files that are read have further ones, which are left out: "
            f"{describe_items(folders)}; "
            f"name all folders: 'data.path=<folder>/{{.,{first}}}/*.{example.rpartition('.')[2]}'",
        )
    if parts := preview.tally[ABSENT_PARTS]:
        yield (
            "warning",
            f"the files that are read are only a part of the data, as their names say: {next(iter(parts))} is absent"
            + (
                f", and so are {rest:,} others"
                if (rest := preview.tally.total(ABSENT_PARTS) - 1)
                else ""
            )
            + "; fetch the others, or name their folder in data.path",
        )
    topics = (OTHER_FILES, LEFT_OUT, HIDDEN_FILES, LEFTOVERS, OTHER_MEMBERS, OTHER_KEYS)
    yield from (
        ("note", f"{topic}: {describe_items(preview.tally[topic])}")
        for topic in topics
        if preview.tally[topic]
    )


def find_pictures_left_out(preview: Preview) -> Iterator[Remark]:
    """Find pictures of formats that are not read."""
    pictures = preview.tally[OTHER_PICTURES]
    if not pictures:
        return
    count = preview.tally.total(OTHER_PICTURES)
    share = count / (count + preview.num_records)
    needs_decoder = any(item.lstrip(".") in HEIF_SUFFIXES for item in pictures)
    decoder = (
        "; HEIC is read once its decoder is installed: pip install pillow-heif"
        if needs_decoder
        else ""
    )
    yield (
        "error" if share >= MIN_LEFT_OUT_SHARE and count >= MIN_LEFT_OUT else "warning",
        f"pictures and videos of kinds that are not read are left out, {100 * share:.1f} % of all: "
        f"{describe_items(pictures)}; convert or rename pictures, and take frames of videos{decoder}",
    )


def find_damaged_files(preview: Preview) -> Iterator[Remark]:
    """Find files that are empty, missing or cannot be decoded."""
    reasons = dict(preview.sample.notes["damaged"])
    count = preview.sample.counts["damaged"]
    for topic, reason in (
        (EMPTY_FILES, "has no bytes"),
        (BROKEN_LINKS, "is a link to a missing file"),
    ):
        new = [name for name in preview.tally[topic] if name not in reasons]
        count += preview.tally.total(topic) - (len(preview.tally[topic]) - len(new))
        reasons |= {name: reason for name in new if name != REST}
    if not count:
        return
    first = sorted(reasons.items())[:_NAMED_FILES]
    text = "; ".join(f"{quote(name, 200)[1:-1]} {reason}" for name, reason in first)
    more = f"; and {count - len(first):,} more" if count > len(first) else ""
    data = preview.data
    skips = isinstance(data, FileDataConfig) and data.on_error == "skip"
    links = preview.tally.total(BROKEN_LINKS)
    if skips and isinstance(data, FileDataConfig) and links > data.max_skipped:
        remedy = f"The links are more than data.max_skipped={data.max_skipped}: restore them"
        skips = False
    else:
        remedy = (
            "They are left out"
            if skips
            else "Repair or remove them, or leave them out with data.on_error=skip"
        )
    yield (
        "warning" if skips else "error",
        f"files that cannot be read ({count:,}): {text}{more}. {remedy}",
    )


def find_split_spellings(preview: Preview) -> Iterator[Remark]:
    """Find splits that were recognized by another spelling."""
    if spellings := preview.tally[SPELLED_SPLITS]:
        text = ", ".join(
            f"{name} is split {split}" for name, (_, split) in list(spellings.items())[:5]
        )
        yield (
            "note",
            f"{text}; other splits: data.splits (folders), data.split_names (tables) or data.split (tars)",
        )


def _in_folder(folder: str) -> str:
    return f" in {folder}" if folder else ""


def describe_items(items: Mapping[str, tuple[int, str]]) -> str:
    """Describe the most frequent items of a topic in one line, each with its count and its example."""
    most = sorted(items.items(), key=lambda item: (-item[1][0], item[0]))[:8]
    described = [
        f"{count:,} {quote(item)[1:-1]} ({quote(example)[1:-1]})" for item, (count, example) in most
    ]
    return ", ".join(described) + (", ..." if len(items) > len(most) else "")
