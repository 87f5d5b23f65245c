"""Facts about a training: its network, its records and steps, its views and its loss, and its targets at their tau."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from permafrost.config.builder import to_plain_dict
from permafrost.config.distillation import DistillConfig
from permafrost.config.teaching import TeachConfig
from permafrost.core.distributed import DistributedContext
from permafrost.loading.decode_threads import decode_threads_of
from permafrost.loading.sampler import expected_draws
from permafrost.loading.target_sheet import target_sheet
from permafrost.models.compute import device_name, resolve_device
from permafrost.models.network import Network
from permafrost.models.network_sheet import machine_sheet, network_facts
from permafrost.sources.classes import find_mirrored
from permafrost.store.facts import UNKNOWN, Fact, FactSheet, read_sheets

if TYPE_CHECKING:
    from permafrost.training.spec import TrainingSpec

_FEW = 0.05
"""Share of records that an epoch may leave out without a mark."""


def training_sheets(
    options: DistillConfig | TeachConfig, spec: TrainingSpec, distributed: DistributedContext
) -> dict[str, FactSheet]:
    """Describe a training before its first step.

    Args:
        options: Options of the command.
        spec: The training.
        distributed: Ranks that train together.

    Returns:
        Sheets of the student (or of the teacher that is trained), of the targets of its first pass, and of the machine.
    """
    subject = "student" if isinstance(options, DistillConfig) else "teacher"
    sheets = [FactSheet(subject=subject, facts=tuple(_facts(options, subject, spec, distributed)))]
    if spec.dataset.passes:
        first = spec.dataset.passes[0]
        tau = getattr(getattr(spec.loss, "config", None), "tau", 1.0)
        before = read_sheets(first.folder).get("targets")
        sheets.append(
            target_sheet(
                first,
                split=_split_of(options),
                tau=tau,
                trained_on=UNKNOWN if before is None else before["trained on"].value,
            )
        )
    device = distributed.device or resolve_device("trainer.device", spec.trainer.device)
    sheets.append(
        machine_sheet(
            spec.trainer.num_threads or torch.get_num_threads(),
            device_name(device),
            decode_threads_of(spec.trainer, distributed),
        )
    )
    return {sheet.subject: sheet for sheet in sheets}


def _facts(
    options: DistillConfig | TeachConfig,
    section: str,
    spec: TrainingSpec,
    distributed: DistributedContext,
) -> Iterator[Fact]:
    trainer, dataset = spec.trainer, spec.dataset
    prefix = "" if section == "student" else "teaching."
    yield from network_facts(Network(spec.model, spec.data_classes, section), options.command)
    if spec.picture is not None:
        yield Fact(name="input", value=f"{spec.picture}, outside of views", source="augment, store")
        kinds = [operation.kind for operation in spec.augment.operations]
        views = "stored ones" if spec.replays else ", ".join(kinds) or "none: whole frames"
        height, width = spec.input_size
        twins = find_mirrored(spec.class_names) if "horizontal_flip" in kinds else ()
        warning = f"a flip makes class {twins[0]!r} look like {twins[1]!r}" if twins else ""
        yield Fact(
            name="views",
            value=f"{views}; {width}x{height}",
            source="augment",
            warning=warning,
        )
    split, whole = _split_of(options), dataset.store.num_records(_split_of(options))
    rows = len(dataset)
    left = (f"; {whole - rows:,} left out" if whole > rows else "") + (
        ""
        if (weights := dataset.relative_weights()) is None
        else f"; weights from {weights.min():.3g} to {weights.max():.3g} times their mean"
    )
    yield Fact(name="records", value=f"{rows:,} of split {split}{left}", source="store, subset")
    if trainer.sampling != "uniform":
        sizes = np.sort(
            np.unique(dataset.classes_to_draw(trainer.sampling)["label"], return_counts=True)[1]
        )
        low, high = (f"{draws:,.0f}" for draws in expected_draws(sizes, trainer.sampling)[[0, -1]])
        yield Fact(
            name="sampling",
            value=f"{trainer.sampling}; {len(sizes):,} classes of {sizes[0]:,} to {sizes[-1]:,} records, each "
            f"{low if low == high else f'{low} to {high}'} draws an epoch",
            source="trainer",
        )
    steps, rest = divmod(rows, trainer.batch_size // spec.views_per_step)
    ranks = distributed.world_size
    each = "" if ranks == 1 else f" ({trainer.batch_size // ranks} on each of {ranks} ranks)"
    epochs = f"{trainer.epochs:,} epoch{'s' if trainer.epochs > 1 else ''}"
    yield Fact(
        name="steps",
        value=f"{steps:,} of {trainer.batch_size} records{each} an epoch, {epochs}; each leaves out {rest:,} records, "
        "drawn anew",
        source="trainer",
        warning=f"a smaller {prefix}trainer.batch_size= leaves out fewer"
        if rest > _FEW * rows
        else "",
    )
    if trainer.ema is not None:
        horizon, total = 1 / (1 - trainer.ema), steps * trainer.epochs
        yield Fact(
            name="average",
            value=f"of the weights over about {horizon:,.0f} steps, of {total:,} in all",
            source="trainer.ema",
            warning=f"it keeps weights of the beginning; lower {prefix}trainer.ema="
            if 3 * horizon > total
            else "",
        )
    yield Fact(
        name="loss",
        value=_describe_loss(spec),
        source="method" if section == "student" else "teaching",
    )


def _split_of(options: DistillConfig | TeachConfig) -> str:
    """Return the split that a training reads."""
    return options.split if isinstance(options, DistillConfig) else options.teaching.split


def _describe_loss(spec: TrainingSpec) -> str:
    """Name a loss, its temperature and the weights of its terms."""
    config = getattr(spec.loss, "config", None)
    values: Mapping[str, object] = {} if config is None else to_plain_dict(config)
    shown = [
        f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"
        for name, value in values.items()
        if name in ("tau", "logits") or name.startswith("lambda_")
    ]
    return ", ".join([str(values.get("kind", "labels")), *shown])
