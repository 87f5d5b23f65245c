"""Weights files of networks that runs have trained, checked against the description next to them.

model.json is the manifest of a trained network: it carries its own digest, lists that of model.safetensors, and is
written last.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from permafrost.config.builder import to_plain_dict
from permafrost.config.models import ModelConfig, Picture, is_weights_file
from permafrost.config.options import Role, options_of
from permafrost.config.plugins import plugin_digests
from permafrost.core.errors import ConfigError, FileError, require, shorten
from permafrost.core.json_entries import from_dict, require_digest, require_entry
from permafrost.core.progress import log_once
from permafrost.core.records import are_numbers, describe_other_names
from permafrost.models.file_kinds import describe_foreign_folder
from permafrost.runs.folder import run_identity, saved_options
from permafrost.storage.files import file_at
from permafrost.storage.object_cache import local_file
from permafrost.storage.signed_files import (
    SIGNATURE,
    check_json,
    damaged,
    naming_damage,
)
from permafrost.store.manifest import MAX_FRAME_PIXELS

logger = logging.getLogger("permafrost.models")

MODEL_NAME = "model.safetensors"
"""File of the weights of a trained network."""
DESCRIPTION_NAME = "model.json"
_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".th")
"""Suffixes of files of weights in a folder."""
_ADVICE = (
    "delete {path} and run the command that trained this network again, which trains it anew "
    "(from checkpoint.pt, if trainer.keep_checkpoint=true left one), or restore them"
)

DataClasses = Sequence[str] | int
"""Names of the data's classes in their order, or only their number, which is not compared."""

_NOT_TRAINED = (
    *("weights", "weights_key", "sha256", "classes"),
    *("input_size", "frame", "crop_fraction", "interpolation"),
)
"""Options that may differ between the training of a network and its use."""
_INFERRED = ("mean", "std", "columns")
"""Options that the provider or the store determines if they are null."""


@dataclass(frozen=True, kw_only=True)
class TrainedFacts:
    """Facts about a trained network that model.json has and that building it again needs."""

    num_classes: int
    input_size: tuple[int, int]
    """Input size (height, width)."""
    classes: tuple[str, ...] = ()
    """Class names, if the outputs are the classes of the data."""
    teachers: tuple[str, ...] = ()
    """Names of the passes it was trained on."""
    split: str = "train"
    steps: int | None = None
    """Number of steps of its training, None if it was not trained by a run."""
    precision: str | None = None
    """Precision of the forward passes of its training, None if it was not trained by a run."""
    picture: Picture | None = None
    """Picture that it receives outside of random views; None for a table, or if that is not known."""
    explainer: str = ""
    """Value of method.explainer in its training, empty if it is explained as its teacher is."""


@dataclass(frozen=True, kw_only=True)
class ModelDescription(TrainedFacts):
    """Entries of model.json."""

    model: dict[str, Any]
    """Options of the network, as plain values."""
    subset: dict[str, Any]
    parameters: int
    """Number of parameters."""
    macs: int
    """Multiply-accumulates of a forward pass of one record."""
    weights_sha256: str
    """SHA-256 of model.safetensors."""
    run: str | None = None
    """Identity of the run that trained it, as its config has it; None if it was not trained by one."""

    def __post_init__(self) -> None:
        require_digest(self.weights_sha256)
        for name in ("kind", "name"):
            require_entry(isinstance(self.model.get(name), str), f"model.{name} is missing")
        require_entry(min(self.num_classes, *self.input_size) >= 1, "a size is not positive")
        require_entry(
            math.prod(self.input_size) <= MAX_FRAME_PIXELS,
            f"an input of {self.input_size} has more than the {MAX_FRAME_PIXELS:,} pixels of a frame",
        )


def read_entries(folder: Path) -> ModelDescription:
    """Read model.json.

    Raises:
        DamagedFileError: If the digest is wrong, an entry has a wrong type or range, or the file is that of another
            run.
    """
    path = folder / DESCRIPTION_NAME
    with naming_damage(path, _ADVICE.format(path=path)):
        described = from_dict(
            ModelDescription,
            {"run": None, "picture": None, "explainer": ""} | check_json(file_at(path).read()),
        )
        run = described.run and run_identity(folder)
        require_entry(run in (None, described.run), "it is that of another run")
    return described


