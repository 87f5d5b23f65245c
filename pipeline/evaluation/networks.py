"""The networks of an evaluation beside its model: each is built once, when an evaluator asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config.models import ModelConfig, NoModelConfig
from pipeline.config.runs import RUNS
from pipeline.config.verbs import EvaluateConfig
from pipeline.core.errors import ConfigError
from pipeline.core.files import sha256_file, sha256_json
from pipeline.evaluation.forward import EvaluatedModel
from pipeline.models.devices import resolve_device
from pipeline.models.fingerprint import describe_teacher
from pipeline.models.providers import build_model, freeze, teacher_input_size
from pipeline.models.saved import MODEL_NAME, is_finished, load_model
from pipeline.store.manifest import StoreMismatchError
from pipeline.store.reader import Store, TeacherPass


class Networks:
    """The teacher itself, and the students of other runs."""

    def __init__(self, config: EvaluateConfig, store: Store, passes: Sequence[TeacherPass]) -> None:
        self.config = config
        self.store = store
        self.passes = passes
        self._students: dict[str, EvaluatedModel] = {}

    def check_teacher(self, evaluator: str) -> None:
        """ConfigError unless `teacher` names the network that made the subject's teacher pass.

        evaluator  that asks for it, for the message
        """
        teacher = _named(self.config)
        if teacher is None:
            raise ConfigError(
                f"evaluators={evaluator} asks the teacher network, and teacher.weights is not set; name it with teacher= and "
                "teacher.weights=, as for precompute"
            )
        check_made_pass(teacher, self.store, self.passes)

    @cached_property
    def described_teacher(self) -> dict[str, Any]:
        """The teacher as its pass names it, or, where there is none, as `teacher` does."""
        if self.passes:
            return self.passes[0].manifest.teacher
        teacher = _named(self.config)
        return (
            {} if teacher is None else describe_teacher(teacher, len(self.store.manifest.classes))
        )

    @cached_property
    def teacher(self) -> EvaluatedModel:
        """The network of `teacher`, after `check_teacher`."""
        teacher = _named(self.config)
        assert teacher is not None
        return build_teacher(teacher, self.store, self.config.evaluate.device)

    def check_student(self, option: str, run: str) -> dict[str, str]:
        """path -> sha256 of the weights of another run's student; ConfigError where there is none.

        option  that names the run, for the message
        """
        folder = _student_folder(run)
        if not is_finished(folder):
            raise ConfigError(
                f"{option}={run}: {folder} holds no finished student; run stages.distill run={run}, or correct it"
            )
        return {str(folder / MODEL_NAME): sha256_file(folder / MODEL_NAME)}

    def student(self, run: str) -> EvaluatedModel:
        """The student of another run, after `check_student`."""
        if run not in self._students:
            model, trained = load_model(_student_folder(run))
            device = resolve_device("evaluate.device", self.config.evaluate.device)
            self._students[run] = EvaluatedModel(
                network=model.to(device), input_size=trained.input_size
            )
        return self._students[run]


def build_teacher(teacher: ModelConfig, store: Store, device: str) -> EvaluatedModel:
    """A teacher as the subject of an evaluator, frozen, at the input size that it takes."""
    side = teacher_input_size(teacher)
    model = freeze(build_model(teacher, len(store.manifest.classes)))
    return EvaluatedModel(
        network=model.to(resolve_device("evaluate.device", device)),
        input_size=store.size if side is None else (side, side),
    )


def check_made_pass(teacher: ModelConfig, store: Store, passes: Sequence[TeacherPass]) -> None:
    """StoreMismatchError unless the network made the first of the passes, where there are any."""
    if not passes:
        return
    asked = describe_teacher(teacher, len(store.manifest.classes))
    made = passes[0].manifest.teacher
    for name, value in asked.items():
        if name == "dtype":  # an evaluator asks in float32, whatever the pass did
            continue
        if sha256_json(made[name]) != sha256_json(value):
            raise StoreMismatchError(
                f"teacher= is not the network that made {passes[0].name}: its {name} is {_short(value)}, the pass's "
                f"{_short(made[name])}; correct teacher= and teacher.weights=, or choose the pass by store.teacher="
            )


def passes_of_teacher(
    teacher: ModelConfig, store: Store, named: Sequence[TeacherPass]
) -> list[TeacherPass]:
    """The pass that a teacher made of a store, of those named or of all; none where the store has no pass."""
    passes = list(named) or [store.open_pass(folder.name) for folder in store.pass_folders()]
    if not passes:
        return []
    asked = describe_teacher(teacher, len(store.manifest.classes))["weights_sha256"]
    own = [made for made in passes if made.manifest.teacher["weights_sha256"] == asked]
    check_made_pass(teacher, store, own or passes)
    return own[:1]


def _named(config: EvaluateConfig) -> ModelConfig | None:
    teacher = config.teacher
    return None if isinstance(teacher, NoModelConfig) or teacher.weights is None else teacher


def _student_folder(run: str) -> Path:
    return RUNS / run / "distill"


def _short(value: object) -> str:
    return str(value)[:160]
