"""Names for what was computed: equal fingerprints mean equal numbers, whoever computed them.

A fingerprint covers what changes the numbers (data, weights, architecture, preprocessing, explainer,
payloads, views) and leaves out what does not (library versions, device, actors, batch size).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import ConfigError, FileDataConfig
from pipeline.store.files import sha256_file, sha256_json

if TYPE_CHECKING:
    from pipeline.config import DataConfig, ExplainerConfig, ModelConfig, PassConfig
    from pipeline.records import Record
    from pipeline.store.manifest import StoreManifest

SHORT = 8
"""Hexadecimal digits of a fingerprint in a folder's name."""


def fingerprint_dataset(config: DataConfig, revision: int, records: list[Record]) -> str:
    """Of a source's options and code, and of every record it lists, in the order of their keys.

    Options that say where the files lie are left out: data that move to another folder stay the same.
    """
    outside = config.NOT_DATA if isinstance(config, FileDataConfig) else frozenset()
    options = {name: value for name, value in asdict(config).items() if name not in outside}
    listing = [asdict(record) for record in sorted(records, key=lambda record: record.key)]
    return sha256_json({"data": options, "revision": revision, "records": listing})


def describe_teacher(config: ModelConfig, num_classes: int) -> dict[str, Any]:
    """The teacher as its pass's manifest names it."""
    if config.weights is None:
        raise ConfigError(
            "teacher.weights is not set; a teacher that was never trained has nothing to teach: "
            "train one with stages.teach and give its model.safetensors"
        )
    path = Path(config.weights)
    if not path.is_file():
        raise ConfigError(
            f"teacher.weights={path} does not exist; train the teacher with stages.teach, or correct the path"
        )
    options = asdict(config)
    preprocessing = {name: options.pop(name) for name in ("mean", "std")}
    options.pop("weights")
    return {
        "architecture": options,
        "weights_sha256": sha256_file(path),
        "classes": num_classes,
        "preprocessing": preprocessing,
        "frame": "full",
        "dtype": "float32",
    }


def describe_pass(
    store: StoreManifest,
    teacher: dict[str, Any],
    explainer: ExplainerConfig,
    config: PassConfig,
    backend: str,
) -> dict[str, Any]:
    """Everything a pass's fingerprint covers, as its manifest repeats it."""
    return {
        "dataset_fingerprint": store.dataset.fingerprint,
        "store_fingerprint": store.fingerprint,
        "selection": None,
        "teacher": teacher,
        "views": {"count": 1, "sampler": "canonical", "seed": 0},
        "explainer": asdict(explainer) if "map" in config.payloads else {},
        "payloads": sorted(config.payloads),
        "map_dtype": config.map_dtype if "map" in config.payloads else None,
        "backend": backend,
    }


def fingerprint_pass(description: dict[str, Any]) -> str:
    """Of `describe_pass`."""
    return sha256_json(description)
