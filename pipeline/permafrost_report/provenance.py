"""Origin of a report: teachers, networks and their sizes, and stored bytes."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from timeit import repeat
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from permafrost.annotation.moved_features import describe_moved_features
from permafrost.annotation.precision import describe_agreement
from permafrost.config.builder import build_config
from permafrost.config.methods import METHODS
from permafrost.core.digests import SHORT, sha256_json
from permafrost.core.errors import UserError
from permafrost.losses.base import Needs, build_loss
from permafrost.models.compute import torch_threads
from permafrost.models.saved import EXPORT_FOLDER, SavedNetwork
from permafrost.models.trained_weights import MODEL_NAME, read_entries
from permafrost.runs.folder import passes_in
from permafrost.storage.signed_files import read_json, write_json
from permafrost.store.facts import read_sheets
from permafrost.store.reader import Store, TeacherPass
from permafrost.store.zarr_fields import FIELDS_FOLDER
from permafrost_report.figures import Measured, Plot, measured_plot
from permafrost_report.main_table import Column
from permafrost_report.passes import UsedPass
from permafrost_report.run_commands import without_folders
from permafrost_report.student_results import StudentResult
from permafrost_report.training_facts import network_text

_PASSES = 30
"""Forward passes whose median is the time of an image, fewer of a large network."""
_SECONDS = 10.0
"""Time of the passes of a network, above which there are fewer of them."""


# ---- networks --------------------------------------------------------------------------------------


def network_rows(results: list[StudentResult], file: Path) -> dict[str, dict[str, Any]]:
    """Build one row per trained student by its run: its folder, network, and what the network costs.

    `parameters`, and `macs` of one record at its input size, are those of model.json. `bytes` are those of
    model.safetensors, `program_bytes` those of student.onnx, or else student.pt2, None without an export.

    Args:
        results: Results of the students.
        file: File of the measured times, which are not measured again on this machine, so that the rows stay the same.
    """
    here = [*platform.uname(), torch.__version__]
    times = read_json(file, f"delete {file}") if file.exists() else {}
    new_times: dict[str, float | None] = {}
    rows = {}
    for result in results:
        folder = result.training_folder
        if not SavedNetwork(folder).is_finished:
            continue
        described = read_entries(folder)
        key = sha256_json(
            [
                here,
                described.model | dict.fromkeys(("weights", "sha256")),
                described.num_classes,
                described.input_size,
            ]
        )[:SHORT]
        if (times | new_times).get(key) is None:
            new_times[key] = _milliseconds(folder)
        rows[result.run] = {
            "method": result.label,
            "seed": result.seed,
            "run": without_folders(result.run),
            "architecture": f"{described.model['kind']} {described.model['name']}",
            "outputs": described.num_classes,
            "parameters": described.parameters,
            "macs": described.macs,
            "bytes": _bytes_of_first(folder / MODEL_NAME),
            "program_bytes": _bytes_of_first(
                *(folder / EXPORT_FOLDER / f"student.{kind}" for kind in ("onnx", "pt2"))
            ),
            "milliseconds": (times | new_times)[key],
        }
    if new_times:
        write_json(file, times | new_times)
    return rows


def _bytes_of_first(*paths: Path) -> int | None:
    return next((path.stat().st_size for path in paths if path.exists()), None)


def _milliseconds(folder: Path) -> float | None:
    """Measure the median forward pass of one record by one thread of the CPU, None if the network cannot be built."""
    try:
        network, trained = SavedNetwork(folder).load()
    except UserError:
        return None
    record = torch.zeros(1, *trained.config.input_shape(trained.input_size))
    with torch_threads(1), torch.inference_mode():
        (first,) = repeat(lambda: network(record), number=1, repeat=1)
        passes = min(_PASSES, max(3, int(_SECONDS / first)))
        return round(1e3 * median(repeat(lambda: network(record), number=1, repeat=passes)), 3)


# ---- stored bytes ----------------------------------------------------------------------------------


_OF_MAPS = ("map", "map_scale", "target_class")


def bytes_by_variant(results: Sequence[StudentResult], store: Store) -> dict[str, float]:
    """Compute the bytes per record of the fields that each variant's loss needs, without variants of other stores."""
    by_variant: dict[str, float] = {}
    for result in results:
        if result.label not in by_variant and (number := _bytes_of(result, store)) is not None:
            by_variant[result.label] = number
    return by_variant


