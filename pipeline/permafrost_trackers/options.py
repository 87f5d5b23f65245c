"""Trackers of `logger=`, and how they enter."""

from __future__ import annotations

from permafrost.config.training import TRACKERS

TRACKERS["wandb"] = "permafrost_trackers.clients:WandB"
TRACKERS["mlflow"] = "permafrost_trackers.clients:MLflow"
TRACKERS["trackio"] = "permafrost_trackers.clients:Trackio"
