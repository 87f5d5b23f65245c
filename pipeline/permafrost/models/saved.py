"""A trained network on disk: model.safetensors, and model.json with everything needed to build it again.

model.json is written last and lists the digest of the weights (trained_weights.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from permafrost.config.builder import build_config, to_plain_dict
from permafrost.config.models import MODELS, MemoryModelConfig, ModelConfig, Picture, usual_picture
from permafrost.config.options import Role, options_of
from permafrost.config.plugins import require_named
from permafrost.config.store import SubsetOptions
from permafrost.core.errors import require, shorten
from permafrost.models.trained_weights import (
    DESCRIPTION_NAME,
    MODEL_NAME,
    TrainedFacts,
    check_trained_weights,
    read_entries,
    require_classes,
    warn_of_other_code,
)
from permafrost.runs.folder import run_identity
from permafrost.storage.files import file_at
from permafrost.storage.signed_files import write_json

if TYPE_CHECKING:
    from torch import nn

    from permafrost.models.classifier import Classifier
    from permafrost.store.reader import Store

EXPORT_FOLDER = "export"
"""Folder of the exported programs of a student, in its run."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel(TrainedFacts):
    """Content of model.json: everything needed in addition to the weights to build the network again."""

    config: ModelConfig
    subset: SubsetOptions = field(default_factory=SubsetOptions)
    """Subset of the split that it was trained on, so that the held-out records can be evaluated."""

    def in_frame(self, frame: str, store: Store) -> TrainedModel:
        """Return it with the picture that evaluate.frame means for it in a store; that of a table stays None.

        Args:
            frame: Value of evaluate.frame.
            store: Store of the records.
        """
        if len(self.config.input_shape(self.input_size)) != 3:
            return self
        picture = self.picture or usual_picture(self.input_size, store.size)
        return replace(self, picture=store.picture_of(picture.on(frame)))


def recorded_picture(network: ModelConfig) -> Picture | None:
    """Return the picture of the run that trained a network's weights; None if no run did, or it is not known."""
    path = Path(network.weights or "")
    is_of_run = path.name == MODEL_NAME and SavedNetwork(path.parent).is_finished
    return read_entries(path.parent).picture if is_of_run else None


def save_model(folder: Path, model: Classifier, trained: TrainedModel) -> None:
    """Write the weights, then the description that marks the run as finished.

    The weights have the names of their provider.
    """
    import torch
    from safetensors.torch import save

    from permafrost.models.cost import measure_cost

    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.network.state_dict().items()
    }
    weights_sha256 = file_at(folder / MODEL_NAME).write(save(state))
    record = torch.zeros(1, *trained.config.input_shape(trained.input_size))
    cost = measure_cost(model.one_network, record.to(model.device))
    description = {
        "model": to_plain_dict(trained.config),
        "num_classes": trained.num_classes,
        "classes": list(trained.classes),
        "input_size": list(trained.input_size),
        "teachers": list(trained.teachers),
        "split": trained.split,
        "subset": to_plain_dict(trained.subset),
        "steps": trained.steps,
        "precision": trained.precision,
        "picture": None if trained.picture is None else asdict(trained.picture),
        **({"explainer": trained.explainer} if trained.explainer else {}),
        "parameters": cost.parameters,
        "macs": cost.macs,
        "weights_sha256": weights_sha256,
        "run": run_identity(folder),
    }
    write_json(folder / DESCRIPTION_NAME, description)


_IN_MEMORY: dict[Path, nn.Module] = {}
"""Networks of this program from which others are built for saved weights, by the folder of their training."""


