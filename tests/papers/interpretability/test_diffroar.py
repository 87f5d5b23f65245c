"""DiffROAR of rankings with a known value: the truth, its inverse, a random one and one that leaks the label."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from permafrost.core.errors import ConfigError
from permafrost_papers.interpretability.diffroar import (
    RankedImages,
    build_probe,
    compare,
    keep_part,
    mask_of_part,
    rank,
    rank_quantiles,
    revealing_positions,
)
from permafrost_papers.interpretability.options import DiffroarOptions

SIDE, INFORMATIVE = 4, 5
COORDINATES = 3 * SIDE * SIDE
TENTH = INFORMATIVE / COORDINATES
OPTIONS = DiffroarOptions(keep=(TENTH, 0.5), seeds=(0, 1), epochs=12, batch_size=64, lr=0.02)
RECORDS = 800


def linear(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(COORDINATES, classes))


def drawn_images(seed, informative=INFORMATIVE):
    """Noise images u8 [RECORDS, 3, SIDE, SIDE] whose first `informative` coordinates decide the label."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (RECORDS, 3, SIDE, SIDE), generator=generator)
    deciding = images.flatten(1)[:, :informative].double().mean(dim=1)
    labels = (deciding > 127.5).long()
    if not informative:
        labels = torch.randint(0, 2, (RECORDS,), generator=generator)
    return images.to(torch.uint8), labels


def ranked(seed, attribute, informative=INFORMATIVE):
    images, labels = drawn_images(seed, informative)
    return RankedImages(images, rank_quantiles(attribute(images, labels)), labels)


def oracle(images, labels):
    attributions = 0.01 * torch.rand(
        len(images), COORDINATES, generator=torch.Generator().manual_seed(7)
    )
    attributions[:, :INFORMATIVE] += 1
    return attributions.view_as(images)


def inverted(images, labels):
    return 2 - oracle(images, labels)


def random_order(images, labels):
    seed = int(images[0].sum())
    return torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))


def perceptron(classes):
    hidden = nn.Linear(COORDINATES, 64)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(64, classes))


def diffroar_of(attribute, options=OPTIONS, informative=INFORMATIVE, build=linear):
    train, test = (ranked(seed, attribute, informative) for seed in (1, 2))
    return compare(train, test, build, options, classes=2)


def names(options=OPTIONS):
    return [f"{100 * fraction:g}%" for fraction in options.keep]


@pytest.mark.parametrize("side", [4, 16])
def test_no_part_is_empty_and_a_whole_part_is_the_image(side):
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    whole = RankedImages(images, rank_quantiles(torch.rand(2, 3, side, side)), torch.tensor([0, 1]))
    rows = torch.arange(2)

    for part in ("top", "bottom"):
        assert not whole.select(rows, part, 0).any()
        assert whole.select(rows, part, 1).all()
        assert whole.select(rows, part, 0.25).float().mean() == 0.25
        assert torch.equal(keep_part(whole, rows, part, 1, 0.5), images / 255)


@pytest.mark.slow
def test_the_truth_is_worth_much_and_its_opposite_as_much_less():
    best, worst = diffroar_of(oracle), diffroar_of(inverted)

    tenth, _ = names()
    assert best["difference"][tenth] > 0.35
    assert best["power"]["top"][tenth] > 0.85
    assert abs(best["power"]["bottom"][tenth] - 0.5) < 0.1
    for name in names():
        assert worst["difference"][name] == pytest.approx(-best["difference"][name], abs=1e-12)
        assert worst["power"]["top"][name] == best["power"]["bottom"][name]
    assert best["mean"] == pytest.approx(sum(best["difference"].values()) / 2)


@pytest.mark.slow
def test_a_random_order_is_worth_nothing():
    found = diffroar_of(random_order)

    se = math.sqrt(2 * 0.25 / RECORDS)
    for name in names():
        assert abs(found["difference"][name]) < 3 * se
        assert abs(found["mask_only"][name] - 0.5) < 3 * math.sqrt(0.25 / RECORDS)


def test_nothing_kept_and_everything_kept_are_worth_nothing_by_definition():
    options = DiffroarOptions(keep=(0.0, 1.0), seeds=(0, 3), epochs=2)

    found = diffroar_of(oracle, options)

    assert found["difference"] == pytest.approx({"0%": 0, "100%": 0}, abs=1e-12)
    assert found["power"]["top"] == found["power"]["bottom"]
    assert found["unmasked"] > found["power"]["top"]["0%"]


