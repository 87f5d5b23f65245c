"""Names for what was computed: equal fingerprints mean equal numbers, whoever computed them.

A fingerprint covers what changes the numbers (data, weights, architecture, preprocessing, explainer,
payloads, views) and leaves out what does not (library versions, device, actors, batch size).
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import ConfigError, FileDataConfig, is_published
from pipeline.store.files import canonical_json, sha256_file, sha256_json
from pipeline.store.manifest import CANONICAL_VIEW

if TYPE_CHECKING:
    from pipeline.config import DataConfig, ExplainerConfig, ModelConfig, PassConfig
    from pipeline.records import Record
    from pipeline.store.manifest import StoreManifest
    from pipeline.stored_views import StoredViews
    from pipeline.superfeatures.partition import Partition

_CANONICAL: tuple[dict[str, Any], None] = (
    {"count": 1, "sampler": CANONICAL_VIEW, "seed": 0},
    None,
)
SHORT = 8
"""Hexadecimal digits of a fingerprint in a folder's name."""


def fingerprint_dataset(config: DataConfig, revision: int, records: list[Record]) -> str:
    """Of a source's options and code, and of every record it lists, in the order of their keys.

    Options that say where the files lie are left out: data that move to another folder stay the same.
    """
    outside = config.NOT_DATA if isinstance(config, FileDataConfig) else frozenset()
    options = {name: value for name, value in asdict(config).items() if name not in outside}
    # The digest of {"data": options, "records": [...], "revision": revision}, whose text is never whole in memory.
    digest = hashlib.sha256(b'{"data":' + canonical_json(options) + b',"records":[')
    for place, record in enumerate(sorted(records, key=lambda record: record.key)):
        digest.update((b"," if place else b"") + canonical_json(asdict(record)))
    digest.update(b'],"revision":' + canonical_json(revision) + b"}")
    return digest.hexdigest()


def describe_teacher(
    config: ModelConfig,
    num_classes: int,
    precision: str = "float32",
    section: str = "teacher",
) -> dict[str, Any]:
    """The teacher as its pass's manifest names it; `precision` is that of its forward pass.

    section  of the options that name it, for messages
    """
    from pipeline.models import (
        RANDOM,
        model_normalisation,
        name_weights,
        published,
        teacher_input_size,
    )

    if config.weights is None:
        raise ConfigError(
            f"{section}.weights is not set; a teacher that was never trained has nothing to teach: train one "
            f"with stages.teach and give its model.safetensors, or write {section}.weights=random if you mean it"
        )
    config = name_weights(config)
    assert config.weights is not None
    classes = config.classes or num_classes
    source = published(config) if is_published(config.weights) else None
    if source is not None and source.classes != classes:
        raise ConfigError(
            f"{section}.weights={config.weights} has {source.classes} outputs where {classes} are wanted, and a fresh "
            f"head has nothing to teach: set {section}.classes={source.classes}, or give weights for your classes"
        )
    if config.weights == RANDOM or is_published(config.weights):
        weights_sha256 = _sha256_weights(config, num_classes)
    else:
        path = Path(config.weights)
        if not path.is_file():
            raise ConfigError(
                f"{section}.weights={path} does not exist; train the teacher with stages.teach, or correct the path"
            )
        weights_sha256 = sha256_file(path)
    elsewhere: tuple[str, ...] = (
        *("weights", "sha256", "license", "classes", "mean", "std", "input_size", "frame"),
    )
    if config.kind == "additive":  # its weights hold the partition, wherever that came from
        elsewhere += ("partition", "partition_control", "partition_seed")
    younger = ("patch", "depth")  # than the first fingerprints, which stay as they were
    options = {
        name: value
        for name, value in asdict(config).items()
        if name not in elsewhere and not (name in younger and value is None)
    }
    mean, std = model_normalisation(config)
    preprocessing = {"mean": mean, "std": std, "input_size": teacher_input_size(config)}
    if options.get("columns") is not None:  # of a table, whose moments its weights hold
        preprocessing = {}
    return {
        "architecture": options,
        "weights_sha256": weights_sha256,
        **({"weights": config.weights} if source is not None else {}),
        "classes": classes,
        "preprocessing": preprocessing,
        "frame": config.frame,
        "dtype": precision,
    }


def _sha256_weights(config: ModelConfig, num_classes: int) -> str:
    """Of the built network's state dict: names, types, shapes and bytes."""
    from pipeline.models import build_model

    digest = hashlib.sha256()
    for name, tensor in sorted(build_model(config, num_classes).network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe_explainer(config: ExplainerConfig) -> dict[str, Any]:
    """The options that decide a pass's maps; each where it is read, so that none changes what it does not touch."""
    options = asdict(config)
    if config.max_classes is None:
        del options["max_classes"]
    if config.explained_classes != "sample_gt":
        del options["seed"]
    return options


def describe_pass(
    store: StoreManifest,
    teacher: dict[str, Any],
    explainer: ExplainerConfig,
    config: PassConfig,
    backend: str,
    views: StoredViews | None = None,
    partition: Partition | None = None,
) -> dict[str, Any]:
    """Everything a pass's fingerprint covers, as its manifest repeats it.

    partition  of an additive teacher, where its superfeatures are stored
    views  None is the canonical view of every record
    """
    seen, selection = _CANONICAL if views is None else views.describe()
    only_where_read: dict[str, Any] = (
        {"cat_size": config.cat_size} if "cat" in config.payloads else {}
    )
    if "ked_z" in config.payloads:
        from pipeline.superfeatures.hierarchy import describe_partition

        assert partition is not None
        only_where_read |= {"ked_dtype": config.ked_dtype, **describe_partition(partition)}
    return {
        "dataset_fingerprint": store.dataset.fingerprint,
        "store_fingerprint": store.fingerprint,
        "selection": selection,
        "teacher": teacher,
        "views": seen,
        "explainer": describe_explainer(explainer) if "map" in config.payloads else {},
        "payloads": sorted(config.payloads),
        "map_dtype": config.map_dtype if "map" in config.payloads else None,
        "backend": backend,
        **only_where_read,
    }


def fingerprint_pass(description: dict[str, Any]) -> str:
    """Of `describe_pass`."""
    return sha256_json(description)
