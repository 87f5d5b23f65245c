"""What a judge learned from a teacher network, kept in the store: the teacher's second student needs no teacher.

<store>/artefacts/<kind>-<fp8>/    manifest.json and <kind>.safetensors
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.store.artefact import (
    artefact_folder,
    is_committed,
    publish,
    read_tensors,
    write_tensors,
)
from pipeline.store.files import sha256_json
from pipeline.store.lock import LockedError, lock_folder
from pipeline.store.manifest import SCHEMA_VERSION, read_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from pipeline.evaluation.trial import Trial

_MADE_BY = "stages.evaluate with teacher="


@dataclass(frozen=True, kw_only=True)
class TeacherArtefactManifest:
    """<store>/artefacts/<kind>-<fp8>/manifest.json."""

    kind: str
    fingerprint: str
    """Of made_from."""
    made_from: dict[str, Any]
    layers: tuple[str, ...]
    """From the finest to the deepest."""
    files: dict[str, str]
    schema: int = SCHEMA_VERSION


@dataclass(frozen=True)
class TeacherArtefact:
    """One set of a teacher's tensors by layer, there or not."""

    store: Path
    kind: str
    made_from: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Named by all that changes the numbers."""
        return artefact_folder(self.store, self.kind, sha256_json(self.made_from))

    @property
    def is_there(self) -> bool:
        return is_committed(self.folder)

    @property
    def layers(self) -> tuple[str, ...]:
        """Of one that is there."""
        return self._manifest().layers

    def load(self) -> dict[str, Tensor]:
        """The tensors of one that is there, checked."""
        repair = f"delete its folder and run {_MADE_BY}"
        return read_tensors(self.folder, self._file_name, self._manifest().files, repair)

    def save(self, layers: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Commit it, unless another process is writing the very same."""
        try:
            with lock_folder(self.folder):
                files = write_tensors(self.folder, self._file_name, tensors)
                publish(
                    self.folder,
                    TeacherArtefactManifest(
                        kind=self.kind,
                        fingerprint=sha256_json(self.made_from),
                        made_from=self.made_from,
                        layers=tuple(layers),
                        files=files,
                    ),
                )
        except LockedError:
            return

    @property
    def _file_name(self) -> str:
        return f"{self.kind}.safetensors"

    def _manifest(self) -> TeacherArtefactManifest:
        return read_manifest(TeacherArtefactManifest, self.folder, _MADE_BY)


def teacher_artefact(trial: Trial, kind: str, **made_from: Any) -> TeacherArtefact:
    """Of the trial's teacher on its store's records.

    made_from  what else changes the numbers, as JSON: which records in which order
    """
    described = trial.networks.described_teacher
    made_from |= {
        # It is asked in float32, whatever its pass did.
        "teacher": {name: value for name, value in described.items() if name != "dtype"},
        "store": trial.store.manifest.fingerprint,
        "frame": trial.options.frame,
    }
    return TeacherArtefact(trial.store.path, kind, made_from)
