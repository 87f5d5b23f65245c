"""Pictures of the README, drawn from the students of a sweep as those of the demo."""

from pathlib import Path

import numpy as np
import pytest

from docs.demo_pictures import demo_maps, one_geometry
from permafrost.config.compose import compose
from permafrost.config.verbs import build_verb_config
from permafrost.loading.dataset import StoreDataset
from permafrost_report.cases import open_pair
from permafrost_report.student_results import load_results


@pytest.fixture(scope="module")
def pair(frozen, swept):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(swept)
        words = [f"store.path={frozen.store.path}", "run=grid"]
        words += ["report.baseline=kd", "report.candidate=e2kd"]
        config = build_verb_config("report", compose("report", words))
        yield open_pair(config, load_results(config.run))


def images_of(axis):
    return [np.asarray(image.get_array()) for image in axis.get_images()]


def test_a_digit_stands_beside_its_maps_as_in_training_and_swapped(pair):
    figure = demo_maps(pair)

    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:8] == ["image", "teacher", "KD student", "e2KD student"] * 2
    shown = [images_of(axis)[0] for axis in figure.axes]
    labels = [axis.get_xlabel() for axis in figure.axes]
    for digit in (0, 4, 8, 12):
        image, *maps = shown[digit : digit + 4]
        assert labels[digit].startswith("a ")
        assert all(text.startswith("says ") for text in labels[digit + 1 : digit + 4])
        assert all(not np.array_equal(image, drawn) for drawn in maps)
    assert labels[0] == labels[8]  # the same digit on the other photograph
    assert not np.array_equal(shown[0], shown[8])


def test_the_first_view_is_what_is_stored(frozen):
    figure = one_geometry(Path(frozen.store.path))

    images = [images_of(axis)[0] for axis in figure.axes]
    record = StoreDataset(frozen.store, np.arange(1)).__getitems__([0])
    assert np.array_equal(images[0], record.inputs[0].permute(1, 2, 0).numpy())
    assert not any(np.array_equal(images[0], image) for image in images[1:5])
