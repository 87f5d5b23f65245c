"""Findings of a preview: a family of rules, each of which looks for one kind of doubt.

    FINDINGS["watermarks"] = find_watermarks        # of a plug-in: a function of a Preview that yields (level, message)

A message says what was understood, with an example, and the way out. An error stops `precompute` unless data.accept
names the finding. Messages are kept beside stores, so they name no absolute path.
"""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from permafrost.config.data import FileDataConfig, ImageFileDataConfig
from permafrost.config.plugins import Family
from permafrost.core.errors import ConfigError, UserError, quote, shorten
from permafrost.sources import image_files, image_folder, image_table, webdataset
from permafrost.sources.classes import has_leading_zero, is_unknown, to_number
from permafrost.sources.preview import Finding, Level, Preview
from permafrost.sources.splits import TRAIN, known_split
from permafrost.sources.tally import REST

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger("permafrost.precompute")

Doubts: TypeAlias = Iterator[tuple[Level, str]]
Rule: TypeAlias = Callable[[Preview], Iterable[tuple[Level, str]]]

_OTHER_THINGS = frozenset(
    {
        *(
            "masks",
            "segmentations",
            "segmentation",
            "annotations",
            "annotation",
            "groundtruth",
            "gt",
            "labels",
        ),
        *(
            "thumbnails",
            "thumbs",
            "trimaps",
            "bboxes",
            "boundingboxes",
            "overlays",
            "heatmaps",
            "contours",
            "edges",
        ),
        *("labelimages", "maskimages", "imagemasks", "segmasks", "segmentationmasks", "metadata"),
    }
)
"""Folders of something else than the images of a class, in lower case without separators."""
_OTHER_THINGS_INSIDE = _OTHER_THINGS | {
    *(
        "mask",
        "label",
        "thumbnail",
        "thumb",
        "seg",
        "trimap",
        "bbox",
        "overlay",
        "heatmap",
        "contour",
        "depth",
    ),
    *("depths", "depthmaps", "previews", "preview", "disparity", "normals", "saliency", "edge"),
}
_UNKNOWN_CLASSES = frozenset(
    {
        *(
            "?",
            "??",
            "-",
            "--",
            "none",
            "unknown",
            "undefined",
            "missing",
            "unlabeled",
            "unlabelled",
            "n.a.",
            "na",
        ),
        *("not available", "tbd", "todo", "no label", "nolabel", "unspecified", "void"),
    }
)
_MANY_PICTURES = 0.1
"""Share of the pictures that are left out from which that is an error."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_FULL_RANGE = 65_535
_DAMAGED = "damaged_files"
"""Finding of files that cannot be packed, whatever the user means."""


def add_findings(preview: Preview) -> Preview:
    """Return a preview with the findings of all rules, errors first.

    Raises:
        ConfigError: data.accept names no finding.
    """
    accepted = preview.data.accept if isinstance(preview.data, FileDataConfig) else ()
    for name in accepted:
        if name not in FINDINGS:
            close = difflib.get_close_matches(name, FINDINGS, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(
                f"data.accept: there is no finding {quote(name)}{hint}; findings are: {', '.join(FINDINGS)}"
            )
    findings = [
        Finding(
            name=name,
            level="warning" if level == "error" and name in accepted else level,
            message=message,
        )
        for name, rule in FINDINGS.items()
        for level, message in rule(preview)
    ]
    levels = ("error", "warning", "note")
    findings.sort(key=lambda finding: levels.index(finding.level))
    return replace(preview, findings=tuple(findings))


class DataError(UserError):
    """Data of which a finding says that they were probably misunderstood."""


def check_findings(preview: Preview) -> None:
    """Log warnings and notes, one line each.

    Raises:
        DataError: There are findings that are errors; it has a line for each.
    """
    for finding in preview.findings:
        if finding.level == "warning":
            logger.warning("warning: %s (%s)", finding.message, finding.name)
        elif finding.level == "note":
            logger.info("%s (%s)", finding.message, finding.name)
    errors = preview.with_level("error")
    if not errors:
        return
    lines = [f"{finding.message} ({finding.name})" for finding in errors]
    lines[-1] += f". Nothing was packed{accept_hint(preview)}"
    error = DataError(" ".join(lines))
    error.lines = lines
    raise error


def accept_hint(preview: Preview) -> str:
    """Return what to add to a message so that the user can say that errors are meant; empty if that would not help."""
    names = list(dict.fromkeys(finding.name for finding in preview.with_level("error")))
    names = [name for name in names if name in FINDINGS and name != _DAMAGED]
    return f"; if the data are as you mean them: data.accept=[{','.join(names)}]" if names else ""


# ---- folders ---------------------------------------------------------------------------------------


def _nested_folders(
    preview: Preview,
) -> Iterator[tuple[str, Mapping[str, tuple[int, str]], int, int]]:
    """Yield each folder of class folders, with the folders in them, their number, and that of those without images."""
    for folder, (classes, _) in preview.tally[image_folder.CLASS_FOLDERS].items():
        nested = preview.tally[f"{image_folder.NESTED_FOLDERS}:{folder}"]
        only, _ = preview.tally[image_folder.FOLDERS_ONLY].get(folder, (0, ""))
        yield folder, nested, classes, only


def _find_repeating_folders(preview: Preview) -> Doubts:
    for folder, nested, classes, only in _nested_folders(preview):
        repeating = {name for name, (count, _) in nested.items() if count > 1 and name != REST}
        covered = sum(nested[name][0] for name in repeating)
        if classes < 2 or only < classes or covered < 0.8 * sum(c for c, _ in nested.values()):
            continue
        outer = sorted({path.split("/")[-2] for _, path in nested.values()})
        splits = "{" + ", ".join(f"{name}: ..." for name in outer[:3]) + "}"
        yield (
            "error",
            f"the class folders{_in_folder(folder)}, such as {shorten(outer, 3)}, contain no images but folders "
            f"that repeat in them: {shorten(sorted(repeating), 5)}. If they are splits: 'data.splits={splits}'. "
            "If the folders inside are views or masks of the same images, list them in a table (data=image_table)",
        )


def _find_folders_too_deep(preview: Preview) -> Doubts:
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


def _find_nested_folders(preview: Preview) -> Doubts:
    for folder, nested, classes, only in _nested_folders(preview):
        is_repeating = any(True for _ in _find_repeating_folders(preview))
        if classes > 1 and only == classes and len(nested) > classes and not is_repeating:
            example = next(iter(nested.values()))[1]
            yield (
                "warning",
                f"all images{_in_folder(folder)} are in folders inside of the class folders, such as {quote(example)}. "
                f"The {classes} outer folders are taken as classes; if the {len(nested)} inner ones are, name the "
                "outer ones as parts of a split: 'data.splits={<outer folder>: train, ...}'",
            )


def _find_other_things(preview: Preview) -> Doubts:
    inside = {
        path: count
        for topic in preview.tally.topics
        if topic.startswith(f"{image_folder.NESTED_FOLDERS}:")
        for name, (count, path) in preview.tally[topic].items()
        if _plain(name) in _OTHER_THINGS_INSIDE
    }
    if inside:
        yield (
            "error",
            f"folders inside of class folders ({sum(inside.values()):,}, such as {quote(next(iter(inside)))}) have "
            "names of something else than images of the class, and their files became records; move them away, or "
            "list images and masks in a table (data=image_table data.mask=...)",
        )
    beside = [name for name in preview.classes if _plain(name) in _OTHER_THINGS]
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


def _find_same_names(preview: Preview) -> Doubts:
    same = preview.tally[image_files.SAME_STEMS]
    if same:
        _, example = next(iter(same.values()))
        yield (
            "warning",
            f"images ({preview.tally.total(image_files.SAME_STEMS):,}, such as {example}) have the name of another one "
            "with another suffix; if they are masks or copies, move them away",
        )


def _find_files_left_out(preview: Preview) -> Doubts:
    for topic in (image_files.LEFT_OUT, image_files.HIDDEN, image_files.LEFTOVERS):
        if preview.tally[topic]:
            yield "note", f"{topic}: {_with_examples(preview.tally[topic])}"


def _find_pictures_left_out(preview: Preview) -> Doubts:
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
        f"pictures of kinds that are not read are left out, {100 * share:.1f} % of all: {_with_examples(pictures)}; "
        f"convert or rename them{decoder}",
    )


def _find_damaged_files(preview: Preview) -> Doubts:
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
        f"{quote(name, 200)[1:-1]} {reason}" for name, reason in sorted(damaged.items())[:50]
    )
    more = f"; and {count - 50:,} more" if count > 50 else ""
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


def _find_split_spellings(preview: Preview) -> Doubts:
    spelled = {
        **preview.tally[image_folder.SPELLED_SPLITS],
        **preview.tally[webdataset.SPELLED_TARS],
    }
    if spelled:
        named = ", ".join(
            f"{name} is split {split}" for name, (_, split) in list(spelled.items())[:5]
        )
        yield "note", f"{named}; other splits: data.splits (folders) or data.split (tars)"


def _find_empty_classes(preview: Preview) -> Doubts:
    empty = preview.tally[image_folder.EMPTY_FOLDERS]
    if empty:
        yield (
            "warning",
            "class folders without images are left out "
            f"({preview.tally.total(image_folder.EMPTY_FOLDERS):,}): {shorten(sorted(empty), 5)}; "
            "data.classes=<file> would keep their classes",
        )
    names = [name for label, name in enumerate(preview.classes) if not _has_records(preview, label)]
    if names and preview.counts.labeled and not _numbers_are_labels(preview):
        yield (
            "warning",
            f"classes without records ({len(names):,} of {len(preview.classes):,}): {shorten(names, 10)}; a network "
            "has an output for each of them",
        )
    if len(preview.classes) == 1:
        yield "warning", f"all labels are of one class, {quote(preview.classes[0])}"


def _has_records(preview: Preview, label: int) -> bool:
    return any((split, label) in preview.counts.labeled for split in preview.counts.records)


# ---- classes ---------------------------------------------------------------------------------------


def _find_numbered_folders(preview: Preview) -> Doubts:
    if preview.source != "image_folder" or getattr(preview.data, "classes", None) is not None:
        return
    names = preview.classes
    if not names or any(to_number(name) is None for name in names):
        return
    odd = [name for name in names if str(to_number(name)) != name and not has_leading_zero(name)]
    if odd:
        yield (
            "error",
            f"all class folders are numbers, but {shorten(odd, 3)} are written in a way that a table would read as "
            "another name; rename them, or list them in data.classes",
        )
    elif list(names) != sorted(names):
        by_text = sorted(names)
        place = next(i for i, name in enumerate(names) if by_text[i] != name)
        yield (
            "warning",
            f"class folders are whole numbers, in the order of their values (label {place} is {names[place]!r}); "
            f"torchvision's ImageFolder sorts them as text (label {place} would be {by_text[place]!r}): for a teacher "
            "that was trained with it, list the folders in that order in data.classes=<file>",
        )


def _find_other_spellings(preview: Preview) -> Doubts:
    groups = defaultdict(list)
    for label, name in enumerate(preview.classes):
        groups[_spelling(name)].append(label)
    twins = [labels for labels in groups.values() if len(labels) > 1]
    if not twins:
        return
    apart = [labels for labels in twins if _are_in_other_splits(preview, labels)]
    named = [
        " and ".join(quote(preview.classes[label]) for label in labels)
        for labels in (apart or twins)[:5]
    ]
    where = ", which no split has together," if apart else ""
    yield (
        "error" if apart else "warning",
        f"classes{where} are spelled in several ways ({len(apart or twins):,}): {'; '.join(named)}; use one spelling",
    )


def _spelling(name: str) -> str:
    """Return a name without what differs by accident: case, separators, accents' form, marks of copies."""
    text = unicodedata.normalize("NFKC", name).casefold()
    text = re.sub(r"[\s_-]*(\(\d+\)|copy|kopie)$|^copy of ", "", text)
    return re.sub(r"[\s_.-]+", " ", text).strip() or name


