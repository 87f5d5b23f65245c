"""Dissection of units whose concepts are known."""

import csv

import numpy as np
import pytest
import torch
from torch import nn

from permafrost.core.errors import ConfigError, RecordError
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.models.classifier import Classifier, Normalize
from permafrost_papers.interpretability.concepts import (
    BrodenFolder,
    DrawnConcepts,
    Labels,
    decode_labels,
)
from permafrost_papers.interpretability.dissection import dissect
from permafrost_papers.interpretability.options import DissectionOptions
from permafrost_papers.interpretability.overlap import (
    OverlapCounts,
    firing_mask,
    keep_largest,
    keep_top_images,
    kept_of,
)
from tests.support.broden import encode_labels, write_broden

SIDE = 25
LABELS = Labels(("", "red", "cat", "beach"), ("color", "object", "scene"), (0, 0, 1, 2))
RED, CAT, BEACH = 1, 2, 3


def tally(*images, units=1, presence="mask"):
    """Count the overlaps of images, each given as (masks, layers, whole)."""
    total = OverlapCounts.zeros(units, LABELS)
    for masks, layers, whole in images:
        total.count(masks, layers, whole, LABELS, presence)
    return total


def layer_of(region, label):
    return (region.long() * label)[None]


@pytest.fixture
def every_fifth():
    """Two regions of a 25 x 25 image, each 1/25 of its area and independent of each other."""
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return (row % 5 == 0) & (column % 5 == 0), (row // 5 == 0) & (column // 5 == 0)


# ---- thresholds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[600], [1, 599], [7] * 85 + [5], [200, 200, 200]])
@pytest.mark.parametrize("quantile", [0.005, 0.01, 0.37])
def test_thresholds_are_those_of_a_full_sort_however_the_images_come(chunks, quantile):
    activations = torch.randn(600, 3, 2, 4, generator=torch.Generator().manual_seed(1)).double()
    keep = kept_of(quantile, 600 * 8)

    largest = torch.zeros(3, 0).double()
    for part in activations.split(chunks):
        largest = keep_largest(largest, part, keep)

    flat = activations.transpose(0, 1).flatten(1)
    ordered = flat.sort(dim=1, descending=True).values
    assert torch.equal(largest, ordered[:, :keep])
    above = (flat > largest[:, -1:]).double().mean(dim=1)
    assert above.max() <= quantile
    assert above.min() > quantile - 1 / (600 * 8)


def test_a_whole_number_of_activations_lies_above_the_threshold():
    assert kept_of(0.005, 1000) == 6  # 5 above, plus the threshold itself
    assert kept_of(0.005, 1001) == 6
    assert kept_of(0.29, 100) == 30  # 0.29 * 100 is 28.999... in floats


def test_the_most_exciting_images_are_kept_in_order_from_any_parts():
    activations = torch.rand(30, 2, 3, 3, generator=torch.Generator().manual_seed(0))

    top = torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64)
    for numbers in torch.arange(30).split([11, 2, 17]):
        top = keep_top_images(*top, activations[numbers], numbers, 4)

    highest = activations.amax(dim=(2, 3)).sort(dim=0, descending=True)
    assert torch.equal(top[0], highest.values[:4].T)
    assert torch.equal(top[1], highest.indices[:4].T)


# ---- firing masks --------------------------------------------------------------------------------


def test_a_map_is_upsampled_before_it_is_cut():
    hot = torch.zeros(1, 7, 7)
    hot[0, 3, 3] = 1

    mask = firing_mask(hot, torch.tensor([0.5]), (224, 224))

    assert int(mask.sum()) == 628  # 1024 is the area of one cell


def test_a_unit_that_never_fires_covers_nothing_and_detects_nothing(every_fifth):
    concept, _ = every_fifth
    silent = torch.zeros(1, SIDE, SIDE)
    threshold = keep_largest(torch.zeros(1, 0), silent[None], 4)[:, -1]

    mask = firing_mask(silent, threshold, (SIDE, SIDE))
    iou = tally((mask, layer_of(concept, RED), ())).iou(LABELS)

    assert not mask.any()
    assert not iou.any()


# ---- counting ------------------------------------------------------------------------------------


