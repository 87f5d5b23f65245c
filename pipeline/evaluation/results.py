"""metrics.json of an evaluation: the results of each evaluator, written as soon as that evaluator is done.

    {"evaluators": {<evaluator>: {"options": its section of evaluate, "files": {path: sha256 of a file it read}}},
     "splits": {<split>: {"records": N, <metric>: ..., <evaluator>: {...}}}}

The metrics of a flat evaluator are direct entries of the split, those of the others are nested under the evaluator's
name. Each evaluator is a unit of work: a call that adds one does not change the results of the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.evaluators import EVALUATORS
from pipeline.config.runs import to_plain_dict
from pipeline.config.verbs import EvaluateConfig
from pipeline.core.errors import ConfigError
from pipeline.core.files import sha256_file, write_atomically

METRICS_NAME = "metrics.json"
TEACHER_EVALUATION = "evaluate-teacher"
"""Name of the folder of a teacher's evaluation."""
NETWORK_EVALUATION = "evaluate-network"
"""Name of the folder of a given network's evaluation."""
_AGAINST = "-against-"


def evaluation_folder(against: str | None) -> str:
    """Name of the folder of a student's evaluation, followed by the pass of evaluate.against if it names one."""
    return "evaluate" if against is None else f"evaluate{_AGAINST}{against}"


def evaluations_against(folder: Path) -> dict[str, Path]:
    """Find the metrics of a run's evaluations against named passes: pass -> metrics.json."""
    found = sorted(folder.glob(f"evaluate{_AGAINST}*/{METRICS_NAME}"))
    return {path.parent.name.partition(_AGAINST)[2]: path for path in found}


def read_results(folder: Path) -> dict[str, Any]:
    """Read metrics.json, or return empty results if it does not exist."""
    path = folder / METRICS_NAME
    if not path.exists():
        return {"evaluators": {}, "splits": {}}
    findings: dict[str, Any] = json.loads(path.read_text())
    return findings


def missing_evaluators(folder: Path, config: EvaluateConfig) -> tuple[str, ...]:
    """Evaluators that the config requests and that are not done.

    Raises ConfigError if one was run with other options, or read a file that has changed since.
    """
    done = read_results(folder)["evaluators"]
    for evaluator in config.requested_evaluators:
        if evaluator in done:
            _check_same(folder, evaluator, done[evaluator], options_of(evaluator, config))
    return tuple(evaluator for evaluator in config.requested_evaluators if evaluator not in done)


def options_of(evaluator: str, config: EvaluateConfig) -> dict[str, Any]:
    """Options of an evaluator as plain values, empty if it has no section."""
    options: dict[str, Any] = to_plain_dict(config.evaluate)
    own: dict[str, Any] = options.get(evaluator, {})
    return own


def add_result(
    folder: Path,
    evaluator: str,
    splits: Mapping[str, Mapping[str, Any]],
    *,
    options: Mapping[str, Any],
    files: Mapping[str, str],
    records: Mapping[str, int],
) -> None:
    """Write the results of an evaluator on each split.

    files    path -> sha256 of the files it read in addition to the model, its store and its passes
    records  number of records of each split
    """
    findings = read_results(folder)
    for split, metrics in splits.items():
        found = findings["splits"].setdefault(split, {"records": records[split]})
        found |= metrics if EVALUATORS[evaluator].is_flat else {evaluator: metrics}
    findings["evaluators"][evaluator] = {"options": options, "files": files}
    write_atomically(folder / METRICS_NAME, json.dumps(findings, indent=1).encode())


def _check_same(
    folder: Path, evaluator: str, done: dict[str, Any], options: dict[str, Any]
) -> None:
    again = f"delete {folder} to evaluate again, or choose another run="
    defaults = to_plain_dict(EVALUATORS[evaluator]())  # of options that are newer than the results
    for name, value in options.items():
        before = done["options"].get(name, defaults.get(name))
        if before != value:
            raise ConfigError(
                f"{folder / METRICS_NAME} has {evaluator} with evaluate.{evaluator}.{name}={before}, but "
                f"this one has {value}; {again}"
            )
    for path, digest in done["files"].items():
        if Path(path).is_file() and sha256_file(Path(path)) != digest:
            raise ConfigError(
                f"{path} has changed since {evaluator} read it for {folder / METRICS_NAME}; {again}"
            )
