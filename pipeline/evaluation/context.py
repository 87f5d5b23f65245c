"""What an evaluator is given: a model, a split's records, and whatever else it may ask for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.config.evaluation import EvaluateOptions
from pipeline.config.verbs import EvaluateConfig
from pipeline.core.errors import ConfigError
from pipeline.core.records import Batch
from pipeline.evaluation.forward import EvaluatedModel, predict_records
from pipeline.evaluation.networks import Networks
from pipeline.evaluation.predictions import Predictions
from pipeline.loading.dataset import StoreDataset
from pipeline.loading.geometry import evaluation_view
from pipeline.loading.loader import move_batch
from pipeline.store.reader import Store


@dataclass(frozen=True, kw_only=True)
class EvaluationContext:
    """One split of an evaluation."""

    split: str
    model: EvaluatedModel
    dataset: StoreDataset
    """The split's records in the index's order, each once, with boxes and masks (`iter_in_order` reads them in
    batches, `geometry.evaluation_view` gives the view to evaluate in). `passes` are those of the subject's teachers."""
    config: EvaluateConfig
    networks: Networks
    """The teacher network and other students, where an evaluator needs them."""
    folder: Path
    """Of the evaluation: where an evaluator writes what is too large for metrics.json, named <evaluator>-<split>.*"""
    fingerprint: str = ""
    """Of the model: sha256 of its weights, as config.yaml names it."""
    localize: bool = True
    """Whether the shared pass looks at maps and regions."""

    @property
    def options(self) -> EvaluateOptions:
        """The section `evaluate`, with one section for each evaluator that has options."""
        return self.config.evaluate

    @property
    def store(self) -> Store:
        """That the records are of."""
        return self.dataset.store

    @cached_property
    def predictions(self) -> Predictions:
        """The one forward pass that accuracy and localization share, and the table of records with them."""
        return predict_records(self.model, self.dataset, self.options, localize=self.localize)

    def iter_batches(self, positions: Sequence[int] | None = None) -> Iterator[Batch]:
        """The split, or some positions of it, in batches, each in the view to evaluate in, where the subject lies."""
        model, size = self.model, self.options.batch_size
        chosen = range(len(self.dataset)) if positions is None else positions
        for start in range(0, len(chosen), size):
            batch = self.dataset.__getitems__(list(chosen[start : start + size]))
            yield evaluation_view(
                move_batch(batch, model.device), self.options.frame, model.input_size
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


def require_one_label(context: EvaluationContext, evaluator: str) -> None:
    """ConfigError unless records of the split have one label each, of the subject's classes."""
    if context.dataset.has_many_labels:
        raise ConfigError(
            f"evaluators={evaluator} needs one label a record, and {context.store.path} has many; leave it out of evaluators"
        )
    if not context.dataset.has_labels:
        raise ConfigError(
            f"evaluators={evaluator} needs labels, and no record of {context.split} has one of the subject's classes; "
            "choose another evaluate.splits, or evaluate.store"
        )
