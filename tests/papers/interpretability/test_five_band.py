"""Five-band scores of maps with known bands, and the cells data for which they are defined."""

import numpy as np
import pytest
import torch

from permafrost.core.batches import Batch
from permafrost.core.errors import ConfigError
from permafrost_papers.interpretability.cells import BODY, CLASSES, PART, CellsSource
from permafrost_papers.interpretability.five_band import (
    BandCounts,
    bands_of,
    normalize,
    steps_of,
    truth_bands,
)
from permafrost_papers.interpretability.options import CellsDataConfig
from tests.support.images import decoded

HARD = [0.0]
HEAT = torch.tensor([0.0, 0.4, 0.9], dtype=torch.float64)
"""Heatmap value of each level of the truth."""


@pytest.fixture
def truth():
    """Levels i64 [1, 4, 4]: an object of 6 pixels, 2 of which determine its class."""
    levels = torch.zeros(1, 4, 4, dtype=torch.int64)
    levels[0, 1:3, 0:3] = 1
    levels[0, 1, 0:2] = 2
    return levels


@pytest.mark.parametrize(
    ("heat", "expected"),
    [
        (HEAT, {"accuracy": 1, "recall": 1, "precision": 1, "fpr": 0}),  # the truth itself
        (0 * HEAT, {"accuracy": 10 / 16, "recall": 0, "precision": 0, "fpr": 0}),
        # Negated: the object's share, because there the bands differ in sign.
        (-HEAT, {"accuracy": 10 / 16, "recall": 0, "precision": 0, "fpr": 6 / 16}),
        # Constant: nothing is missed, and no background is left.
        (0 * HEAT + 1, {"accuracy": 2 / 16, "recall": 1, "precision": 2 / 16, "fpr": 1}),
    ],
)
def test_the_truth_itself_is_right_everywhere(truth, heat, expected):
    tally = BandCounts.of(heat[truth], truth, HARD)

    assert {name: float(values[0]) for name, values in tally.scores.items()} == expected
    assert int(tally.counts.sum()) == truth.numel()
    assert tally.metrics["background_fraction"] == 10 / 16
    assert tally.metrics["zero_map_fraction"] == (not heat.any())


def test_a_positive_factor_changes_nothing_and_wrong_bands_on_the_object_are_false_positives(truth):
    maps = HEAT[truth]
    maps[0, 1, 0] = 0.5  # a pixel of the part, marked as the rest of the object

    tally = BandCounts.of(maps, truth, HARD)

    assert tally.counts.tolist() == [[5, 1, 10, 0]]
    assert torch.equal(BandCounts.of(1e-3 * maps, truth, HARD).counts, tally.counts)


