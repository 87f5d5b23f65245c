"""The price of freezing: bytes and hours of stored views, and how far their targets are from a live teacher's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, isnan, prod

import numpy as np

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.pass_plan import plan_pass
from permafrost.annotation.stored_views import (
    StoredViews,
    fields_of_views,
    place_fields_of,
    read_inputs,
    requested_views,
)
from permafrost.config.augment import RandomViewsConfig
from permafrost.config.store import PrecomputeConfig, SubsetOptions
from permafrost.core.records import (
    FEATURES,
    REST_LOGITS,
    TOP_CLASS,
    TOP_LOGITS,
    VIEW_FIELDS,
    FieldSpec,
)
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.loading.dataset import StoreDataset, iter_batches
from permafrost.loading.recipes import Recipe
from permafrost.loading.transfer import iter_on_device
from permafrost.models.compute import torch_threads
from permafrost.store.frames import ShardFrames
from permafrost.store.reader import Store, TeacherPass
from permafrost_estimate.options import EstimateOptions
from permafrost_estimate.sample import Whole
from permafrost_estimate.steps import annotator_of, seconds_of
from permafrost_estimate.turns import TimeBudget
from permafrost_estimate.volume import pass_parts
from permafrost_evaluators.equivariance import RECIPE, compare_views

_METRICS = {"logits": "logits_kl", "maps": "map_cosine", "features": "features_cosine"}
"""Metric of each output, whose distance is the KL in nats, or 1 - cosine."""


@dataclass(frozen=True, kw_only=True)
class FreezingRow:
    """A number of stored views, or a live teacher."""

    views: int
    """Stored views per record, 0 for frozen targets of the whole image."""
    bytes: float
    """Bytes of the targets of all records."""
    bytes_by_output: dict[str, float] = field(default_factory=dict)
    """The same by output, and of what says what the views are (`views`)."""
    hours: float
    """Hours of one worker, once for all students; of a live teacher those that it adds to one job of all students."""
    distances: dict[str, float] = field(default_factory=dict)
    """Distance of the targets of a view to the teacher's answer to it, by output: KL in nats, 1 - cosine; infinite for
    one that was not measured."""
    is_live: bool = False

    @property
    def distance(self) -> float:
        """Largest of the distances."""
        return max(self.distances.values(), default=0.0)

    @property
    def words(self) -> str:
        """Options of this setting, as they are typed."""
        if self.is_live:
            return "mode=live"
        return f"mode=replay views=random views.count={self.views}" if self.views else "mode=frozen"


@dataclass(frozen=True, kw_only=True)
class ViewCost:
    """Measurement of views of a recipe on the sample."""

    seconds: float
    """Seconds of a worker for one stored view."""
    distances: dict[str, float]
    """Distance of targets of whole images to the teacher's answers to views, by output that can be compared."""


def measure_views(
    config: PrecomputeConfig, store: Store, rounds: int, budget: TimeBudget
) -> ViewCost:
    """Measure what a stored view costs, and how far targets of whole images are from the teacher's answers to views.

    Args:
        config: Options of the pass, and `augment`.
        store: Store of the sample, with the pass of whole images.
        rounds: Number of times that a batch is annotated; the fastest one counts.
        budget: Time of the estimate.
    """
    canonical = store.open_passes((plan_pass(config, store).folder.name,))
    mix = config.views.mix if isinstance(config.views, RandomViewsConfig) else ()
    # Views are of the whole frame, and the sample has no other records.
    changed = replace(config, views=RandomViewsConfig(count=1, mix=mix), subset=SubsetOptions())
    first = store.part(0, 1)  # which a pass of views is over
    views = requested_views(changed, first)
    plan = plan_pass(changed, store, views)
    with torch_threads(config.cluster.threads_per_actor):
        annotator = annotator_of(plan)
        return ViewCost(
            seconds=_view_seconds(
                annotator, views, first, plan.options.records_per_batch, rounds, budget
            ),
            distances=_distances(annotator, config, store, canonical),
        )


def _view_seconds(
    annotator: TeacherAnnotator,
    views: StoredViews,
    store: Store,
    batch_size: int,
    rounds: int,
    budget: TimeBudget,
) -> float:
    """Measure the seconds of one view of a record of the largest shard."""
    entries = [store.shards[number] for number in views.shards.tolist()]
    shard = max(entries, key=lambda entry: entry.records)
    rows = views.rows_of(store, shard)[:batch_size]
    keys = [store.index.shard_keys(store.shards.number_of(shard.name))[row] for row in rows]
    drawn = views.draw(store, shard).select(slice(0, len(rows)))
    batch = read_inputs(ShardFrames(store, shard, rows), drawn, annotator.input_size, 0, len(rows))
    work = partial(annotator.annotate, [batch], keys, drawn)
    sides = {"": partial(seconds_of, work, len(rows))}
    return min(budget.in_turn(sides, rounds, "views", share=0.6)[""])


