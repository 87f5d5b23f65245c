"""Scores of groups of records, such as bird and background in Waterbirds, and of sets of groups.

A study compares sets: in Waterbirds the groups on their usual background (in distribution, 0 and 3) and the others
(out of distribution, 1 and 2). The paper does not state whether such a set weights its records or its groups
equally, and groups differ in size, so both are reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from permafrost.core.records import NO_GROUP


def group_scores(
    name: str, hits: Tensor, groups: Tensor, group_sets: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Shares of `hits` (bool [N]) in [0, 1] by group [N]. Groups and sets without a record are left out.

    group_<name>             number of the group -> share
    <set>_<name>             share over all records of the set's groups
    <set>_mean_group_<name>  mean of the shares of the set's groups
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