def test_thresholds_belong_to_the_band_below():
    values = torch.tensor(
        [-1.0, -0.7, -0.69, -0.3, -0.29, 0.3, 0.31, 0.7, 0.71], dtype=torch.float64
    )

    assert bands_of(values).tolist() == [-2, -2, -1, -1, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(("grid", "last"), [("legacy", (0.1, 0.5)), ("v2", (0.025, 0.425))])
def test_soft_steps_end_where_their_grid_says(grid, last):
    steps = steps_of(grid)

    assert len(steps) == {"legacy": 11, "v2": 56}[grid]
    assert (0.3 - steps[-1], 0.7 - steps[-1]) == pytest.approx(last)
    for moved in steps:  # the bands of the truth do not change
        assert bands_of(HEAT, moved).tolist() == [0, 1, 2]


def test_softer_thresholds_find_a_faint_object(truth):
    maps = torch.tensor([0.0, 0.15, 1.0], dtype=torch.float64)[truth]

    found = BandCounts.of(maps, truth, steps_of("legacy")).metrics

    assert found["recall"]["hard"] == pytest.approx(2 / 6)
    assert found["recall"]["best"] == 1
    assert found["best_step"] == 8  # 0.3 - 8 * 0.02 = 0.14 < 0.15
    assert found["recall"]["hard"] < found["recall"]["mean"] < 1


def test_tallies_of_parts_are_those_of_the_whole(truth):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(9, 4, 4, generator=generator)
    levels = torch.randint(0, 3, (9, 4, 4), generator=generator)
    steps = steps_of("legacy")

    whole = BandCounts.of(maps, levels, steps)
    parts = [BandCounts.of(maps[i : i + 4], levels[i : i + 4], steps) for i in range(0, 9, 4)]

    assert (parts[0] + parts[1] + parts[2]).metrics == whole.metrics
    assert normalize(torch.zeros(1, 2, 2)).eq(0).all()


@pytest.fixture(scope="module")
def cell_source():
    source = CellsSource(CellsDataConfig(image_size=48, train_records=60, test_records=30))
    return source, list(source.records())


def test_cells_are_drawn_the_same_again_and_otherwise_by_another_seed(cell_source):
    source, records = cell_source
    other = CellsSource(CellsDataConfig(image_size=48, seed=1))
    again = CellsSource(CellsDataConfig(image_size=48))

    for record in records[:10]:
        assert source.read(record) == again.read(record)
        assert source.read(record).image != other.read(record).image
    first = next(record for record in records if record.split == "test")
    assert source.read(first).image != source.read(records[0]).image


def test_masks_have_the_level_of_the_class_where_there_is_one(cell_source):
    source, records = cell_source
    for record in records:
        levels = set(np.unique(decoded(source.read(record).mask)).tolist())
        expected = {"plain": {0, BODY}, "empty": {0}}.get(CLASSES[record.label], {0, BODY, PART})
        assert levels == expected, CLASSES[record.label]


def test_a_rectangle_has_its_color_where_its_mask_says(cell_source):
    source, records = cell_source
    for record in records:
        if CLASSES[record.label] in ("red", "green", "blue"):
            content = source.read(record)
            inside = decoded(content.image)[decoded(content.mask) == PART].mean(axis=0)
            assert inside.argmax() == ("red", "green", "blue").index(CLASSES[record.label])
            assert inside.max() > 200


def test_boxes_bound_the_mask_and_backgrounds_go_with_no_class(cell_source):
    source, records = cell_source
    for record in records[:20]:
        mask = decoded(source.read(record).mask)
        if CLASSES[record.label] == "empty":
            assert record.boxes == ()
            continue
        (box,) = record.boxes
        x0, y0, x1, y1 = ((edge + 1) / 2 * 48 for edge in (box.x0, box.y0, box.x1, box.y1))
        inside = mask[round(y0) : round(y1), round(x0) : round(x1)]
        assert (inside > 0).sum() == (mask > 0).sum()
        assert inside[0].any()
        assert inside[:, -1].any()
    train = [record for record in records if record.split == "train"]
    pairs = {(record.label, record.group) for record in train}
    assert pairs == {(label, group) for label in range(10) for group in range(3)}


def test_tails_are_as_many_as_their_class_says(cell_source):
    from scipy.ndimage import label

    source, records = cell_source
    for record in records:
        tails = {"tail_1": 1, "tail_3": 3, "tail_8": 8}.get(CLASSES[record.label])
        if tails:
            assert label(decoded(source.read(record).mask) == PART, np.ones((3, 3)))[1] == tails


def test_bands_of_a_mask_follow_the_view(truth):
    masks = truth[:, None].to(torch.uint8)
    batch = Batch(
        keys=("a",),
        record_index=torch.zeros(1, dtype=torch.int64),
        inputs=torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        canonical_from_view=None,
        view_index=torch.full((1,), -1),
        original_size=torch.full((1, 2), 4.0),
        labels=torch.zeros(1, dtype=torch.int64),
        groups=torch.zeros(1, dtype=torch.int64),
        masks=masks,
    )

    assert torch.equal(truth_bands(batch, (4, 4)), truth)
    larger = truth_bands(batch, (16, 16))
    assert larger.unique().tolist() == [0, 1, 2]
    assert torch.equal(larger[:, 2::4, 2::4], truth)  # far from the edges of the 4 x 4 pixels


def test_options_of_cells_are_checked():
    with pytest.raises(ConfigError, match=r"data\.image_size must be in \[24, 512\]"):
        CellsDataConfig(image_size=8)
    with pytest.raises(ConfigError, match=r"data\.test_records must be >= 1"):
        CellsDataConfig(test_records=0)
