"""Networks that options name: checked against the data once, and identified as in manifests and fingerprints."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from permafrost.config.models import CENTER_CROP_FRACTION, MEMORY, ModelConfig, is_published
from permafrost.config.options import (
    Options,
    Role,
    identifying_values,
    is_left_out,
    options_of,
)
from permafrost.config.plugins import plugin_digests
from permafrost.core.digests import sha256_json
from permafrost.core.errors import ConfigError, UserError, require
from permafrost.models.read_files import digests_of_reads
from permafrost.models.trained_weights import (
    DataClasses,
    WeightsFile,
    count_classes,
    require_classes,
    require_texts,
)

_BUILT: dict[str, str] = {}
"""Digests of random and published weights, by the network that has them."""
_KEYS: dict[str, str | None] = {}
"""Keys of the weights in files, by the digest of the file and the network."""
_ELSEWHERE = (
    *("weights_key", "classes", "mean", "std"),
    *("input_size", "frame", "crop_fraction", "interpolation"),
)
"""Options that a description has outside of its architecture."""


class Network:
    """A network of the options, for the classes of its data: what its weights are, and what identifies it."""

    def __init__(self, config: ModelConfig, classes: DataClasses, section: str = "teacher") -> None:
        """Find the weights that the options name.

        Args:
            config: Options of the network.
            classes: Classes of the data, as many as the outputs unless the config sets `classes`.
            section: Section of the options, for messages.

        Raises:
            ConfigError: If published weights, or a file in a folder, cannot be found.
        """
        if is_published(config.weights):
            from permafrost.models.providers import name_weights

            config = name_weights(config)
        self.config, self.classes, self.section = config, classes, section
        self.file = WeightsFile.of(config)

    @property
    def num_classes(self) -> int:
        """Number of outputs."""
        return self.config.classes or count_classes(self.classes)

    @property
    def own_classes(self) -> tuple[str, ...]:
        """Names of the classes that a run trained the weights on, empty if none did, or if the config has a number."""
        described = None if self.file is None else self.file.description
        return () if described is None or self.config.classes else described.classes

    @property
    def input_size(self) -> int | None:
        """Side of the input images in pixels; None for the frame of the store."""
        from permafrost.models.providers import teacher_input_size, with_preprocessing

        return teacher_input_size(with_preprocessing(self.config, count_classes(self.classes)))

    def check(self, *, reads_head: bool = True) -> None:
        """Check that the options are those that a run has trained the weights with, on the classes of the data.

        Args:
            reads_head: False if the logits are not read, so that only the number of classes is compared.

        Raises:
            ConfigError: If they are not.
            DamagedFileError: If model.json next to the weights is damaged.
        """
        if self.file is not None and self.file.description is not None:
            self.file.check_options(self.config, self.section)
            classes = self.classes if reads_head else count_classes(self.classes)
            self.file.check_classes(self.config, classes, self.section)

    def require_weights(self, otherwise: str = "") -> None:
        """Require that weights are named, and that a file of them exists.

        Args:
            otherwise: What else could be done without any, for the message.

        Raises:
            ConfigError: If not.
        """
        require(
            self.config.weights is not None,
            f"{self.section}.weights is not set, so the network is untrained; name the model.safetensors of permafrost "
            f"teach, or set {self.section}.weights=random for an untrained network{otherwise}",
        )
        self._require_file(
            f"{self.section}.weights={self.config.weights} does not exist; train the network with permafrost teach, or "
            "correct the path"
        )

    def require_outputs(self) -> None:
        """Require that the number of outputs is known.

        Raises:
            ConfigError: If neither the data have classes nor the options a number.
        """
        require(
            self.num_classes > 0,
            f"the records have no classes; set {self.section}.classes to the number of the teacher's outputs, or store "
            "what needs none, as in annotate.outputs=[pooled]",
        )

    def build(self, store: str, columns: int | None, *, reads_head: bool) -> None:
        """Build a teacher for records that are not packed yet, to find what is wrong with it.

        Args:
            store: Path of the store, for messages.
            columns: Number of columns of a table, None for images.
            reads_head: False if the logits are not stored.

        Raises:
            ConfigError: If there is no such network, or the weights or their outputs do not fit.
        """
        from permafrost.models.providers import build_model

        if reads_head:
            self.require_outputs()
            if is_published(self.config.weights):
                self._check_published()
        self.check(reads_head=reads_head)
        config = self.config.resolve(self.section, store, columns)
        classes = self.classes if reads_head else count_classes(self.classes)
        build_model(config, classes, may_replace_head=not reads_head)

    def describe(self, precision: str = "float32", *, reads_head: bool = True) -> dict[str, Any]:
        """Describe the network as the teacher in the manifest of its pass.

        Args:
            precision: Precision of its forward pass.
            reads_head: False if its logits are not read, so that published weights may have other outputs, or none.

        Raises:
            ConfigError: If no weights are named, a file of weights does not exist, published weights have another
                number of outputs, a run has trained the weights with other options, or the classes are others.
        """
        from permafrost.models.providers import with_preprocessing

        self.require_weights()
        is_of_provider = is_published(self.config.weights)
        if is_of_provider and reads_head:
            self._check_published()
        weights_sha256 = self.weights_sha256
        self.check(reads_head=reads_head)
        config = with_preprocessing(self.config, count_classes(self.classes))
        key = self.weights_key
        return {
            "architecture": {
                option.name: identifying_values(value) if isinstance(value, Options) else value
                for option in options_of(type(config))
                if not {Role.OUTSIDE_IDENTITY, Role.IN_WEIGHTS} & option.roles
                and option.name not in _ELSEWHERE
                and not is_left_out(option, value := getattr(config, option.name))
            },
            "weights_sha256": weights_sha256,
            **({"weights": config.weights} if is_of_provider else {}),
            **({"weights_key": key} if key is not None else {}),
            "classes": self.num_classes,
            "preprocessing": {} if config.learns_moments else describe_input(config),
            "frame": config.frame,
            "dtype": precision,
            **plugin_digests(config),
            **digests_of_reads(config, self.num_classes or 1),
            **(config.fingerprint_files() if config.digests_in_passes else {}),
        }

    def digest(self, *, reads_head: bool = True) -> str:
        """Return the SHA-256 of `describe`. The argument and the errors are those of it."""
        return sha256_json(self.describe(reads_head=reads_head))

    def _check_published(self) -> None:
        """Raise ConfigError unless the outputs of published weights are the classes of the data."""
        from permafrost.models.providers import published

        source, weights = published(self.config), f"{self.section}.weights={self.config.weights}"
        if source is not None and source.classes != self.num_classes:
            advice = f"set {self.section}.classes={source.classes}, or " if source.classes else ""
            if source.prompts:
                weights, advice = f"{self.section}.prompts", "write a line for each class, or "
            raise ConfigError(
                f"{weights} has {source.classes} outputs, but {self.num_classes} are needed, and a new head would be "
                f"untrained; {advice}name weights for your classes, or store what needs no head, as in "
                "annotate.outputs=[pooled]"
            )
        if source is not None:
            require_classes(source.labels, self.classes, f"{weights} are", are_published=True)
            require_texts(source.prompts, self.classes, f"{self.section}.prompts")

    def identify_start(self, option: str) -> str:
        """Return what identifies weights that a training starts from: their published name, or their file and key.

        Args:
            option: Name of the option, for messages.

        Raises:
            ConfigError: If the file does not exist.
            DamagedFileError: If a run has written other weights than the file has.
        """
        if self.file is None:
            return str(self.config.weights)
        self._require_file(f"{option}={self.config.weights} does not exist; correct the path")
        digest, key = self.file.sha256(), self.weights_key
        return digest if key is None else f"{digest} {key}"

    def _require_file(self, error_message: str) -> None:
        require(self.file is None or self.file.path.is_file(), error_message)

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the file of weights, or of the state dict of a network that is built, once per process."""
        if self.file is not None:
            self.require_weights()
            return self.file.sha256(self.config.sha256)
        origin, _, state = str(self.config.weights).partition(":")
        if origin == MEMORY:
            return state
        config, num_classes = self.config, count_classes(self.classes)
        if (built := f"{num_classes} {config!r}") not in _BUILT:
            from permafrost.models.cost import sha256_tensors
            from permafrost.models.providers import build_model, provider_of, published

            source = published(config) if is_published(config.weights) else None
            # With the published head, because one for other classes is drawn anew in every process.
            model = (
                build_model(config, num_classes)
                if source is None
                else provider_of(config).build(config, source.classes)
            )
            _BUILT[built] = sha256_tensors(model.network)
        return _BUILT[built]

    @cached_property
    def weights_key(self) -> str | None:
        """Key of the weights in their file, None if the file has a single set that fits, or none."""
        file, num_classes = self.file, count_classes(self.classes)
        if file is None or not file.path.is_file() or file.description is not None:
            return None
        if (read := f"{file.sha256()} {num_classes} {self.config!r}") not in _KEYS:
            _KEYS[read] = _find_key(self.config, file.path, num_classes)
        return _KEYS[read]


def _find_key(config: ModelConfig, path: Path, num_classes: int) -> str | None:
    from permafrost.core.generators import SeededDraws
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


def describe_input(config: ModelConfig) -> dict[str, Any]:
    """Describe what a network's images go through. Manifests have a crop or an interpolation only if it is unusual."""
    from permafrost.models.providers import model_normalization, teacher_input_size

    mean, std = model_normalization(config)
    described: dict[str, Any] = {"mean": mean, "std": std, "input_size": teacher_input_size(config)}
    if config.crop_fraction not in (None, CENTER_CROP_FRACTION):
        described["crop_fraction"] = config.crop_fraction
    if config.interpolation == "bicubic":
        described["interpolation"] = config.interpolation
    return described