def check_trained_weights(folder: Path) -> str:
    """Return the SHA-256 of model.safetensors.

    Raises:
        DamagedFileError: If it is not the one that model.json lists.
    """
    listed, path = read_entries(folder).weights_sha256, folder / MODEL_NAME
    if (actual := file_at(path).sha256()) != listed:
        raise damaged(
            path,
            f"it has sha256 {actual[:12]}, but {DESCRIPTION_NAME} next to it lists {listed[:12]}",
            _ADVICE.format(path=folder / DESCRIPTION_NAME),
        )
    return actual


def warn_of_other_code(folder: Path, config: ModelConfig) -> None:
    """Log that the code of a network of one's own is not that of the run that trained it, if it is known.

    Args:
        folder: Folder of the trained network.
        config: Options of the network.
    """
    trained = saved_options(folder).get("inputs", {})
    current = plugin_digests(config)
    if changed := [name for name, digest in current.items() if trained.get(name, digest) != digest]:
        logger.warning(
            "%s was trained with another state of %s: what the network computes now may be something else; restore "
            "that code, or train again in another run=",
            folder,
            ", ".join(name.removeprefix("plug-in ") for name in changed),
        )


class WeightsFile:
    """File of a network's weights, with the description that a run has written next to it."""

    def __init__(self, weights: str) -> None:
        """Find the file that the option `weights` names, or its only one in a folder.

        Of an address it is a copy, with the model.json next to it.

        Raises:
            ConfigError: If there are several files in a folder, or none.
            FileError: If there is nothing at an address.
        """
        path = local_file(weights, DESCRIPTION_NAME)
        path = _file_in(path) if path.is_dir() else path
        # A link to the weights of a run has no model.json next to it.
        linked = path.resolve() if path.is_symlink() else path
        self.path = linked if _is_of_a_run(linked) else path

    @classmethod
    def of(cls, config: ModelConfig) -> WeightsFile | None:
        """Return the file that the options of a network name, None if they name none."""
        return cls(str(config.weights)) if is_weights_file(config.weights) else None

    @cached_property
    def description(self) -> ModelDescription | None:
        """Description of the network, None if no run has trained the weights.

        Raises:
            DamagedFileError: If it is damaged.
        """
        return read_entries(self.path.parent) if _is_of_a_run(self.path) else None

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of outputs that timm or transformers has written next to the weights, empty if there are none."""
        path = self.path.parent / "config.json"
        try:
            values = json.loads(file_at(path).read()) if path.exists() else {}
            names = values.get("label_names") or values.get("id2label") or ()
            if isinstance(names, dict):
                names = [names[key] for key in sorted(names, key=int)]
            return tuple(map(str, names))
        except (ValueError, AttributeError, RecursionError, FileError):  # of another program
            return ()

    def sha256(self, expected: str | None = None) -> str:
        """Return the SHA-256 of the file.

        Args:
            expected: Value of the option `sha256`.

        Raises:
            WeightsError: If the option names another digest.
            DamagedFileError: If a run has written other weights to it.
        """
        actual = self._digest
        if expected is not None and actual != expected.lower():
            from permafrost.models.classifier import WeightsError  # imports torch

            raise WeightsError(
                f"{self.path} has sha256 {actual}, but the option sha256 is {expected}; fetch the file again or "
                "correct the option"
            )
        return actual

    @cached_property
    def _digest(self) -> str:
        if self.description is not None:
            return check_trained_weights(self.path.parent)
        return file_at(self.path).sha256()

    def check_options(self, config: ModelConfig, section: str) -> None:
        """Check that the options of a network are those that a run has trained these weights with.

        Args:
            config: Options of the network.
            section: Section of the options, for messages.

        Raises:
            ConfigError: If a run has trained the weights with other options.
            DamagedFileError: If the description is damaged.
        """
        if self.description is None:
            return
        trained = self.description.model
        require(
            trained["kind"] == config.kind,
            f"{section}.weights={config.weights} are those of a network of kind {trained['kind']}; set "
            f"{section}={trained['kind']} {section}.name={trained['name']}",
        )
        options = to_plain_dict(config)
        if other := {
            option.name: trained[option.name]
            for option in options_of(type(config))
            if option.name in trained
            and option.name not in _NOT_TRAINED
            and not {Role.OUTSIDE_IDENTITY, Role.IN_WEIGHTS} & option.roles
            and trained[option.name] != options[option.name]
            and not (
                option.name in _INFERRED and None in (trained[option.name], options[option.name])
            )
        }:
            arguments = shlex.join(
                f"{section}.{name}={_text_of(value)}" for name, value in other.items()
            )
            values = ", ".join(f"{section}.{name}={_text_of(options[name])}" for name in other)
            raise ConfigError(
                f"{section}.weights={config.weights} were trained with other options than {values}; "
                f"set {arguments}, as in {DESCRIPTION_NAME} next to them"
            )
        warn_of_other_code(self.path.parent, config)

    def check_classes(
        self,
        config: ModelConfig,
        classes: DataClasses,
        section: str = "",
        *,
        is_start: bool = False,
    ) -> None:
        """Check that a run has trained the weights on the classes of the data, if it has trained them.

        Args:
            config: Options of the network. A number of classes that is not that of the data declares other ones.
            classes: Classes of the data.
            section: Section of the options, for messages.
            is_start: True for the start of a training, which learns its classes; other ones are then logged.

        Raises:
            ConfigError: If the names or their order differ.
        """
        if config.classes not in (None, count_classes(classes)):
            return
        # Names of other libraries may be spelled in another way than those of the data.
        is_foreign = self.description is None
        trained = self.label_names if self.description is None else self.description.classes
        subject = f"{section}.weights" if section else "weights"
        subject = f"{subject}={config.weights} were"
        if not is_start:
            option = f"{section}.classes" if section else "classes"
            own_outputs = f", or set {option}={len(trained)} for outputs of its own classes"
            require_classes(trained, classes, subject, own_outputs, are_published=is_foreign)
        elif reason := describe_other_classes(trained, classes, are_published=is_foreign):
            kept, count = len(self.outputs_of(classes)), count_classes(classes)
            logger.warning(
                "%s trained on %s; the training begins with a last layer for them%s",
                subject,
                reason,
                f", with the rows of {kept} known classes and {count - kept} new ones"
                if kept and len(trained) != count
                else "",
            )

    def outputs_of(self, classes: DataClasses) -> dict[int, int]:
        """Return the output of each class of the data that a run has trained the weights on, by its number there."""
        trained = () if self.description is None else self.description.classes
        named = [] if isinstance(classes, int) else list(classes)
        return {named.index(name): n for n, name in enumerate(trained) if name in named}


def count_classes(classes: DataClasses) -> int:
    """Return the number of the data's classes."""
    return classes if isinstance(classes, int) else len(classes)


