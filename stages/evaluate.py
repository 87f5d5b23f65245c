"""Judge a finished student, or its teacher: how right it is, how close to its teacher, and where it looks.

    python -m stages.evaluate experiment=demo
    python -m stages.evaluate store.path=stores/demo run=my-student evaluate.splits=[test]
    python -m stages.evaluate experiment=demo judges=[accuracy,localization,shift] evaluate.max_shift=4
    python -m stages.evaluate experiment=demo subject=teacher
    python -m stages.evaluate store.path=stores/other-images run=transferred evaluate.store=stores/teachers-own

Reads   runs/<run>/distill/ and <store.path>; the teacher's side comes from the store, and its network
        (teacher=, teacher.weights=) is read by judges that ask it again, and with subject=teacher
Writes  runs/<run>/evaluate/ (evaluate-teacher/): metrics.json, records.parquet, pictures.safetensors, config.yaml
Again   each judge is a unit of work: one that is done is left as it is
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commandline import main
from pipeline.config import ConfigError, NoModelConfig, require
from pipeline.evaluation.baselines import named_baselines, with_baselines
from pipeline.evaluation.findings import (
    FLAT,
    METRICS_NAME,
    add_finding,
    missing_judges,
    options_of,
    read_findings,
)
from pipeline.runs import RUNS, TrainedModel, load_model, open_run, read_description
from pipeline.selection import HOLDOUT
from pipeline.store.files import sha256_file, sha256_json, write_atomically
from pipeline.store.manifest import StoreMismatchError
from pipeline.store.reader import Store
from pipeline.tables import fit_network

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.config import EvaluateConfig
    from pipeline.evaluation.judge import Subject
    from pipeline.evaluation.trial import Trial
    from pipeline.store.reader import TeacherPass

PICTURES_NAME = "pictures.safetensors"


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """Metrics by split; fractions in [0, 1]."""

    metrics: str
    splits: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """Who is judged, on what."""

    store: Store
    passes: list[TeacherPass]
    fingerprint: str
    build: Callable[[], tuple[Subject, TrainedModel]]


def run(config: EvaluateConfig, name: str = "evaluate") -> EvaluateResult:
    """Judge the subject on each split, by each judge that has not done so.

    name  of the folder to write in the run's: evaluations of other splits lie side by side
    """
    if config.subject == "teacher":  # who is compared with no other student
        config = with_baselines(config, dict.fromkeys(named_baselines(config)))
        judged, name = _open_teacher(config), f"{name}-teacher"
    else:
        judged = _open_student(config)
    inputs = {
        config.subject: judged.fingerprint,
        "store": judged.store.manifest.fingerprint,
        **{f"teacher {teacher.name}": teacher.manifest.fingerprint for teacher in judged.passes},
    }
    folder = open_run(name, config.run, config.shared, inputs)
    missing = missing_judges(folder, config)
    if missing:
        _judge(config, judged, folder, missing)
    splits = read_findings(folder)["splits"]
    return EvaluateResult(metrics=str(folder / METRICS_NAME), splits=splits)


# ---- who is judged -------------------------------------------------------------------------------


def _open_student(config: EvaluateConfig) -> _Judged:
    student = RUNS / config.run / "distill"
    trained = read_description(student)
    store, passes = open_judged(config, config.store.teacher or trained.teachers)
    if not (config.store.teacher or trained.teachers):
        passes = [teacher for teacher in passes if teacher.num_classes == trained.num_classes]

    def build() -> tuple[Subject, TrainedModel]:
        from pipeline.evaluation.judge import Subject
        from pipeline.training import resolve_device

        model, described = load_model(student)
        if passes and passes[0].num_classes != described.num_classes:
            raise StoreMismatchError(
                f"{student} has {described.num_classes} classes, {passes[0].folder} has {passes[0].num_classes}; "
                "set store.teacher to the pass it learned from"
            )
        fit_network(described.config, store, "student")
        device = resolve_device("evaluate.device", config.evaluate.device)
        return Subject(model=model.to(device), input_size=described.input_size), described

    fingerprint = sha256_file(student / "model.safetensors")
    return _Judged(store=store, passes=passes, fingerprint=fingerprint, build=build)


def open_judged(config: EvaluateConfig, names: Sequence[str]) -> tuple[Store, list[TeacherPass]]:
    """The store that students are judged on, and what its teachers say there.

    names  of the passes in store.path that the student learned from; for a student of labels the store's
           only pass, if it has just one. In evaluate.store it is the passes of the same teachers.
    """
    taught = Store(Path(config.store.path))
    passes = []
    if names or len(taught.pass_folders()) == 1:
        passes = taught.open_passes(names)
    if config.evaluate.store is None:
        return taught, passes
    require(
        HOLDOUT not in config.evaluate.splits,
        f"evaluate.splits={HOLDOUT} are records of the store that the student learned from, and "
        f"evaluate.store={config.evaluate.store} is another; name a split of that one",
    )
    judged = Store(Path(config.evaluate.store))
    return judged, [judged.canonical_of(teacher) for teacher in passes]


def _open_teacher(config: EvaluateConfig) -> _Judged:
    """The network of `teacher`, with its own pass where the store has one."""
    from pipeline.evaluation.networks import build_teacher, passes_of_teacher
    from pipeline.fingerprint import describe_teacher

    teacher = config.teacher
    require(
        HOLDOUT not in config.evaluate.splits,
        f"evaluate.splits={HOLDOUT} is what a student's own training left out; name a split of the store for "
        "subject=teacher",
    )
    if isinstance(teacher, NoModelConfig) or teacher.weights is None:
        raise ConfigError(
            "subject=teacher needs the network: name it with teacher= and teacher.weights="
        )
    store = Store(Path(config.evaluate.store or config.store.path))
    described = describe_teacher(teacher, len(store.manifest.classes))

    def build() -> tuple[Subject, TrainedModel]:
        subject = build_teacher(teacher, store, config.evaluate.device)
        return subject, TrainedModel(
            config=teacher, num_classes=described["classes"], input_size=subject.input_size
        )

    named = store.open_passes(config.store.teacher) if config.store.teacher else []
    return _Judged(
        store=store,
        passes=passes_of_teacher(teacher, store, named),
        fingerprint=sha256_json(described),
        build=build,
    )


# ---- judging -------------------------------------------------------------------------------------


def _judge(config: EvaluateConfig, judged: _Judged, folder: Path, missing: Sequence[str]) -> None:
    """Add the findings of each missing judge; what any of them lacks is said before the first begins."""
    from pipeline.evaluation.judge import open_split
    from pipeline.evaluation.judges import JUDGES
    from pipeline.evaluation.networks import Networks
    from pipeline.evaluation.trial import Trial

    subject, trained = judged.build()
    networks = Networks(config, judged.store, judged.passes)
    wanted = {*config.asked, *read_findings(folder)["judges"]}
    trials = [
        Trial(
            split=split,
            subject=subject,
            dataset=open_split(judged.store, judged.passes, split, trained),
            config=config,
            networks=networks,
            folder=folder,
            fingerprint=judged.fingerprint,
            localise="localization" in wanted,
        )
        for split in config.evaluate.splits
    ]
    files = {
        judge: {
            path: digest for trial in trials for path, digest in JUDGES[judge].check(trial).items()
        }
        for judge in missing
    }
    if set(FLAT) & set(missing):
        _write_records(trials)
    for judge in missing:
        add_finding(
            folder,
            judge,
            {trial.split: JUDGES[judge].judge(trial) for trial in trials},
            options=options_of(judge, config),
            files=files[judge],
            records={trial.split: len(trial.dataset) for trial in trials},
        )


def _write_records(trials: Sequence[Trial]) -> None:
    """The table of all splits' records, and the maps of some of them."""
    import pyarrow as pa
    import torch
    from safetensors.torch import save

    from pipeline.evaluation.pictures import picture_maps
    from pipeline.evaluation.record_table import RECORDS_NAME, record_table
    from pipeline.store.index import write_table

    tables, shown = [], []
    folder, options = trials[0].folder, trials[0].options
    per_split = 0 if trials[0].store.is_table else -(-options.num_pictures // len(trials))
    for trial in trials:
        tables.append(record_table(trial.split, trial.judged))
        positions = list(range(min(per_split, len(trial.dataset))))
        if positions:
            shown.append(picture_maps(trial.subject, trial.dataset, positions, options.frame))
    if shown:
        tensors = {name: torch.cat([part[name] for part in shown]) for name in shown[0]}
        write_atomically(folder / PICTURES_NAME, save(tensors))
    write_table(folder / RECORDS_NAME, pa.concat_tables(tables))


if __name__ == "__main__":
    main("evaluate", run, __doc__)
