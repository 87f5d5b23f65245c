"""Checkpoints: the state of a training, written atomically."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from pipeline.config.runs import CHECKPOINT_NAME
from pipeline.core.files import write_atomically
from pipeline.training.state import Training


def save_checkpoint(training: Training, folder: Path) -> None:
    """Write the whole state atomically. The old checkpoint remains valid until it is replaced."""
    if not training.distributed.is_first:
        return
    buffer = io.BytesIO()
    torch.save(training.state(), buffer)
    write_atomically(folder / CHECKPOINT_NAME, buffer.getvalue())


def load_checkpoint(training: Training, folder: Path) -> None:
    """Resume every rank from the folder's checkpoint, or do nothing if there is none."""
    path = folder / CHECKPOINT_NAME
    if path.exists():
        device = next(training.model.parameters()).device
        training.load_state(torch.load(path, map_location=device, weights_only=True))
    training.distributed.require_equal(
        [training.epoch, training.step, training.global_step],
        f"ranks found different checkpoints in {folder}; put the run's folder on storage that all nodes share",
    )
