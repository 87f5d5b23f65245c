"""Results over a whole set, stored next to a store's shards.

Each is a folder <store>/artifacts/<kind>-<fp8>/ with a manifest and one file of tensors, named by the fingerprint of
everything that changes its numbers. An artifact exists if its manifest does.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from permafrost.core.digests import SHORT, sha256_json
from permafrost.core.errors import require
from permafrost.storage.files import file_at
from permafrost.storage.lock import LockedError, folder_lock
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.entries import ManifestError
from permafrost.store.manifest import (
    MANIFEST_NAME,
    read_manifest,
    write_manifest,
)

if TYPE_CHECKING:
    from torch import Tensor


ARTIFACTS_FOLDER = "artifacts"
"""Folder of the artifacts of a store."""
ARTIFACT_SCHEMA = 1
_POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class ArtifactManifest:
    """Content of <store>/artifacts/<kind>-<fp8>/manifest.json."""

    kind: str
    fingerprint: str
    """SHA-256 of made_from."""
    made_from: dict[str, Any]
    """Everything that changes the numbers."""
    description: dict[str, Any]
    """Facts about the result, defined by its kind."""
    files: dict[str, str]
    """SHA-256 of each file."""
    schema: int = ARTIFACT_SCHEMA


@dataclass(frozen=True)
class Artifact:
    """Artifact of a store, which may or may not exist."""

    store: RootedPath
    kind: str
    made_from: dict[str, Any]
    made_by: str
    """Command that creates it, for messages."""

    @property
    def folder(self) -> RootedPath:
        """Folder of the artifact, which exists once it has been saved."""
        return self.store / ARTIFACTS_FOLDER / f"{self.kind}-{sha256_json(self.made_from)[:SHORT]}"

    @property
    def exists(self) -> bool:
        """True if the artifact has been saved; its manifest is written last."""
        return file_at(self.folder / MANIFEST_NAME).exists()

    @property
    def description(self) -> dict[str, Any]:
        """Description of an existing artifact.

        Raises:
            ManifestError: If there is none, or if its manifest is damaged.
        """
        return read_manifest(
            ArtifactManifest, self.folder, self.made_by, ARTIFACT_SCHEMA
        ).description

    def save(
        self, tensors: Mapping[str, Tensor], description: dict[str, Any], *, wait: bool = False
    ) -> None:
        """Commit the artifact unless it exists or another process is writing the same one.

        Args:
            tensors: Tensors of the artifact by name.
            description: Facts about the result for its manifest.
            wait: Wait for that process, so that the artifact exists afterwards.
        """
        while not self.exists:
            self._save_alone(tensors, description)
            if not wait:
                return
            time.sleep(_POLL_SECONDS)

    def _save_alone(self, tensors: Mapping[str, Tensor], description: dict[str, Any]) -> None:
        from safetensors.torch import save

        name = f"{self.kind}.safetensors"
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        file_at(self.folder).make_folder()
        try:
            with folder_lock(self.folder):
                digest = file_at(self.folder / name).write(save(contiguous))
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
        """Load the manifest and the tensors, checked as in `load_artifact`.

        Raises:
            ManifestError: If the artifact does not exist, or if any byte has changed.
        """
        return load_artifact(self.folder, self.made_by)


def load_artifact(folder: RootedPath, made_by: str) -> tuple[ArtifactManifest, dict[str, Tensor]]:
    """Load the manifest and the tensors of a folder.

    Args:
        folder: Folder of the artifact.
        made_by: Command that creates such a folder, for messages.

    Returns:
        The manifest, and the tensors by name.

    Raises:
        ManifestError: If a file is missing, or if any byte has changed.
    """
    from safetensors.torch import load

    manifest = read_manifest(ArtifactManifest, folder, made_by, ARTIFACT_SCHEMA)
    repair = f"delete its folder and run {made_by}"
    name = f"{manifest.kind}.safetensors"
    path = folder / name
    require(
        file_at(path).is_file(),
        f"{path} does not exist, but its manifest does; {repair}",
        ManifestError,
    )
    content = file_at(path).read()
    digest, claimed = hashlib.sha256(content).hexdigest(), manifest.files.get(name, "")
    require(
        digest == claimed,
        f"{path} is damaged: it has sha256 {digest[:12]}, but its manifest lists {claimed[:12]}; {repair}",
        ManifestError,
    )
    return manifest, load(content)