def _are_in_other_splits(preview: Preview, labels: list[int]) -> bool:
    splits = [
        {s for s in preview.counts.records if (s, label) in preview.counts.labeled}
        for label in labels
    ]
    return all(splits) and not set.intersection(*splits)


def _find_classes_of_one_split(preview: Preview) -> Doubts:
    splits = [split for split in preview.counts.records if preview.labels_of(split)]
    if TRAIN not in splits:
        return
    trained = preview.labels_of(TRAIN)
    for split in sorted(set(splits) - {TRAIN}):
        labels = preview.labels_of(split)
        new, lacking = sorted(labels - trained), sorted(trained - labels)
        if not labels & trained:
            yield (
                "error",
                f"split {split} and split {TRAIN} have no class in common: {_names(preview, labels)} and "
                f"{_names(preview, trained)}; their classes are named in different ways, or folders were misunderstood",
            )
        elif new:
            yield (
                "warning",
                f"split {TRAIN} lacks classes of split {split} ({len(new):,}): {_names(preview, new)}",
            )
        if labels & trained and lacking:
            yield (
                "warning",
                f"split {split} lacks classes of split {TRAIN} ({len(lacking):,}): {_names(preview, lacking)}",
            )


def _names(preview: Preview, labels: Iterable[int]) -> str:
    return shorten([preview.classes[label] for label in sorted(labels)], 5)


