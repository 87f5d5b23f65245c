"""Grouping of features to a nested partition by their dependency: Louvain communities, their mergers and splits.

Shape letters: d features, n features that are not null, M superfeatures.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import networkx
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.core.digests import derive_seed
from permafrost.core.errors import require
from permafrost_papers.ked.dependency import symmetric
from permafrost_papers.ked.partition import Partition

logger = logging.getLogger("permafrost.superfeatures")

NULL_SHARE = 1e-6
"""Fraction of the largest row sum below which a feature counts as null, that is, independent of all others."""
_STARTS = 5
"""Number of runs of Louvain's algorithm, of which the best is used."""
_FINER = 1.25
"""Factor by which the resolution is raised while there are too few communities."""
_MIN_NEIGHBORS = 4
_DECIMALS = 12
"""Decimals of normalized weights and gains, so that the summation order does not break ties."""


@dataclass(frozen=True, kw_only=True)
class GroupingFacts:
    """Facts about the search of a partition."""

    seed: int
    neighbors: int
    """Number k of strongest edges kept for each feature. An edge is kept if either of its features keeps it."""
    resolution: float
    """Resolution at which Louvain's algorithm found enough communities."""
    communities: int
    """Number of communities found at that resolution."""
    modularity: tuple[float, ...]
    """Modularity of the partitions into 1, 2, ... M superfeatures, on the sparsified graph at resolution 1."""
    null_features: tuple[int, ...]
    """Features that were not clustered, but assigned to the superfeature of their nearest feature."""


@dataclass(frozen=True, kw_only=True)
class Grouping(GroupingFacts):
    """A partition and the facts of its search."""

    partition: Partition