@pytest.mark.slow
def test_an_order_that_reads_the_true_label_gives_it_away_in_its_places(caplog):
    """The positions of the kept pixels alone reveal the class, on images of pure noise."""

    def label_dependent(images, labels):
        first = torch.arange(COORDINATES) < COORDINATES // 2
        toward = torch.where(labels[:, None] == 1, first, ~first).double()
        jitter = torch.rand(COORDINATES, generator=torch.Generator().manual_seed(5))
        return (toward + 0.1 * jitter).view_as(images)

    found = diffroar_of(label_dependent, informative=0, build=perceptron)

    assert found["mask_only"]["50%"] == 1
    (sentence,) = revealing_positions(found)
    assert "50% kept, a probe of the positions alone" in sentence
    assert caplog.messages == [sentence]
    se = math.sqrt(0.25 / RECORDS)
    assert found["power"]["top"]["50%"] > 0.5 + 10 * se  # although the images are pure noise
    assert abs(found["unmasked"] - 0.5) < 0.1
    assert abs(found["chance"] - 0.5) < 0.05


def test_ranks_are_of_magnitudes_and_each_is_given_once():
    attributions = torch.tensor([0.1, -3.0, 2.0, 0.0]).view(1, 1, 2, 2)

    assert rank(attributions).flatten().tolist() == [2, 0, 1, 3]
    tied = rank(torch.zeros(2, 3, 4, 4))
    assert torch.equal(tied[0], tied[1])
    assert sorted(tied[0].flatten().tolist()) == list(range(48))
    assert tied[0].flatten().tolist() != list(range(48))  # ties are not broken from left to right


def exact_selection(ranks, part, fraction):
    """Selection by ranks without rounding to levels."""
    total = ranks[0].numel()
    count = round(fraction * total)
    return ranks < count if part == "top" else ranks >= total - count


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32), (3, 29, 31)])
def test_quantiles_of_one_byte_select_what_ranks_do_within_a_512th(shape):
    attributions = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    total = attributions[0].numel()
    ranks = rank(attributions)
    images = torch.zeros(3, 3, *shape[1:], dtype=torch.uint8)
    held = RankedImages(images, rank_quantiles(attributions), torch.zeros(3, dtype=torch.int64))

    assert held.quantiles.dtype == torch.uint8
    assert held.images.nbytes + held.quantiles.nbytes == 3 * (3 + shape[0]) * shape[1] * shape[2]
    for fraction in DiffroarOptions.keep:
        for part in ("top", "bottom"):
            own = held.select(torch.arange(3), part, fraction)
            exact = exact_selection(ranks, part, fraction)
            assert (own ^ exact).flatten(1).sum(dim=1).max() <= total / 512 + 1
            assert not (own & ~exact).any() or not (exact & ~own).any()  # one contains the other
    if total % 256 == 0:  # a multiple of the levels is selected exactly, so the probes are equal
        for part in ("top", "bottom"):
            own = held.select(torch.arange(3), part, 77 / 256)
            assert torch.equal(own, exact_selection(ranks, part, 77 / 256))


def test_what_is_not_kept_is_filled_and_a_pixel_is_kept_whole():
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2)
    attributions = torch.tensor([4.0, 1.0, 3.0, 2.0]).view(1, 1, 2, 2).expand(2, 1, 2, 2)
    train = RankedImages(images, rank_quantiles(attributions), torch.zeros(2, dtype=torch.int64))
    rows = torch.tensor([1])

    top, bottom = (keep_part(train, rows, part, 0.5, -1.0) for part in ("top", "bottom"))
    places = mask_of_part(train, rows, "top", 0.5)

    assert places[0].flatten(1).tolist() == [[1, 0, 1, 0]] * 3
    assert torch.equal(top == -1, places == 0)
    assert torch.equal(bottom == -1, places == 1)
    assert torch.allclose(top[places == 1], images[1:].float()[places == 1] / 255)


@pytest.mark.slow
def test_the_probe_of_images_learns_a_color():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.randint(0, 90, (60, 3, 8, 8), generator=generator)
    images[torch.arange(60), labels] += 120
    order = rank_quantiles(torch.rand(60, 3, 8, 8, generator=generator))
    train = RankedImages(images.to(torch.uint8), order, labels)

    found = compare(
        train,
        train,
        partial(build_probe, width=4),
        DiffroarOptions(keep=(0.5,), seeds=(0,), epochs=30),
        3,
    )

    assert found["unmasked"] == 1


def test_options_are_checked():
    with pytest.raises(
        ConfigError, match=r"diffroar\.keep must list at least one fraction in \[0, 1\]"
    ):
        DiffroarOptions(keep=(0.1, 1.2))
    with pytest.raises(
        ConfigError, match=r"diffroar\.seeds must list at least one value, each once"
    ):
        DiffroarOptions(seeds=(1, 1))
    with pytest.raises(ConfigError, match=r"diffroar\.batch_size must be >= 2"):
        DiffroarOptions(batch_size=1)