def _find_unknown_classes(preview: Preview) -> Doubts:
    listed = getattr(preview.data, "classes", None) is not None
    words = [name for name in preview.classes if is_unknown(name.strip()) or name.strip() == "-1"]
    if words and not listed:
        yield (
            "error",
            f"the class folders {shorten(words, 5)} bear words that mean an unknown label, as programs write it; "
            "rename them, move them away, or list the classes in data.classes",
        )
    doubtful = [
        name
        for name in preview.classes
        if name.strip().lower() in _UNKNOWN_CLASSES and name not in words
    ]
    if doubtful and not listed:
        yield (
            "warning",
            f"the classes {shorten(doubtful, 5)} may mean that a label is unknown; they are classes here",
        )


# ---- labels ----------------------------------------------------------------------------------------


def _numbers_are_labels(preview: Preview) -> bool:
    """Return whether the classes are the numbers up to the largest label, because nothing names them."""
    tally = preview.tally
    return bool(tally[image_table.NUMBERED] or tally[webdataset.NUMBERED_TARS])


def _find_label_gaps(preview: Preview) -> Doubts:
    if not _numbers_are_labels(preview):
        return
    gaps = [label for label in range(len(preview.classes)) if not _has_records(preview, label)]
    if not gaps:
        return
    first = min((label for _, label in preview.counts.labeled), default=0)
    begins = f", as they begin at {first}" if gaps == list(range(first)) else ""
    yield (
        "error",
        f"labels are numbers up to {len(preview.classes) - 1}, but some have no records ({len(gaps):,}{begins}): "
        f"{shorten([str(gap) for gap in gaps], 5)}. A network would have an output for each. Labels count from 0; list "
        "the class names in a file and set data.classes to it",
    )