def describe_other_classes(
    trained: Sequence[str], classes: DataClasses, *, are_published: bool = False
) -> str:
    """Say how the classes that a network was trained on differ from those of the data, empty if they do not.

    Args:
        trained: Names of the network's outputs in their order, empty if they are not known.
        classes: Classes of the data.
        are_published: True if the names are those of a provider, whose spelling may differ from that of the data: then
            only the order of equal names is compared, if most are equal.
    """
    if (
        isinstance(classes, int)
        or not (trained and classes)
        or list(trained) == list(classes)
        or (
            are_numbers(trained) and len(trained) == len(classes)
        )  # which may have been named since
    ):
        return ""
    common = {name for name, count in Counter(trained).items() if count == 1} & set(classes)
    if are_published and (len(trained) != len(classes) or 2 * len(common) <= len(classes)):
        return ""
    if are_published or sorted(trained) == sorted(classes):
        moved = (
            number
            for number, name in enumerate(trained)
            if name in common and name != classes[number]
        )
        if (output := next(moved, None)) is None:
            return ""
        return (
            f"the same classes in another order than the store has: output {output} is {trained[output]}, and class "
            f"{output} of the store is {classes[output]}; list the classes in the order of the outputs in "
            "data.classes= (a text file, one class per line) and pack the data again"
        )
    return f"other classes: {describe_other_names(trained, classes)}"


