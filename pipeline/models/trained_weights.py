"""Weights files of networks that runs have trained, checked against the description beside them (model.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.models import is_published
from pipeline.config.options import Role, options_of
from pipeline.config.runs import to_plain_dict
from pipeline.core.errors import ConfigError, shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.config.models import ModelConfig

MODEL_NAME = "model.safetensors"
DESCRIPTION_NAME = "model.json"
FILES_OF_A_NETWORK = ("weights", "sha256", "partition")
"""Options of a network that name files whose content is included in the trained weights."""

_NOT_TRAINED = (
    *("classes", "input_size", "frame", "crop_fraction", "interpolation", *FILES_OF_A_NETWORK),
    *("partition_control", "partition_seed"),
)
"""Options that may differ between the training of a network and its use."""
_INFERRED = ("mean", "std", "columns")
"""Options that the provider or the store determines if they are null."""


def trained_here(config: ModelConfig) -> bool:
    """Return whether the weights of a network are a file that a run has trained, described by model.json beside it."""
    return _description_of_weights(config) is not None


def check_weights(config: ModelConfig, section: str, classes: Sequence[str] = ()) -> None:
    """Raise ConfigError if a run has trained the weights of a network with other options, or on other classes.

    section  section of the options, for messages
    classes  names of the classes of the data, to be compared unless the options have a number of classes
    """
    described = _description_of_weights(config)
    if described is None:
        return
    trained: dict[str, Any] = described["model"]
    if trained["kind"] != config.kind:
        raise ConfigError(
            f"{section}.weights={config.weights} are those of a network of kind {trained['kind']}; set "
            f"{section}={trained['kind']} {section}.name={trained['name']}"
        )
    own = to_plain_dict(config)
    other = {
        option.name: trained[option.name]
        for option in options_of(type(config))
        if option.name in trained
        and option.name not in _NOT_TRAINED
        and Role.OUTSIDE_IDENTITY not in option.roles
        and trained[option.name] != own[option.name]
        and not (option.name in _INFERRED and None in (trained[option.name], own[option.name]))
    }
    if other:
        words = " ".join(f"{section}.{name}={_word(value)}" for name, value in other.items())
        values = ", ".join(f"{section}.{name}={_word(own[name])}" for name in other)
        raise ConfigError(
            f"{section}.weights={config.weights} were trained with other options than {values}; set {words}, as "
            f"{DESCRIPTION_NAME} beside them says"
        )
    known = described.get("classes")
    if classes and known and config.classes is None and list(classes) != known:
        raise ConfigError(
            f"{section}.weights={config.weights} were trained on the classes {shorten(known, 5)}, but the store has "
            f"{shorten(classes, 5)}; correct one of them, or set {section}.classes={len(known)} to store the outputs "
            "for its own classes"
        )


def _word(value: Any) -> str:
    """Format a value as in an override."""
    return "null" if value is None else json.dumps(value).replace(" ", "").strip('"')


def _description_of_weights(config: ModelConfig) -> dict[str, Any] | None:
    """Read model.json beside the weights of a network, or return None if they are no file of a run."""
    if config.weights is None or is_published(config.weights):
        return None
    path = Path(config.weights)
    if path.name != MODEL_NAME or not (path.parent / DESCRIPTION_NAME).exists():
        return None
    values = json.loads((path.parent / DESCRIPTION_NAME).read_text())
    is_of_a_run = isinstance(values, dict) and isinstance(values.get("model"), dict)
    return values if is_of_a_run else None