class SavedNetwork:
    """Trained network in the folder of a run."""

    def __init__(self, folder: Path) -> None:
        """Name the folder, which may not have a network yet."""
        self.folder = folder

    @property
    def is_finished(self) -> bool:
        """True if the folder contains a trained model, whose description is written last."""
        return (self.folder / DESCRIPTION_NAME).exists()

    def build_from(self, network: nn.Module) -> None:
        """Build the network as a copy of this one from now on, because no file describes its code."""
        _IN_MEMORY[self.folder.absolute()] = network

    def forget(self) -> None:
        """Forget the network of `build_from`."""
        _IN_MEMORY.pop(self.folder.absolute(), None)

    def check(self) -> str:
        """Return the SHA-256 of model.safetensors.

        Raises:
            DamagedFileError: If it is not the one that model.json lists.
        """
        return check_trained_weights(self.folder)

    def load(self, classes: Sequence[str] = ()) -> tuple[Classifier, TrainedModel]:
        """Load the network, frozen, and its description.

        Args:
            classes: Names of the classes of the records that it will run on, empty away from any data.

        Raises:
            ConfigError: If the run is not finished, or was trained on other classes.
            DamagedFileError: If its files are not the ones that it wrote.
            WeightsError: If the weights do not fit the network of the description.
        """
        from permafrost.core.generators import SeededDraws
        from permafrost.models.build_limit import limited_construction
        from permafrost.models.memory_network import warn_of_changed_module
        from permafrost.models.providers import build_model, freeze
        from permafrost.models.weights import load_weights

        trained = self.describe()
        if list(trained.classes) != list(classes[: len(trained.classes)]):  # others may follow
            require_classes(trained.classes, classes, f"the network in {self.folder} was")
        self.check()
        warn_of_other_code(self.folder, trained.config)
        if isinstance(trained.config, MemoryModelConfig):
            warn_of_changed_module(self.folder, trained.config)
        # The initial weights are not used.
        with limited_construction(self.folder / MODEL_NAME), SeededDraws(0):
            model = build_model(trained.config, trained.num_classes)
        load_weights(model, self.folder / MODEL_NAME)
        model.explainer_of_training = trained.explainer
        return freeze(model), trained

    def _others_like(self) -> str:
        """Return the runs with a finished network of the same stage, for messages; empty if there are none."""
        runs = sorted(
            path.parent.parent.name
            for path in self.folder.parent.parent.glob(f"*/{self.folder.name}/{DESCRIPTION_NAME}")
        )
        return f"; runs with one are {shorten(runs, 8)}" if runs else ""

    def describe(self) -> TrainedModel:
        """Read model.json.

        Raises:
            ConfigError: If the run is not finished, or its network is of a plug-in that is not named.
            DamagedFileError: If the digest is wrong, or an entry has a wrong type or range.
        """
        require(
            self.is_finished,
            f"{self.folder} holds no finished model; run its stage first, or correct run={self._others_like()}",
        )
        values, path = read_entries(self.folder), self.folder / DESCRIPTION_NAME
        kind = values.model["kind"]
        require(
            kind in MODELS,
            f"{path} names a network of kind {kind}, which is not among "
            f"{', '.join(MODELS)}; name the plug-in that adds it, plugins=[my_networks.py]",
        )
        require_named(values.model.get("factory"), path)
        # The weights, with all that is part of them, are next to the description, so the original files are not needed.
        files = {
            option.name
            for option in options_of(MODELS[kind])
            if option.name in ("weights", "sha256") or {Role.FILE, Role.IN_WEIGHTS} <= option.roles
        }
        options = values.model | dict.fromkeys(files & values.model.keys())
        config = build_config(MODELS[kind], options, str(path))
        if isinstance(config, MemoryModelConfig):
            config = replace(config, network=_IN_MEMORY.get(self.folder.absolute()))
        return TrainedModel(
            config=config,
            num_classes=values.num_classes,
            classes=values.classes,
            input_size=values.input_size,
            teachers=values.teachers,
            split=values.split,
            subset=build_config(SubsetOptions, values.subset, f"{path}: subset"),
            steps=values.steps,
            precision=values.precision,
            picture=values.picture,
            explainer=values.explainer,
        )
