"""Results of an evaluation on disk, and the evaluators that are missing in them.

    {"evaluators": {<evaluator>: {"options": those it reads, "files": {path: sha256 of a file it read}}},
     "splits": {<split>: {"records": N, <metric>: ..., <evaluator>: {...}}},
     "commands": {<evaluator>: arguments of the command that ran it},
     "random_networks": {<evaluator>: number of untrained networks that it has measured},
     "written": {<file next to metrics.json>: sha256}}

A split's "random_networks" is a list of the same metrics, one entry per untrained network (random_networks.py). The
metrics of a flat evaluator are direct entries of the split, and the others' are nested under the evaluator's name. Each
evaluator is a unit of work: a call that adds one does not change the results of the others. The file carries its own
digest, and covers the tables and pictures next to it, which are written before it.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

from permafrost.config.builder import build_config, to_plain_dict
from permafrost.config.evaluation import EVALUATORS, EvaluateOptions
from permafrost.config.models import Picture, frame_of
from permafrost.config.verbs import EvaluateConfig, EvaluationRun
from permafrost.core.errors import ConfigError, require
from permafrost.core.json_entries import from_dict, require_digest, require_entry
from permafrost.evaluation.evaluator import METRICS
from permafrost.runs.folder import (
    CONFIG_NAME,
    identity,
    passes_in,
    read_config,
    saved_options,
)
from permafrost.storage.files import file_at
from permafrost.storage.signed_files import damaged, naming_damage, read_json, write_json
from permafrost.storage.untrusted import load_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from permafrost.store.reader import Store

logger = logging.getLogger("permafrost.evaluate")

METRICS_NAME = "metrics.json"
"""File of the metrics of an evaluation."""
_THRESHOLD = "evaluate.threshold"
"""Entry of the options of an evaluator that depends on it."""
PER_LABEL = "labels"
"""Entry of a split's metrics with a table of many labels: counts, threshold and scores by class."""
TEACHER_EVALUATION = "evaluate-teacher"
"""Name of the folder of a teacher's evaluation."""
PICTURE, TEACHER_PICTURE = "picture", "teacher_picture"
"""Name of the picture of an evaluation among its inputs and in metrics.json, and that of the compared pass there."""
MAPS = "maps"
"""Name of the explainers whose maps are compared, where they differ, as PICTURE is of pictures."""
RANDOM_NETWORKS = "random_networks"
"""Entry of metrics.json, and of a split's metrics there, of the untrained networks to compare with."""
NETWORK_EVALUATION = "evaluate-network"
"""Name of the folder of a given network's evaluation."""
_AGAINST, _ON = "-against-", "-on-"


def _no_results() -> dict[str, Any]:
    entries = ("evaluators", "splits", "written", "commands", RANDOM_NETWORKS)
    return {name: {} for name in entries} | dict.fromkeys((PICTURE, TEACHER_PICTURE, MAPS), "")


def evaluation_folder(against: str | None, elsewhere: str = "") -> str:
    """Return the name of the folder of a student's evaluation.

    Args:
        against: Pass of evaluate.against, if that names one.
        elsewhere: `place_of` of a store other than the one that the student was trained on.
    """
    main = f"evaluate{elsewhere}"
    return main if against is None else f"{main}{_AGAINST}{against}"


def place_of(store: Store) -> str:
    """Return the part of the name of an evaluation's folder, or of a report, that says on which store it is."""
    name = re.sub(r"[^A-Za-z0-9_-]", "-", store.folder.name)[:60]
    return f"-in-{name}-{store.manifest.fingerprint[:8]}"


def place_beside(folder: Path, store: Store) -> str:
    """Return `place_of` a store if the evaluation in a folder is one of another store, otherwise an empty text.

    Args:
        folder: Folder of a training or an evaluation.
        store: The store to evaluate on.
    """
    path = folder / CONFIG_NAME
    read = saved_options(folder).get("inputs", {}).get("store") if path.exists() else None
    return "" if read in (None, store.part_with(read).manifest.fingerprint) else place_of(store)


