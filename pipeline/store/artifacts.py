"""Set-level results beside a store's shards: <store>/artifacts/<kind>-<fp8>/, a manifest and one file of tensors.

An artifact is named by the fingerprint of all that changes its numbers, and exists when its manifest does.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.core.files import SHORT, make_folder, sha256_json, write_atomically
from pipeline.store.lock import LockedError, lock_folder
from pipeline.store.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    ManifestError,
    read_manifest,
    write_manifest,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

ARTIFACTS_FOLDER = "artifacts"
_POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class ArtifactManifest:
    """<store>/artifacts/<kind>-<fp8>/manifest.json."""

    kind: str
    fingerprint: str
    """SHA-256 of made_from."""
    made_from: dict[str, Any]
    """Everything that changes the numbers."""
    description: dict[str, Any]
    """Facts about the result, as its kind defines them."""
    files: dict[str, str]
    """File -> SHA-256."""
    schema: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Artifact:
    """One artifact of a store, present or not."""

    store: Path
    kind: str
    made_from: dict[str, Any]
    made_by: str
    """The command that makes it, for messages."""

    @property
    def folder(self) -> Path:
        """Its folder, which exists once it was saved."""
        name = f"{self.kind}-{sha256_json(self.made_from)[:SHORT]}"
        return self.store / ARTIFACTS_FOLDER / name

    @property
    def exists(self) -> bool:
        """Whether it was saved; its manifest is written last."""
        return (self.folder / MANIFEST_NAME).exists()

    @property
    def description(self) -> dict[str, Any]:
        """The description of one that is there."""
        return read_manifest(ArtifactManifest, self.folder, self.made_by).description

    def save(
        self, tensors: Mapping[str, Tensor], description: dict[str, Any], *, wait: bool = False
    ) -> None:
        """Commit it, unless it is there or another process is writing the very same.

        wait  for that process, so that it is there afterwards
        """
        while not self.exists:
            self._save_alone(tensors, description)
            if not wait:
                return
            time.sleep(_POLL_SECONDS)

    def _save_alone(self, tensors: Mapping[str, Tensor], description: dict[str, Any]) -> None:
        from safetensors.torch import save

        name = _file_name(self.kind)
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        make_folder(self.folder)
        try:
            with lock_folder(self.folder):
                digest = write_atomically(self.folder / name, save(contiguous))
                manifest = ArtifactManifest(
                    kind=self.kind,
                    fingerprint=sha256_json(self.made_from),
                    made_from=self.made_from,
                    description=description,
                    files={name: digest},
                )
                write_manifest(self.folder, manifest)
        except LockedError:
            return

    def load(self) -> tuple[ArtifactManifest, dict[str, Tensor]]:
        """Its manifest and tensors, as `load_artifact` checks them."""
        return load_artifact(self.folder, self.made_by)


def load_artifact(folder: Path, made_by: str) -> tuple[ArtifactManifest, dict[str, Tensor]]:
    """The manifest and the tensors of a folder; ManifestError where a byte is not what was written.

    made_by  the command that makes such a folder, for messages
    """
    from safetensors.torch import load

    manifest = read_manifest(ArtifactManifest, folder, made_by)
    repair = f"delete its folder and run {made_by}"
    name = _file_name(manifest.kind)
    path = folder / name
    if not path.is_file():
        raise ManifestError(f"{path} does not exist, though its manifest does; {repair}")
    content = path.read_bytes()
    found, claimed = hashlib.sha256(content).hexdigest(), manifest.files.get(name, "")
    if found != claimed:
        raise ManifestError(
            f"{path} is damaged: it has sha256 {found[:12]}, its manifest says {claimed[:12]}; {repair}"
        )
    return manifest, load(content)


def _file_name(kind: str) -> str:
    return f"{kind}.safetensors"
