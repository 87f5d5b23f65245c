"""The judges of an evaluation, run one after the other over its splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import torch
from safetensors.torch import save

from pipeline.config.evaluators import EVALUATORS
from pipeline.config.verbs import EvaluateConfig
from pipeline.core.files import write_atomically
from pipeline.evaluation.context import Trial
from pipeline.evaluation.evaluators.build import evaluator_named
from pipeline.evaluation.forward import open_split
from pipeline.evaluation.networks import Networks
from pipeline.evaluation.pictures import PICTURES_NAME, picture_maps
from pipeline.evaluation.record_table import RECORDS_NAME, record_table
from pipeline.evaluation.results import add_finding, options_of, read_findings
from pipeline.evaluation.subjects import OpenSubject
from pipeline.store.index import write_table


def run_judges(
    config: EvaluateConfig, judged: OpenSubject, folder: Path, missing: Sequence[str]
) -> None:
    """Add the findings of each missing judge; what any of them lacks is said before the first begins."""
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
    evaluators = {judge: evaluator_named(judge) for judge in missing}
    files = {
        judge: {
            path: digest
            for trial in trials
            for path, digest in evaluators[judge].check(trial).items()
        }
        for judge in missing
    }
    if any(EVALUATORS[judge].is_flat for judge in missing):
        _write_records(trials)
    for judge in missing:
        add_finding(
            folder,
            judge,
            {trial.split: evaluators[judge].run(trial) for trial in trials},
            options=options_of(judge, config),
            files=files[judge],
            records={trial.split: len(trial.dataset) for trial in trials},
        )


def _write_records(trials: Sequence[Trial]) -> None:
    """The table of all splits' records, and the maps of some of them."""
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