def folder_of_evaluation(
    run: Path,
    main: str,
    options: EvaluateOptions,
    picture: Picture | None,
    inputs: Mapping[str, str],
) -> str:
    """Return the name of the folder of an evaluation of some splits in a picture, within its run's folder.

    It is `main` for the first evaluation of the run. Those of the same network on other splits, or in another picture,
    are next to it, in <main>-on-<splits>[-<frame>], and those of a student against other passes in
    <main>-against-<passes>[-on-<splits>[-<frame>]].

    Args:
        run: Folder of the run.
        main: Name of the folder of the first evaluation.
        options: Options with the splits.
        picture: What the network receives of an image; None for a table.
        inputs: Fingerprints of the network with its store, and of the passes; each of the two may be left out if it is
            known to be that of the first evaluation.
    """
    path = run / main / CONFIG_NAME
    if not (path.exists() and (run / main / METRICS_NAME).exists()):
        return main
    first = read_config(path, EvaluationRun)
    network, passes = _inputs_of(first)
    wanted_network, wanted_passes = _inputs_of({"inputs": inputs})
    is_compared = wanted_passes in ([], passes)
    may_differ = "student" in network and options.against is None
    if wanted_network not in ({}, network) or not (is_compared or may_differ):
        return main  # which is an error of RunFolder.open
    if not is_compared:
        names = _shorten("-and-".join(name for name, _ in wanted_passes))
        return folder_of_evaluation(run, f"{main}{_AGAINST}{names}", options, picture, inputs)
    splits, shown = _view_of(first)
    is_shown = picture is None or shown == str(picture)
    if is_shown and splits == list(options.splits):
        return main
    frame = [] if picture is None or is_shown else [frame_of(str(picture))]
    return f"{main}{_ON}{_shorten('-'.join(['-and-'.join(options.splits), *frame]))}"


def _shorten(name: str) -> str:
    """Return a part of the name of a folder, or a digest in its place if it is too long or has other characters."""
    is_short = re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII)
    return name if is_short else hashlib.sha256(name.encode()).hexdigest()[:16]


class StoredEvaluation(NamedTuple):
    """Results of an evaluation in the folder of a run."""

    folder: str
    """Name of its folder."""
    against: str
    """Pass that it is against, empty for that of the evaluation that is shown."""
    frame: str
    """Part of each image that was evaluated."""
    metrics: dict[str, dict[str, Any]]
    """Metrics by split, or by <split>-<frame> for another frame than that of the evaluation that is shown."""


def evaluations_beside(run: Path, first_folder: str) -> list[StoredEvaluation]:
    """Read an evaluation and then the others of the same network and store.

    Args:
        run: Folder of the run.
        first_folder: Folder of the evaluation that is shown. If it is missing, the first one against a named pass is.

    Returns:
        The evaluations, [] if there is none to show.

    Raises:
        DamagedFileError: If a file of an evaluation is damaged.
    """
    named = [run / first_folder, *sorted(run.glob(f"{first_folder}{_AGAINST}*"))]
    folders = dict.fromkeys([*named, *sorted(run.glob("evaluate*"))])
    present = [folder for folder in folders if (folder / METRICS_NAME).exists()]
    every = {
        folder: read_config(folder / CONFIG_NAME, EvaluationRun)
        if (folder / CONFIG_NAME).exists()
        else {}
        for folder in present
        if present[0] in named
    }
    first = next(iter(every.values()), {})
    same = [folder for folder in every if _inputs_of(every[folder])[0] == _inputs_of(first)[0]]
    main = next((every[folder] for folder in same if not _against(every[folder])), first)
    evaluations = []
    for folder in same:
        picture, passes = _view_of(every[folder])[1], _inputs_of(every[folder])[1]
        others = passes if passes != _inputs_of(main)[1] else []
        against = _against(every[folder]) or "-and-".join(name for name, _ in others)
        suffix = "" if picture == _view_of(main)[1] else f"-{frame_of(picture)}"
        metrics = {f"{key}{suffix}": each for key, each in read_results(folder)["splits"].items()}
        evaluations.append(StoredEvaluation(folder.name, against, frame_of(picture), metrics))
    return evaluations


