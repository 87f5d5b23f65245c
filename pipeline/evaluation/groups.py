"""Scores of groups of records, as of bird and background in Waterbirds, and of sets of groups.

A set is what a study compares: in Waterbirds the groups on their usual background (in distribution, 0 and 3)
and the others (out of distribution, 1 and 2). The paper does not say whether such a set counts its records or
its groups alike, and groups differ in size, so both are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from pipeline.core.records import NO_GROUP


def group_scores(
    name: str, hits: Tensor, groups: Tensor, group_sets: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Shares of `hits` (bool [N]) in [0, 1], by group [N]; groups and sets without a record are left out.

    group_<name>             group's number -> share
    <set>_<name>             over the records of the set's groups
    <set>_mean_group_<name>  the mean of its groups' shares
    """
    present = torch.unique(groups[groups != NO_GROUP]).tolist()
    shares = {group: _share(hits[groups == group]) for group in present}
    scores: dict[str, Any] = {f"group_{name}": {str(g): share for g, share in shares.items()}}
    for set_name, members in group_sets.items():
        found = [group for group in members if group in shares]
        if found:
            inside = torch.isin(groups, torch.tensor(found))
            scores[f"{set_name}_{name}"] = _share(hits[inside])
            scores[f"{set_name}_mean_group_{name}"] = mean(shares[group] for group in found)
    return scores


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
