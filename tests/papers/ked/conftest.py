"""Fixtures of training."""

import pytest
from torch import nn

from permafrost_papers.ked.grouping import group_features
from permafrost_papers.ked.search import partition_artifact, save_partition
from tests.support.superfeatures import MADE_FROM, OPTIONS, Additive, measured


@pytest.fixture
def kept(tmp_path):
    total = measured(Additive(nn.GELU))
    grouping = group_features(total.matrix, 3, grid=(3, 3))
    artifact = partition_artifact(tmp_path, MADE_FROM, OPTIONS)
    save_partition(artifact, grouping, total)
    return artifact.folder, grouping, total