def _inputs_of(values: Mapping[str, Any]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Return the recorded fingerprints of a network with its store, and those of passes in their order, by name.

    The picture and plug-ins' code are left out.
    """
    inputs = values.get("inputs", {})
    network = {
        name: digest
        for name, digest in inputs.items()
        if name != PICTURE and not name.startswith("plug-in ") and not passes_in({name: digest})
    }
    return network, list(passes_in(inputs).items())


def _against(values: Mapping[str, Any]) -> str:
    """Return the pass that an evaluation names (evaluate.against), empty without one."""
    return values.get("evaluate", {}).get("against") or ""


def _view_of(values: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """Return the splits of the options of an evaluation and its picture, None for a table."""
    splits = values.get("evaluate", {}).get("splits", ("test",))
    return list(splits), values.get("inputs", {}).get(PICTURE)


def read_results(folder: Path) -> dict[str, Any]:
    """Read metrics.json, or return empty results if it does not exist.

    Raises:
        DamagedFileError: If the digest is wrong, or an entry has a wrong type or range.
    """
    if not (path := folder / METRICS_NAME).exists():
        return _no_results()
    return read_metrics_file(path, f"delete {folder} and run permafrost evaluate again")


def without_outputs(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of records of a split and its metrics of features, without those of logits and maps."""
    return {
        name: value
        for name, value in metrics.items()
        if name == "records" or (name in EVALUATORS and not EVALUATORS[name].reads_outputs)
    }


def threshold_of(folder: Path) -> float | str | None:
    """Return the evaluate.threshold with which an evaluation has measured accuracy, None without one."""
    done = read_results(folder)["evaluators"].values()
    return next((one["options"][_THRESHOLD] for one in done if _THRESHOLD in one["options"]), None)


def stored_thresholds(
    run: Path, model: str, fingerprint: str, option: str | None = None
) -> tuple[str, list[tuple[float, float]]] | None:
    """Return how and as what an evaluation has chosen the logits from which classes are predicted.

    Args:
        run: Folder of the run.
        model: Option `model` of the evaluation.
        fingerprint: Fingerprint of the network.
        option: Value of evaluate.threshold; None for any that is set.

    Returns:
        The value, and for each class the logits of the network and of its teacher; None if there is no such evaluation.
    """
    for path in sorted(run.glob(f"evaluate*/{METRICS_NAME}")):
        chosen = threshold_of(path.parent)
        is_same = saved_options(path.parent).get("inputs", {}).get(model) == fingerprint
        if is_same and chosen is not None and option in (None, chosen):
            for metrics in read_results(path.parent)["splits"].values():
                rows = metrics.get(PER_LABEL, {}).values()
                logits = [(row["threshold_logit"], row["teacher_threshold_logit"]) for row in rows]
                if logits:
                    return str(chosen), logits
    return None


def label_rows(table: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Return the cells of a table of labels: counts, threshold, F1 with its interval, and the other scores.

    The table fits 120 columns; metrics.json has all intervals.

    Args:
        table: Entry PER_LABEL of a split's metrics.
    """
    counts = ("positives", "negatives", "unknown")
    scores = ("f1", "precision", "recall", "average_precision", "auroc")
    rows = [["label", *counts, "threshold", *(name.replace("_", " ") for name in scores)]]
    for name, row in table.items():
        cells = [name, *(f"{row[count]:,}" for count in counts), f"{row['threshold']:.3f}"]
        for score in scores:
            ends = [row.get(f"{score}{end}", math.nan) for end in ("", "_low", "_high")]
            form = "{:.3f} ({:.3f} to {:.3f})" if score == "f1" else "{:.3f}"
            cells.append("-" if score not in row else form.format(*ends))
        rows.append(cells)
    return rows


def read_metrics_file(path: Path, advice: str) -> dict[str, Any]:
    """Read a metrics.json; a teacher's (teach) has splits only.

    Args:
        path: The file.
        advice: Fix, for the error message.

    Raises:
        DamagedFileError: If the digest is wrong, or an entry has a wrong type or range.
    """
    findings = _no_results() | read_json(path, advice)
    with naming_damage(path, advice):
        checked = from_dict(_MetricsFile, findings)
        for split, metrics in checked.splits.items():
            records = metrics.get("records", 0)
            require_entry(type(records) is int and records >= 0, f"{split} has {records!r} records")
            for name in METRICS.keys() & metrics.keys():
                number = metrics[name]
                is_number = type(number) in (int, float, NoneType)
                require_entry(is_number, f"{split}.{name} is {str(number)[:80]!r}")
        for digest in checked.written.values():
            require_digest(digest)
    return findings


@dataclass(frozen=True, kw_only=True)
class _EvaluatorEntry:
    """Entry of an evaluator in metrics.json."""

    options: dict[str, Any]
    files: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class _MetricsFile:
    """Entries of metrics.json."""

    evaluators: dict[str, _EvaluatorEntry]
    splits: dict[str, dict[str, Any]]
    written: dict[str, str]
    commands: dict[str, tuple[str, ...]]
    random_networks: dict[str, int]
    picture: str
    teacher_picture: str
    maps: str


def check_written(folder: Path, name: str) -> Path:
    """Return the path of a file of an evaluation, after a check of its bytes.

    The errors of `open` are raised as well.

    Args:
        folder: Folder of the evaluation.
        name: Name of the file.

    Raises:
        DamagedFileError: If the bytes are not those that metrics.json lists.
    """
    path = folder / name
    listed, actual = read_results(folder)["written"].get(name), file_at(path).sha256()
    if listed != actual:
        claim = (
            f"{METRICS_NAME} lists {listed[:12]}" if listed else f"{METRICS_NAME} does not list it"
        )
        raise damaged(
            path,
            f"it has sha256 {actual[:12]}, but {claim}",
            f"if an evaluation was interrupted, run the same permafrost evaluate again; otherwise delete {folder} and "
            "evaluate again",
        )
    return path


def load_written(folder: Path, name: str) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file of an evaluation.

    Args:
        folder: Folder of the evaluation.
        name: Name of the file.

    Raises:
        DamagedFileError: If the bytes are not those that metrics.json lists, or not those of tensors.
    """
    path = check_written(folder, name)
    with naming_damage(path, f"delete {folder} and evaluate again"):
        return load_tensors(path)


def missing_evaluators(folder: Path, config: EvaluateConfig) -> tuple[str, ...]:
    """Return the evaluators that the config requests and that are not done.

    Args:
        folder: Folder of the evaluation.
        config: Options of the command.

    Raises:
        ConfigError: If one was run with other options, or read a file that has changed since.
    """
    done = read_results(folder)["evaluators"]
    for evaluator in config.requested_evaluators:
        if evaluator in done:
            _check_same(folder, evaluator, done[evaluator], evaluator_options(evaluator, config))
    return tuple(evaluator for evaluator in config.requested_evaluators if evaluator not in done)


def lacking_networks(results: Mapping[str, Any], config: EvaluateConfig) -> tuple[int, list[str]]:
    """Return how many untrained networks each evaluator is to measure, and the evaluators that have measured fewer.

    Args:
        results: Content of metrics.json.
        config: Options of the command; evaluate.random_networks=null keeps the number of an earlier call, and 0
            measures none.
    """
    measured = results[RANDOM_NETWORKS]
    if config.evaluate.random_networks == 0:
        return 0, []
    count = max(config.evaluate.random_networks or 0, *measured.values(), 0)
    evaluators = dict.fromkeys([*results["evaluators"], *config.requested_evaluators])
    known = [name for name in evaluators if name in EVALUATORS]  # others are of plug-ins
    return count, [name for name in known if measured.get(name, 0) < count]


def keep_options(config: EvaluateConfig, folder: Path) -> EvaluateConfig:
    """Return the options with the values of an earlier evaluation where the command names none.

    An option is kept if the command does not name it and no experiment has set it.

    Args:
        config: Options of the command.
        folder: Folder of the evaluation, which may not exist.
    """
    if not (folder / CONFIG_NAME).exists():
        return config
    recorded = read_config(folder / CONFIG_NAME, EvaluationRun).get("evaluate", {})
    now, default = to_plain_dict(config.evaluate), to_plain_dict(EvaluateOptions())
    earlier = {"": identity(recorded, EvaluateOptions)} | {
        evaluator: done["options"] for evaluator, done in read_results(folder)["evaluators"].items()
    }
    kept = []
    for evaluator, options in earlier.items():
        values: dict[str, Any] = now.get(evaluator, {}) if evaluator else now
        usual: dict[str, Any] = default.get(evaluator, {}) if evaluator else default
        for name in values.keys() & options.keys() - EVALUATORS.keys():
            option = ".".join(filter(None, ("evaluate", evaluator, name)))
            is_named = any(word.startswith(f"{option}=") for word in config.command)
            if values[name] == usual[name] != options[name] and not is_named:
                values[name] = options[name]
                kept.append(f"{option}={options[name]}")
    if not kept:
        return config
    logger.info("as in the earlier evaluation of %s: %s", folder, ", ".join(sorted(kept)))
    return replace(config, evaluate=build_config(EvaluateOptions, now, "evaluate"))


def evaluator_options(evaluator: str, config: EvaluateConfig) -> dict[str, Any]:
    """Return the options of an evaluator as plain values.

    They are those of its section, and `augment.operations` and `augment.mix` if it applies them.
    """
    options: dict[str, Any] = to_plain_dict(config.evaluate).get(evaluator, {})
    if EVALUATORS[evaluator].reads_threshold and config.evaluate.threshold is not None:
        options[_THRESHOLD] = config.evaluate.threshold
    if EVALUATORS[evaluator].reads_augment:
        augment = to_plain_dict(config.augment)
        options |= {f"augment.{name}": augment[name] for name in ("operations", "mix")}
    return options


def add_random_networks(
    folder: Path, networks: Mapping[str, Sequence[Mapping[str, Any]]], evaluators: Iterable[str]
) -> None:
    """Write what untrained networks have measured.

    Args:
        folder: Folder of the evaluation.
        networks: Metrics of each network, by split.
        evaluators: Names of the evaluators that have measured them.
    """
    findings = read_results(folder)
    for split, measured in networks.items():
        before = findings["splits"][split].get(RANDOM_NETWORKS, [])
        findings["splits"][split][RANDOM_NETWORKS] = [
            {**(before[number] if number < len(before) else {}), **metrics}
            for number, metrics in enumerate(measured)
        ]
        findings[RANDOM_NETWORKS] |= dict.fromkeys(evaluators, len(measured))
    write_json(folder / METRICS_NAME, findings)


def add_result(
    folder: Path,
    evaluator: str,
    splits: Mapping[str, Mapping[str, Any]],
    *,
    options: Mapping[str, Any],
    files: Mapping[str, str],
    records: Mapping[str, int],
    command: Sequence[str] = (),
    pictures: Mapping[str, str] = MappingProxyType({}),
    written: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the results of an evaluator on each split.

    Args:
        folder: Folder of the evaluation.
        evaluator: Name of the evaluator.
        splits: Metrics of each split.
        options: Options of the evaluator, from `evaluator_options`.
        files: SHA-256 of the files it read in addition to the model, its store and its passes, by path.
        records: Number of records of each split.
        command: Arguments of the command that has run it.
        pictures: What the network and its teacher receive of an image, by PICTURE and TEACHER_PICTURE.
        written: SHA-256 of the files that were written next to metrics.json, by name.
    """
    findings = {**read_results(folder), **pictures}
    for split, metrics in splits.items():
        split_metrics = findings["splits"].setdefault(split, {"records": records[split]})
        split_metrics |= metrics if EVALUATORS[evaluator].is_flat else {evaluator: metrics}
    findings["evaluators"][evaluator] = {"options": options, "files": files}
    findings["commands"][evaluator] = list(command)
    findings["written"] |= written
    write_json(folder / METRICS_NAME, findings)


def _check_same(
    folder: Path, evaluator: str, done: dict[str, Any], options: dict[str, Any]
) -> None:
    again = f"delete {folder} to evaluate again (the student is in another one and stays)"
    for name, value in options.items():
        if (before := done["options"].get(name)) != value:
            before, value = ("null" if each is None else each for each in (before, value))
            option = name if "." in name else f"evaluate.{evaluator}.{name}"
            raise ConfigError(
                f"{folder / METRICS_NAME} has {evaluator} with {option}={before}, but this one has {value}; leave the "
                f"option out to keep these results, or {again}"
            )
    for path, digest in done["files"].items():
        require(
            not Path(path).is_file() or file_at(Path(path)).sha256() == digest,
            f"{path} has changed since {evaluator} read it for {folder / METRICS_NAME}; {again}",
        )