def _find_missing_labels(preview: Preview) -> Doubts:
    unlabeled = preview.counts.unlabeled.total()
    if not unlabeled or not preview.num_records:
        return
    hints = []
    if preview.tally[webdataset.UNLABELED_MEMBERS]:
        hints.append(
            f"their other members are {_with_examples(preview.tally[webdataset.UNLABELED_MEMBERS])}"
        )
    if preview.tally[webdataset.JSON_KEYS]:
        keys = [key for key in preview.tally[webdataset.JSON_KEYS] if key != REST]
        hints.append(f"keys of their .json are {shorten(keys, 10)} (data.label_key chooses one)")
    there = f"; {'; '.join(hints)}" if hints else ""
    if preview.source == "webdataset":
        there += ". Labels are read from .cls, and from data.label_key in .json"
    if unlabeled < preview.num_records:
        counts = ", ".join(
            f"{split} {count:,}" for split, count in sorted(preview.counts.unlabeled.items())
        )
        yield (
            "warning",
            f"records without a label: {unlabeled:,} of {preview.num_records:,} ({counts}){there}",
        )
    elif preview.classes or hints or _expects_labels(preview):
        level: Level = "error" if preview.classes else "warning"
        named = f", although {len(preview.classes):,} classes are named" if preview.classes else ""
        yield level, f"no record has a label ({unlabeled:,} records){named}{there}"


def _expects_labels(preview: Preview) -> bool:
    """Return whether the options name a place of labels, or the source reads them by itself."""
    options = (getattr(preview.data, name, None) for name in ("label", "labels", "label_key"))
    return any(option is not None for option in options)


def _find_joined_labels(preview: Preview) -> Doubts:
    several = getattr(preview.data, "labels", None) is not None
    for separator, (count, example) in preview.tally[image_table.JOINED].items():
        if not several:
            column = getattr(preview.data, "label", "")
            yield (
                "error",
                f"cells of column {column} ({count:,} different ones, such as {quote(example)}) look like several "
                f"labels in one cell; read them as such with data.label=null data.labels={column}",
            )
        elif separator != " ":
            yield (
                "error",
                f"cells of labels ({count:,} different ones, such as {quote(example)}) contain {separator!r}, but "
                f"what it separates hardly occurs in other cells: set 'data.label_separator={separator}', or "
                "data.label_separator='' if cells are whole names",
            )
        else:
            yield (
                "warning",
                f"cells of labels ({count:,} different ones, such as {quote(example)}) contain blanks and are taken as "
                "whole names; data.label_separator=' ' separates them",
            )


def _find_separators(preview: Preview) -> Doubts:
    for separator, (count, example) in preview.tally[image_table.SEPARATED].items():
        yield (
            "note",
            f"cells of labels are separated at {separator!r} ({count:,} different ones, such as {quote(example)}); "
            "data.label_separator sets another one, and '' keeps cells whole",
        )


