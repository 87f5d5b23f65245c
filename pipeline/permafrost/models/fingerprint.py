"""Identity of a network: architecture, weights and preprocessing, as recorded in manifests and fingerprints."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from permafrost.config.models import CENTER_CROP_FRACTION, ModelConfig, is_published
from permafrost.config.options import Role, is_left_out, options_of
from permafrost.config.plugins import plugin_digests
from permafrost.core.errors import ConfigError, UserError, require
from permafrost.models.read_files import digests_of_reads
from permafrost.models.trained_weights import (
    DataClasses,
    check_weights,
    count_classes,
    is_of_a_run,
    require_classes,
    sha256_weights,
    weights_file,
)

_BUILT: dict[str, str] = {}
"""Digests of random and published weights, by the network that has them."""
_KEYS: dict[str, str | None] = {}
"""Keys of the weights in files, by the digest of the file and the network."""


def describe_teacher(
    config: ModelConfig,
    data_classes: DataClasses,
    precision: str = "float32",
    section: str = "teacher",
    *,
    reads_head: bool = True,
) -> dict[str, Any]:
    """Describe a teacher as in the manifest of its pass.

    Args:
        config: Options of the network, with its weights.
        data_classes: Classes of the data, whose number is that of the outputs unless the config sets `classes`.
        precision: Precision of its forward pass.
        section: Section of the options that name it, for messages.
        reads_head: False if its logits are not read, so that published weights may have other outputs, or none.

    Raises:
        ConfigError: If no weights are named, a file of weights does not exist, published weights have another number of
            outputs, a run has trained the weights with other options, or the classes are others.
    """
    from permafrost.models.providers import (
        RANDOM,
        name_weights,
        published,
        with_preprocessing,
    )

    require(
        config.weights is not None,
        f"{section}.weights is not set, so the network is untrained; train one with permafrost teach and name its "
        f"model.safetensors, or set {section}.weights=random to use an untrained network on purpose",
    )
    config = name_weights(config)
    assert config.weights is not None
    num_classes = count_classes(data_classes)
    classes = config.classes or num_classes
    source = published(config) if is_published(config.weights) else None
    if reads_head and source is not None and source.classes != classes:
        advice = f"set {section}.classes={source.classes}, or " if source.classes else ""
        raise ConfigError(
            f"{section}.weights={config.weights} has {source.classes} outputs, but {classes} are needed, and a new "
            f"head would be untrained; {advice}name weights for your classes, or store what needs no head, as in "
            "annotate.payloads=[pooled]"
        )
    if source is not None and reads_head:
        subject = f"{section}.weights={config.weights} are"
        require_classes(source.labels, data_classes, subject, are_published=True)
    if config.weights == RANDOM or is_published(config.weights):
        weights_sha256 = _sha256_weights(config, num_classes)
    else:
        path = weights_file(config.weights)
        require(
            path.is_file(),
            f"{section}.weights={path} does not exist; train the network with permafrost teach, or correct the path",
        )
        weights_sha256 = sha256_weights(path, config.sha256)
    check_weights(config, section, data_classes if reads_head else num_classes)
    key = _weights_key(config, num_classes, weights_sha256)
    config = with_preprocessing(config, num_classes)
    elsewhere = (
        *("weights_key", "classes", "mean", "std"),
        *("input_size", "frame", "crop_fraction", "interpolation"),
    )
    options = {
        option.name: getattr(config, option.name)
        for option in options_of(type(config))
        if not {Role.OUTSIDE_IDENTITY, Role.IN_WEIGHTS} & option.roles
        and option.name not in elsewhere
        and not is_left_out(option, getattr(config, option.name))
    }
    preprocessing = {} if config.learns_moments else _describe_input(config)
    return {
        "architecture": options,
        "weights_sha256": weights_sha256,
        **({"weights": config.weights} if source is not None else {}),
        **({"weights_key": key} if key is not None else {}),
        "classes": classes,
        "preprocessing": preprocessing,
        "frame": config.frame,
        "dtype": precision,
        **plugin_digests(config),
        **digests_of_reads(config, classes or 1),
    }


def identify_start(config: ModelConfig, option: str, num_classes: int) -> str:
    """Return what identifies the weights that a training starts from: the exact name of published ones, or their file.

    Args:
        config: Options of the network, with its weights.
        option: Name of the option, for messages.
        num_classes: Number of outputs, unless the config sets `classes`.

    Raises:
        ConfigError: If the file does not exist.
    """
    weights = str(config.weights)
    if is_published(weights):
        return weights
    require(weights_file(weights).is_file(), f"{option}={weights} does not exist; correct the path")
    return identify_weights(config, num_classes)


def identify_weights(config: ModelConfig, num_classes: int) -> str:
    """Return the SHA-256 of a network's file of weights, and the key of its weights if the file has several.

    Raises:
        DamagedFileError: If a run has written other weights than the file has.
    """
    digest = sha256_weights(weights_file(str(config.weights)))
    key = _weights_key(config, num_classes, digest)
    return digest if key is None else f"{digest} {key}"


def _weights_key(config: ModelConfig, num_classes: int, weights_sha256: str) -> str | None:
    """Return which weights of its file a network has, None if the file has a single set that fits, or none."""
    from permafrost.models.providers import RANDOM

    if config.weights in (None, RANDOM) or is_published(config.weights):
        return None
    path = weights_file(str(config.weights))
    if not path.is_file() or is_of_a_run(path):
        return None
    known = f"{weights_sha256} {num_classes} {config!r}"
    if known not in _KEYS:
        _KEYS[known] = _find_key(config, path, num_classes)
    return _KEYS[known]


def _find_key(config: ModelConfig, path: Path, num_classes: int) -> str | None:
    from permafrost.core.seeded import SeededDraws
    from permafrost.models.providers import provider_of
    from permafrost.models.weights import choose_fit, read_state_dict

    outputs = config.classes or num_classes or 1
    try:
        tensors = read_state_dict(path)
        with SeededDraws(0):  # of weights that are not used
            model = provider_of(config).build(config, outputs)
    except UserError:
        return None
    fit, *others = choose_fit(model, path, tensors, outputs, config.weights_key)
    return fit.key if others else None


def _describe_input(config: ModelConfig) -> dict[str, Any]:
    """Describe what a network's images go through. Manifests have a crop or an interpolation only if it is unusual."""
    from permafrost.models.providers import model_normalization, teacher_input_size

    mean, std = model_normalization(config)
    described: dict[str, Any] = {"mean": mean, "std": std, "input_size": teacher_input_size(config)}
    if config.crop_fraction not in (None, CENTER_CROP_FRACTION):
        described["crop_fraction"] = config.crop_fraction
    if config.interpolation == "bicubic":
        described["interpolation"] = config.interpolation
    return described


def _sha256_weights(config: ModelConfig, num_classes: int) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes in the state dict of a network, built once per process."""
    key = f"{num_classes} {config!r}"
    if key not in _BUILT:
        _BUILT[key] = _sha256_built(config, num_classes)
    return _BUILT[key]


def _sha256_built(config: ModelConfig, num_classes: int) -> str:
    from permafrost.models.providers import build_model, provider_of, published

    source = published(config) if is_published(config.weights) else None
    # With the published head, because one for other classes is drawn anew in every process.
    model = (
        build_model(config, num_classes)
        if source is None
        else provider_of(config).build(config, source.classes)
    )
    digest = hashlib.sha256()
    for name, tensor in sorted(model.network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
