"""Content of each teacher pass of a store, and its size on disk."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.store.reader import Store, TeacherPass
from pipeline.store.zarr_fields import FIELDS_FOLDER


def describe_passes(store: Store) -> list[dict[str, Any]]:
    """Build one row per pass, those of stored views last."""
    return [
        _describe(store.open_pass(folder.name, stored_views=stored_views))
        for stored_views in (False, True)
        for folder in store.pass_folders(stored_views=stored_views)
    ]


def _describe(teacher: TeacherPass) -> dict[str, Any]:
    """Describe a pass. Bytes are those of one record with all its views.

    name, views, records, bytes                every pass
    superfeatures                              if superfeature logits are stored
    explainer, map, fidelity, raw_bytes        if maps are stored; raw_bytes is the size as float32
    map_bytes                                  if the backend stores maps in separate files
    """
    manifest = teacher.manifest
    records = teacher.shards.num_rows
    row = {
        "name": teacher.name,
        "views": f"{teacher.num_views} {teacher.views['sampler']}",
        "records": records,
        "bytes": teacher.bytes_per_record,
    }
    specs = {spec.name: spec for spec in manifest.fields}
    if (logits := specs.get("superfeature_logits")) is not None:
        row["superfeatures"] = f"{'x'.join(map(str, logits.shape))} {logits.dtype}"
    spec = specs.get("map")
    if spec is None:
        return row
    of_maps = teacher.shards.bytes_below(f"{FIELDS_FOLDER}/{spec.name}/")
    shape = spec.shape if spec.shape[0] > 1 else spec.shape[1:]
    explained = manifest.explainer["explained_classes"]
    row |= {
        "explainer": teacher.explainer
        if explained == "top1"
        else f"{teacher.explainer}, {explained}",
        "map": f"{'x'.join(map(str, shape))} {spec.dtype}",
        "raw_bytes": int(teacher.num_views * np.prod(spec.shape) * np.dtype(np.float32).itemsize),
        "fidelity": manifest.fidelity[spec.name],
    }
    return row | ({"map_bytes": of_maps / records} if of_maps else {})
