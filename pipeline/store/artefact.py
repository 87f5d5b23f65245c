"""Set-level results beside a store's shards: <store>/artefacts/<kind>-<fp8>/, a manifest and a file of tensors.

An artefact is named by the fingerprint of all that changes its numbers, and exists when its manifest does. Whoever
makes one brings its own manifest, a dataclass with `files: {path: sha256}` and `schema`.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pipeline.fingerprint import SHORT
from pipeline.store.files import make_folder, write_atomically
from pipeline.store.manifest import MANIFEST_NAME, ManifestError, write_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from _typeshed import DataclassInstance
    from torch import Tensor

ARTEFACTS_FOLDER = "artefacts"


def artefact_folder(store: Path, kind: str, fingerprint: str) -> Path:
    """Where an artefact lies; it is there where the folder has a manifest."""
    return store / ARTEFACTS_FOLDER / f"{kind}-{fingerprint[:SHORT]}"


def is_committed(folder: Path) -> bool:
    """Whether the artefact is there; its manifest is written last."""
    return (folder / MANIFEST_NAME).exists()


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write the tensors into one safetensors file; the manifest's `files` for it."""
    from safetensors.torch import save

    make_folder(folder)
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    return {name: write_atomically(folder / name, save(contiguous))}


def publish(folder: Path, manifest: DataclassInstance) -> None:
    """After this the artefact exists for readers."""
    write_manifest(folder, manifest)


def read_tensors(
    folder: Path, name: str, files: Mapping[str, str], repair: str
) -> dict[str, Tensor]:
    """The tensors of a file, checked byte by byte against its manifest's `files`.

    repair  the way out, for messages
    """
    from safetensors.torch import load

    path = folder / name
    if not path.is_file():
        raise ManifestError(f"{path} does not exist, though its manifest does; {repair}")
    content = path.read_bytes()
    found, claimed = hashlib.sha256(content).hexdigest(), files[name]
    if found != claimed:
        raise ManifestError(
            f"{path} is damaged: it has sha256 {found[:12]}, its manifest says {claimed[:12]}; {repair}"
        )
    return load(content)