def bytes_plot(
    summary: Sequence[Mapping[str, Any]],
    column: Column,
    needed: Mapping[str, float],
    colors: Mapping[str, str] = MappingProxyType({}),
) -> Plot | None:
    """Plot a column's mean over the bytes per record, None if all variants need equally many.

    Args:
        summary: Rows of `main_table.variant_summary`.
        column: The column.
        needed: Result of `bytes_by_variant`.
        colors: Colors of the variants.
    """
    scale = column.metric.scale
    variants = {
        row["method"]: Measured(
            needed[row["method"]],
            scale * row[column.name]["mean"],
            None if row[column.name]["sd"] is None else scale * row[column.name]["sd"],
        )
        for row in summary
        if row["method"] in needed and row[column.name]
    }
    if len({round(point.x, 3) for point in variants.values()}) < 2:
        return None
    return Plot(
        measured_plot(variants, "stored targets, bytes per record", column.title, colors),
        f"{column.words} over the bytes of stored targets per record, one point per variant",
        f"{column.title} against the bytes per record of the stored targets that a variant's loss uses",
    )


def _bytes_of(result: StudentResult, store: Store) -> float | None:
    config = result.training
    inputs = config.get("inputs", {})
    store = store.part_with(inputs.get("store"))
    if inputs.get("store") != store.manifest.fingerprint:
        return None
    names = list(passes_in(inputs))
    stored_views = config.get("mode") == "replay"
    try:
        method = config["method"]
        loss = build_loss(build_config(METHODS[method["kind"]], method, "method"))
        passes = [store.open_pass(name, stored_views=stored_views) for name in names]
    except (KeyError, UserError):  # options of another version, or a pass that was removed
        return None
    return sum(_bytes_needed(teacher, loss.needs_of(teacher.name)) for teacher in passes)


def _bytes_needed(teacher: TeacherPass, terms: Sequence[Needs]) -> float:
    names = {"logits"}
    for needs in terms:
        if needs.maps_every is not None:
            names |= set(_OF_MAPS)
        for name in needs.outputs:
            fields = teacher.fields_of(name)
            names |= {*fields, *(f"{name}_scale" for name in fields)}
    return sum(
        _bytes_of_field(teacher, spec.name, math.prod(spec.shape) * np.dtype(spec.dtype).itemsize)
        for spec in teacher.manifest.fields
        if spec.name in names
    )


def _bytes_of_field(teacher: TeacherPass, name: str, value_bytes: int) -> float:
    """Bytes per record of a field with all its views: on disk, or of its values if its file has other fields too."""
    if on_disk := teacher.shards.bytes_below(f"{FIELDS_FOLDER}/{name}/"):
        return on_disk / teacher.shards.num_rows
    return float(teacher.num_views * value_bytes)


# ---- provenance ------------------------------------------------------------------------------------


def describe_teachers(passes: Sequence[UsedPass]) -> list[dict[str, str]]:
    """Describe the network of every pass: its students, name, size, weights and explainer."""
    return [_describe_teacher(*used) for used in passes]


def _describe_teacher(teacher: TeacherPass, learners: Sequence[str]) -> dict[str, str]:
    described = teacher.manifest.teacher
    facts = {
        "Pass": teacher.name,
        "Students": ", ".join(learners) or "none learned from it, they are compared with it",
        "Network": network_text(described.get("architecture", {})),
    }
    made_with = dict(teacher.manifest.made_with)
    if parameters := made_with.pop("parameters", ""):
        facts["Parameters"] = parameters
    weights = [made_with.pop("weights", ""), f"sha256 {described.get('weights_sha256')}"]
    facts["Weights"] = ", ".join(filter(None, weights))
    if agreement := teacher.manifest.agreement:
        facts["Precision"] = (
            f"{agreement.precision}; against float32: {describe_agreement(agreement)}"
        )
    if projections := teacher.manifest.projections:
        shares = (f"{name} {entry.kept:.1%}" for name, entry in projections.items())
        facts["Variance that the stored components keep"] = ", ".join(shares)
    if moved := teacher.manifest.moved_features:
        facts["Variance that moved features miss"] = describe_moved_features(moved)
    if teacher.explainer is not None:
        explained = teacher.manifest.explainer.get("target_classes")
        facts["Maps"] = f"{teacher.explainer} of {explained}"
    facts |= {
        f"{subject}: {name}": text
        for subject, sheet in read_sheets(teacher.folder).items()
        if subject != "machine"
        for name, text in sheet.rows().items()
    }
    if made_with:
        facts["Computed with"] = ", ".join(f"{name} {value}" for name, value in made_with.items())
    return facts
