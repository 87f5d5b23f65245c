"""Sizes of the networks of a report, because a gain from more parameters is not a gain of the method."""

from __future__ import annotations

from typing import Any

import torch

from permafrost.models.cost import measure_cost
from permafrost.models.saved import is_finished, load_model
from permafrost.report.results import StudentResult


def network_rows(results: list[StudentResult]) -> list[dict[str, Any]]:
    """Build one row per arm: method, architecture, parameters, and macs, the multiply-accumulates of one record.

    It describes the first student of each arm whose weights exist, at its input size.
    """
    first: dict[str, StudentResult] = {}
    for result in results:
        if is_finished(result.folder / "distill"):
            first.setdefault(result.label, result)
    return [{"method": label, **_row(result)} for label, result in first.items()]


def _row(result: StudentResult) -> dict[str, Any]:
    model, trained = load_model(result.folder / "distill")
    config = trained.config
    shape = (trained.input_size[1],) if config.takes_rows else (3, *trained.input_size)
    cost = measure_cost(model, torch.zeros(1, *shape))
    return {
        "architecture": f"{config.kind} {config.name}",
        "parameters": cost.parameters,
        "macs": cost.macs,
    }
