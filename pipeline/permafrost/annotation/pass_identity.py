"""The identity of a teacher pass.

A fingerprint covers everything that changes the numbers (data, weights, architecture, preprocessing, explainer,
outputs, views) and excludes everything that does not (library versions, device, actors, batch size). The batch size of
stored mixtures is part of it, since second records are drawn within a batch.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Sequence
from typing import Any

from permafrost.annotation.stored_views import StoredViews
from permafrost.config.differences import differences
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.models import ModelConfig
from permafrost.config.options import identifying_values
from permafrost.config.store import OUTPUTS, PassOptions
from permafrost.core.digests import sha256_json
from permafrost.models.providers import build_model
from permafrost.store.manifest import CANONICAL_VIEW, PassManifest, StoreManifest

_OF_MANIFEST = (
    *("dataset_fingerprint", "store_fingerprint", "selection", "teacher", "views", "explainer"),
    *("backend", "temperatures"),
)
"""Entries of a description that are fields of a manifest; all others are in `added`."""
_OPTIONS = {
    "teacher.architecture.": "teacher.",
    "teacher.preprocessing.": "teacher.",
    "teacher.dtype": "annotate.precision",
    "teacher.plug-in ": "code of ",
    "teacher.file ": "file ",
    "teacher.format.": "format.",
    "views.sampler": "views",
    "views.mix_block": "annotate.batch_size",
    **{f"views.{name}": f"augment.{name}" for name in ("operations", "edges", "border")},
    "views.interpolation": "augment.interpolation",
    "selection.split": "split",
    "selection.subset": "subset",
    "projection": "annotate.features_channels",
    "dataset_fingerprint": "records",
    "store_fingerprint": "store",
    "backend": "store.backend",
    "temperatures": "annotate.temperatures",
}
"""Option, or the start of its name, by the start of the name of an entry."""
_CANONICAL: tuple[dict[str, Any], None] = (
    {"count": 1, "sampler": CANONICAL_VIEW, "seed": 0},
    None,
)


def describe_explainer(config: ExplainerConfig) -> dict[str, Any]:
    """Describe the options that determine a pass's maps. Options that are not read are left out."""
    options = identifying_values(config)
    if config.max_classes is None:
        del options["max_classes"]
    if config.target_classes != "sample_gt":
        del options["seed"]
    return options


def describe_pass(
    store: StoreManifest,
    teacher: dict[str, Any],
    explainer: ExplainerConfig,
    config: PassOptions,
    backend: str,
    views: StoredViews | None = None,
    network: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe everything that a pass's fingerprint covers, in the form of its manifest.

    Args:
        store: Manifest of the store.
        teacher: Description of the network, of `describe_teacher`, with its dtype.
        explainer: Options returned by `resolve_explainer`.
        config: Options of the pass, without "auto".
        backend: Format of the pass's fields.
        views: Stored views, None for the canonical view of every record.
        network: What outputs say about the teacher (OutputInfo.describe).
    """
    views_entry, selection = _CANONICAL if views is None else views.describe()
    only_where_read: dict[str, Any] = {
        option: getattr(config, option)
        for name in config.outputs
        for option in config.read_by(name)
    }
    return {
        "dataset_fingerprint": store.dataset.fingerprint,
        "store_fingerprint": store.fingerprint,
        "selection": selection,
        "teacher": teacher,
        "views": views_entry,
        "explainer": describe_explainer(explainer) if "maps" in config.outputs else {},
        "outputs": sorted(config.outputs),
        "backend": backend,
        **only_where_read,
        **(network or {}),
    }


def fingerprint_pass(description: dict[str, Any]) -> str:
    """Compute the fingerprint of the result of `describe_pass`."""
    return sha256_json(description)


def description_of(manifest: PassManifest) -> dict[str, Any]:
    """Return the result of `describe_pass` from a manifest, of earlier versions without the options of outputs."""
    known = {name: getattr(manifest, name) for name in _OF_MANIFEST}
    return {name: value for name, value in known.items() if value != ()} | manifest.added


def pass_differences(
    existing: dict[str, Any], requested: dict[str, Any], weights: Iterable[str]
) -> dict[str, tuple[Any, Any]]:
    """Return the options in which two passes differ, each with both values.

    Args:
        existing: Description of a pass, perhaps of an earlier version.
        requested: Description of another one.
        weights: Names of the files of their weights, as far as they are known.
    """
    old = {name: value for name, value in existing.items() if value is not None}
    known = requested if "outputs" in old else old  # not all options of an earlier version
    new = {name: value for name, value in requested.items() if name in known and value is not None}
    options = {
        "teacher.weights_sha256": f"teacher.weights ({' -> '.join(dict.fromkeys(weights))})",
        **{name: f"annotate.{name}" for name in {**old, **new} if name not in _OF_MANIFEST},
    }
    return differences(old, new, options | _OPTIONS)


def describe_network(
    outputs: Sequence[str], teacher: ModelConfig, classes: Sequence[str]
) -> dict[str, Any]:
    """Return the entries that outputs add about the teacher.

    Raises:
        ConfigError: If the teacher cannot produce one of them.
    """
    functions = [OUTPUTS[name].describe for name in outputs]
    if not any(functions):
        return {}
    network = build_model(teacher, classes)
    described: dict[str, Any] = {}
    for function in filter(None, functions):
        described |= pkgutil.resolve_name(function)(network)
    return described
