"""Checkpoints: the state of a training, written atomically, with its own digest.

checkpoint.pt is the ZIP archive of torch.save, whose comment is `sha256:<digest>` of all bytes before the digest.
torch.load ignores comments, so other programs read it as any checkpoint.

Not here: checkpoints of other programs. A training starts from their weights (student.weights=), not from their state.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from permafrost.core.errors import require
from permafrost.runs.folder import CHECKPOINT_NAME
from permafrost.storage.files import file_at
from permafrost.storage.signed_files import DigestError, naming_damage
from permafrost.training.state import Training

_COMMENT = b"sha256:"
_DIGITS = 64
_END_OF_ARCHIVE = b"PK\x05\x06"
_END_BYTES = 22
"""Size of the last entry of an archive without a comment, whose last two bytes are the comment's length."""
_BLOCK_BYTES = 2**20


def save_checkpoint(training: Training, folder: Path) -> None:
    """Write the whole state atomically. The old checkpoint remains valid until it is replaced."""
    if not training.distributed.is_first:
        return
    buffer = io.BytesIO()
    torch.save(training.state(), buffer)
    archive = buffer.getbuffer()
    end = bytes(archive[-_END_BYTES:])
    require(
        end.startswith(_END_OF_ARCHIVE) and end.endswith(b"\0\0"),
        "torch.save did not write a ZIP archive without a comment",
        RuntimeError,
    )
    with file_at(folder / CHECKPOINT_NAME).open_atomically() as file:
        for start in range(0, len(archive) - 2, _BLOCK_BYTES):
            file.write(bytes(archive[start : min(start + _BLOCK_BYTES, len(archive) - 2)]))
        file.write((len(_COMMENT) + _DIGITS).to_bytes(2, "little") + _COMMENT)
        file.write(file.sha256.encode())


def load_checkpoint(training: Training, folder: Path) -> None:
    """Resume every rank from the folder's checkpoint, or do nothing if there is none.

    Raises:
        DamagedFileError: If its bytes are not those that were written, before any of them is interpreted, or if they
            are the state of another training.
    """
    if (path := folder / CHECKPOINT_NAME).exists():
        with naming_damage(path, "delete it, and the training starts again at epoch 0"):
            _check_digest(path)
            _restore(training, path)
    training.distributed.require_equal(
        [training.epoch, training.step, training.global_step],
        f"ranks found different checkpoints in {folder}; put the run's folder on storage that all nodes share",
    )


def _check_digest(path: Path) -> None:
    """Raise DigestError unless a checkpoint has the digest in its comment."""
    digest = hashlib.sha256()
    with file_at(path).open() as file:
        if (remaining := file.seek(0, io.SEEK_END) - _DIGITS) < len(_COMMENT):
            raise DigestError(f"it has {max(remaining + _DIGITS, 0)} bytes")
        file.seek(remaining - len(_COMMENT))
        require(
            file.read(len(_COMMENT)) == _COMMENT, "it does not end with its sha256", DigestError
        )
        file.seek(0)
        block = b""
        while remaining and (block := file.read(min(remaining, _BLOCK_BYTES))):
            digest.update(block)
            remaining -= len(block)
        claimed = file.read(_DIGITS)
    require(
        claimed == digest.hexdigest().encode(),
        f"it has sha256 {digest.hexdigest()[:12]}, but lists {claimed[:12].decode(errors='replace')!r}",
        DigestError,
    )


def _restore(training: Training, path: Path) -> None:
    """Load a whole checkpoint. Raises DigestError if it is not of this training."""
    try:
        state: dict[str, Any] = torch.load(
            path, map_location=training.model.device, weights_only=True
        )
        position = state["position"]
        require(
            [type(count) for count in position] == [int] * 3 and min(position) >= 0,
            f"its position is {position}",
            ValueError,
        )
        training.load_state(state)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises many kinds for a state of another network
        reason = " ".join(str(error).split())[:200]
        raise DigestError(f"it does not fit this training ({reason})") from error
