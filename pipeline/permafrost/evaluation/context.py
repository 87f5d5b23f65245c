"""The input of an evaluator: a model, the records of a split, and everything else it may need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.models import frame_of
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.batches import Batch
from permafrost.core.errors import require
from permafrost.core.interrupts import check_interrupted
from permafrost.evaluation.forward import EvaluatedModel, Predictions, predict_split
from permafrost.evaluation.other_networks import Networks
from permafrost.evaluation.saved_records import picture_features, picture_maps
from permafrost.loading.dataset import StoreDataset, iter_batches
from permafrost.loading.geometry import view_images
from permafrost.loading.transfer import iter_on_device
from permafrost.models.saved import TrainedModel
from permafrost.storage.files import file_at
from permafrost.store.index import RowNumbers
from permafrost.store.reader import Store, TeacherPass


@dataclass(frozen=True, kw_only=True)
class EvaluationContext:
    """The evaluation of one split."""

    split: str
    model: EvaluatedModel
    dataset: StoreDataset
    """Records of the split in the order of the index, each once, with boxes and masks. `iter_batches` reads them in
    batches in the picture to evaluate in. `passes` are those of the evaluated
    model's teachers."""
    config: EvaluateConfig
    networks: Networks
    """Teacher network and other students, for evaluators that need them."""
    folder: Path
    """Folder of the evaluation, to which evaluators `write` files (<evaluator>-<split>.*) too large for
    metrics.json."""
    trained: TrainedModel | None = None
    """Description of the student, None for other networks."""
    fingerprint: str = ""
    """Fingerprint of the model: sha256 of its weights, as recorded in config.yaml."""
    localize: bool = True
    """True if the shared forward pass also evaluates maps and regions."""
    written: dict[str, str] = field(default_factory=dict)
    """SHA-256 by name of the files that were written to `folder`."""

    pooled_features: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Pooled features f32 [n, d] and labels i64 [n] that evaluators share, by a digest of their rows."""

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
        return predict_split(
            self.model, self.dataset, self.options, self.networks.passes, localize=self.localize
        )

    def iter_batches(
        self, positions: Sequence[int] | None = None, dataset: StoreDataset | None = None
    ) -> Iterator[Batch]:
        """Iterate over the split in batches in the evaluation view on the model's device.

        Args:
            positions: Positions to read, in this order; None reads all.
            dataset: Records to read; None for those of the split.
        """
        records = self.dataset if dataset is None else dataset
        on_host = iter_batches(records, self.options.batch_size, positions)
        for batch in iter_on_device(on_host, self.model.device):
            check_interrupted()
            yield batch

    def iter_views(
        self, positions: Sequence[int], dataset: StoreDataset | None = None
    ) -> Iterator[Tensor]:
        """Iterate over images in the evaluation view, f32 [b, 3, H, W] in [0, 1], on the model's device.

        Args:
            positions: Positions to read, in this order.
            dataset: Records to read; None for those of the split.
        """
        yield from (
            view_images(batch, self.model.input_size)
            for batch in self.iter_batches(positions, dataset)
        )

    def picture_maps(self, positions: list[int]) -> dict[str, Tensor]:
        """Return `picture_maps` and `picture_features` of records of the split in the evaluation view."""
        return {
            **picture_maps(self.model, self.dataset, positions),
            **picture_features(self.model, self.dataset, positions),
        }

    @property
    def frame(self) -> str:
        """Part of an image in the evaluation: a value of evaluate.frame other than auto."""
        return frame_of(str(self.dataset.picture))

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the evaluation, whose digest metrics.json will list."""
        self.written[name] = file_at(self.folder / name).write(data)

    def open_rows(
        self, rows: RowNumbers, passes: Sequence[TeacherPass] = (), output: str | None = None
    ) -> StoreDataset:
        """Open rows of the store, to be read as those of the split are.

        Args:
            rows: Rows of the store's index.
            passes: Passes whose targets are read with them.
            output: Output to read in addition to logits and maps.
        """
        return StoreDataset(
            self.store,
            rows,
            passes,
            output=output,
            decode_threads=self.dataset.decode_threads.count,
        ).in_picture(self.dataset.picture)

    @cached_property
    def has_regions(self) -> bool:
        """True if any record has a region of the kind evaluate.region."""
        return self.dataset.has_masks if self.options.region == "masks" else self.dataset.has_boxes

    @property
    def has_maps(self) -> bool:
        """True if the evaluated model's first teacher pass contains maps."""
        passes = self.dataset.passes
        return bool(passes) and any(spec.name == "map" for spec in passes[0].manifest.fields)


def require_one_label(context: EvaluationContext, evaluator: str) -> None:
    """Raise ConfigError unless the records of the split have one label each, among the evaluated model's classes."""
    require(
        not context.dataset.has_many_labels,
        f"evaluators={evaluator} needs one label per record, but records of {context.store.path} have many; "
        "remove it from evaluators",
    )
    require(
        context.dataset.has_labels,
        f"evaluators={evaluator} needs labels, but no record of {context.split} is labeled with a class of the "
        "evaluated model; choose another evaluate.splits or evaluate.store",
    )
