"""What each teacher pass of a store holds, and what that costs on disk."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.store.reader import Store, TeacherPass
from pipeline.store.zarr_fields import FIELDS_FOLDER


PASS_KEYS = (
    *("name", "views", "records", "bytes"),
    *("explainer", "map", "raw_bytes", "map_bytes", "fidelity", "superfeatures"),
)
"""Keys of a pass's row; those of the second line exist only where the pass has maps or superfeatures."""


def describe_passes(store: Store) -> list[dict[str, Any]]:
    """A row a pass, those of stored views last."""
    return [
        _describe(store.open_pass(folder.name, stored_views=stored_views))
        for stored_views in (False, True)
        for folder in store.pass_folders(stored_views=stored_views)
    ]


def _describe(teacher: TeacherPass) -> dict[str, Any]:
    """name, views, records, bytes; of a pass with maps also explainer, map, fidelity and raw_bytes (float32),
    and map_bytes where its backend keeps the maps apart; superfeatures where it has their logits. Bytes are those
    of a record with all its views.
    """
    manifest = teacher.manifest
    files = [entry for shard in manifest.shards for entry in shard.files]
    records = sum(shard.rows for shard in manifest.shards)
    row = {
        "name": teacher.name,
        "views": f"{teacher.num_views} {teacher.views['sampler']}",
        "records": records,
        "bytes": sum(entry.bytes for entry in files) / records,
    }
    specs = {spec.name: spec for spec in manifest.fields}
    if (logits := specs.get("superfeature_logits")) is not None:
        row["superfeatures"] = f"{'x'.join(map(str, logits.shape))} {logits.dtype}"
    spec = specs.get("map")
    if spec is None:
        return row
    of_maps = [e.bytes for e in files if e.path.startswith(f"{FIELDS_FOLDER}/{spec.name}/")]
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
    return row | ({"map_bytes": sum(of_maps) / records} if of_maps else {})