def _find_unknown_cells(preview: Preview) -> Doubts:
    words = {**preview.tally[image_table.UNKNOWN_CELLS], **preview.tally[webdataset.UNKNOWN_LABELS]}
    words = {
        word: counted
        for word, counted in words.items()
        if not re.fullmatch("[-+]?nan", word, re.IGNORECASE)
    }
    if words:
        yield (
            "warning",
            f"labels taken as unknown: {_with_examples(words)}; a word that data.classes lists is a class",
        )


def _find_fractions(preview: Preview) -> Doubts:
    names = preview.classes
    if not names or not all(map(_NUMBER.fullmatch, names)):
        return
    fractions = [name for name in names if float(name) % 1]
    if fractions:
        yield (
            "error",
            f"all labels are numbers, and {len(fractions):,} of them have fractions ({shorten(fractions, 3)}), so each "
            "value is a class of its own; if they are measurements, set data.label=null, or name another column",
        )


def _find_json_beside_cls(preview: Preview) -> Doubts:
    passed = preview.tally[webdataset.PASSED_OVER_JSON]
    if passed:
        yield (
            "warning",
            "a .json beside a .cls was passed over, because it has no boxes, labels and group of the form that is "
            f"read: {_with_examples(passed)}",
        )


# ---- pixels ----------------------------------------------------------------------------------------


def _find_dark_images(preview: Preview) -> Doubts:
    sample = preview.sample
    if (
        sample is None
        or not isinstance(preview.data, ImageFileDataConfig)
        or preview.data.bit_range
    ):
        return
    number, high_only = sample.kinds["16 bits"], sample.kinds["high bytes only"]
    if sample.largest_value is not None and sample.largest_value < _FULL_RANGE / 2:
        bits = max(8, sample.largest_value.bit_length())
        share = (sample.largest_value + 1) / (_FULL_RANGE + 1)
        yield (
            "error" if sample.largest_value <= _FULL_RANGE / 4 else "warning",
            f"the largest value of images of 16 bits ({number:,}) is {sample.largest_value:,}, {share:.2g} of the "
            f"range, so they would be dark; if white is a smaller value, set it: data.bit_range=[0,{2**bits - 1}]",
        )
    elif number:
        high = f" (of {high_only:,} the high bytes only)" if high_only else ""
        yield (
            "note",
            f"images of 16 bits ({number:,}) are scaled to 8{high}; data.bit_range sets black and white",
        )


def _find_turned_regions(preview: Preview) -> Doubts:
    sample = preview.sample
    if (
        sample is None
        or not sample.kinds["turned with regions"]
        or not isinstance(preview.data, ImageFileDataConfig)
    ):
        return
    if preview.data.boxes_of == "upright":
        yield (
            "warning",
            f"images with boxes or masks ({sample.kinds['turned with regions']:,}) are turned by their EXIF "
            "orientation; their regions are taken as those of the upright image. If they count the stored pixels, as "
            "COCO's and OpenCV's without EXIF do: data.boxes_of=stored",
        )


def _with_examples(items: Mapping[str, tuple[int, str]]) -> str:
    most = sorted(items.items(), key=lambda item: (-item[1][0], item[0]))[:8]
    more = ", ..." if len(items) > len(most) else ""
    return (
        ", ".join(
            f"{count:,} {quote(item)[1:-1]} ({quote(example)[1:-1]})"
            for item, (count, example) in most
        )
        + more
    )


def _in_folder(folder: str) -> str:
    return f" in {folder}" if folder else ""


FINDINGS: Family[Rule] = Family(
    {
        "class_folders_repeat": _find_repeating_folders,
        "folders_too_deep": _find_folders_too_deep,
        "nested_class_folders": _find_nested_folders,
        "other_things": _find_other_things,
        "same_names": _find_same_names,
        "files_left_out": _find_files_left_out,
        "pictures_left_out": _find_pictures_left_out,
        _DAMAGED: _find_damaged_files,
        "split_spellings": _find_split_spellings,
        "empty_classes": _find_empty_classes,
        "numbered_folders": _find_numbered_folders,
        "class_spellings": _find_other_spellings,
        "classes_of_one_split": _find_classes_of_one_split,
        "unknown_classes": _find_unknown_classes,
        "label_gaps": _find_label_gaps,
        "missing_labels": _find_missing_labels,
        "joined_labels": _find_joined_labels,
        "label_separator": _find_separators,
        "unknown_cells": _find_unknown_cells,
        "fractions": _find_fractions,
        "json_beside_cls": _find_json_beside_cls,
        "dark_images": _find_dark_images,
        "turned_regions": _find_turned_regions,
    }
)
"""Rules by the name of their findings."""
