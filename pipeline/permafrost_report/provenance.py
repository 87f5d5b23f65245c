"""Origin of a report: teachers, and networks with their sizes."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from timeit import repeat
from typing import Any

import torch

from permafrost.annotation.moved_features import describe_moved_features
from permafrost.annotation.precision import describe_agreement
from permafrost.core.digests import SHORT, sha256_json
from permafrost.core.errors import UserError
from permafrost.models.compute import torch_threads
from permafrost.models.saved import EXPORT_FOLDER, SavedNetwork
from permafrost.models.trained_weights import MODEL_NAME, read_entries
from permafrost.storage.signed_files import read_json, write_json
from permafrost.store.facts import read_sheets
from permafrost.store.reader import TeacherPass
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
        facts["Maps"] = f"{teacher.explainer} of {teacher.manifest.explainer.get('target_classes')}"
    facts |= {
        f"{subject}: {name}": text
        for subject, sheet in read_sheets(teacher.folder).items()
        if subject != "machine"
        for name, text in sheet.rows().items()
    }
    if made_with:
        facts["Computed with"] = ", ".join(f"{name} {value}" for name, value in made_with.items())
    return facts
