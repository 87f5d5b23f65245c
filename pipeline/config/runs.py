"""A run's folder: what was asked, what came out, and whether it is finished."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import yaml

from pipeline.config.judging import JudgeName
from pipeline.core.errors import ConfigError
from pipeline.core.files import remove_partial_files, write_atomically

RUNS = Path("runs")
_RESULTS = ("checkpoint.pt", "model.json", "metrics.json")
_NO_DIFFERENCE = (
    "store.path",  # the fingerprints of what was read say more
    "store.backend",
    "store.shard_size",
    "store.seed",
    "store.image_size",
    "store.format",
    "teacher.weights",
    "teacher.sha256",
    "student.sha256",
    "black_box.sha256",
    "student.license",
    "teacher.license",
    "black_box.license",
    "teacher.partition",
    "student.partition",
    "black_box.weights",
    "black_box.partition",
    "evaluate.store",
    "evaluate.max_shift",  # of the judge shift, whose options lie with its numbers
    "evaluate.shift_records",
    "trainer.ranks",
    "trainer.loader_processes",
    "trainer.log_every_steps",
    "trainer.checkpoint_every_epochs",
    "trainer.checkpoint_every_steps",
)
_YOUNGER: dict[str, Any] = {
    "augment.mixup_alpha": None,
    "augment.randaugment": None,
    "black_box.kind": "none",
    "evaluate.group_sets": {},
    "explainer.max_classes": None,
    "explainer.seed": 0,
    "method.logits": "softmax",
    "method.norm": "mse",
    "student.depth": None,
    "student.patch": None,
    "teacher.depth": None,
    "teacher.patch": None,
    "teaching.start": None,
    "trainer.decay": 0.1,
    "trainer.decay_every_epochs": 30,
    "trainer.warmup_steps": None,
}
"""Options that came after the first runs: with these values a run is what it was without them."""
_NOWHERE = {"cluster", *(f"evaluate.{name}" for name in get_args(JudgeName))}
"""Whole sections that make no difference: where a run runs, and options of one judge, which lie with its numbers."""
CONFIG_NAME = "config.yaml"
COST_NAME = "cost.json"


def open_run(verb: str, run: str, config: Any, inputs: dict[str, str]) -> Path:
    """The folder runs/<run>/<verb>, with the config that made it; it may hold a part of the same run.

    inputs  fingerprints of what is read, so that a changed store is a changed run
    Raises ConfigError where the folder holds results of other options.
    """
    folder = RUNS / run / verb
    values = plain(config) | {"inputs": inputs}
    path = folder / CONFIG_NAME
    if folder.is_dir():
        remove_partial_files(folder)
    if path.exists() and any((folder / name).exists() for name in _RESULTS):
        existing = yaml.safe_load(path.read_text())
        if identity(existing) != identity(values):
            raise ConfigError(
                f"{folder} holds a run with {_first_difference(identity(existing), identity(values))}; "
                "choose another run=, or delete that folder"
            )
    else:
        save_config(path, values)
    return folder


def identity(values: dict[str, Any], section: str = "") -> dict[str, Any]:
    """The part of a resolved config that decides what comes out of it."""
    return {
        name: identity(value, name) if isinstance(value, dict) else value
        for name, value in values.items()
        if not {name, f"{section}.{name}"} & _NOWHERE
        and _makes_a_difference(f"{section}.{name}", value)
    }


def _makes_a_difference(option: str, value: Any) -> bool:
    is_as_before = option in _YOUNGER and value == _YOUNGER[option]
    return option not in _NO_DIFFERENCE and not is_as_before


def save_config(path: Path, values: dict[str, Any]) -> None:
    """Write a resolved config as YAML beside what it made."""
    write_atomically(path, to_yaml(values).encode())


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    text: str = yaml.safe_dump(values, sort_keys=False)
    return text


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as plain values."""
    values: dict[str, Any] = _without_tuples(asdict(config))
    return values


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_tuples(member) for name, member in value.items()}
    return (
        [_without_tuples(member) for member in value] if isinstance(value, (list, tuple)) else value
    )


def _first_difference(existing: Any, wanted: Any, path: str = "") -> str:
    if isinstance(existing, dict) and isinstance(wanted, dict):
        for name in [*existing, *wanted]:
            if existing.get(name) != wanted.get(name):
                below = f"{path}.{name}" if path else str(name)
                return _first_difference(existing.get(name), wanted.get(name), below)
    return f"{path}={existing} where this one has {wanted}"


def save_cost(folder: Path, seconds: float, records: int) -> None:
    """Add to what the folder's work has cost so far; for people, never read by training."""
    before = read_cost(folder) or {"seconds": 0.0, "records": 0}
    cost = {"seconds": before["seconds"] + seconds, "records": before["records"] + records}
    write_atomically(folder / COST_NAME, json.dumps(cost).encode())


def read_cost(folder: Path) -> dict[str, float] | None:
    """Seconds and records (each visit counted) that went into a folder; None where not recorded."""
    path = folder / COST_NAME
    cost: dict[str, float] | None = json.loads(path.read_text()) if path.exists() else None
    return cost
