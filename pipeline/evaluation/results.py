"""metrics.json of an evaluation: what each judge found, written as soon as that judge is done.

    {"judges": {<judge>: {"options": its section of evaluate, "files": {path: sha256 of what it read}}},
     "splits": {<split>: {"records": N, <metric>: ..., <judge>: {...}}}}

The metrics of a flat evaluator stand beside each other, those of the others below their evaluator's name. Every
judge is a unit of work: a call that asks for one more leaves the numbers of the others alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.evaluators import EVALUATORS
from pipeline.config.runs import plain
from pipeline.config.verbs import EvaluateConfig
from pipeline.core.errors import ConfigError
from pipeline.core.files import sha256_file, write_atomically

METRICS_NAME = "metrics.json"


def read_findings(folder: Path) -> dict[str, Any]:
    """The whole of metrics.json; nothing found where there is none."""
    path = folder / METRICS_NAME
    if not path.exists():
        return {"judges": {}, "splits": {}}
    findings: dict[str, Any] = json.loads(path.read_text())
    return findings


def missing_judges(folder: Path, config: EvaluateConfig) -> tuple[str, ...]:
    """The judges that the config asks for and that are not done.

    Raises ConfigError where one is done with other options, or read what has changed since.
    """
    done = read_findings(folder)["judges"]
    for judge in config.asked:
        if judge in done:
            _check_same(folder, judge, done[judge], options_of(judge, config))
    return tuple(judge for judge in config.asked if judge not in done)


def options_of(judge: str, config: EvaluateConfig) -> dict[str, Any]:
    """A judge's own options, as plain values; none where it has no section."""
    options: dict[str, Any] = plain(config.evaluate)
    own: dict[str, Any] = options.get(judge, {})
    return own


def add_finding(
    folder: Path,
    judge: str,
    splits: Mapping[str, Mapping[str, Any]],
    *,
    options: Mapping[str, Any],
    files: Mapping[str, str],
    records: Mapping[str, int],
) -> None:
    """Commit what a judge found on each split.

    files    path -> sha256 of what it read beside the subject, its store and its passes
    records  of each split
    """
    findings = read_findings(folder)
    for split, metrics in splits.items():
        found = findings["splits"].setdefault(split, {"records": records[split]})
        found |= metrics if EVALUATORS[judge].is_flat else {judge: metrics}
    findings["judges"][judge] = {"options": options, "files": files}
    write_atomically(folder / METRICS_NAME, json.dumps(findings, indent=1).encode())


def _check_same(folder: Path, judge: str, done: dict[str, Any], options: dict[str, Any]) -> None:
    again = f"delete {folder} to judge anew, or choose another run="
    for name, value in options.items():
        before = done["options"].get(name)
        if before != value:
            raise ConfigError(
                f"{folder / METRICS_NAME} has {judge} with evaluate.{judge}.{name}={before} where this "
                f"one has {value}; {again}"
            )
    for path, digest in done["files"].items():
        if Path(path).is_file() and sha256_file(Path(path)) != digest:
            raise ConfigError(
                f"{path} has changed since {judge} read it for {folder / METRICS_NAME}; {again}"
            )