def _distances(
    annotator: TeacherAnnotator,
    config: PrecomputeConfig,
    store: Store,
    canonical: Sequence[TeacherPass],
) -> dict[str, float]:
    output = FEATURES if canonical[0].fields_of(FEATURES) else None
    dataset = StoreDataset(store, np.arange(store.index.num_rows), canonical, output=output)
    model = EvaluatedModel(network=annotator.model, input_size=annotator.input_size)
    batches = iter_on_device(
        iter_batches(dataset, config.annotate.records_per_batch, None), model.device
    )
    metrics = compare_views(model, dataset, {RECIPE: config.augment.operations}, batches)
    measured = {
        name: 1 - metrics[metric][RECIPE] if "cosine" in metric else metrics[metric][RECIPE]
        for name, metric in _METRICS.items()
        if metric in metrics
    }
    return {name: inf if isnan(value) else max(0.0, value) for name, value in measured.items()}


def freezing_rows(
    config: PrecomputeConfig,
    views: Sequence[int],
    teacher: TeacherPass,
    numbers: Whole,
    seconds: float,
    cost: ViewCost,
) -> list[FreezingRow]:
    """Return a row for each number of views.

    Args:
        config: Options of the pass, and `augment`.
        views: Numbers of stored views, 0 for frozen targets.
        teacher: Pass of whole images of the sample.
        numbers: Numbers of the whole store.
        seconds: Seconds of a worker for the pass of whole images.
        cost: Result of `measure_views`.
    """
    whole, view = Counter[str](), Counter[str]()
    for part in pass_parts(teacher, numbers):
        whole[_output_of(part.name)] += part.bytes
    mixed = isinstance(config.views, RandomViewsConfig) and config.views.mixes
    recipe, places = Recipe(config.augment.operations), place_fields_of(config.augment)
    of_views = fields_of_views(recipe, mixed=mixed, place_fields=places)
    for spec in (*teacher.manifest.fields, *of_views):
        view[_output_of(spec.name)] += numbers.trained * _view_bytes(spec)
    outputs = [name for name in view if name != _VIEWS]
    fidelity = teacher.manifest.fidelity
    # The targets of a stored view are the teacher's answer to the same pixels, in their stored form.
    errors = {
        name: max(
            [1 - cosine for field, cosine in fidelity.items() if _output_of(field) == name],
            default=0.0,
        )
        for name in outputs
    }
    rows = []
    for count in views:
        by_output = {name: whole[name] + count * view[name] for name in whole | view}
        rows.append(
            FreezingRow(
                views=count,
                bytes=sum(by_output.values()),
                bytes_by_output={name: size for name, size in by_output.items() if size},
                hours=(seconds + cost.seconds * count * numbers.trained) / 3600,
                distances=errors
                if count
                else {name: cost.distances.get(name, inf) for name in outputs},
            )
        )
    return rows


_VIEWS = "views"
_OUTPUTS_OF = {
    **dict.fromkeys((TOP_LOGITS, TOP_CLASS, REST_LOGITS), "logits"),
    **dict.fromkeys(("map", "map_scale", "target_class"), "maps"),
    **dict.fromkeys(VIEW_FIELDS, _VIEWS),
}


def _output_of(name: str) -> str:
    """Return the output of a field; other parts of a pass have their own name."""
    return FEATURES if name.startswith(f"{FEATURES}_") else _OUTPUTS_OF.get(name, name)


def _view_bytes(spec: FieldSpec) -> int:
    """Return the bytes of one stored view, which needs neither horizontal flips nor a border, before compression."""
    shape = [*spec.shape[1:]] if spec.mirrored else [*spec.shape]
    if spec.margin:
        shape[-2:] = [round(side / (1 + 2 * spec.margin)) for side in shape[-2:]]
    return prod(shape) * np.dtype(spec.dtype).itemsize


def propose(rows: Sequence[FreezingRow], options: EstimateOptions) -> str:
    """Propose the cheapest setting within the limits: the fewest bytes within a distance, the most views within bytes.

    Args:
        rows: Settings, of which a live teacher is one.
        options: Limits, of which at least one is set.
    """
    budget, largest = options.budget_bytes, options.max_distance
    within = [
        row
        for row in rows
        if (budget is None or row.bytes <= budget) and (largest is None or row.distance <= largest)
    ]
    if not (stored := [row for row in within if not row.is_live]):
        return (
            f"{within[0].words}, as no stored targets are within the limits"
            if within
            else ("no setting is within the limits")
        )
    if largest is not None:
        return min(stored, key=lambda row: row.bytes).words
    return max(stored, key=lambda row: row.views).words
