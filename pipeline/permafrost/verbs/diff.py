"""Show what differs between two stores, two passes or two runs, and whether their results may be compared.

    permafrost diff stores/photos stores/photos-2026
    permafrost diff stores/photos/teachers/resnet20-1a2b3c4d stores/photos/teachers/resnet20-5e6f7a8b
    permafrost diff stores/photos/1a2b3c4d stores/photos/5e6f7a8b
    permafrost diff kd e2kd output=kd-e2kd.json

A pass is named by its folder, or by the store's folder and the pass's name or digits. A run is named as in `run=`.

Reads   manifests and indexes of stores, manifests of passes, options of runs
Writes  nothing; with `output=` the differences as JSON
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from permafrost.annotation.pass_identity import description_of, pass_differences
from permafrost.config.differences import NOT_SET, describe_difference, differences
from permafrost.config.distillation import DistillConfig
from permafrost.config.options import Options
from permafrost.config.store import StoreOptions
from permafrost.config.teaching import TeachConfig
from permafrost.config.verbs import DiffConfig, EvaluationRun
from permafrost.core.digests import derive_seed
from permafrost.core.errors import ConfigError, require
from permafrost.runs.folder import (
    CONFIG_NAME,
    INPUT_OPTIONS,
    RunFolder,
    describe_run,
    identity,
    read_config,
)
from permafrost.storage.files import file_at
from permafrost.store.commit import read_origin
from permafrost.store.manifest import MANIFEST_NAME, TEACHERS_FOLDER
from permafrost.store.reader import Store

_SHOWN = 5
"""Largest number of keys that are listed of each kind of difference."""
_TRAININGS: dict[str, type[Options]] = {"distill": DistillConfig, "teach": TeachConfig}


@dataclass(frozen=True, kw_only=True)
class DiffResult:
    """Differences of two stores, passes or runs."""

    compared: str
    """Kind of both, such as two stores."""
    options: dict[str, tuple[Any, Any]]
    """Both values of each option that differs, and digests of weights and code that differ."""
    data: dict[str, Any]
    """Number, first keys and splits of the records of each kind of difference; empty for equal records."""
    incomparable: list[str]
    """Why results may not be compared; empty if they may be."""

    def printed(self) -> dict[str, str]:
        """Return the values for the terminal."""
        options = [describe_difference(option, *pair) for option, pair in self.options.items()]
        data = [
            f"{each['records']:,} {kind} ({', '.join(each['keys'])}{', ...' * (each['records'] > _SHOWN)})"
            for kind, each in self.data.items()
        ]
        reasons = "; ".join(self.incomparable)
        return {
            "compared": self.compared,
            "options": "\n  ".join(["", *options]) or "the same",
            "records": "\n  ".join(["", *data]) or "the same",
            "results may be compared": f"no: {reasons}" if reasons else "yes",
        }


def compare_two(config: DiffConfig) -> DiffResult:
    """Compare two stores, two passes or two runs.

    Raises:
        ConfigError: If a name is of something else, or if their kinds differ.
    """
    (kind, old, store, *file), (other, new, other_store, *other_file) = (
        _described(config.old),
        _described(config.new),
    )
    require(
        kind == other,
        f"diff compares two of a kind, but {config.old} is a {kind} and {config.new} is a {other}; name two stores, "
        "two passes, or two runs of one verb",
    )
    changed = (
        pass_differences(old, new, file + other_file)
        if kind == "pass"
        else differences(old, new, INPUT_OPTIONS)
    )
    data, reasons = (
        _compare_records(store, other_store) if "store" in changed else ({}, list[str]())
    )
    evaluated = {
        name: pair
        for name, pair in changed.items()
        if name.startswith("evaluation.") and NOT_SET not in pair
    }
    result = DiffResult(
        compared=f"two {'passes' if kind == 'pass' else f'{kind}s'}",
        options={
            name: pair
            for name, pair in changed.items()
            if name in evaluated or not name.startswith("evaluation.")
        },
        data=data,
        incomparable=reasons
        + [describe_difference(name, *pair) for name, pair in evaluated.items()],
    )
    if config.output:
        file_at(Path(config.output)).write(json.dumps(asdict(result), indent=1).encode())
    return result


def _described(name: str) -> tuple[Any, ...]:
    """Return the kind of what a name is of, its description, its store, and the file of a pass's weights if known.

    The store is None if it is not at its place any more. Raises ConfigError if there is none of these.
    """
    parent, _, last = name.rstrip("/").rpartition("/")
    folder = parent.removesuffix(TEACHERS_FOLDER).rstrip("/") or "."
    if folder == (parent or ".") and (store := _store_at(name)) is not None:
        return "store", _describe_store(store), store
    if (store := _store_at(folder)) is not None:
        known = file_at(store.folder / TEACHERS_FOLDER).paths()
        found = [each for each in known if last in (each.name, *each.name.rsplit("-", 1))]
        require(
            len(found) == 1,
            f"{folder} has {len(found) or 'no'} passes {last}; name one of: {', '.join(each.name for each in known)}",
        )
        made = store.pass_manifest(found[0])
        weights = made.made_with.get("weights", "")
        return "pass", description_of(made), _store_at(folder, made.store_fingerprint), weights
    for run, (verb, cls) in product((Path(name), RunFolder(name).path), _TRAININGS.items()):
        if (run / verb / CONFIG_NAME).is_file():
            values = read_config(run / verb / CONFIG_NAME, cls)
            described, evaluated = describe_run(values, cls), run / "evaluate" / CONFIG_NAME
            if evaluated.is_file():
                evaluation = read_config(evaluated, EvaluationRun)
                options = identity(evaluation, EvaluationRun)["evaluate"]
                described["evaluation"] = options | {"frame": evaluation["evaluate"]["frame"]}
            return (
                f"{verb} run",
                described,
                _store_at(values["store"]["path"], values["inputs"]["store"]),
            )
    raise ConfigError(
        f"{name} is not a store, a pass or a run; name a store's folder, <store>/<pass>, or a run as in run="
    )


def _store_at(path: str, fingerprint: str | None = None) -> Store | None:
    """Return the generations of a store that have a fingerprint, None if it is not there."""
    folder = StoreOptions(path=path or ".").folder
    store = (
        Store(folder).part_with(fingerprint) if file_at(folder / MANIFEST_NAME).exists() else None
    )
    is_other = store is not None and fingerprint not in (None, store.manifest.fingerprint)
    return None if is_other else store


def _describe_store(store: Store) -> dict[str, Any]:
    """Describe the options of a store, as far as its manifest and the origin of its data have them."""
    manifest = store.manifest
    return {
        "data": read_origin(store.folder).get("options", {}),
        "store": {
            "frame": manifest.canonical and asdict(manifest.canonical),
            "shard_size": manifest.rows_per_shard,
        },
        **{name: getattr(manifest, name) for name in ("columns", "classes", "multi_label")},
        "generations": store.num_generations,
        "inputs": {"store": manifest.fingerprint},
    }


def _compare_records(old: Store | None, new: Store | None) -> tuple[dict[str, Any], list[str]]:
    """Return `data` and `incomparable` of the result, without a Python object for each record."""
    if old is None or new is None:
        return {}, ["the stores differ, and one of them is not at its place any more"]
    joined = _records_of(old).join(
        _records_of(new), "key", join_type="full outer", right_suffix="_new"
    )
    masks = {
        "added": joined["split"].is_null(),
        "removed": joined["split_new"].is_null(),
        **{
            f"with other {name}": pc.not_equal(joined[name], joined[f"{name}_new"])
            for name in ("bytes", "labels", "split")
        },
    }
    parts = {name: joined.filter(mask).sort_by("key") for name, mask in masks.items()}
    data = {
        name: {
            "records": part.num_rows,
            "keys": part["key"][:_SHOWN].to_pylist(),
            "splits": sorted(
                split
                for split in {*old.shards.splits, *new.shards.splits}
                if pc.index(part["split"], split).as_py() >= 0
                or pc.index(part["split_new"], split).as_py() >= 0
            ),
        }
        for name, part in parts.items()
        if part.num_rows
    }
    reasons = [
        f"{split} has records {name}"
        for name, each in data.items()
        for split in each["splits"]
        if split != "train"
    ]
    for name, text in (("classes", "classes"), ("canonical", "frames"), ("columns", "columns")):
        is_other = getattr(old.manifest, name) != getattr(new.manifest, name)
        reasons += [f"the {text} differ"] * is_other
    return data, reasons


def _records_of(store: Store) -> pa.Table:
    """Return the key, the digest of the bytes, that of the labels' names, and the split of each record."""
    index, rows = store.index, np.arange(store.index.num_rows)
    labels, lengths = (
        index.label_lists(rows)
        if store.manifest.multi_label
        else (index.values("label", rows), np.ones_like(rows))
    )
    codes = np.array([*map(derive_seed, store.manifest.classes), 0], np.uint64)  # 0 for none
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes[labels])])
    ends = np.cumsum(lengths)
    return pa.table(
        {
            "key": index.key_column(rows),
            "bytes": index.image_digests(),
            "labels": sums[ends] - sums[ends - lengths],
            "split": store.shards.table["split"].take(pa.array(index.shard_numbers(rows))),
        }
    )
