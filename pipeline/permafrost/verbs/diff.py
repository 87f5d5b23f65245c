"""Show what differs between two stores, two passes or two runs, and whether their results may be compared.

    permafrost diff stores/photos stores/photos-2026
    permafrost diff stores/photos/teachers/resnet20-1a2b3c4d stores/photos/teachers/resnet20-5e6f7a8b
    permafrost diff stores/photos/1a2b3c4d stores/photos/5e6f7a8b
    permafrost diff kd e2kd output=kd-e2kd.json

A pass is named by its folder, or by the store's folder and the pass's name or digits. A run is named as in `run=`.
Records are compared between two stores; passes and runs of different stores say that their stores differ.

Reads   manifests and indexes of stores, manifests of passes, options of runs
Writes  nothing; with `output=` the differences as JSON
"""

from __future__ import annotations

import json
import re
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
_OF_RESULTS = re.compile(r"evaluation\.|classes|columns|store\.frame|store$")
"""Names of what results depend on besides the network; of stores, also the records outside of train."""


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
        records = [
            f"{each['records']:,} {kind} ({', '.join(each['keys'])}{', ...' * (each['records'] > _SHOWN)})"
            for kind, each in self.data.items()
        ]
        return {
            "compared": self.compared,
            "options": "\n  ".join(["", *options]) or "the same",
            "records": "\n  ".join(["", *records])
            or (
                "those of two stores, which permafrost diff compares"
                if "store" in self.options
                else "the same"
            ),
            "results may be compared": f"no: {'; '.join(self.incomparable)}"
            if self.incomparable
            else "yes",
        }


def compare_two(config: DiffConfig) -> DiffResult:
    """Compare two stores, two passes or two runs.

    Raises:
        ConfigError: If a name is of something else, or if their kinds differ.
    """
    require(
        bool(config.new), "diff compares two; type both, as in permafrost diff stores/a stores/b"
    )
    (kind, old, read), (other, new, other_read) = map(_described, (config.old, config.new))
    require(
        kind == other,
        f"diff compares two of a kind, but {config.old} is a {kind} and {config.new} is a {other}; name two stores, "
        "two passes, or two runs of one verb",
    )
    pairs = (
        pass_differences(old, new, (read, other_read))
        if kind == "pass"
        else differences(old, new, INPUT_OPTIONS)
    )
    changed = {
        name: pair
        for name, pair in pairs.items()
        if NOT_SET not in pair or not name.startswith("evaluation.")  # of one run only
    }
    data = _compare_records(read, other_read) if kind == "store" else {}
    reasons = [
        f"{split} has records {kind_of_records}"
        for kind_of_records, each in data.items()
        for split in each["splits"]
        if split != "train"
    ]
    result = DiffResult(
        compared=f"two {'passes' if kind == 'pass' else f'{kind}s'}",
        options=changed,
        data=data,
        incomparable=reasons
        + [
            describe_difference(name, *pair)
            for name, pair in changed.items()
            if _OF_RESULTS.match(name)
        ],
    )
    if config.output:
        file_at(Path(config.output)).write(json.dumps(asdict(result), indent=1).encode())
    return result


def _described(name: str) -> tuple[str, dict[str, Any], Any]:
    """Return the kind of what a name is of, its description, and the store or the file of the pass's weights.

    Raises ConfigError if there is none of these.
    """
    parent, _, last = name.rstrip("/").rpartition("/")
    folder = parent.removesuffix(TEACHERS_FOLDER).rstrip("/")
    if parent and (store := _store_at(folder)) is not None:
        folders = file_at(store.folder / TEACHERS_FOLDER).paths()
        matches = [each for each in folders if last in (each.name, *each.name.rsplit("-", 1))]
        require(
            len(matches) == 1,
            f"{folder} has {len(matches) or 'no'} passes {last}; name one of: "
            + ", ".join(each.name for each in folders),
        )
        made = store.pass_manifest(matches[0])
        return "pass", description_of(made), made.made_with.get("weights", "")
    if (store := _store_at(name)) is not None:
        return "store", _describe_store(store), store
    for run, (verb, cls) in product((Path(name), RunFolder(name).path), _TRAININGS.items()):
        if (run / verb / CONFIG_NAME).is_file():
            described = describe_run(read_config(run / verb / CONFIG_NAME, cls), cls)
            if (run / "evaluate" / CONFIG_NAME).is_file():
                evaluation = read_config(run / "evaluate" / CONFIG_NAME, EvaluationRun)
                options = identity(evaluation, EvaluationRun)["evaluate"]
                described["evaluation"] = options | {"frame": evaluation["evaluate"]["frame"]}
            return f"{verb} run", described, None
    raise ConfigError(
        f"{name} is not a store, a pass or a run; name a store's folder, <store>/<pass>, or a run as in run=, of a "
        "sweep <run>/students/<student>"
    )


def _store_at(path: str) -> Store | None:
    """Return the store of a folder, None if there is none."""
    folder = StoreOptions(path=path or ".").folder
    return Store(folder) if file_at(folder / MANIFEST_NAME).exists() else None


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
    }


def _compare_records(old: Store, new: Store) -> dict[str, Any]:
    """Return `data` of the result, without a Python object for each record."""
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
    return {
        name: {
            "records": part.num_rows,
            "keys": part["key"][:_SHOWN].to_pylist(),
            "splits": sorted(
                {*part["split"].unique().to_pylist(), *part["split_new"].unique().to_pylist()}
                - {None}
            ),
        }
        for name, part in parts.items()
        if part.num_rows
    }


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