def test_a_unit_that_is_the_concept_has_iou_one(every_fifth):
    concept, _ = every_fifth
    jitter = 0.01 * torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    activation = (concept + jitter)[None]
    largest = keep_largest(torch.zeros(1, 0), activation[None], kept_of(1 / 25, SIDE**2))

    mask = firing_mask(activation, largest[:, -1], (SIDE, SIDE))
    iou = tally((mask, layer_of(concept, CAT), ())).iou(LABELS)

    assert iou[0, CAT].item() == pytest.approx(1, abs=1e-9)
    assert iou[0, [0, RED, BEACH]].eq(0).all()


def test_a_unit_independent_of_a_concept_of_its_own_size_has_c_over_two_minus_c(every_fifth):
    concept, fires = every_fifth
    c = 1 / 25

    iou = tally((fires[None], layer_of(concept, RED), ())).iou(LABELS)

    assert iou[0, RED].item() == pytest.approx(c / (2 - c), abs=1e-9)
    assert iou[0, RED] < DissectionOptions().iou


def test_images_without_the_category_change_nothing(every_fifth):
    concept, fires = every_fifth
    everywhere = torch.ones(1, SIDE, SIDE, dtype=torch.bool)
    one = (fires[None] | concept[None], layer_of(concept, RED), ())

    alone = tally(one)
    among = tally(one, (everywhere, layer_of(fires, CAT), ()), (everywhere, one[1][:0], (BEACH,)))

    assert among.iou(LABELS)[0, RED] == alone.iou(LABELS)[0, RED]
    assert among.act[0].tolist() == [int(one[0].sum()), SIDE**2, SIDE**2]


def test_a_label_of_the_whole_image_counts_for_all_its_pixels(every_fifth):
    _, fires = every_fifth
    nothing = torch.zeros(0, SIDE, SIDE, dtype=torch.int64)

    found = tally((fires[None], nothing, (BEACH,)))

    assert found.inter[0, BEACH] == 25
    assert found.lab[BEACH] == SIDE**2
    assert found.iou(LABELS)[0, BEACH].item() == pytest.approx(25 / SIDE**2)


def test_a_category_is_present_under_the_mask_or_in_the_image(every_fifth):
    concept, fires = every_fifth
    apart = fires & ~concept
    image = (apart[None], layer_of(concept, RED), ())

    assert tally(image).act[0, 0] == 0
    assert tally(image, presence="image").act[0, 0] == int(apart.sum())


def test_a_pixel_that_has_a_label_in_two_label_images_has_it_once(every_fifth):
    concept, _ = every_fifth
    twice = layer_of(concept, RED).repeat(2, 1, 1)
    other = torch.cat([layer_of(concept, RED), layer_of(concept, CAT)])

    assert tally((concept[None], twice, ())).iou(LABELS)[0, RED].item() == pytest.approx(1)
    both = tally((concept[None], other, ())).iou(LABELS)[0]
    assert both[[RED, CAT]].tolist() == pytest.approx([1, 1])


# ---- Broden --------------------------------------------------------------------------------------


def test_labels_of_two_bytes_do_not_overflow():
    pixels = np.array([[[255, 3, 0], [7, 0, 9]]], np.uint8)

    assert decode_labels(pixels).tolist() == [[1023, 7]]
    assert decode_labels(encode_labels(np.array([[1023, 65535]]))).tolist() == [[1023, 65535]]


@pytest.fixture
def broden_folder(tmp_path):
    write_broden(DrawnConcepts(6, 32), tmp_path / "broden")
    return tmp_path / "broden"


def test_a_set_on_disk_is_the_set_that_was_written(broden_folder):
    drawn, read = DrawnConcepts(6, 32), BrodenFolder(broden_folder)

    assert len(read) == 6
    assert read.labels == drawn.labels
    for number in range(6):
        one, other = drawn.read(number), read.read(number)
        assert torch.equal(one.image, other.image)
        assert one.whole == other.whole
        assert sorted(map(bytes, one.layers)) == sorted(map(bytes, other.layers))
    assert len(BrodenFolder(broden_folder, 2)) == 2