def group_features(
    dependency: Tensor,
    number: int,
    *,
    levels: int | None = None,
    seed: int = 0,
    grid: tuple[int, int] | None = None,
    correlation: Tensor | None = None,
    neighbors: int | None = None,
    resolution: float = 1.0,
) -> Grouping:
    """Group features into a nested partition with 1 to `levels` superfeatures, optimized for `number` of them.

    Louvain's algorithm searches for `number` communities. Coarser levels merge them, finer levels split them, so the
    levels up to `number` do not depend on `levels`.

    Args:
        dependency: f64 [d, d], whose diagonal, the features' own curvature, is not read.
        number: Number of superfeatures that is optimized.
        levels: Number of superfeatures of the finest level, at least `number`; None means `number`.
        seed: Seed of Louvain's algorithm.
        grid: (rows, columns) of the features, on which a null feature joins the nearest one.
        correlation: [d, d] of a table's features, by which a null feature joins the one with the largest |correlation|.
        neighbors: Number of strongest edges kept for each feature; None means max(4, n / 8). With n - 1 every edge is
            kept, and Louvain's algorithm finds little.
        resolution: Resolution of Louvain's algorithm, which is raised until there are enough communities.

    Raises:
        ConfigError: If no feature depends on another, or fewer do than superfeatures are asked for.
        ValueError: If a table has null features, and no correlation is given.
    """
    weights = symmetric(dependency.double().cpu()).numpy()
    live = _live(weights)
    null = np.setdiff1d(np.arange(len(weights)), live)
    most = number if levels is None else levels
    require(
        len(live) != 0,
        f"none of the {len(weights)} features depends on another, so they cannot be grouped; if a global average "
        "pooling makes logits linear in the cells, probe pixel blocks or cut the trunk earlier; if the network "
        "has ReLUs, use derivative=fd, because its exact second derivatives are zero",
    )
    require(
        1 <= most <= len(live),
        f"{most} superfeatures are not possible with {len(live)} features that depend on others; choose 1 to "
        f"{len(live)}",
    )
    k = max(_MIN_NEIGHBORS, len(live) // 8) if neighbors is None else neighbors
    graph = sparsify((weights / weights.max())[np.ix_(live, live)].round(_DECIMALS), k)
    communities = _louvain(graph, seed, resolution)
    while communities.max() + 1 < number:
        resolution *= _FINER
        communities = _louvain(graph, seed, resolution)
    nested = _mergers(graph, communities)[:number]
    if most > number:
        nested += _splits(graph, nested[-1], most, seed)
    modularity = tuple(_modularity(graph, level) for level in nested)

    assignments = np.empty((most, len(weights)), dtype=np.int64)
    assignments[:, live] = nested
    if len(null):
        assignments[:, null] = assignments[:, _nearest(null, live, grid, correlation)]
    _warn_of_small_groups(nested[number - 1], number)
    return Grouping(
        partition=Partition(
            assignments=torch.from_numpy(np.stack([_numbered(row) for row in assignments])),
            grid=grid,
        ),
        seed=seed,
        neighbors=k,
        resolution=resolution,
        communities=int(communities.max()) + 1,
        modularity=modularity,
        null_features=tuple(null.tolist()),
    )


def count_dependent(dependency: Tensor) -> int:
    """Count the features of a dependency matrix f64 [d, d] that are not null, the maximum number of superfeatures."""
    return len(_live(symmetric(dependency.double().cpu()).numpy()))


def _live(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    strength = weights.sum(axis=1)
    return np.flatnonzero((strength >= NULL_SHARE * strength.max()) & (strength > 0))


def sparsify(weights: NDArray[np.float64], neighbors: int) -> NDArray[np.float64]:
    """Keep an edge if it is among the strongest of either node. Of equal edges, those to the lowest nodes are kept.

    Args:
        weights: Symmetric, [n, n].
        neighbors: Number of edges that each node keeps.
    """
    strongest = np.argsort(-weights, axis=1, kind="stable")[:, :neighbors]
    kept = np.zeros(weights.shape, dtype=bool)
    np.put_along_axis(kept, strongest, True, axis=1)
    return np.where(kept | kept.T, weights, 0.0)


def _louvain(graph: NDArray[np.float64], seed: int, resolution: float) -> NDArray[np.int64]:
    """Best communities of several runs, i64 [n]. A node without edges is a separate community."""
    if not graph.any():
        return np.arange(len(graph))
    nodes = networkx.Graph()
    nodes.add_nodes_from(range(len(graph)))
    nodes.add_weighted_edges_from(
        (int(row), int(column), float(graph[row, column]))
        for row, column in np.argwhere(np.triu(graph)).tolist()
    )
    communities = [
        networkx.community.louvain_communities(
            nodes,
            weight="weight",
            resolution=resolution,
            seed=derive_seed(seed, "louvain", start),
        )
        for start in range(_STARTS)
    ]
    assignments = [_assignment(sets) for sets in communities]
    # Of equally good ones, max returns the first.
    return max(
        assignments,
        key=lambda assignment: round(_modularity(graph, assignment, resolution), _DECIMALS),
    )


def _splits(
    graph: NDArray[np.float64], coarse: NDArray[np.int64], number: int, seed: int
) -> list[NDArray[np.int64]]:
    """Split the communities of `coarse` in levels with one more community each, up to `number`: i64 [n] each.

    Louvain's algorithm divides each community separately, at the first resolution with enough parts in total. Mergers
    within communities produce the intermediate levels.
    """
    resolution = 1.0
    groups = [np.flatnonzero(coarse == group) for group in range(int(coarse.max()) + 1)]
    while True:
        fine = np.empty_like(coarse)
        parts = 0
        for members in groups:
            communities = _louvain(graph[np.ix_(members, members)], seed, resolution)
            fine[members] = communities + parts
            parts += int(communities.max()) + 1
        if parts >= number:
            break
        resolution *= _FINER
    return _mergers(graph, _numbered(fine), within=coarse)[1 : number - len(groups) + 1]


def _assignment(sets: list[set[int]]) -> NDArray[np.int64]:
    """Convert communities from sets to i64 [n], numbered by their lowest node."""
    community_of = {node: community for community, nodes in enumerate(sets) for node in nodes}
    return _numbered(np.array([community_of[node] for node in range(len(community_of))]))


def _mergers(
    graph: NDArray[np.float64],
    communities: NDArray[np.int64],
    within: NDArray[np.int64] | None = None,
) -> list[NDArray[np.int64]]:
    """Levels of 1, 2, ... communities, i64 [n] each, made by repeatedly merging the pair with the largest gain.

    Args:
        within: Coarser communities that are not merged with each other, and are the first level.
    """
    levels = [communities]
    fewest = 1 if within is None else int(within.max()) + 1
    while (number := int(levels[0].max()) + 1) > fewest:
        between = _between(graph, levels[0])
        gain = 2 * between / graph.sum() - 2 * np.multiply.outer(
            strength := between.sum(axis=1) / graph.sum(), strength
        )
        gain[np.tril_indices(number)] = -np.inf
        if within is not None:
            owner = np.empty(number, np.int64)
            owner[levels[0]] = within
            gain[owner[:, None] != owner] = -np.inf
        # Of equal gains, argmax returns the first, that of the lowest communities.
        low, high = divmod(int(gain.round(_DECIMALS).argmax()), number)
        levels.insert(0, _numbered(np.where(levels[0] == high, low, levels[0])))
    return levels


def _between(graph: NDArray[np.float64], assignment: NDArray[np.int64]) -> NDArray[np.float64]:
    """Total weight between each pair of communities, with twice the weight within a community on the diagonal."""
    member = np.eye(int(assignment.max()) + 1)[assignment]
    return member.T @ graph @ member


def _modularity(
    graph: NDArray[np.float64], assignment: NDArray[np.int64], resolution: float = 1.0
) -> float:
    share = _between(graph, assignment) / graph.sum()
    return float(np.trace(share) - resolution * np.square(share.sum(axis=1)).sum())


def _nearest(
    null: NDArray[np.int64],
    live: NDArray[np.int64],
    grid: tuple[int, int] | None,
    correlation: Tensor | None,
) -> NDArray[np.int64]:
    """Feature whose superfeature each null feature joins, the lowest of equally near ones."""
    if grid is not None:
        places = np.stack(np.unravel_index(np.arange(grid[0] * grid[1]), grid), axis=1)
        near = -np.square(places[null][:, None] - places[live][None]).sum(axis=2)
    elif correlation is not None:
        # The correlation of a constant column with any other is undefined.
        near = correlation.double().cpu().nan_to_num(nan=0.0).abs().numpy()[np.ix_(null, live)]
    else:
        raise ValueError(
            f"features {null.tolist()} of the table do not depend on others; pass the correlation of its columns"
        )
    return live[near.argmax(axis=1)]  # type: ignore[no-any-return]


def _numbered(assignment: NDArray[np.int64]) -> NDArray[np.int64]:
    """Renumber groups by their lowest feature."""
    _, first, place = np.unique(assignment, return_index=True, return_inverse=True)
    return np.take(first.argsort().argsort(), place)


def _warn_of_small_groups(finest: NDArray[np.int64], number: int) -> None:
    sizes = np.bincount(finest)
    small = sizes[sizes < len(finest) / (8 * number)]
    if len(small):
        logger.warning(
            "%d of %d superfeatures have fewer than %.1f features (%s); lower teacher.superfeatures or raise "
            "teaching.neighbors for groups of more equal sizes",
            len(small),
            number,
            len(finest) / (8 * number),
            ", ".join(map(str, sorted(small.tolist()))),
        )
