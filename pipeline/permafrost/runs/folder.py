"""Folder of a run: its config, its results, and the cost of the work."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.config.builder import check_values, to_plain_dict
from permafrost.config.differences import describe_differences, describe_fewest, differences
from permafrost.config.families import element_class, section_class
from permafrost.config.options import Options, Role, is_left_out, options_of
from permafrost.config.plugins import plugin_digests
from permafrost.core.digests import SHORT, sha256_json
from permafrost.core.errors import ConfigError, UserError, require
from permafrost.core.yaml_text import dump_yaml
from permafrost.runs.mirrors import RunFiles
from permafrost.storage.files import remove_partial_files
from permafrost.storage.lock import LOCK_NAME, folder_lock
from permafrost.storage.signed_files import (
    DamagedFileError,
    damaged,
    read_json,
    read_yaml,
    write_json,
    write_yaml,
)

if TYPE_CHECKING:
    from permafrost.store.reader import Store, TeacherPass

logger = logging.getLogger("permafrost.run")

_TEACHER = "teacher "
"""Start of the names of passes among the inputs of a run."""
STUDENTS = "students"
"""Folder of a sweep's students below that of its run."""
_RESULTS = ("checkpoint.pt", "model.json", "metrics.json")
CONFIG_NAME = "config.yaml"
"""File of the options of a run."""
SWEEP_NAME = "sweep.json"
"""File of a sweep that lists its students."""
CHECKPOINT_NAME = "checkpoint.pt"
COST_NAME = "cost.json"
INPUT_OPTIONS = {"inputs.plug-in ": "code of ", "inputs.": ""}
"""Names of what a run has read by the start of the names of its inputs."""
_IDENTITY = "identity"
"""Entry of a run's config that its other files repeat, so that they are not taken for those of another run."""
_OUTSIDE_IDENTITY = {Role.OUTSIDE_IDENTITY, Role.BY_FINGERPRINT}
"""Roles of options that an identity leaves out; `inputs` has the fingerprints."""


class RunFolder:
    """Folder of a run, which contains a folder for each verb."""

    def __init__(self, run: str) -> None:
        """Name the run.

        Args:
            run: Path below runs/, or the address of a bucket's folder.
        """
        self.files = RunFiles(run)
        self.path = self.files.folder
        """The folder; of a run in a bucket its mirror on this machine."""

    @contextmanager
    def open(self, verb: str, config: Options, inputs: dict[str, str]) -> Iterator[Path]:
        """Provide the folder of a verb with its config, which no other process writes to in the block.

        It may already contain part of the same run.

        Args:
            verb: Command of the work, which names the folder.
            config: Options of the command.
            inputs: Fingerprints of the inputs, so that a changed store makes a different run.

        Raises:
            ConfigError: If the folder holds results of other options.
            LockedError: If another process writes to it.
        """
        folder = self.path / verb
        with folder_lock(folder, "run"), self.files.opened(verb):
            remove_partial_files(folder)
            if not self.check(verb, config, inputs):
                values = _plain_run(config, inputs)
                described = identity(values, type(config)) | {"run": None, "verb": verb}
                save_config(folder / CONFIG_NAME, values | {_IDENTITY: sha256_json(described)[:32]})
            yield folder

    def check(self, verb: str, config: Options, inputs: dict[str, str]) -> bool:
        """Return whether the folder of a verb holds results of these options, without writing to it.

        Args:
            verb: Command of the work, which names the folder.
            config: Options of the command.
            inputs: Fingerprints of the inputs.

        Raises:
            ConfigError: If it holds results of other options.
        """
        folder, cls = self.path / verb, type(config)
        if not (
            (folder / CONFIG_NAME).exists() and any((folder / name).exists() for name in _RESULTS)
        ):
            return False
        existing = describe_run(read_config(folder / CONFIG_NAME, cls), cls)
        wanted = describe_run(_plain_run(config, inputs), cls)
        if existing == wanted:
            return True
        remedy = "choose another run=, or delete that folder"
        if verb == "distill":
            plugin = " and its plugins=" if "plug-in " in "\n".join(existing["inputs"]) else ""
            remedy += (
                ". For more epochs of this student, train another run with student=saved "
                f"student.weights={folder}{plugin}"
            )
        if verb.startswith("evaluate") and not verb.endswith("-network"):
            remedy = (
                "delete that folder to evaluate again (the student is in another one and stays)"
            )
        changed = describe_differences(differences(existing, wanted, INPUT_OPTIONS))
        raise ConfigError(
            f"{folder} contains a run with other options (its own -> those of this one): {changed}; {remedy}"
        )