def test_the_index_lists_several_label_images_of_a_category_and_labels_of_whole_images(
    broden_folder,
):
    with (broden_folder / "index.csv").open() as lines:
        rows = list(csv.DictReader(lines))

    assert all(len(row["object"].split(";")) == 2 for row in rows)
    assert all(row["scene"].isdecimal() for row in rows)
    assert {row["sh"] for row in rows} == {"16"}


def test_a_label_of_two_categories_counts_where_it_covers_most(broden_folder):
    path = broden_folder / "c_texture.csv"
    path.write_text(path.read_text() + "9,1,red,1e6\n")

    labels = BrodenFolder(broden_folder).labels

    assert labels.categories[labels.category_of[labels.names.index("red")]] == "texture"


def test_a_damaged_set_is_refused_by_file(broden_folder, tmp_path):
    with pytest.raises(
        ConfigError, match=r"dissection\.path=.* has no index\.csv; name the folder"
    ):
        BrodenFolder(tmp_path)
    (broden_folder / "images" / "00001_0.png").write_bytes(b"no image")
    with pytest.raises(RecordError, match=r"00001_0\.png cannot be decoded"):
        BrodenFolder(broden_folder).read(1)
    (broden_folder / "images" / "00002.png").unlink()
    with pytest.raises(RecordError, match=r"00002\.png is missing, but index\.csv lists it"):
        BrodenFolder(broden_folder).read(2)
    index = broden_folder / "index.csv"
    index.write_text(index.read_text().replace(",16,16,", ",16,17,"))
    with pytest.raises(RecordError, match=r"has 16x16 pixels, but index\.csv lists 16x17"):
        BrodenFolder(broden_folder).read(0)
    (broden_folder / "c_scene.csv").unlink()
    with pytest.raises(ConfigError, match=r"category\.csv names scene, but .*c_scene\.csv is miss"):
        BrodenFolder(broden_folder)


# ---- a network with known units ------------------------------------------------------------------


class ColorDetector(Classifier):
    """Network with three units: red minus green and blue, green minus red and blue, and one that is always zero."""

    def __init__(self):
        super().__init__()
        self.normalize = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.linear = nn.Linear(3, 2)

    @property
    def network(self):
        return self

    @property
    def head(self):
        return None

    def forward_trunk(self, images):
        red, green, blue = self.normalize(images).unbind(dim=1)
        units = [red - green - blue, green - red - blue, torch.full_like(red, -1.0)]
        return torch.stack(units, dim=1).relu(), None

    def forward_head(self, features, context):
        return self.linear(features.mean(dim=(2, 3)))


@pytest.mark.parametrize("batch_size", [3, 16])
def test_units_that_see_colors_detect_them(batch_size, monkeypatch):
    concepts = DrawnConcepts(16, 32)
    model = EvaluatedModel(network=ColorDetector().eval(), input_size=(32, 32))
    reds = np.mean([(concepts.read(n).layers == 1).any(axis=0).mean() for n in range(16)])

    found = dissect(model, concepts, DissectionOptions(quantile=float(reds)), batch_size)

    names = [concepts.labels.names[label] for label in found.iou.argmax(dim=1)]
    assert names[:2] == ["red", "green"]
    # Below 1: label images are coarser, and dark pixels are less red.
    assert found.iou[0].max() > 0.6
    assert not found.iou[2].any()
    again = dissect(model, concepts, DissectionOptions(quantile=float(reds)), 5)
    assert torch.equal(again.iou, found.iou)
    assert torch.equal(again.top_images, found.top_images)


def test_the_published_normalization_takes_the_place_of_the_networks_own():
    from permafrost_papers.interpretability.dissection import _legacy_normalization

    network = ColorDetector()
    network.normalize = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.1))
    model = EvaluatedModel(network=network, input_size=(4, 4))
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    seen = network.normalize(
        _legacy_normalization(model, images, DissectionOptions(legacy_norm=True))
    )

    mean = torch.tensor([124.69, 118.69, 109.54]).view(-1, 1, 1)
    assert torch.allclose(seen, (255 * images - mean) / (255 * 0.224), atol=1e-5)
    assert _legacy_normalization(model, images, DissectionOptions()) is images
