"""Networks with known superfeatures."""

import itertools

import torch
from torch import nn

from permafrost.models.providers import freeze
from permafrost_papers.ked.curvature import table_probes
from permafrost_papers.ked.dependency import measure_dependency

GROUPS = ([0, 3, 6], [1, 4, 7], [2, 5, 8])


class Additive(nn.Module):
    """Network whose logits [B, K] are a sum of networks, each of which reads one group of a table's columns."""

    def __init__(self, activation, groups=GROUPS, classes=4, output=None):
        super().__init__()
        torch.manual_seed(1)
        self.groups = [list(group) for group in groups]
        self.output = output or (lambda logits: logits)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(len(g), 16), activation(), nn.Linear(16, classes))
            for g in groups
        )
        freeze(self.double())

    def explanations(self, inputs):  # [B, M, K]
        return torch.stack(
            [part(inputs[:, g]) for g, part in zip(self.groups, self.parts, strict=True)], dim=1
        )

    def forward(self, inputs):
        return self.output(self.explanations(inputs).sum(dim=1))


def keyed_rows(number=24, width=9, seed=0):
    inputs = torch.randn(number, width, generator=torch.Generator().manual_seed(seed)).double()
    return [f"record-{n}" for n in range(number)], inputs


def measured(network, number=24, probes=None, **options):
    return measure_dependency(network, [keyed_rows(number)], probes or table_probes(9), **options)


def groups_of(assignment):
    return {
        tuple(torch.nonzero(assignment == group).flatten().tolist())
        for group in assignment.unique()
    }


def dense(features=20, seed=0):
    weights = torch.rand(features, features, generator=torch.Generator().manual_seed(seed)).double()
    return weights + weights.T


def is_nested(partition):
    return all(
        len({(int(f), int(c)) for f, c in zip(fine, coarse, strict=True)}) == len(fine.unique())
        for coarse, fine in itertools.pairwise(partition.assignments)
    )


MADE_FROM = {"teacher": {"weights_sha256": "ab" * 32}, "records": 24}


OPTIONS = {"derivative": "fd", "number": 3, "grid": [3, 3]}