@contextmanager
def mirrored_run(run: str) -> Iterator[None]:
    """Fetch a run in a bucket before the block, and upload afterwards what the block itself has written."""
    files = RunFiles(run)
    files.fetch()
    try:
        yield
    finally:
        files.upload_top()


@contextmanager
def without_remains(run: str) -> Iterator[None]:
    """Remove the folder of a run that the block has begun, if it fails before it has written a result."""
    folder = RunFolder(run).path
    is_new = not folder.exists()
    try:
        yield
    except BaseException:
        files = {path.name for path in folder.rglob("*") if path.is_file()}
        if is_new and files <= {LOCK_NAME, CONFIG_NAME}:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _plain_run(config: Options, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of a run as plain values, with the fingerprints of what it reads and of its plug-ins."""
    return to_plain_dict(config) | {"inputs": {**inputs, **plugin_digests(config)}}


def run_identity(folder: Path) -> str | None:
    """Return what the other files of a run's folder repeat from its config, None if that is missing.

    Raises:
        DamagedFileError: If the config is damaged.
    """
    entry = saved_options(folder).get(_IDENTITY)
    return None if entry is None else str(entry)


def identity(values: Mapping[str, Any], cls: type[Options]) -> dict[str, Any]:
    """Return the part of a resolved config that determines the results.

    Args:
        values: Plain values of a verb's config; entries that are not options of it are kept.
        cls: Class of the config.
    """
    options = {option.name: option for option in options_of(cls)}
    kept: dict[str, Any] = {}
    for name, value in values.items():
        option = options.get(name)
        if option is not None and (option.roles & _OUTSIDE_IDENTITY or is_left_out(option, value)):
            continue
        section = None if option is None else section_class(option, value)
        if section is not None:
            value = identity(value, section)
        elif option is not None and isinstance(value, list):
            classes = [element_class(option, item) for item in value]
            value = [
                each if element_type is None else identity(each, element_type)
                for each, element_type in zip(value, classes, strict=True)
            ]
        kept[name] = value
    return kept


def describe_run(values: Mapping[str, Any], cls: type[Options]) -> dict[str, Any]:
    """Return what determines the results of a run that may be moved, with its passes by the option that names them.

    Args:
        values: Plain values of a verb's config with its `inputs`.
        cls: Class of the config.
    """
    inputs = values["inputs"]
    names = [
        name if name.endswith(digest[:SHORT]) else f"{name} {digest}"
        for name, digest in passes_in(inputs).items()
    ]
    others = {name: inputs[name] for name in inputs if not name.startswith(_TEACHER)}
    return identity(values, cls) | {"run": None, "inputs": others, "store.teacher": names}


def nearest_run(config: Options, inputs: dict[str, str], folders: Iterable[Path]) -> str:
    """Describe the options that differ from those of the nearest training of the same store, empty without one.

    Args:
        config: Options of the new training, resolved.
        inputs: Fingerprints of its inputs.
        folders: Folders of the others.
    """
    new, changed = describe_run(_plain_run(config, inputs), type(config)), {}
    for folder in folders:
        with suppress(UserError, OSError):
            old = describe_run(read_config(folder / CONFIG_NAME, type(config)), type(config))
            if old["inputs"]["store"] == inputs["store"]:
                changed[folder.parent.name] = differences(old, new, INPUT_OPTIONS)
    return describe_fewest(changed)


def save_config(path: Path, values: dict[str, Any]) -> None:
    """Write a resolved config as YAML with its digest, next to the results."""
    write_yaml(path, dump_yaml(values))


def read_config(path: Path, cls: type[Options], *required: str) -> dict[str, Any]:
    """Read a resolved config as plain values, with the `inputs` and the command that it was saved with.

    Options of another version are left as they are.

    Args:
        path: File of the config.
        cls: Class of the config.
        *required: Sections that it must have.

    Raises:
        DamagedFileError: If this package has not written the file, or if it has a value that no option takes.
    """
    advice = _advice(path)
    values = read_yaml(path, advice)
    values.pop(_IDENTITY, None)
    inputs = values.get("inputs", {})
    try:
        require(
            isinstance(inputs, dict)
            and all(isinstance(text, str) for pair in inputs.items() for text in pair),
            "inputs is not a mapping from names to fingerprints",
        )
        command = values.get("command", [])
        require(
            isinstance(command, list) and all(isinstance(argument, str) for argument in command),
            "command is not a list of arguments",
        )
        missing = [name for name in required if not isinstance(values.get(name), dict)]
        require(not missing, f"it lacks {', '.join(missing)}")
        check_values(
            cls,
            {name: value for name, value in values.items() if name not in ("inputs", "command")},
        )
    except ConfigError as error:
        raise damaged(path, error, advice) from error
    return values


def pass_inputs(passes: Iterable[TeacherPass]) -> dict[str, str]:
    """Return the entries of passes among the inputs of a run, in their order."""
    return {f"{_TEACHER}{teacher.name}": teacher.manifest.fingerprint for teacher in passes}


def passes_in(inputs: Mapping[str, str]) -> dict[str, str]:
    """Return the fingerprints of the passes among the inputs of a run, by the names of the passes."""
    return {
        name.removeprefix(_TEACHER): fingerprint
        for name, fingerprint in inputs.items()
        if name.startswith(_TEACHER)
    }


def saved_options(folder: Path) -> dict[str, Any]:
    """Return the config of a verb's folder as plain values, with its `inputs`; empty if there is none.

    Raises:
        DamagedFileError: If it is damaged.
    """
    path = folder / CONFIG_NAME
    return read_yaml(path, _advice(path)) if path.exists() else {}


class PassRecords:
    """Teacher passes that runs have read, or were compared with, as their configs name them."""

    def __init__(self, folders: Iterable[Path]) -> None:
        """Read the configs.

        Args:
            folders: Folders of trainings and evaluations; those without a config are left out.

        Raises:
            DamagedFileError: If a config is damaged.
        """
        self._configs = [saved_options(folder) for folder in folders]
        self._is_said = False

    def part_of(self, store: Store) -> Store:
        """Return the generations of a store that the runs have read, all of them if they have read none of it."""
        fingerprints = {values.get("inputs", {}).get("store") for values in self._configs}
        parts = {part.num_generations: part for part in map(store.part_with, fingerprints)}
        part = parts[min(parts)] if parts else store
        if part is not store and not self._is_said:
            self._is_said = True
            logger.info(
                "of the %d generations of %s the run keeps to the %d that it has read; another run= reads all",
                store.num_generations,
                store.path,
                part.num_generations,
            )
        return part

    def in_store(self, fingerprint: str, *, replays: bool = False) -> list[tuple[str, ...]]:
        """Return the names of the passes of each run, each group once.

        Args:
            fingerprint: Fingerprint of the store.
            replays: True for the passes of stored views of trainings with mode=replay; otherwise canonical ones.
        """
        groups: dict[tuple[str, ...], None] = {}
        for values in self._configs:
            inputs = values.get("inputs", {})
            if inputs.get("store") == fingerprint and (values.get("mode") == "replay") == replays:
                groups[tuple(passes_in(inputs)) or tuple(values["store"].get("teacher", ()))] = None
        return [group for group in groups if group]


def _advice(path: Path) -> str:
    if path.name != CONFIG_NAME:
        return "delete it; only the command that it describes is then missing in reports"
    return (
        "restore it, or delete it if you know that the options of this run are those of your command; otherwise "
        f"delete the folder {path.parent}"
    )


def save_options(path: Path, values: dict[str, Any], command: list[str]) -> None:
    """Write the options of a call and its command, unless a call with the same options has written its own.

    A run may make several passes, and the options of each stay, in precompute.yaml, precompute-2.yaml and so on.

    Args:
        path: File of the first call.
        values: Resolved options as plain values.
        command: Arguments of the command.
    """
    saved, numbers = path, count(2)
    while saved.exists():
        if _read_options(saved) == values:
            return
        if path.stem != "precompute":
            break
        saved = path.with_stem(f"{path.stem}-{next(numbers)}")
    save_config(saved, values | {"command": command})


def _read_options(path: Path) -> dict[str, Any]:
    """Read the options of an earlier call, none from a damaged file."""
    with suppress(DamagedFileError):
        return {name: value for name, value in read_yaml(path, "").items() if name != "command"}
    return {}


def save_cost(folder: Path, seconds: float, records: int) -> None:
    """Add to the recorded cost of the folder's work. It is informational and never read by training.

    Args:
        folder: Folder of the work.
        seconds: Further seconds.
        records: Further records, each visit counted.
    """
    before = read_cost(folder) or {"seconds": 0.0, "records": 0}
    cost = {"seconds": before["seconds"] + seconds, "records": before["records"] + records}
    write_json(folder / COST_NAME, cost)


def read_cost(folder: Path) -> dict[str, float] | None:
    """Return the seconds and records (each visit counted) spent on a folder, or None if not recorded.

    Raises:
        DamagedFileError: If the file is damaged.
    """
    if not (path := folder / COST_NAME).exists():
        return None
    advice = "delete it; only the seconds and records of the work so far are lost"
    cost = read_json(path, advice)
    for name in ("seconds", "records"):
        value = cost.get(name)
        if type(value) not in (int, float) or not 0 <= value < math.inf:  # type: ignore[operator]
            raise damaged(path, f"{name} is {value!r}", advice)
    return {name: cost[name] for name in ("seconds", "records")}
