"""Fit of the projections of features (annotate.features_channels): principal components of their channels.

One pass of the teacher over a sample of the training split accumulates the mean and the covariance of the channels of
each stage over all cells, of the same images that the pass stores (with their horizontal flips and borders).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from permafrost.annotation.outputs import BatchInfo, EncodedFields, FeaturesOutput
from permafrost.annotation.samples import Sample, SampleTask, measure_sample, select_sample
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.store import PROJECTION_RECORDS, PassOptions
from permafrost.core.errors import require
from permafrost.core.tasks import Executor
from permafrost.loading.channel_moments import ChannelMoments
from permafrost.models.classifier import Classifier, ModelOutput
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.projections import read_projections, write_projection
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
