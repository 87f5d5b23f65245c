"""Fit of the projections of features (annotate.features_channels): principal components of their channels.

One pass of the teacher over a sample of the training split accumulates the mean and the covariance of the channels of
each stage over all cells, of the same images that the pass stores (with their horizontal flips and borders).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from permafrost.annotation.outputs import BatchInfo, EncodedFields, FeaturesOutput
from permafrost.annotation.samples import Sample, SampleTask, measure_sample, select_sample
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.store import PROJECTION_RECORDS, PassOptions
from permafrost.core.errors import require
from permafrost.core.tasks import Executor
from permafrost.models.classifier import Classifier, ModelOutput
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.projections import Projection, read_projections, write_projection
from permafrost.store.shards import ShardEntry


def fit_projections(
    executor: Executor, task: FitProjections, shards: Sequence[ShardEntry], split: str
) -> dict[str, float]:
    """Write the projections of a pass, unless they exist.

    Args:
        executor: Executor that runs the task.
        task: Task that fits the projections.
        shards: Shards of the store; those of the split are sampled.
        split: Split that students are trained on.

    Returns:
        The fraction of the variance of this sample that each of those keeps that exist.

    Raises:
        ConfigError: If the split has no records.
    """
    sample = select_sample([shard for shard in shards if shard.split == split], PROJECTION_RECORDS)
    require(
        len(sample) > 0,
        f"annotate.features_channels is fitted on records of split={split}, but the store has none; set split= to the "
        "split that students are trained on",
    )
    return measure_sample(executor, task, sample, shards)


class ChannelMoments:
    """Sums over the cells of one stage, for the mean and covariance of its channels."""

    def __init__(self, channels: int) -> None:
        self.cells = 0
        self.sums = torch.zeros(channels, dtype=torch.float64)
        self.products = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add features [n, C, h, w]."""
        values = features.detach().transpose(0, 1).flatten(1).double()
        self.cells += values.shape[1]
        self.sums += values.sum(dim=1).cpu()
        self.products += (values @ values.T).cpu()

    def fit(self, components: int) -> Projection:
        """Return the projection on the components of the largest variances, each with its largest entry positive."""
        mean = self.sums / self.cells
        covariance = self.products / self.cells - torch.outer(mean, mean)
        variances, vectors = torch.linalg.eigh(covariance)
        variances, vectors = variances.flip(0)[:components], vectors.T.flip(0)[:components]
        largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
        vectors = vectors * largest.sign()
        return Projection(
            mean=mean.numpy().astype(np.float32),
            components=vectors.numpy().astype(np.float32),
            variances=variances.clamp(min=0).numpy().astype(np.float32),
            total=float(covariance.diagonal().sum()),
        )

    def kept_share(self, projection: Projection) -> float:
        """Return the fraction of the variance about the projection's mean that is along its components."""
        center = self.sums / self.cells
        shift = center - torch.from_numpy(projection.mean).double()
        moments = (
            self.products / self.cells - torch.outer(center, center) + torch.outer(shift, shift)
        )
        components = torch.from_numpy(projection.components).double()
        return float((components @ moments * components).sum() / moments.diagonal().sum())


class _MomentsOutput(FeaturesOutput):
    """Output that stores nothing, and adds the features of each batch to the moments of their stage."""

    def __init__(self, config: PassOptions, explainer: ExplainerConfig) -> None:
        super().__init__(config, explainer)
        self.moments: dict[str, ChannelMoments] = {}

    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        for name, values in self.values(output).items():
            if values.dim() == 4:
                self.moments.setdefault(name, ChannelMoments(values.shape[1])).add(values)
        return EncodedFields({}, {})


@dataclass(frozen=True, kw_only=True)
class FitProjections(SampleTask[dict[str, float]]):
    """Task that fits the projections on a sample and writes them, unless they exist.

    A stage of no more channels than annotate.features_channels gets none.
    """

    folder: RootedPath
    """Folder of the pass."""

    @torch.no_grad()
    def measure(self, sample: Sample) -> tuple[int, dict[str, float]]:
        count = self.config.features_channels
        assert count is not None
        annotator = self.build_annotator()
        output_kind = _MomentsOutput(self.config, self.explainer)
        annotator.output_kinds = [output_kind]
        existing = read_projections(self.folder)
        records = 0
        for frames, keys in self.iter_batches(sample):
            annotator.annotate([frames], keys)
            records += len(keys)
        for field, moments in output_kind.moments.items():
            if len(moments.sums) > count and field not in existing:
                write_projection(self.folder, field, moments.fit(count))
        kept = {name: output_kind.moments[name].kept_share(existing[name]) for name in existing}
        return records, kept
