"""What a judge is given: a subject, a split's records, and whatever else it may ask for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.config.judging import EvaluateOptions
from pipeline.config.verbs import EvaluateConfig
from pipeline.core.errors import ConfigError
from pipeline.core.records import Batch
from pipeline.evaluation.forward import Subject, judge_records
from pipeline.evaluation.networks import Networks
from pipeline.evaluation.predictions import Judged
from pipeline.loading.dataset import StoreDataset
from pipeline.loading.geometry import judged_view
from pipeline.loading.loader import move_batch
from pipeline.store.reader import Store


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One split of an evaluation."""

    split: str
    subject: Subject
    dataset: StoreDataset
    """The split's records in the index's order, each once, with boxes and masks (`iter_in_order` reads them in
    batches, `geometry.judged_view` gives the view to judge in). `passes` are those of the subject's teachers."""
    config: EvaluateConfig
    networks: Networks
    """The teacher network and other students, where a judge needs them."""
    folder: Path
    """Of the evaluation: where a judge writes what is too large for metrics.json, named <judge>-<split>.*"""
    fingerprint: str = ""
    """Of the subject: sha256 of its weights, as config.yaml names it."""
    localise: bool = True
    """Whether the shared pass looks at maps and regions."""

    @property
    def options(self) -> EvaluateOptions:
        """The section `evaluate`, with one section for each judge that has options."""
        return self.config.evaluate

    @property
    def store(self) -> Store:
        """That the records are of."""
        return self.dataset.store

    @cached_property
    def judged(self) -> Judged:
        """The one forward pass that accuracy and localization share, and the table of records with them."""
        return judge_records(self.subject, self.dataset, self.options, localise=self.localise)

    def views(self, positions: Sequence[int] | None = None) -> Iterator[Batch]:
        """The split, or some positions of it, in batches, each in the view to judge in, where the subject lies."""
        subject, size = self.subject, self.options.batch_size
        chosen = range(len(self.dataset)) if positions is None else positions
        for start in range(0, len(chosen), size):
            batch = self.dataset.__getitems__(list(chosen[start : start + size]))
            yield judged_view(
                move_batch(batch, subject.device), self.options.frame, subject.input_size
            )

    @cached_property
    def has_regions(self) -> bool:
        """Whether any record has a region of evaluate.region."""
        if self.options.region == "masks":
            return bool((self.dataset.columns["mask_size"] > 0).any())
        boxes = self.store.index["boxes"].take(self.dataset.rows)
        return any(len(of_record) > 0 for of_record in boxes.to_pylist())

    @property
    def has_maps(self) -> bool:
        """Whether the subject's first teacher pass holds maps."""
        passes = self.dataset.passes
        return bool(passes) and any(spec.name == "map" for spec in passes[0].manifest.fields)


def require_one_label(trial: Trial, judge: str) -> None:
    """ConfigError unless records of the split have one label each, of the subject's classes."""
    if trial.dataset.has_many_labels:
        raise ConfigError(
            f"judges={judge} needs one label a record, and {trial.store.path} has many; leave it out of judges"
        )
    if not trial.dataset.has_labels:
        raise ConfigError(
            f"judges={judge} needs labels, and no record of {trial.split} has one of the subject's classes; "
            "choose another evaluate.splits, or evaluate.store"
        )