def require_classes(
    trained: Sequence[str],
    classes: DataClasses,
    subject: str,
    remedy: str = "",
    *,
    are_published: bool = False,
) -> None:
    """Require that a network was trained on the classes of the data, in their order.

    Args:
        trained: As for `describe_other_classes`.
        classes: Classes of the data.
        subject: Words before "trained on", for the message.
        remedy: Another fix if their number differs, for the message.
        are_published: As for `describe_other_classes`.

    Raises:
        ConfigError: If the names or their order differ.
    """
    reason = describe_other_classes(trained, classes, are_published=are_published)
    if (
        not reason
        and are_numbers(trained)
        and classes
        and not isinstance(classes, int)
        and not are_numbers(classes)
    ):
        logger.warning(
            "%s trained on classes without names, 0 to %d, which are taken as %s in this order",
            subject,
            len(trained) - 1,
            shorten(classes, 3),
        )
    names = () if isinstance(classes, int) else tuple(classes)
    is_named = are_published and 0 < len(trained) == len(names) and not are_numbers(trained)
    if is_named and set(names).isdisjoint(trained):
        log_once(
            logger,
            logging.WARNING,
            f"{subject} trained on {shorten(list(trained), 3)}, none of which is a class of the data by name; they are "
            f"taken as {shorten(list(names), 3)} in this order",
        )
    if reason.startswith("other"):
        reason += "; name weights, or a store, of the same classes"
    other_number = len(trained) != count_classes(classes)
    require(not reason, f"{subject} trained on {reason}{remedy if other_number else ''}")


def require_texts(texts: Sequence[str], classes: DataClasses, option: str) -> None:
    """Require that no text of a class names another class instead, and warn of texts that name none.

    Args:
        texts: Texts in the order of the classes, empty if there are none.
        classes: Classes of the data.
        option: Option that has the texts, for messages.

    Raises:
        ConfigError: If a text names another class instead of its own.
    """
    names = () if isinstance(classes, int) else classes
    silent = [
        pair for pair in zip(names, texts, strict=False) if _words(pair[0]) not in _words(pair[1])
    ]
    wrong = [pair for pair in silent if any(_words(name) in _words(pair[1]) for name in names)]
    for name, text in wrong[:1] or silent[:1]:
        message = (
            f"{option}: {len(silent)} lines do not name their class, such as that of {name}, {text!r}; write the lines "
            "in the order of the store's classes"
        )
        require(not wrong, f"{message}, as some name another class")
        logger.warning(message)


@cache
def _words(text: str) -> str:
    """Return the words of a text in lower case between spaces."""
    words = " ".join(re.findall(r"[^\W_]+", text.lower()))
    return f" {words} "


def _text_of(value: Any) -> str:
    """Format a value as in an override."""
    return "null" if value is None else json.dumps(value).replace(" ", "").strip('"')


def _file_in(folder: Path) -> Path:
    """Return the file of weights in a folder: model.safetensors, or the only one. Raises ConfigError."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in _SUFFIXES)
    if MODEL_NAME in names:
        names = [MODEL_NAME]
    if len(names) != 1:
        foreign = describe_foreign_folder(folder)
        require(not foreign, f"weights={folder} is {foreign}")
        listed = f"it has {shorten(names)}" if names else "it has no file of weights"
        raise ConfigError(f"weights={folder} is a folder; name a file in it ({listed})")
    log_once(logger, logging.INFO, f"weights={folder} is a folder; reading {names[0]} in it")
    return folder / names[0]


def _is_of_a_run(path: Path) -> bool:
    """Return whether weights have a model.json of a run next to them. Those without a run's entries do not count."""
    described = path.parent / DESCRIPTION_NAME
    if path.name != MODEL_NAME or not described.exists():
        return False
    try:
        values = json.loads(file_at(described).read())
    except (ValueError, RecursionError):  # a damaged file, which its reader names
        return True
    return not isinstance(values, dict) or bool({"model", SIGNATURE} & values.keys())
