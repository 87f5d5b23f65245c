"""Rules of findings about pictures: what their pixels, boxes and masks are, and what else tells classes apart."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from statistics import median_low

import numpy as np
from numpy.typing import NDArray

from permafrost.config.data import ImageFileDataConfig
from permafrost.core.errors import printable, quote, shorten
from permafrost.core.records import NO_LABEL
from permafrost.sources.data_preview import Preview, Remark
from permafrost.sources.splits import TRAIN
from permafrost_findings.thresholds import (
    MAX_SHARE_OF_FEW,
    MAX_SIDE_RATIO,
    MIN_BRIGHTNESS_EFFECT,
    MIN_BRIGHTNESS_ERRORS,
    MIN_BRIGHTNESS_FILES,
    MIN_FEWER_BITS,
    MIN_FILES,
    MIN_SHARE_OF_MOST,
    MIN_TRAIT_FILES,
)

_FULL_RANGE = 65_535
"""Largest value of 16 bits."""
_NAMED = 3
_WORDS = {"format": "format", "color": "kind of color", "bits": "number of bits", "size": "size"}


# ---- is there a picture --------------------------------------------------------------------------


def find_blank_images(preview: Preview) -> Iterator[Remark]:
    """Find images whose pixels all have one value, such as drawings on transparency."""
    sample = preview.sample
    if not (blank := sample.counts["blank"]):
        return
    decoded = sample.counts["decoded"]
    share = blank / decoded
    if share < MAX_SHARE_OF_FEW and blank < MIN_TRAIT_FILES:
        return
    values = Counter(sample.notes["blank"].values()).most_common(1)[0][0]
    alpha = "; transparency is blended onto white" if values == "255" else ""
    yield (
        "error" if share >= MIN_SHARE_OF_MOST and decoded >= MIN_FILES else "warning",
        f"images have one value everywhere ({blank:,} of {decoded:,} that were decoded), mostly "
        f"{values}, such as {shorten(list(sample.notes['blank']), _NAMED)}, so there is no picture in them{alpha}",
    )


def find_dim_images(preview: Preview) -> Iterator[Remark]:
    """Find images of 8 bits that are nearly black, as label maps are."""
    dim, decoded = (preview.sample.counts[name] for name in ("dim", "decoded"))
    if dim >= max(MIN_TRAIT_FILES, MIN_SHARE_OF_MOST * decoded):
        yield (
            "warning",
            f"images of 8 bits are nearly black ({dim:,} of {decoded:,} that were decoded have no value "
            "above 31), as maps of class numbers are; if they are masks, list images and masks in a table "
            "(data=image_table data.mask=...), and if they are pictures, scale their values",
        )


def find_dropped_channels(preview: Preview) -> Iterator[Remark]:
    """Find files that are only partly read: the first channels, or the first picture."""
    sample = preview.sample
    if sample.kinds["further channels"]:
        yield (
            "warning",
            f"files have further channels besides their colors ({sample.kinds['further channels']:,}), of which the "
            "first three are read; write those that you mean as RGB",
        )
    translucent, decoded = sample.kinds["translucent"], sample.counts["decoded"]
    if translucent > MAX_SHARE_OF_FEW * decoded and (
        translucent >= min(MIN_TRAIT_FILES, decoded / 2)
    ):
        yield (
            "warning",
            f"the last channel of images ({translucent:,} of {decoded:,} that were decoded) is read as "
            "transparency, and the colors are blended onto white by it, but most of its values are neither 0 nor the "
            "largest; if it is near infrared, depth or the like, save the files without it",
        )
    if sample.kinds["several pictures"]:
        yield (
            "warning",
            f"files have several pictures ({sample.kinds['several pictures']:,}), as animations and stacks have, of "
            "which the first one is read",
        )


def find_dark_images(preview: Preview) -> Iterator[Remark]:
    """Find images of 16 bits that use a small part of their range."""
    sample = preview.sample
    if not isinstance(preview.data, ImageFileDataConfig):
        return
    if preview.data.bit_range:
        white = preview.data.bit_range[1]
        cut_off = sum(value > white for value in sample.largest_values)
        if cut_off:
            yield (
                "warning",
                f"images of 16 bits have values above data.bit_range={list(preview.data.bit_range)} ({cut_off:,} of "
                f"{len(sample.largest_values):,}, up to {max(sample.largest_values):,}), which become white",
            )
        return
    number = sample.kinds["16 bits"]
    largest = sample.typical_largest if sample.largest_values else _FULL_RANGE
    if largest < _FULL_RANGE / 2:
        bits, share = max(8, largest.bit_length()), (largest + 1) / (_FULL_RANGE + 1)
        above = [value for value in sample.largest_values if value >= 2**bits]
        brighter = (
            f"; {len(above):,} of them reach up to {max(above):,} and would be cut off at that white"
            if above
            else ""
        )
        is_sample = sample.files < preview.num_records
        sampled = (
            f" ({sample.files:,} files were read; preview.all=true reads all)" if is_sample else ""
        )
        yield (
            "error" if largest <= _FULL_RANGE / 4 else "warning",
            f"the values of images of 16 bits ({number:,}) reach {largest:,}, {share:.2g} of the range, so they "
            f"would be dark; if white is a smaller value, set it: data.bit_range=[0,{2**bits - 1}]{brighter}{sampled}",
        )
    elif number:
        yield (
            "note",
            f"images of 16 bits ({number:,}) are scaled to 8; data.bit_range sets black and white",
        )


def find_turned_regions(preview: Preview) -> Iterator[Remark]:
    """Find boxes and masks of images that EXIF turns."""
    turned = preview.sample.kinds["turned with regions"]
    if turned and getattr(preview.data, "boxes_of", "") == "upright":
        yield (
            "warning",
            f"images with boxes or masks ({turned:,}) are turned by their EXIF "
            "orientation; their regions are taken as those of the upright image. If they count the stored pixels, as "
            "COCO's and OpenCV's without EXIF do: data.boxes_of=stored",
        )


def find_regions_outside(preview: Preview) -> Iterator[Remark]:
    """Find boxes and masks that do not fit their images."""
    if number := preview.sample.counts["regions"]:
        examples = list(preview.sample.notes["regions"].items())[:_NAMED]
        text = "; ".join(f"{quote(name, 200)[1:-1]}: {reason}" for name, reason in examples)
        yield (
            "warning" if getattr(preview.data, "on_error", "") == "skip" else "error",
            f"boxes or masks do not fit their images ({number:,} of {preview.sample.files:,} that were read): "
            f"{text}. Boxes are x0, y0, x1, y1 in pixels of the image as it is stored here; correct them or set "
            "data.on_error=skip",
        )


def find_mask_values(preview: Preview) -> Iterator[Remark]:
    """Find masks of several classes with values above the number of classes."""
    if number := preview.sample.counts["mask_values"]:
        name, value = next(iter(preview.sample.notes["mask_values"].items()))
        yield (
            "error",
            "masks of records with several labels have values above the number of classes "
            f"({number:,}, such as {value} in {quote(name, 200)[1:-1]}); a pixel of class c has the "
            f"value c + 1 there, up to {len(preview.classes)}, and 0 is the background. Write the masks so, or leave "
            "data.mask out",
        )


def find_strips(preview: Preview) -> Iterator[Remark]:
    """Find images that are much longer than wide, or the reverse."""
    sides = np.array(preview.sample.sides)
    if len(sides) < MIN_FILES:
        return
    ratio = float(np.median(sides.max(axis=1) / sides.min(axis=1)))
    if ratio >= MAX_SIDE_RATIO:
        yield (
            "warning",
            f"images are long and narrow (longer side {ratio:.3g} times the shorter one in the median), and a network "
            "of square inputs receives them squeezed, as explanation maps are; pad them to squares or cut them before "
            "they are packed, or train with a crop (augment=resized_crop_flip, student.frame=center_crop)",
        )


def describe_brightness(one: NDArray[np.float64], other: NDArray[np.float64]) -> str:
    """Say that images are brighter or darker than others, as their mean values tell; empty if they do not."""
    if min(len(one), len(other)) < MIN_BRIGHTNESS_FILES:
        return ""
    difference = float(one.mean() - other.mean())
    spread = float(np.sqrt((one.var(ddof=1) + other.var(ddof=1)) / 2))
    error = float(np.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other)))
    if abs(difference) <= max(MIN_BRIGHTNESS_EFFECT * spread, MIN_BRIGHTNESS_ERRORS * error):
        return ""
    return (
        f"{'brighter' if difference > 0 else 'darker'} than those there: their mean value is {one.mean():.0f} of 255, "
        f"and {other.mean():.0f} there (between images {spread:.0f})"
    )


# ---- what else tells classes and splits apart ----------------------------------------------------


def _counts_of_traits(preview: Preview) -> Iterator[tuple[str, str, str, int, int]]:
    """Iterate over trait, value, split, label and number of the files that were decoded."""
    for key, count in preview.sample.traits.items():
        trait, value, split, label = json.loads(key)
        yield trait, value, split, label, count


def _telling_values(counts: Mapping[str, Counter[str]]) -> dict[str, str]:
    """Return the items that nearly all files of one value have and nearly no file of the others.

    Args:
        counts: Number of files by item (such as a class) and value.
    """
    totals = {item: values.total() for item, values in counts.items()}
    telling = {}
    for item, values in counts.items():
        (value, count) = values.most_common(1)[0]
        others = sum(totals.values()) - totals[item]
        elsewhere = sum(each[value] for name, each in counts.items() if name != item)
        if min(totals[item], others) >= MIN_TRAIT_FILES and (
            count >= (1 - MAX_SHARE_OF_FEW) * totals[item]
            and elsewhere <= MAX_SHARE_OF_FEW * others
        ):
            telling[item] = value
    return telling


def find_traits_of_classes(preview: Preview) -> Iterator[Remark]:
    """Find classes that their files' format, color, bits or size tell, and not only the subject."""
    by_trait: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for trait, value, _, label, count in _counts_of_traits(preview):
        if label != NO_LABEL and trait in _WORDS:
            by_trait[trait][preview.classes[label]][value] += count
    for trait, counts in by_trait.items():
        telling = _telling_values(counts)
        is_of_some = trait == "size" and len(telling) < len(counts)  # photographs of one camera
        if telling and not is_of_some:
            text = ", ".join(
                f"{quote(name)} is {printable(value)}"
                for name, value in list(telling.items())[:_NAMED]
            )
            yield (
                "warning",
                f"the {_WORDS[trait]} of a file tells its class ({text}), so that a network may learn it in place of "
                "the subject; convert all files alike",
            )


