"""Superfeatures: saved files and pictures."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from permafrost.storage.lock import LOCK_NAME
from permafrost.store.entries import ManifestError
from permafrost_papers.ked.dependency import symmetric
from permafrost_papers.ked.grouping import group_features
from permafrost_papers.ked.partition_pictures import (
    dependency_picture,
    group_picture,
    superfeature_figure,
)
from permafrost_papers.ked.search import load_partition, partition_artifact, save_partition
from tests.support.html_page import pixels_of_uri
from tests.support.superfeatures import (
    MADE_FROM,
    OPTIONS,
    Additive,
    dense,
    groups_of,
    is_nested,
    measured,
)


def test_a_partition_on_disk_is_the_one_that_was_saved(kept, tmp_path):
    folder, grouping, total = kept

    loaded = load_partition(folder)

    assert folder == partition_artifact(tmp_path, MADE_FROM, OPTIONS).folder
    assert folder.parent == tmp_path / "artifacts"
    assert (
        folder != partition_artifact(tmp_path, MADE_FROM, OPTIONS | {"derivative": "ablate"}).folder
    )
    assert loaded.partition.sha256 == grouping.partition.sha256 == loaded.facts.partition_sha256
    assert torch.equal(loaded.dependency, total.matrix)
    assert loaded.partition.grid == (3, 3)
    facts = loaded.facts
    assert (facts.records, facts.seed, facts.neighbors) == (24, 0, 4)
    assert facts.modularity == grouping.modularity
    assert facts.split_half == pytest.approx(total.split_half)
    named = {p.name for p in folder.iterdir()} - {LOCK_NAME}
    assert named == {"manifest.json", "partition.safetensors"}


def test_a_partition_that_is_there_stays(kept, tmp_path):
    folder, grouping, total = kept
    before = (folder / "manifest.json").read_bytes()

    other = group_features(total.matrix, 2)
    save_partition(partition_artifact(tmp_path, MADE_FROM, OPTIONS), other, total)

    assert (folder / "manifest.json").read_bytes() == before
    assert load_partition(folder).partition.sha256 == grouping.partition.sha256


def test_an_interrupted_save_is_no_partition(kept):
    folder, _, _ = kept
    (folder / "manifest.json").unlink()

    with pytest.raises(ManifestError, match="does not exist"):
        load_partition(folder)


@pytest.mark.parametrize("name", ["partition.safetensors", "manifest.json"])
def test_any_flipped_byte_of_a_partition_is_found(kept, name):
    folder, _, _ = kept
    whole = (folder / name).read_bytes()

    for place in np.linspace(2, len(whole) - 3, 12).astype(int):
        (folder / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ManifestError, match="damaged"):
            load_partition(folder)

    (folder / name).write_bytes(whole)
    load_partition(folder)


def test_groups_have_colors_of_their_own():
    assignment = torch.arange(16).view(4, 4).flatten().numpy() // 2

    colors = group_picture(assignment, (4, 4)).reshape(16, 3)

    for a, b in itertools.combinations(range(16), 2):
        apart = np.abs(colors[a] - colors[b]).max()
        assert apart == 0 if assignment[a] == assignment[b] else apart > 0.1


def test_the_matrix_is_shown_in_blocks():
    w = measured(Additive(nn.GELU)).matrix
    assignment = np.arange(9) % 3

    picture = dependency_picture(w, assignment)

    # Without the red lines.
    ink = np.where(np.ptp(picture, axis=2) > 0, 0, 1 - picture.mean(axis=2))
    third = len(ink) // 3
    assert ink[:third, :third].mean() > 0.1
    assert ink[: third - 2, third + 2 : 2 * third].max() < 1e-12
    assert (np.ptp(picture, axis=2) > 0).any(axis=1).all()


@pytest.mark.parametrize("grid", [(3, 3), None])
def test_the_figure_has_the_colors_of_all_groups(grid):
    w = measured(Additive(nn.GELU)).matrix

    groups, dependency = superfeature_figure(group_features(w, 3, grid=grid).partition, w)

    assert [tile.caption for tile in groups.tiles] == ["2 superfeatures", "3 superfeatures"]
    assert len(dependency.tiles) == 2
    pixels = pixels_of_uri(groups.tiles[-1].source)
    for color in group_picture(np.arange(3), None)[0]:
        assert (np.abs(pixels - 255 * color).max(axis=2) <= 2).any()


def test_symmetric_leaves_out_own_curvature():
    matrix = torch.tensor([[5.0, 1.0], [3.0, 7.0]])

    assert symmetric(matrix).tolist() == [[0, 2], [2, 0]]


@pytest.mark.parametrize("number", [1, 2, 4, 7])
def test_the_groups_at_m_do_not_depend_on_the_levels_above(number):
    alone = group_features(dense(24), number)

    for levels in (number, number + 1, 16, 24):
        deeper = group_features(dense(24), number, levels=levels)
        assert deeper.partition.most == levels
        assert torch.equal(deeper.partition.assignments[:number], alone.partition.assignments)
        assert deeper.modularity[:number] == alone.modularity
        assert (deeper.resolution, deeper.communities) == (alone.resolution, alone.communities)
        assert is_nested(deeper.partition)
        for finer, assignment in enumerate(deeper.partition.assignments, start=1):
            assert torch.equal(assignment.unique(), torch.arange(finer))


def test_planted_groups_are_found_at_their_own_number_and_lost_from_sixteen_down():
    """Four planted groups of 5 in noise are found exactly with number=4, independent of the number of levels."""
    planted = torch.arange(20) // 5
    weights = 1.0 + 0.9 * (planted[:, None] == planted) + 0.6 * dense(20, seed=3)

    found = group_features(weights, 4, levels=16).partition.assignment(4)

    assert groups_of(found) == groups_of(planted)
