"""Epochs that a run lists in a file, and the weights of some of them next to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.storage.files import file_at
from permafrost.storage.signed_files import naming_damage, read_json, write_json

if TYPE_CHECKING:
    from permafrost.models.classifier import Classifier


def read_listed(
    path: Path, section: str, check: Callable[[dict[str, Any]], object], advice: str
) -> list[dict[str, Any]]:
    """Read the entries of a file, none if it does not exist.

    Args:
        path: File with a digest.
        section: Name of the list in the file.
        check: Function that raises EntryError for wrong types and ranges.
        advice: Fix, for the error message.

    Raises:
        DamagedFileError: If the digest is wrong, or an entry has a wrong type or range.
    """
    if not path.exists():
        return []
    values = read_json(path, advice)
    with naming_damage(path, advice):
        check(values)
    entries: list[dict[str, Any]] = values[section]
    return entries


@dataclass(frozen=True)
class KeptEpochs:
    """Writer of the list of epochs, and of the weights of those that are kept."""

    path: Path
    """File of the list."""
    section: str
    """Name of the list in the file."""
    prefix: str
    """First part of the names of the files of weights."""

    def weights(self, epoch: int) -> Path:
        """Return the path of an epoch's weights."""
        return self.path.with_name(f"{self.prefix}{epoch:04d}.safetensors")

    def write(
        self,
        model: Classifier,
        epoch: int,
        entries: Sequence[dict[str, Any]],
        kept_numbers: Collection[int],
    ) -> None:
        """Write the list after an epoch and, if this epoch is kept, its weights; delete those that are not kept.

        Args:
            model: Network after the epoch.
            epoch: Number of the epoch.
            entries: Entries of the list; that of a kept epoch gets the digest of its weights.
            kept_numbers: Numbers of the epochs whose weights are kept.
        """
        from safetensors.torch import save

        if epoch in kept_numbers:
            (entry,) = (entry for entry in entries if entry["epoch"] == epoch)
            state = {
                name: tensor.contiguous().cpu()
                for name, tensor in model.network.state_dict().items()
            }
            entry["sha256"] = file_at(self.weights(epoch)).write(save(state))
        write_json(self.path, {self.section: entries})
        requested = {self.weights(number) for number in kept_numbers}
        for path in self.path.parent.glob(f"{self.prefix}*.safetensors"):
            if path not in requested:
                path.unlink()
