"""Superfeatures from a dependency matrix: groups, hierarchies and controls."""

import logging
import math

import networkx
import numpy as np
import pytest
import torch
from torch import nn

from permafrost.core.errors import ConfigError
from permafrost_papers.ked.curvature import table_probes
from permafrost_papers.ked.dependency import measure_dependency
from permafrost_papers.ked.grouping import group_features, sparsify
from permafrost_papers.ked.partition import contiguous_partition, random_partition
from tests.support.superfeatures import Additive, dense, groups_of, is_nested, keyed_rows


def test_a_partition_covers_every_feature_once_and_is_nested():
    grouping = group_features(dense(), 8)

    assert grouping.partition.most == 8
    for number, assignment in enumerate(grouping.partition.assignments, start=1):
        assert assignment.shape == (20,)
        assert torch.equal(assignment.unique(), torch.arange(number))
    assert is_nested(grouping.partition)
    assert grouping.communities >= 8
    assert grouping.modularity[0] == pytest.approx(0)


def test_grouping_depends_on_the_matrix_and_the_seed_alone():
    first = group_features(dense(), 6, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        np.random.seed(99)
        again = group_features(1e6 * dense() + torch.eye(20), 6, seed=3)

    assert again.partition.sha256 == first.partition.sha256
    assert again.modularity == pytest.approx(first.modularity)


def test_the_merger_of_largest_gain_comes_first():
    weights = torch.zeros(8, 8).double()
    for a, b, weight in [
        (0, 1, 9),
        (2, 3, 9),
        (4, 5, 9),
        (6, 7, 9),
        (2, 4, 3),
        (0, 6, 2),
        (1, 3, 1),
    ]:
        weights[a, b] = weights[b, a] = weight

    partition = group_features(weights, 4, resolution=1.6).partition

    pairs = {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert groups_of(partition.assignment(4)) == pairs
    assert groups_of(partition.assignment(3)) == {(0, 1), (2, 3, 4, 5), (6, 7)}
    assert groups_of(partition.assignment(2)) == {(0, 1, 6, 7), (2, 3, 4, 5)}


def test_modularity_is_that_of_the_library():
    weights = dense(12).fill_diagonal_(0)
    grouping = group_features(weights, 3, neighbors=4)
    graph = networkx.from_numpy_array(sparsify(weights.numpy(), 4))

    for number, found in enumerate(grouping.modularity, start=1):
        sets = groups_of(grouping.partition.assignment(number))
        assert found == pytest.approx(networkx.community.modularity(graph, sets))


def test_a_null_feature_makes_no_group_of_its_own():
    network, (keys, inputs) = Additive(nn.GELU), keyed_rows()
    # The network does not read columns 9 and 10: 9 is the negative of column 4, and 10 is constant.
    inputs = torch.cat([inputs, -inputs[:, 4:5], torch.ones(24, 1)], dim=1)
    total = measure_dependency(lambda x: network(x[:, :9]), [(keys, inputs)], table_probes(11))
    with np.errstate(invalid="ignore"):
        correlation = torch.corrcoef(inputs.T)

    grouping = group_features(total.matrix, 3, correlation=correlation)

    assert grouping.null_features == (9, 10)
    assert groups_of(grouping.partition.assignment(3)) == {(0, 3, 6, 10), (1, 4, 7, 9), (2, 5, 8)}
    with pytest.raises(ValueError, match=r"features \[9, 10\] of the table"):
        group_features(total.matrix, 3)
    with pytest.raises(ConfigError, match="choose 1 to 9"):
        group_features(total.matrix, 10, correlation=correlation)


def test_a_null_cell_joins_its_neighbors():
    weights = torch.zeros(12, 12).double()  # a 3 x 4 grid whose middle row has no edges
    for a, b in [(0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (8, 9), (9, 10), (10, 11), (8, 10)]:
        weights[a, b] = weights[b, a] = 1

    grouping = group_features(weights, 2, grid=(3, 4))

    assert grouping.null_features == (4, 5, 6, 7)
    assert groups_of(grouping.partition.assignment(2)) == {tuple(range(8)), (8, 9, 10, 11)}


def test_every_node_keeps_its_strongest_edges():
    weights = np.array([[0, 3, 2, 1.0], [3, 0, 2, 1], [2, 2, 0, 1], [1, 1, 1, 0]])

    kept = sparsify(weights, 1)

    # Among equal edges, the one to the lowest node is kept: 2 keeps 0, and 3 keeps 0.
    assert sorted(map(tuple, np.argwhere(np.triu(kept)).tolist())) == [(0, 1), (0, 2), (0, 3)]
    assert np.array_equal(kept, kept.T)
    assert group_features(dense(64), 3).neighbors == 8
    assert group_features(dense(20), 3).neighbors == 4


def test_more_superfeatures_than_communities_raise_the_resolution():
    grouping = group_features(dense(24), 12)

    assert grouping.resolution > 1
    assert math.log(grouping.resolution, 1.25) == pytest.approx(
        round(math.log(grouping.resolution, 1.25))
    )


def test_groups_of_very_unequal_sizes_are_warned_of(caplog):
    weights = torch.zeros(40, 40).double()
    weights[:38, :38] = 1
    weights[38, 39] = weights[39, 38] = 1
    with caplog.at_level(logging.WARNING, logger="permafrost.superfeatures"):
        group_features(weights, 2)

    assert "1 of 2 superfeatures have fewer than 2.5 features (2)" in caplog.text


def test_a_random_partition_has_the_sizes_of_the_one_it_controls():
    like = group_features(dense(), 6).partition

    control = random_partition(like, seed=1)

    for number in range(1, 7):
        sizes = [torch.bincount(p.assignment(number)).tolist() for p in (like, control)]
        assert sizes[0] == sizes[1]
    assert is_nested(control)
    assert groups_of(control.assignment(6)) != groups_of(like.assignment(6))
    assert random_partition(like, seed=1).sha256 == control.sha256
    assert random_partition(like, seed=2).sha256 != control.sha256


def test_a_contiguous_partition_is_of_rectangles():
    control = contiguous_partition(8, 32, grid=(4, 8))

    assert is_nested(control)
    for number in range(1, 9):
        picture = control.assignment(number).view(4, 8)
        for group in range(number):
            rows, columns = torch.nonzero(picture == group, as_tuple=True)
            area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert area == len(rows)
    assert torch.bincount(control.assignment(8)).tolist() == [4] * 8
    assert groups_of(control.assignment(2)) == groups_of(torch.arange(32) % 8 // 4)


def test_a_contiguous_partition_of_a_table_is_of_runs():
    control = contiguous_partition(3, 10)

    assert control.assignment(3).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert control.grid is None
