"""Other networks of an evaluation besides its model, each built once when an evaluator first needs it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from permafrost.config.models import ModelConfig, NoModelConfig
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.digests import sha256_json
from permafrost.core.errors import ConfigError, require
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.models.compute import resolve_device
from permafrost.models.network import Network
from permafrost.models.providers import build_model, freeze, with_recorded_layer
from permafrost.models.resolve import resolve_network
from permafrost.models.saved import SavedNetwork
from permafrost.models.trained_weights import MODEL_NAME
from permafrost.runs.folder import PassRecords, RunFolder
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store, TeacherPass


class Networks:
    """The teacher network and the students of other runs."""

    def __init__(self, config: EvaluateConfig, store: Store, passes: Sequence[TeacherPass]) -> None:
        self.config, self.store, self.passes = config, store, passes
        self._students: dict[str, EvaluatedModel] = {}

    def check_teacher(self, evaluator: str, *, is_stored: bool = False) -> None:
        """Check that `teacher` names the network that made the evaluated model's teacher pass.

        Args:
            evaluator: Name of the evaluator that needs it, for the message.
            is_stored: True if the store has what the evaluator needs of it, so that it need not be named.

        Raises:
            ConfigError: If no network is named.
            StoreMismatchError: If the pass was made by another network.
        """
        words = self.config.command
        if is_stored and not any(word.startswith(("teacher=", "teacher.")) for word in words):
            return
        if (teacher := _name_network(self.config)) is None:
            raise ConfigError(
                f"evaluators={evaluator} needs the teacher network, but teacher.weights is not set; name the network "
                "with teacher= and teacher.weights=, as for precompute"
            )
        check_made_pass(teacher, self.store, self.passes)

    @cached_property
    def described_teacher(self) -> dict[str, Any]:
        """Description of the teacher from its pass, or from `teacher` if there is no pass."""
        if self.passes:
            return self.passes[0].manifest.teacher
        teacher = _name_network(self.config)
        return {} if teacher is None else Network(teacher, self.store.manifest.classes).describe()

    @cached_property
    def teacher(self) -> EvaluatedModel:
        """Network of `teacher`. Call `check_teacher` first."""
        teacher = _name_network(self.config)
        assert teacher is not None
        if self.passes:
            teacher = with_recorded_layer(teacher, self.passes[0].manifest.made_with)
        return build_teacher(teacher, self.store, self.config.evaluate.device)

    def check_student(self, option: str, run: str) -> dict[str, str]:
        """Return the SHA-256 of the weights of another run's student, by their path.

        Args:
            option: Name of the option that names the run, for the message.
            run: Name of the run.

        Raises:
            ConfigError: If the run has no finished student.
            DamagedFileError: If the weights are not those that its training wrote.
        """
        folder = RunFolder(run).path / "distill"
        require(
            SavedNetwork(folder).is_finished,
            f"{option}={run}: {folder} holds no finished student; run permafrost distill run={run}",
        )
        return {str(folder / MODEL_NAME): SavedNetwork(folder).check()}

    def student(self, run: str) -> EvaluatedModel:
        """Load the student of another run. Call `check_student` first."""
        if run not in self._students:
            model, trained = SavedNetwork(RunFolder(run).path / "distill").load(
                self.store.manifest.classes
            )
            device = resolve_device("evaluate.device", self.config.evaluate.device)
            self._students[run] = EvaluatedModel(
                network=model.to(device), input_size=trained.input_size
            )
        return self._students[run]


def build_teacher(
    teacher: ModelConfig, store: Store, device: str, *, reads_head: bool = True
) -> EvaluatedModel:
    """Build a teacher as an evaluated model, frozen, at its input size.

    Args:
        teacher: Options of the network.
        store: Store of the evaluated records.
        device: Value of evaluate.device.
        reads_head: False if its last layer is not read, which its weights file need not have then.
    """
    side = Network(teacher, store.manifest.classes).input_size
    model = freeze(
        build_model(
            teacher,
            store.manifest.classes if reads_head else len(store.manifest.classes),
            may_replace_head=not reads_head,
        )
    )
    return EvaluatedModel(
        network=model.to(resolve_device("evaluate.device", device)),
        input_size=store.size if side is None else (side, side),
    )


def check_made_pass(teacher: ModelConfig, store: Store, passes: Sequence[TeacherPass]) -> None:
    """Raise StoreMismatchError unless the network made the first of the passes, if there are any."""
    if not passes:
        return
    teacher = resolve_network(teacher, store, "teacher")
    asked = Network(teacher, store.manifest.classes).describe(reads_head=False)
    entry = passes[0].manifest.teacher
    if teacher.frame == "auto":  # whatever it was for the pass
        asked["frame"] = entry["frame"]
        named = [name for name in ("mean", "std") if name in asked["preprocessing"]]
        if teacher.input_size is not None:
            named.append("input_size")
        asked["preprocessing"] = entry["preprocessing"] | {
            name: asked["preprocessing"][name] for name in named
        }
    for name, value in asked.items():
        # Evaluators run in float32, independent of the pass.
        require(
            name == "dtype" or sha256_json(entry.get(name)) == sha256_json(value),
            f"teacher= is not the network that made {passes[0].name}: its {name} is {str(value)[:160]}, that of the "
            f"pass is {str(entry.get(name))[:160]}; correct teacher= and teacher.weights=, or choose the pass with "
            "store.teacher=",
            StoreMismatchError,
        )


def first_made_pass(
    folder: Path, store: Store, weights_sha256: str, passes: Sequence[TeacherPass]
) -> list[TeacherPass]:
    """Find the pass that an evaluation reads of those made with the given weights: the recorded one, or the first.

    Args:
        folder: Folder of the evaluation, which keeps to the pass that it has read before.
        store: Store of the passes.
        weights_sha256: SHA-256 of the teacher's weights.
        passes: Passes to choose from.

    Returns:
        A list of that pass; empty if none was made with these weights.
    """
    of_weights = [
        made for made in passes if made.manifest.teacher["weights_sha256"] == weights_sha256
    ]
    recorded = PassRecords([folder]).in_store(store.manifest.fingerprint)
    return sorted(of_weights, key=lambda made: (made.name,) not in recorded)[:1]


def passes_of_teacher(
    folder: Path, teacher: ModelConfig, store: Store, candidates: Sequence[TeacherPass]
) -> list[TeacherPass]:
    """Return the pass that a teacher made, or [] if there is none to choose from.

    Args:
        folder: Folder of the evaluation, which keeps to one of several passes of the same weights.
        teacher: Options of the network.
        store: Store of the passes.
        candidates: Passes to choose from, empty for all passes of the store.

    Raises:
        StoreMismatchError: If the network made none of these passes.
    """
    passes = list(candidates) or [store.open_pass(folder.name) for folder in store.pass_folders()]
    if not passes:
        return []
    described = Network(teacher, store.manifest.classes).describe(reads_head=False)
    teacher_passes = first_made_pass(folder, store, described["weights_sha256"], passes)
    check_made_pass(teacher, store, teacher_passes or passes)
    return teacher_passes


def _name_network(config: EvaluateConfig) -> ModelConfig | None:
    teacher = config.teacher
    return None if isinstance(teacher, NoModelConfig) or teacher.weights is None else teacher
