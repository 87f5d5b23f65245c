"""Content of each teacher pass of a store, its size on disk, and the students that learned from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from permafrost.config.distillation import DistillConfig
from permafrost.config.verbs import EvaluationRun
from permafrost.core.errors import require
from permafrost.core.records import VIEW_FIELDS
from permafrost.runs.folder import CONFIG_NAME, passes_in, read_config
from permafrost.store.reader import Store, TeacherPass
from permafrost_report.comparison import group_pairs
from permafrost_report.student_results import StudentResult


class UsedPass(NamedTuple):
    """A pass that the students of a report used."""

    teacher: TeacherPass
    learners: tuple[str, ...]
    """Variants that were trained on it, empty if they were only compared with it."""


def used_passes(results: Sequence[StudentResult], store: Store) -> list[UsedPass]:
    """Open the passes that students learned from or were compared with, as the configs of their runs record them.

    Passes of other stores, and those that the store no longer has, are left out.
    """
    learners = group_pairs(
        (entry, result.label)
        for result in results
        for entry in _recorded_passes(result.training_folder)
    )
    compared = {
        entry
        for result in results
        for name in result.evaluations
        for entry in _recorded_passes(result.folder / name)
    }
    used = {*learners, *compared}
    return sorted(
        [
            UsedPass(teacher, tuple(dict.fromkeys(learners.get(entry, ()))))
            for stored_views in (False, True)
            for folder in store.pass_folders(stored_views=stored_views)
            if (teacher := store.open_pass(folder.name, stored_views=stored_views))
            and (entry := (teacher.name, teacher.manifest.fingerprint)) in used
        ],
        key=lambda used: not used.learners,
    )


def check_named_passes(names: Sequence[str], used: Sequence[UsedPass], store: Store) -> None:
    """Check that store.teacher names passes that students of the report used.

    Args:
        names: Value of store.teacher.
        used: Passes that the students used; if there are none, any pass may be named.
        store: The store.

    Raises:
        ConfigError: If no student used one of them.
    """
    known = [one.teacher.name for one in used]
    for name in names:
        require(
            not known or store.open_pass(name).name in known,
            f"store.teacher={name}: no student of this report learned from that pass or was compared with it; "
            f"leave store.teacher out, or name one that they used: {', '.join(known)}",
        )


def _recorded_passes(folder: Path) -> Iterator[tuple[str, str]]:
    """Iterate over the names and fingerprints of the passes among the inputs of a run's stage."""
    path = folder / CONFIG_NAME
    cls = EvaluationRun if folder.name != "distill" else DistillConfig
    values = read_config(path, cls) if path.exists() else {}
    yield from passes_in(values.get("inputs", {})).items()


_USUAL = {"logits", "map", "map_scale", "target_class", *VIEW_FIELDS}
"""Fields of most passes."""


def describe_passes(store: Store) -> list[dict[str, Any]]:
    """Build one row per pass, those of stored views last; bytes are those of one record with all its views."""
    return [
        _describe(store.open_pass(folder.name, stored_views=stored_views))
        for stored_views in (False, True)
        for folder in store.pass_folders(stored_views=stored_views)
    ]


def _describe(teacher: TeacherPass) -> dict[str, Any]:
    """Describe a pass. Bytes are those of one record with all its views.

    Returns:
        For every pass, its name, views, records and bytes. If fields besides logits and maps are stored, `others` names
        them, without their scales. If maps are stored, there are explainer, map and fidelity.
    """
    manifest = teacher.manifest
    row = {
        "name": teacher.name,
        "views": f"{teacher.num_views} {teacher.views['sampler']}"
        + (", mixed" if teacher.views.get("mix") else ""),
        "records": teacher.shards.num_rows,
        "bytes": teacher.bytes_per_record,
    }
    specs = {spec.name: spec for spec in manifest.fields}
    if others := [
        f"{name} {'x'.join(map(str, spec.shape))} {spec.dtype}"
        for name, spec in specs.items()
        if name not in _USUAL and name.removesuffix("_scale") not in specs.keys() - {name}
    ]:
        row["others"] = ", ".join(others)
    if (spec := specs.get("map")) is None:
        return row
    shape = spec.shape if spec.shape[0] > 1 else spec.shape[1:]
    explained = manifest.explainer["target_classes"]
    row |= {
        "explainer": teacher.explainer
        if explained == "top1"
        else f"{teacher.explainer}, {explained}",
        "map": f"{'x'.join(map(str, shape))} {spec.dtype}",
    }
    if spec.name in manifest.fidelity:
        row["fidelity"] = manifest.fidelity[spec.name]
    return row
