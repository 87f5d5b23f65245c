"""The interface of an evaluator: its input, how it runs, what it checks first, and what the report shows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from permafrost.config.evaluation import EVALUATORS, EvaluateOptions
from permafrost.config.options import resolve_implementation
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.errors import ConfigError
from permafrost.core.files import write_atomically
from permafrost.core.interrupts import check_interrupted
from permafrost.core.records import Batch
from permafrost.evaluation.forward import EvaluatedModel, Predictions, predict_records
from permafrost.evaluation.other_networks import Networks
from permafrost.evaluation.scores import PLAIN, Metric
from permafrost.loading.dataset import StoreDataset, iter_batches
from permafrost.loading.geometry import evaluation_view
from permafrost.loading.transfer import iter_on_device
from permafrost.store.index import Rows
from permafrost.store.reader import Store, TeacherPass


@dataclass(frozen=True, kw_only=True)
class EvaluationContext:
    """The evaluation of one split."""

    split: str
    model: EvaluatedModel
    dataset: StoreDataset
    """Records of the split in the order of the index, each once, with boxes and masks. `iter_batches` reads them in
    batches, and `geometry.evaluation_view` returns the view to evaluate in. `passes` are those of the evaluated
    model's teachers."""
    config: EvaluateConfig
    networks: Networks
    """Teacher network and other students, for evaluators that need them."""
    folder: Path
    """Folder of the evaluation, to which evaluators `write` files (<evaluator>-<split>.*) too large for
    metrics.json."""
    fingerprint: str = ""
    """Fingerprint of the model: sha256 of its weights, as recorded in config.yaml."""
    localize: bool = True
    """True if the shared forward pass also evaluates maps and regions."""
    written: dict[str, str] = field(default_factory=dict)
    """SHA-256 by name of the files that were written to `folder`."""

    @property
    def options(self) -> EvaluateOptions:
        """Section `evaluate` of the config, with one subsection for each evaluator that has options."""
        return self.config.evaluate

    @property
    def store(self) -> Store:
        """Store of the records."""
        return self.dataset.store

    @cached_property
    def predictions(self) -> Predictions:
        """Results of the one forward pass that accuracy, localization and the table of records share."""
        return predict_records(self.model, self.dataset, self.options, localize=self.localize)

    def iter_batches(self, positions: Sequence[int] | None = None) -> Iterator[Batch]:
        """Iterate over the split, or some positions of it, in batches in the evaluation view on the model's device."""
        on_host = iter_batches(self.dataset, self.options.batch_size, positions)
        for _, batch in iter_on_device(on_host, self.model.device):
            check_interrupted()
            yield evaluation_view(batch, self.options.frame, self.model.input_size)

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the evaluation, whose digest metrics.json will list."""
        self.written[name] = write_atomically(self.folder / name, data)

    def open_rows(
        self, rows: Rows, passes: Sequence[TeacherPass] = (), payload: str | None = None
    ) -> StoreDataset:
        """Open rows of the store, to be read as those of the split are."""
        return StoreDataset(
            self.store,
            rows,
            passes,
            payload=payload,
            decode_threads=self.dataset.decode_threads.count,
        )

    @cached_property
    def has_regions(self) -> bool:
        """True if any record has a region of the kind evaluate.region."""
        if self.options.region == "masks":
            return self.dataset.has_masks
        return self.dataset.has_boxes

    @property
    def has_maps(self) -> bool:
        """True if the evaluated model's first teacher pass contains maps."""
        passes = self.dataset.passes
        return bool(passes) and any(spec.name == "map" for spec in passes[0].manifest.fields)


def require_one_label(context: EvaluationContext, evaluator: str) -> None:
    """Raise ConfigError unless the records of the split have one label each, among the evaluated model's classes."""
    if context.dataset.has_many_labels:
        raise ConfigError(
            f"evaluators={evaluator} needs one label per record, but records of {context.store.path} have many; "
            "remove it from evaluators"
        )
    if not context.dataset.has_labels:
        raise ConfigError(
            f"evaluators={evaluator} needs labels, but no record of {context.split} is labeled with a class of the "
            "evaluated model; choose another evaluate.splits or evaluate.store"
        )


# ---- evaluator -------------------------------------------------------------------------------------


class Quantity(NamedTuple):
    """A quantity of an evaluator: its metric and its table in the report."""

    name: str
    """Name <quantity> or <quantity>.<part> of a number, or of a mapping from names to numbers."""
    caption: str
    meaning: str
    """One sentence that says what the numbers are, for the report."""
    metric: Metric = PLAIN
    plot: str = ""
    """Kind of plot: "line" (one curve per arm over the names of the numbers), "bar" (arms side by side) or none."""
    is_main: bool = True
    """True if the table is always visible, False if it is collapsed."""


class Page(NamedTuple):
    """Section of an evaluator in the report."""

    short: str
    title: str
    introduction: str
    quantities: tuple[Quantity, ...]
    per_split: bool = True
    """False for an evaluator whose numbers are the same for every split."""
    pictures: str = ""
    """`module:function` that draws its pictures from its files: (results, teacher, store) -> list of PictureFigure
    (report/evaluator_sections.py)."""


def needs_nothing_else(context: EvaluationContext) -> Mapping[str, str]:
    """Check of an evaluator without requirements."""
    return {}


class Evaluator(NamedTuple):
    """An evaluator of one split."""

    run: Callable[[EvaluationContext], Mapping[str, Any]]
    """Function that computes the metrics of one split as JSON values, and writes large results to context.folder."""
    check: Callable[[EvaluationContext], Mapping[str, str]] = needs_nothing_else
    """Function called before anything is computed. It raises ConfigError if a requirement is missing, and returns
    path -> sha256 of the files that the evaluator reads in addition to the model, the store and the passes (such as
    another student)."""
    page: Page | None = None
    """Section in the report, None if the report shows the numbers elsewhere."""


# ---- build -----------------------------------------------------------------------------------------


def evaluator_named(name: str) -> Evaluator:
    """Return the evaluator of that name in config.evaluators.EVALUATORS."""
    evaluator: Evaluator = resolve_implementation(EVALUATORS[name])
    return evaluator
