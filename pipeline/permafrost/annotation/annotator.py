"""The annotator: computes stored fields from canonical frames with a frozen teacher, without Ray or disk access.

Not here: averages over views of a record (test-time augmentation) or over teachers. Each teacher is a pass of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from permafrost.annotation.outputs import (
    BatchInfo,
    EncodedFields,
    FeaturesOutput,
    FoldOutput,
    Framing,
    MapsOutput,
    OutputKind,
    build_outputs,
)
from permafrost.annotation.stored_views import DrawnViews
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.models import CENTER_CROP_FRACTION, ModelConfig
from permafrost.config.store import PassOptions
from permafrost.core.batches import Rendering
from permafrost.core.errors import ConfigError, UserError
from permafrost.core.progress import count_records
from permafrost.core.records import FieldSpec
from permafrost.core.tasks import task_context
from permafrost.loading.geometry import center_crop, render_frames, render_windows, warp
from permafrost.loading.mixtures import mix_images
from permafrost.loading.pixel_changes import change_rows
from permafrost.loading.transfer import copy_to, move_values
from permafrost.models.classifier import Classifier, Intermediates, ModelOutput, to_float32
from permafrost.models.compute import (
    ComputeSettings,
    deterministic_algorithms,
    device_name,
    require_tf32,
    resolve_device,
)
from permafrost.models.explanations import forward_to_explain, pass_precision, require_image_places
from permafrost.models.fold_networks import FoldsClassifier
from permafrost.models.providers import build_model, freeze, teacher_input_size, with_preprocessing
from permafrost.models.record_independence import require_no_memory
from permafrost.models.trained_weights import DataClasses, count_classes
from permafrost.store.frames import FrameBatch
from permafrost.store.projections import Projection

T = TypeVar("T")

logger = logging.getLogger("permafrost.annotation")


class FidelityError(UserError, ValueError):
    """Error for a stored form that is too far from its values."""


class NotFiniteError(UserError, ValueError):
    """Error for teacher outputs that are not finite."""


class TeacherAnnotator:
    """One teacher and its outputs, which share one forward pass."""

    def __init__(
        self,
        teacher: ModelConfig,
        classes: DataClasses,
        explainer: ExplainerConfig,
        config: PassOptions,
        frame_size: tuple[int, int],
        device: torch.device | None = None,
    ) -> None:
        """Build the teacher and its outputs.

        Args:
            teacher: Options returned by `resolve_network`.
            classes: Classes of the data.
            explainer: Options returned by `resolve_explainer`.
            config: Options of the pass, with a precision that is not "auto".
            frame_size: (height, width) of the canonical frames, or (1, columns) for a table.
            device: Device that computes; None takes a GPU if there is one.
        """
        self.config = config
        self.largest_batch = config.records_per_batch
        precision = pass_precision(config, explainer)
        self.device = device or resolve_device("device")
        if precision == "tf32":
            require_tf32("annotate.precision", self.device)
        self.settings = ComputeSettings(
            compile=config.compile,
            channels_last=teacher.suits_channels_last
            if config.channels_last is None
            else config.channels_last,
        ).with_precision(precision)
        teacher = with_preprocessing(teacher, count_classes(classes))
        crop_fraction = teacher.crop_fraction or CENTER_CROP_FRACTION
        self.crop_fraction = crop_fraction if teacher.frame == "center_crop" else None
        self.interpolation = teacher.interpolation or "bilinear"
        side = teacher_input_size(teacher)
        self.input_size = frame_size if side is None else (side, side)
        self.input_shape = teacher.input_shape
        if not config.reads_head:
            classes = count_classes(classes)

        def build() -> Classifier:
            replaces = not config.reads_head
            model = freeze(build_model(teacher, classes, may_replace_head=replaces)).to(self.device)
            self.settings.set_memory_format(model)
            return model

        # The tasks of a pass share a network, which a compiled one would not be for those that are eager.
        options = teacher, classes, config.reads_head, self.settings.channels_last, config.compile
        network = task_context().keep("teacher", (*options, self.device), build)
        self.model = network.one_network
        self.output_kinds = build_outputs(config, explainer)
        self.folds = network if isinstance(network, FoldsClassifier) else None
        """Networks of which each record has its own, None for a single one, which is `model`."""
        if self.folds is not None:
            self.output_kinds.append(FoldOutput(self.folds))
        if self.settings.compile:
            # Some networks examine themselves in their first pass.
            self._forward(self._example(), self.output_kinds)
            for module in [self.model] if self.folds is None else self.folds.networks:
                module.compile()

    def with_precision(self, precision: str) -> TeacherAnnotator:
        """Return an annotator with the same network, whose forward pass has another precision.

        Args:
            precision: Name of the precision, as in options.
        """
        return self.with_changes(settings=self.settings.with_precision(precision))

    def with_changes(self, **changes: Any) -> TeacherAnnotator:
        """Return an annotator with the same network, of which some attributes are others.

        Args:
            changes: Attributes to replace, by name, such as the `crop_fraction` or the `input_size` of the images that
                the network receives.
        """
        other = copy(self)
        vars(other).update(changes)
        return other

    def with_projections(self, projections: Mapping[str, Projection]) -> TeacherAnnotator:
        """Return this annotator, which projects the features of the given fields from now on."""
        for kind in self.output_kinds:
            if isinstance(kind, FeaturesOutput):
                kind.projections = projections
        return self

    def fields(self) -> list[FieldSpec]:
        """Return the fields that the pass stores of the teacher.

        Raises:
            ConfigError: If annotate.features_margin is not a whole number of cells of each field's grid.
        """
        outputs: dict[float, ModelOutput] = {}
        specs = []
        for kind in self.output_kinds:
            framing = getattr(kind, "framing", Framing())
            for margin in (0.0, framing.margin):
                if margin not in outputs:
                    outputs[margin] = self._forward(self._example(margin), self.output_kinds)
            own_specs = kind.fields(self.model, outputs[framing.margin])
            if any(spec.frame is not None for spec in own_specs):
                require_image_places(self.model, ", ".join(spec.name for spec in own_specs))
            if framing.margin:
                _require_whole_cells(
                    framing.margin, kind.fields(self.model, outputs[0.0]), own_specs
                )
            specs += [self._with_images(spec, framing) for spec in own_specs]
        return specs

    def annotate(
        self,
        batches: Iterable[FrameBatch],
        keys: Sequence[str],
        views: DrawnViews | None = None,
    ) -> tuple[dict[str, NDArray[np.generic]], dict[str, float]]:
        """Compute fields [n, V, *shape] of canonical frames, and their fidelity.

        Args:
            batches: Frames, divided at fixed positions, so that the values do not depend on the process.
            keys: Keys of all n records, for messages.
            views: Views of the records, whose values become fields, too; None for the canonical view only.

        Returns:
            The values of each field, and the lowest cosine between a record's values and their stored form for each
            lossy field.

        Raises:
            NotFiniteError: If an output of the teacher is not finite, or exceeds the range of its stored dtype.
            FidelityError: If a cosine is below annotate.min_fidelity.
        """
        values: dict[str, NDArray[np.generic]] = {}
        fidelity: dict[str, float] = {}

        def collect(download: _Download, rows: slice) -> None:
            for name, stored in download.wait().items():
                if name not in values:
                    values[name] = np.empty((len(keys), *stored.shape[1:]), stored.dtype)
                values[name][rows] = stored
            for name, cosines in download.fidelity.items():
                fidelity[name] = min(cosines.min().item(), fidelity.get(name, 1.0))

        if not keys:
            return {
                spec.name: np.empty((0, 1, *spec.shape), spec.dtype) for spec in self.fields()
            }, {}
        done = 0
        finish: Callable[[], None] = lambda: None  # noqa: E731
        with ThreadPoolExecutor(1, "download") as pool:
            for batch in batches:
                rows = slice(done, done := done + len(batch.heights))
                download = self._annotate_batch(
                    batch, keys[rows], None if views is None else views.select(rows)
                )
                finish()
                count_records(len(batch.heights))
                finish = partial(collect, download, rows)
                if sum(tensor.nbytes for tensor in download.values.values()) >= _LARGE:
                    finish = pool.submit(finish).result
            finish()
        for name, lowest in fidelity.items():
            if lowest < self.config.min_fidelity:
                raise FidelityError(
                    f"field {name} stored as {values[name].dtype} has cosine {lowest:.6f} to its values, "
                    f"below annotate.min_fidelity={self.config.min_fidelity}; choose a wider dtype for it"
                )
        return values, fidelity

    def _annotate_batch(
        self, batch: FrameBatch, keys: Sequence[str], views: DrawnViews | None
    ) -> _Download:
        """Compute fields [n, V, *shape] with one forward pass per view, over frames that are decoded once."""
        records = BatchInfo(keys, batch.labels)
        if views is None:
            return _Download(_merged([self._annotate_frames(batch, records)], _stacked), keys, {})
        view_fields = [
            self.annotate_inputs(images, records) for images in self.inputs_of_views(batch, views)
        ]
        return _Download(_merged(view_fields, _stacked), keys, views.fields())

    def _annotate_frames(self, batch: FrameBatch, records: BatchInfo) -> EncodedFields:
        """Compute fields [n, *shape] of the canonical view, with one forward pass for each form of the images."""
        encoded: list[list[EncodedFields]] = [[] for _ in self.output_kinds]
        framings = [getattr(kind, "framing", Framing()) for kind in self.output_kinds]
        for margin in dict.fromkeys(framing.margin for framing in framings):
            inputs = self.inputs_of(batch, margin)
            for is_mirrored in (False, True):
                if numbers := [
                    number
                    for number, framing in enumerate(framings)
                    if framing.margin == margin and (framing.mirrored or not is_mirrored)
                ]:
                    images = inputs.flip(-1) if is_mirrored else inputs
                    kinds = [self.output_kinds[number] for number in numbers]
                    parts = self._annotate_inputs(images, records, kinds)
                    for number, part in zip(numbers, parts, strict=True):
                        encoded[number].append(part)
        return _joined([_merged(part, _stacked) if len(part) > 1 else part[0] for part in encoded])

    def inputs_of(self, batch: FrameBatch, margin: float = 0.0) -> Tensor:
        """Return the teacher's inputs f32 [n, 3, height, width] in [0, 1] for the canonical view, or rows of a table.

        Args:
            batch: Records.
            margin: Width of a black border in units of the side.
        """
        if (frames := self._frames(batch)).ndim == 2:  # rows have no views
            return frames
        if self.crop_fraction is None and frames.shape[-2:] == self.input_size and not margin:
            return frames.float() / 255
        canonical_from_input = (
            torch.eye(3).expand(len(frames), 3, 3)
            if self.crop_fraction is None
            else center_crop(batch.heights, batch.widths, self.crop_fraction)
        )
        growth = 1 + 2 * margin
        matrices = canonical_from_input @ torch.tensor([growth, growth, 1.0]).diag()
        rendering = Rendering(resize=self.interpolation)
        size = self._size_with(margin)
        return render_frames(frames, copy_to(matrices, self.device), None, rendering, size)

    def inputs_of_views(self, batch: FrameBatch, views: DrawnViews) -> Iterator[Tensor]:
        """Iterate over the teacher's inputs f32 [n, 3, height, width] in [0, 1] for each view of the records."""
        frames = self._frames(batch)
        for number in range(views.count):
            shown = views.views.select(np.s_[:, number])
            moves = move_values(shown.moves, self.device)
            if views.cuts_originals:
                images = render_windows(frames[:, number], moves, self.input_size, views.rendering)
            else:
                matrices = copy_to(shown.canonical_from_view, self.device)
                images = render_frames(frames, matrices, moves, views.rendering, self.input_size)
            images = change_rows(images, move_values(views.changes(number), self.device))
            if views.mixtures is not None:
                mixture = move_values(views.mixtures.at_view(number), self.device)
                images = mix_images(images, mixture)
            yield images

    def run_inputs(self, inputs: Tensor) -> ModelOutput:
        """Run the teacher on its inputs."""
        return self._forward(inputs, self.output_kinds)

    def require_no_memory(self, name: str, inputs: Tensor) -> None:
        """Raise DependentRecordsError if the teacher keeps something of the records that it runs on.

        Args:
            name: Name of the teacher, for the message.
            inputs: Two inputs or more.
        """

        def run(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
            output = self.settings.run(model, inputs.to(self.device))
            return to_float32(output.logits), to_float32(output.features)

        require_no_memory(name, self.model, run, inputs[:2], inputs[-1:])

    @torch.no_grad()
    def run_views(self, batch: FrameBatch, views: Tensor) -> ModelOutput:
        """Run the teacher on one view canonical_from_view [n, 3, 3] of each whole frame."""
        inputs = warp(self._frames(batch), views.to(self.device), self.input_size) / 255
        return self._forward(inputs, self.output_kinds)

    def annotate_inputs(self, inputs: Tensor, records: BatchInfo) -> EncodedFields:
        """Compute fields [n, *shape] of the teacher's inputs f32 [n, 3, height, width] in [0, 1], on its device."""
        return _joined(self._annotate_inputs(inputs, records, self.output_kinds))

    def stored_fields(self, inputs: Tensor, records: BatchInfo) -> dict[str, NDArray[np.generic]]:
        """Compute fields [n, *shape] of the teacher's inputs as they are stored.

        Raises:
            NotFiniteError: If an output of the teacher is not finite, or exceeds the range of its stored dtype.
        """
        return _Download(self.annotate_inputs(inputs, records), records.keys, {}).wait()

    def _annotate_inputs(
        self, inputs: Tensor, records: BatchInfo, kinds: Sequence[OutputKind]
    ) -> list[EncodedFields]:
        """Compute the fields of each of the outputs, if need be in parts (annotate.batch_size=auto)."""

        most = min(self.largest_batch, len(inputs))

        def annotate(batch: int) -> list[EncodedFields]:
            if batch < most:
                self.largest_batch = batch
                torch.cuda.empty_cache()
                logger.warning(
                    "annotate.batch_size=auto: %s has no room for more; going on with %d records at once",
                    device_name(self.device),
                    batch,
                )
            cuts = [slice(start, start + batch) for start in range(0, len(inputs), batch)]
            parts = [
                self._run_outputs(
                    inputs[rows], BatchInfo(records.keys[rows], records.labels[rows]), kinds
                )
                for rows in cuts
            ]
            return [
                _merged(parts_of_output, _concatenated)
                for parts_of_output in zip(*parts, strict=True)
            ]

        return in_memory(self.config, most, annotate)

    def _run_outputs(
        self, inputs: Tensor, records: BatchInfo, kinds: Sequence[OutputKind]
    ) -> list[EncodedFields]:
        """Compute the fields of each of the outputs with one forward pass, or one of each fold."""
        if self.folds is not None:
            return self._run_folds(self.folds, inputs, records, kinds)
        output = self._forward(inputs, kinds)
        with deterministic_algorithms(self.device):
            encoded = [kind.encode(self.model, output, records) for kind in kinds]
        logits = {_OUTPUT: output.logits.isfinite().all(dim=1)}
        return [part._replace(finite=logits | _finite_records(part.values)) for part in encoded]

    def _run_folds(
        self,
        networks: FoldsClassifier,
        inputs: Tensor,
        records: BatchInfo,
        kinds: Sequence[OutputKind],
    ) -> list[EncodedFields]:
        """Compute the fields of each of the outputs by the network of each record's fold."""
        folds = torch.from_numpy(networks.folds_of(records.keys))
        parts = []
        for fold in sorted(set(folds.tolist())):
            rows = (folds == fold).nonzero()[:, 0]
            keys = [records.keys[row] for row in rows.tolist()]
            annotator = self.with_changes(model=networks.networks[fold], folds=None)
            part = inputs[rows.to(inputs.device)], BatchInfo(keys, records.labels[rows])
            parts.append(annotator._run_outputs(*part, kinds))
        places = folds.argsort(stable=True).argsort()  # of each record among the parts
        merged = [_merged(part, _concatenated) for part in zip(*parts, strict=True)]
        return [
            EncodedFields(
                _rows_of(each.values, places), each.fidelity, _rows_of(each.finite, places)
            )
            for each in merged
        ]

    def _frames(self, batch: FrameBatch) -> Tensor:
        """Frames u8 [n, 3, H, W], or rows of a table, on the teacher's device.

        They are contiguous, because convolutions of another memory format have other last bits, and the shards of a
        pass must not depend on the reader that made them.
        """
        return copy_to(batch.frames, self.device).contiguous()

    def _example(self, margin: float = 0.0) -> Tensor:
        """Return an input f32 [1, ...] of zeros."""
        return torch.zeros(1, *self.input_shape(self._size_with(margin)))

    def _size_with(self, margin: float) -> tuple[int, int]:
        """Return the (height, width) of the teacher's input with a border."""
        height, width = (round(side * (1 + 2 * margin)) for side in self.input_size)
        return height, width

    def _with_images(self, spec: FieldSpec, framing: Framing) -> FieldSpec:
        """Return the description of a field with the form of the images that the teacher receives."""
        if framing.mirrored:
            spec = replace(spec, shape=(2, *spec.shape), axes=("mirror", *spec.axes), mirrored=True)
        if spec.frame is None:
            return spec
        return replace(
            spec,
            frame="full" if self.crop_fraction is None else "center_crop",
            crop_fraction=self.crop_fraction,
            margin=framing.margin,
        )

    @torch.no_grad()
    def _forward(self, inputs: Tensor, kinds: Sequence[OutputKind]) -> ModelOutput:
        """Run the network with the intermediates that these outputs need."""
        intermediates = Intermediates(
            *map(any, zip(*(kind.intermediates for kind in kinds), strict=True))
        )
        inputs = inputs.to(self.device)
        count = len(inputs)
        if self.settings.compile and count < self.largest_batch:
            # A batch of another size would be compiled again.
            missing = self.largest_batch - count
            inputs = torch.cat([inputs, inputs.new_zeros(missing, *inputs.shape[1:])])
        try:
            with deterministic_algorithms(self.device):
                output = (
                    forward_to_explain(self.model, inputs, intermediates, self.settings)
                    if any(isinstance(kind, MapsOutput) for kind in kinds)
                    else self.settings.run(self.model, inputs, intermediates)
                )
        except Exception as error:
            if self.settings.compile:
                _refuse_compilation(error)
            raise
        output = output._replace(
            logits=to_float32(output.logits), features=to_float32(output.features)
        )
        return output if count == len(inputs) else output.first(count)


def in_memory(config: PassOptions, batch: int, work: Callable[[int], T]) -> T:
    """Do work in batches, with annotate.batch_size=auto in halves of them as long as a GPU has no room.

    Args:
        config: Options of the pass.
        batch: Records of a batch.
        work: Function of the records of a batch.
    """
    while True:
        try:
            return work(batch)
        except torch.OutOfMemoryError:
            if config.batch_size != "auto" or batch == 1:
                raise
        batch //= 2


_LARGE = 2**20
"""Bytes of a batch's fields that another thread copies. To hand over less of them takes longer than the copy."""


_OUTPUT = "logits before they are stored"
"""Name of the network's own output among what must be finite."""


def _finite_records(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whether the values of each record are finite, bool [n], of each field of numbers with a fraction."""
    return {
        name: tensor.flatten(1).isfinite().all(dim=1)
        for name, tensor in values.items()
        if tensor.is_floating_point()
    }


class _Download:
    """Fields of a batch on their way from the device."""

    def __init__(
        self,
        fields: EncodedFields,
        keys: Sequence[str],
        added: Mapping[str, NDArray[np.generic]],
    ) -> None:
        """Copy the fields of records with these keys to pinned memory of the host, without waiting for a GPU.

        Args:
            fields: Fields on the device, [n, V, *shape].
            keys: Keys of the n records.
            added: Further fields, which the host has.
        """
        self.keys, self.added = keys, added
        self.values, self.fidelity, self.finite = (
            {name: tensor.to("cpu", non_blocking=True) for name, tensor in part.items()}
            for part in fields
        )
        self.copied = None
        if any(tensor.is_cuda for tensor in fields.finite.values()):
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record()

    def wait(self) -> dict[str, NDArray[np.generic]]:
        """Return the values when they have arrived.

        Raises:
            NotFiniteError: If an output of the teacher is not finite, or exceeds the range of its stored dtype.
        """
        if self.copied is not None:
            self.copied.synchronize()
        for name, is_finite in self.finite.items():
            if not is_finite.all():
                key = self.keys[int((~is_finite).nonzero()[0, 0])]
                what, reason = "logits", ""
                if name != _OUTPUT:
                    dtype = str(self.values[name].dtype).removeprefix("torch.")
                    what, reason = name, f", or exceed the range of {dtype}"
                raise NotFiniteError(
                    f"the teacher's {what} of record {key} are not finite{reason}; check teacher.weights and the record"
                )
        return {name: tensor.numpy() for name, tensor in self.values.items()} | dict(self.added)


def _joined(parts: Sequence[EncodedFields]) -> EncodedFields:
    """Join the fields of several outputs."""
    return EncodedFields(
        *(
            {name: value for part in parts for name, value in part[kind].items()}
            for kind in range(3)
        )
    )


def _merged(
    parts: Sequence[EncodedFields], join: Callable[[list[Tensor]], Tensor]
) -> EncodedFields:
    """Merge the same fields of several parts.

    Args:
        parts: Parts.
        join: Function of the values of a field.
    """
    return EncodedFields(
        *(
            {name: join([part[kind][name] for part in parts]) for name in parts[0][kind]}
            for kind in range(3)
        )
    )


def _rows_of(values: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Return these rows of each tensor."""
    return {name: tensor[rows.to(tensor.device)] for name, tensor in values.items()}


def _concatenated(tensors: list[Tensor]) -> Tensor:
    """Concatenate the values of several batches, without a copy of a single one."""
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Stack the values of several views, or of the images and their horizontal flips, along a new axis, [n, V, ...]."""
    return torch.stack(tensors, dim=1) if len(tensors) > 1 else tensors[0].unsqueeze(1)


def _require_whole_cells(
    margin: float, without: Sequence[FieldSpec], with_margin: Sequence[FieldSpec]
) -> None:
    """Raise ConfigError unless the border is whole cells of each field's grid."""
    for inner, outer in zip(without, with_margin, strict=True):
        if inner.frame is None:
            continue
        cells = [side * margin for side in inner.shape[-2:]]
        grown = tuple(
            round(side + 2 * border) for side, border in zip(inner.shape[-2:], cells, strict=True)
        )
        if any(abs(border - round(border)) > 1e-3 for border in cells) or grown != outer.shape[-2:]:
            coarsest = min(min(spec.shape[-2:]) for spec in without if spec.frame is not None)
            raise ConfigError(
                f"annotate.features_margin={margin:g} is not whole cells of {inner.name}, whose grid is "
                f"{inner.shape[-2]}x{inner.shape[-1]}; set it to 0 or to a multiple of {1 / coarsest:.6f} "
                f"(1/{coarsest})"
            )


def _refuse_compilation(error: Exception) -> None:
    """Raise ConfigError for an error of torch.compile, and nothing for one of the network."""
    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

    if isinstance(error, TorchDynamoException):
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"annotate.compile=true: torch.compile cannot compile this teacher here ({reason}); set "
            "annotate.compile=false"
        ) from error