def find_brightness_of_splits(preview: Preview) -> Iterator[Remark]:
    """Find splits whose images are darker or brighter than those of the training split."""
    means = preview.sample.means
    trained = np.array(means.get(TRAIN, ()))
    for split in sorted(means.keys() - {TRAIN}):
        described = describe_brightness(np.array(means[split]), trained)
        if described:
            yield (
                "warning",
                f"images of split {printable(split)} are {described.replace('there', f'of split {TRAIN}', 1)}, so that "
                "results on it are of other pictures than those that a network is trained on; look at how they were "
                "made",
            )


def find_darker_items(preview: Preview) -> Iterator[Remark]:
    """Find classes and splits whose images of 16 bits use fewer bits than those of others, as 12 of 16."""
    counts: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    for trait, value, split, label, count in _counts_of_traits(preview):
        if trait == "range":
            counts["split", split][int(value)] += count
            if label != NO_LABEL:
                counts["class", preview.classes[label]][int(value)] += count
    for kind in ("class", "split"):
        bits = {
            name: median_low(values.elements())
            for (of, name), values in counts.items()
            if of == kind and values.total() >= MIN_FILES
        }
        most = max(bits, key=bits.__getitem__, default="")
        dark = [name for name in bits if bits[name] <= bits[most] - MIN_FEWER_BITS]
        if dark:
            yield (
                "warning",
                f"images of 16 bits of {kind} {shorten(dark, _NAMED)} use {bits[dark[0]]} bits and those of {kind} "
                f"{quote(most)} {bits[most]}; all are scaled alike, so they are darker, which a network may learn in "
                "place of the subject: scale all files to one range",
            )


def find_traits_of_splits(preview: Preview) -> Iterator[Remark]:
    """Find splits whose files have another format, color, depth or size than those of the training split."""
    by_trait: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for trait, value, split, _, count in _counts_of_traits(preview):
        if trait in _WORDS:
            by_trait[trait][split][value] += count
    for trait, counts in by_trait.items():
        for split in sorted(counts.keys() - {TRAIN}):
            pair = {name: counts[name] for name in (split, TRAIN) if name in counts}
            telling = _telling_values(pair)
            if split in telling:
                usual = pair[TRAIN].most_common(1)[0][0]
                yield (
                    "warning",
                    f"the {_WORDS[trait]} of files of split {split} is {telling[split]}, and in split {TRAIN} mostly "
                    f"{usual}, so that results on it are of other files than those that a network is trained on",
                )
