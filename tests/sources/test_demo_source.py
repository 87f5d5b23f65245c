"""Demo set: it has exactly the documented shortcut."""

import numpy as np
import pytest

from permafrost_sources.demo import DemoSource, load_digit_images
from permafrost_sources.options import DemoDataConfig
from tests.support.images import decoded

pytestmark = pytest.mark.usefixtures("records_drawn_anew")


@pytest.fixture(scope="module")
def source():
    return DemoSource(DemoDataConfig())


@pytest.fixture(scope="module")
def by_split(source):
    splits = {}
    for record in source.records():
        splits.setdefault(record.split, []).append(record)
    return splits


def digits_in(records):
    return {record.content[1] for record in records}


def photograph(record):
    return record.group % 2


@pytest.mark.slow
def test_keys_are_unique_and_labels_are_the_digits(source, by_split):
    records = [record for split in by_split.values() for record in split]

    assert len({record.key for record in records}) == len(records)
    labels = load_digit_images()[1]
    assert all(record.label == labels[record.content[1]] for record in records)


@pytest.mark.slow
def test_in_training_and_in_distribution_the_photograph_is_the_parity(by_split):
    for split in ("train", "test"):
        assert all(photograph(record) == record.label % 2 for record in by_split[split])


@pytest.mark.slow
def test_swapped_is_the_same_digits_in_the_same_places_on_the_other_photograph(source, by_split):
    for one, other in zip(by_split["test"], by_split["test_swapped"], strict=True):
        assert one.content[:3] == other.content[:3]
        assert one.boxes == other.boxes
        assert photograph(other) == 1 - photograph(one)
    first, second = source.read(by_split["test"][0]), source.read(by_split["test_swapped"][0])
    assert first.mask == second.mask
    assert first.image != second.image


def test_the_teacher_sees_both_photographs_behind_every_digit(by_split):
    seen = {}
    for record in by_split["teacher"]:
        seen.setdefault(record.content[1], set()).add(photograph(record))

    assert all(photographs == {0, 1} for photographs in seen.values())


def test_the_tests_share_no_digit_with_training(by_split):
    held_out = digits_in(by_split["test"])

    assert len(held_out) == 350
    assert not held_out & digits_in(by_split["train"])
    assert not held_out & digits_in(by_split["teacher"])


@pytest.mark.slow
def test_no_training_image_is_among_the_teachers(source, by_split):
    teachers = {source.read(record).image for record in by_split["teacher"][:300]}

    assert not teachers & {source.read(record).image for record in by_split["train"][:300]}


def test_the_ink_stands_out_from_what_is_around_it(source, by_split):
    for record in by_split["train"][:100]:
        content = source.read(record)
        image, mask = decoded(content.image).mean(axis=2), decoded(content.mask) > 0
        core = mask & np.roll(mask, 1, 0) & np.roll(mask, -1, 0)
        near = [np.roll(mask, shift, axis) for shift in (2, -2) for axis in (0, 1)]
        around = ~mask & np.logical_or.reduce(near)
        assert abs(image[core].mean() - image[around].mean()) > 30


@pytest.mark.slow
def test_photographs_cannot_be_told_by_their_brightness(source, by_split):
    means = {0: [], 1: []}
    for record in by_split["teacher"][:600]:
        content = source.read(record)
        behind = decoded(content.image).mean(axis=2)[decoded(content.mask) == 0]
        means[photograph(record)].append(behind.mean())

    spread = np.std(means[0] + means[1])
    assert abs(np.mean(means[0]) - np.mean(means[1])) < spread


def test_reading_is_a_pure_function_of_the_record(source, by_split):
    record = by_split["train"][0]

    assert source.read(record) == DemoSource(DemoDataConfig()).read(record)
