"""The commands that made a run."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from permafrost.config.evaluation import EVALUATORS
from permafrost.config.store import PrecomputeConfig
from permafrost.config.verbs import VERBS, build_verb_config
from permafrost.core.errors import UserError
from permafrost.evaluation.results import METRICS_NAME, read_results
from permafrost.models.resolve import resolve_precompute
from permafrost.models.saved import SavedNetwork
from permafrost.models.trained_weights import read_entries
from permafrost.runs.folder import CONFIG_NAME, STUDENTS, RunFolder, read_config
from permafrost.runs.mirrors import RUNS
from permafrost.storage.rooted_paths import name_of_path
from permafrost.storage.signed_files import DamagedFileError
from permafrost.store.manifest import CANONICAL_VIEW, MANIFEST_NAME
from permafrost.store.reader import Store, TeacherPass

logger = logging.getLogger("permafrost.verbs.next_commands")

_PATH = re.compile(r"(?<![^=\[,{: '\"])(?:[a-z0-9]+:/|~|\.\.)?(?:/[^/,\]}'\"]+)+")
"""Paths in the words of a command that are absolute, addresses, or lead out of the folder."""
_OTHER_RUNS = {
    ("distill",): r"\.baseline=([^\s'\]]+)",
    ("teach", "distill"): r"=runs/([^\s'\]]+)/(?:teach|distill)\b",
}
"""Patterns of the runs whose networks a command reads, by the verbs that may have trained them."""
_VERBS = ("teach", "precompute", "sweep", "distill", "evaluate")
"""Verbs in the order in which a run uses them."""


def commands_of(
    run: str, passes: Sequence[TeacherPass] = (), other_runs: Sequence[str] = ()
) -> list[str]:
    """Return the commands that made a run, in the order of their use.

    Besides one command per verb whose config the run has, these are the commands that made the store, the passes and
    their teachers, in whichever run of this folder their configs are.

    Args:
        run: Name of the run, or its address in a bucket.
        passes: Passes that the run's students used; without any, the run's own precompute is stated.
        other_runs: Runs whose students are on the run's page, too.

    Raises:
        DamagedFileError: If a config of these runs is damaged.
    """
    calls = list(_precompute_calls(run, passes[0].store)) if passes else []
    packing = [_command("precompute", path) for path, values in calls if _only_packs(values)][:1]
    teaching, commands = _own_commands(run, ("teach",)), []
    network: list[str] = []
    for teacher in passes:
        path, values = next((call for call in calls if _makes(call[1], teacher)), (None, {}))
        typed = [word for word in values.get("command", []) if word.startswith("teacher")]
        network = network or typed
        weights = values.get("teacher", teacher.manifest.made_with).get("weights")
        teaching += _teaching_commands(teacher, Path(str(weights)).parent)
        made_by = "ingest" if "targets" in teacher.manifest.made_with else "precompute"
        commands.append(
            f"permafrost {made_by}  # pass {teacher.name}: {name_of_path(str(teacher.folder / MANIFEST_NAME), 4)}"
            if path is None
            else _command("precompute", path)
        )
    verbs = _VERBS[2:] if passes else _VERBS[1:]
    for other in other_runs:
        commands += _own_commands(other, verbs, network)
    commands = [*packing, *teaching, *commands, *_own_commands(run, verbs, network)]
    return list(dict.fromkeys(chain.from_iterable(map(_with_needed, commands))))


def _with_needed(command: str, outer: tuple[str, ...] = ()) -> list[str]:
    """Return a command after those that made the networks of other runs that it names."""
    needed = [
        made
        for verbs, pattern in _OTHER_RUNS.items()
        for name in re.findall(pattern, command)
        for made in _own_commands(name, verbs)
        if made not in (command, *outer)
    ]
    return [*(each for made in needed for each in _with_needed(made, (command, *outer))), command]


def _own_commands(run: str, verbs: Sequence[str], network: Sequence[str] = ()) -> list[str]:
    """Return the commands whose options are in the run's folder or next to results in it.

    Args:
        run: Name of the run.
        verbs: Verbs to return, in this order.
        network: Words that name the teacher, for evaluators that read what an earlier command left of it in the store.
    """
    folder = RunFolder(run).path
    patterns = (f"evaluate*/{METRICS_NAME}", f"{STUDENTS}/*/evaluate*/{METRICS_NAME}")
    files = sorted(chain.from_iterable(map(folder.glob, patterns)))
    evaluations = [
        shown_command(words if _names_teacher(evaluator, words) else [*words, *network])
        for path in files
        for evaluator, words in read_results(path.parent)["commands"].items()
        if words
    ]
    commands = []
    for verb in verbs:
        paths = [folder / f"{verb}.yaml", folder / verb / CONFIG_NAME]
        recorded = [text for text in evaluations if text.startswith(f"permafrost {verb} ")]
        commands += recorded or [_command(verb, path) for path in paths if path.exists()][:1]
    return list(dict.fromkeys(commands))


def _names_teacher(evaluator: str, words: Sequence[str]) -> bool:
    """Return whether a command names the teacher, or the evaluator does not read it."""
    reads = evaluator in EVALUATORS and EVALUATORS[evaluator].uses_teacher
    return not reads or any(word.startswith(("teacher", "experiment=")) for word in words)


def _command(verb: str, path: Path) -> str:
    """Return the command that a file of options records, or one that names the file."""
    words = read_config(path, VERBS[verb].options).get("command")
    return (
        shown_command(words)
        if words
        else f"permafrost {verb}  # options: {name_of_path(str(path))}"
    )


def shown_command(words: Sequence[str]) -> str:
    """Return a command as a page shows it, with the names of files and folders elsewhere in place of their paths."""
    return f"permafrost {shlex.join(map(without_folders, words))}"


def without_folders(word: str) -> str:
    """Return a word with the names of files and folders elsewhere in place of their paths."""
    return _PATH.sub(lambda path: name_of_path(path[0]), word)


def _precompute_calls(run: str, store: Store) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Iterate over the options of precompute on a store that are below runs/, those of the run first.

    A damaged file of another run is a warning; one of the run itself raises DamagedFileError.
    """
    paths = [*(RunFolder(run).path).glob("precompute*.yaml"), *RUNS.glob("*/precompute*.yaml")]
    for path in dict.fromkeys(
        sorted(paths, key=lambda path: (path.parent != RunFolder(run).path, path))
    ):
        try:
            values = read_config(path, PrecomputeConfig, "store", "data", "teacher")
        except DamagedFileError as error:
            if path.parent == RunFolder(run).path:
                raise
            logger.warning("%s", error)
            continue
        if Path(values["store"].get("path", "")).absolute() == store.path.absolute():
            yield path, values


def _only_packs(values: dict[str, Any]) -> bool:
    return bool(values["teacher"].get("kind", "none") == "none")


def _makes(values: dict[str, Any], teacher: TeacherPass) -> bool:
    """Return whether options of precompute are those of a pass, by the pass's fingerprint."""
    from permafrost.annotation.pass_plan import plan_pass
    from permafrost.annotation.stored_views import requested_views

    if _only_packs(values):
        return False
    store, views = teacher.store, None
    try:
        config = resolve_precompute(build_verb_config("precompute", values), store)
        if teacher.views["sampler"] != CANONICAL_VIEW:
            views = requested_views(config, store.part(0, 1))
        return plan_pass(config, store, views).fingerprint == teacher.manifest.fingerprint
    except UserError:  # options of another version, or weights that are gone
        return False


def _teaching_commands(teacher: TeacherPass, folder: Path) -> list[str]:
    """Return the command that trained the teacher of a pass, none if it is not the network of a run's folder."""
    described = teacher.manifest.teacher.get("weights_sha256")
    path = folder / CONFIG_NAME
    if folder.name not in _VERBS or not SavedNetwork(folder).is_finished or not path.is_file():
        return []
    return [_command(folder.name, path)] if read_entries(folder).weights_sha256 == described else []
