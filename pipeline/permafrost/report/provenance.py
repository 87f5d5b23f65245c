"""Origin of a report: teachers, networks and their sizes, stored bytes, and the version that wrote the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from permafrost.config.builder import build_config
from permafrost.config.distillation import DistillConfig
from permafrost.config.methods import METHODS
from permafrost.config.models import MODELS
from permafrost.config.runs import CONFIG_NAME, read_config
from permafrost.config.version import __version__
from permafrost.core.errors import UserError
from permafrost.losses.base import Needs, build_loss
from permafrost.models.providers import build_model, count_parameters, measure_cost
from permafrost.models.saved import is_finished, load_model
from permafrost.report.figures import Measured, Plot, measured_plot
from permafrost.report.main_table import Column
from permafrost.report.passes import UsedPass
from permafrost.report.student_results import StudentResult
from permafrost.report.training_facts import describe_network
from permafrost.store.reader import Store, TeacherPass
from permafrost.store.zarr_fields import FIELDS_FOLDER

# ---- networks --------------------------------------------------------------------------------------


def network_rows(results: list[StudentResult]) -> list[dict[str, Any]]:
    """Build one row per arm: method, architecture, parameters, and macs, the multiply-accumulates of one record.

    It describes the first student of each arm whose weights exist, at its input size.
    """
    first: dict[str, StudentResult] = {}
    for result in results:
        if is_finished(result.folder / "distill"):
            first.setdefault(result.label, result)
    return [{"method": label, **_row(result)} for label, result in first.items()]


def _row(result: StudentResult) -> dict[str, Any]:
    model, trained = load_model(result.folder / "distill")
    config = trained.config
    shape = (trained.input_size[1],) if config.takes_rows else (3, *trained.input_size)
    cost = measure_cost(model, torch.zeros(1, *shape))
    return {
        "architecture": f"{config.kind} {config.name}",
        "parameters": cost.parameters,
        "macs": cost.macs,
    }


# ---- stored bytes ----------------------------------------------------------------------------------


_OF_MAPS = ("map", "map_scale", "explained_class")


def bytes_by_arm(results: Sequence[StudentResult], store: Store) -> dict[str, float]:
    """Compute the bytes per record of the fields that each arm's loss needs; arms of other stores are left out."""
    found: dict[str, float] = {}
    for result in results:
        if result.label not in found and (number := _bytes_of(result, store)) is not None:
            found[result.label] = number
    return found


def bytes_plot(
    summary: Sequence[Mapping[str, Any]],
    column: Column,
    needed: Mapping[str, float],
    colors: Mapping[str, str] = MappingProxyType({}),
) -> Plot | None:
    """Plot a column's mean over the bytes per record, None if all arms need equally many.

    summary  rows of columns.arm_summary
    needed   result of `bytes_by_arm`
    colors   colors of the arms
    """
    scale = column.metric.scale
    arms = {
        row["method"]: Measured(
            needed[row["method"]],
            scale * row[column.name]["mean"],
            None if row[column.name]["sd"] is None else scale * row[column.name]["sd"],
        )
        for row in summary
        if row["method"] in needed and row[column.name]
    }
    if len({round(found.x, 3) for found in arms.values()}) < 2:
        return None
    source = measured_plot(arms, "stored targets, bytes per record", column.title, colors)
    name = column.name.replace("_", " ")
    return Plot(
        source,
        f"{name} over the bytes of stored targets per record, one point per arm",
        f"{column.title} against the bytes per record of the stored targets that an arm's loss uses",
    )


def _bytes_of(result: StudentResult, store: Store) -> float | None:
    path = result.folder / "distill" / CONFIG_NAME
    config = read_config(path, DistillConfig) if path.exists() else {}
    inputs = config.get("inputs", {})
    if inputs.get("store") != store.manifest.fingerprint:
        return None
    names = [name.removeprefix("teacher ") for name in inputs if name.startswith("teacher ")]
    stored_views = config.get("mode") == "replay"
    try:
        method = config["method"]
        needs = build_loss(build_config(METHODS[method["kind"]], method, "method")).needs
        passes = [store.open_pass(name, stored_views=stored_views) for name in names]
    except (KeyError, UserError):  # options of another version, or a pass that was removed
        return None
    return sum(_bytes_needed(teacher, needs) for teacher in passes)


def _bytes_needed(teacher: TeacherPass, needs: Needs) -> float:
    names = {"logits"}
    if needs.maps_every is not None:
        names |= set(_OF_MAPS)
    if needs.payload is not None:
        fields = teacher.fields_of(needs.payload)
        names |= {*fields, *(f"{name}_scale" for name in fields)}
    return sum(
        _bytes_of_field(teacher, spec.name, math.prod(spec.shape) * np.dtype(spec.dtype).itemsize)
        for spec in teacher.manifest.fields
        if spec.name in names
    )


def _bytes_of_field(teacher: TeacherPass, name: str, value_bytes: int) -> float:
    """Bytes per record of a field with all its views: on disk, or of its values if its file has other fields too."""
    on_disk = teacher.shards.bytes_below(f"{FIELDS_FOLDER}/{name}/")
    if on_disk:
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
        "Network": describe_network(described.get("architecture", {})),
    }
    parameters = _parameters(described)
    if parameters is not None:
        facts["Parameters"] = f"{parameters:,}"
    made_with = dict(teacher.manifest.made_with)
    weights = [made_with.pop("weights", ""), f"sha256 {described.get('weights_sha256')}"]
    facts["Weights"] = ", ".join(filter(None, weights))
    if teacher.explainer is not None:
        explained = teacher.manifest.explainer.get("explained_classes")
        facts["Maps"] = f"{teacher.explainer} of {explained}"
    if made_with:
        listed = (f"{name} {value}" for name, value in made_with.items())
        facts["Computed with"] = ", ".join(listed)
    return facts


def _parameters(described: dict[str, Any]) -> int | None:
    """Count the parameters of a described network, None if that needs a download."""
    architecture = described.get("architecture", {})
    if ":" in str(architecture.get("name")):
        return None
    try:
        cls = MODELS[architecture["kind"]]
        config = build_config(cls, dict(architecture), "teacher")
        return count_parameters(build_model(config, int(described["classes"])).network)
    except (KeyError, UserError):  # a network of another version
        return None


def describe_writing() -> str:
    """Say which version writes the report. When it does is in the log, as the same inputs give the same page."""
    return f"by permafrost {__version__}"
