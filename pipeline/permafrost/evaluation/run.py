"""Runs the evaluators of an evaluation one after the other over its splits."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import save
from torch import Tensor

from permafrost.config.evaluation import EVALUATORS
from permafrost.config.explainers import EXPLAINERS
from permafrost.core.errors import device_errors, require
from permafrost.core.interrupts import check_interrupted
from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.evaluator import evaluator_named
from permafrost.evaluation.forward import EvaluatedModel, explained_as, open_split, predict_split
from permafrost.evaluation.inputs import EvaluationInputs
from permafrost.evaluation.map_colors import feature_colors
from permafrost.evaluation.other_networks import Networks
from permafrost.evaluation.per_label import AT_HALF, Thresholds, best_thresholds
from permafrost.evaluation.random_networks import (
    check_untrained,
    measure_untrained,
    untrained_network,
)
from permafrost.evaluation.results import (
    add_random_networks,
    add_result,
    evaluator_options,
    lacking_networks,
    read_results,
    stored_thresholds,
    threshold_of,
)
from permafrost.evaluation.saved_records import PICTURES_NAME, RECORDS_NAME, record_table
from permafrost.loading.decode_threads import resolve_decode_threads
from permafrost.models.classifier import trial_copy
from permafrost.models.compute import device_name, float32_products
from permafrost.models.record_independence import probe_positions, require_independent_network
from permafrost.models.saved import EXPORT_FOLDER, TrainedModel
from permafrost.store.arrow_files import write_table

logger = logging.getLogger("permafrost.evaluate")


@float32_products()  # as evaluators may call networks as they are
def run_evaluators(inputs: EvaluationInputs, folder: Path, missing: Sequence[str]) -> None:
    """Run each missing evaluator and add its results, after the checks of all of them have passed.

    Args:
        inputs: The evaluation.
        folder: Folder of the evaluation.
        missing: Names of the evaluators to run.

    Raises:
        ConfigError: If a requirement of an evaluator is missing.
        DeviceError: If the device has no room for a batch.
    """
    with device_errors(f"lower evaluate.batch_size={inputs.config.evaluate.batch_size}"):
        _run_evaluators(inputs, folder, missing)


def _run_evaluators(inputs: EvaluationInputs, folder: Path, missing: Sequence[str]) -> None:
    config = inputs.config
    model, trained = inputs.build()
    model = replace(model, thresholds=_thresholds(inputs, folder, model, trained))
    logger.info("evaluators run on %s", device_name(model.device))
    networks = Networks(config, inputs.store, inputs.passes)
    requested = {*config.requested_evaluators, *read_results(folder)["evaluators"]}
    model = explained_as(model, inputs.passes)
    if "localization" in requested:
        _warn_of_other_explainer(inputs, model)
    threads = resolve_decode_threads(config.evaluate.decode_threads)
    contexts = [
        EvaluationContext(
            split=split,
            model=model,
            dataset=open_split(inputs.store, inputs.passes, split, trained, threads),
            config=config,
            networks=networks,
            folder=folder,
            trained=trained if config.model == "student" else None,
            fingerprint=inputs.fingerprint,
            localize="localization" in requested,
        )
        for split in config.evaluate.splits
    ]
    if positions := probe_positions(len(contexts[0].dataset)):
        views = list(contexts[0].iter_views(positions))
        require_independent_network(trial_copy(model.network), torch.cat(views))
    count, lacking = lacking_networks(read_results(folder), config)
    if lacking:
        check_untrained(trained, model, count)
    files = _check_evaluators([*missing, *lacking], contexts)
    _add_results(inputs, folder, {name: files[name] for name in missing}, contexts)
    levels: dict[str, list[dict[str, Any]]] = {context.split: [] for context in contexts}
    for number in range(count if lacking else 0):
        logger.info("untrained network %d of %d: %s", number + 1, count, ", ".join(lacking))
        network = untrained_network(trained, model, number)
        read = {name: files[name] for name in lacking}
        for context in contexts:
            check_interrupted()
            measured = measure_untrained(context, trained, network, read, inputs.fingerprints)
            levels[context.split].append({"records": len(context.dataset), **measured})
    if lacking:
        add_random_networks(folder, levels, lacking)


def _check_evaluators(
    evaluators: Iterable[str], contexts: Sequence[EvaluationContext]
) -> dict[str, dict[str, str]]:
    """Run the checks of evaluators on all splits, and return the files that each of them reads."""
    return {
        evaluator: {
            path: digest
            for context in contexts
            for path, digest in (evaluator_named(evaluator).check(context) or {}).items()
        }
        for evaluator in evaluators
    }


def _add_results(
    inputs: EvaluationInputs,
    folder: Path,
    files: Mapping[str, Mapping[str, str]],
    contexts: Sequence[EvaluationContext],
) -> None:
    """Run evaluators, by name with the files that they read, on all splits."""
    if any(EVALUATORS[evaluator].is_flat for evaluator in files):
        _write_records(contexts)
    for evaluator in files:
        check_interrupted()
        add_result(
            folder,
            evaluator,
            {context.split: evaluator_named(evaluator).run(context) for context in contexts},
            options=evaluator_options(evaluator, inputs.config),
            command=inputs.config.command,
            files=files[evaluator],
            records={context.split: len(context.dataset) for context in contexts},
            pictures=inputs.pictures,
            written={
                name: digest for context in contexts for name, digest in context.written.items()
            },
        )


def _warn_of_other_explainer(inputs: EvaluationInputs, model: EvaluatedModel) -> None:
    """Warn that maps are not compared if those of the pass are of an explainer that cannot explain the network.

    Raises:
        ConfigError: If they are of a plug-in that is not named.
    """
    kind = inputs.passes[0].explainer if inputs.passes else None
    if kind is not None and not model.is_compared_with(inputs.passes[0]):
        require(
            kind.split()[0] in EXPLAINERS,
            f"the maps of {inputs.passes[0].name} are of explainer={kind}, whose plug-in is not named; name it with "
            "plugins=, or leave maps out with evaluators=[accuracy]",
        )
        logger.warning(
            "map_cosine is not measured: the maps of %s are of explainer=%s, by which %s cannot be explained. EPG, IoU "
            "and pictures use the network's own explainer=%s; to compare maps, name a pass of explainer=%s with "
            "evaluate.against=",
            inputs.passes[0].name,
            kind,
            type(model.network.network).__name__,
            model.explainer,
            model.explainer,
        )


def _thresholds(
    inputs: EvaluationInputs, folder: Path, model: EvaluatedModel, trained: TrainedModel
) -> Thresholds:
    """Return the logits from which classes are predicted, by evaluate.threshold.

    Raises:
        ConfigError: If records have one label each, or the thresholds of another store's split were not chosen yet.
    """
    option, run = inputs.config.evaluate.threshold, inputs.run_folder.path
    stored = None
    if inputs.store.manifest.multi_label:
        option = threshold_of(folder) if option is None else option
        name = option if isinstance(option, str) else None
        stored = stored_thresholds(run, inputs.config.model, inputs.fingerprint, name)
    if option is None:
        if stored is not None:
            logger.warning(
                "classes are predicted from 0.5, and this run has stored the thresholds of evaluate.threshold=%s",
                stored[0],
            )
        return AT_HALF
    require(
        inputs.store.manifest.multi_label,
        f"evaluate.threshold={option} is for records with many labels, and those of {inputs.store.path} have one each",
    )
    if not isinstance(option, str):
        logit = math.log(option / (1 - option))
        return Thresholds(logit, logit)
    if stored is not None:
        of_model, of_teacher = torch.tensor(stored[1], dtype=torch.float64).T
        return Thresholds(of_model, of_teacher)
    require(
        not inputs.is_elsewhere,
        f"evaluate.threshold={option} takes the thresholds of split {option} of the store that the student was trained "
        f"on, and {inputs.store.path} is another one; choose them first with permafrost evaluate "
        f"store.path=<that store> run={inputs.config.run} evaluate.threshold={option}",
    )
    if (run / "distill" / EXPORT_FOLDER).exists():
        logger.warning(
            "%s has other thresholds; run permafrost export again", run / "distill" / EXPORT_FOLDER
        )
    threads = resolve_decode_threads(inputs.config.evaluate.decode_threads)
    dataset = open_split(inputs.store, inputs.passes, option, trained, threads, with_regions=False)
    predictions = predict_split(
        model, dataset, inputs.config.evaluate, inputs.passes, localize=False
    )
    logits = predictions.teacher_logits
    of_teacher = (
        best_thresholds(logits, predictions.labels[: len(logits)])
        if isinstance(logits, Tensor)
        else 0.0
    )
    return Thresholds(best_thresholds(predictions.logits, predictions.labels), of_teacher)


def _write_records(contexts: Sequence[EvaluationContext]) -> None:
    """Write the table of all splits' records, and the pictures of some of them."""
    tables, shown = [], []
    folder, options = contexts[0].folder, contexts[0].options
    per_split = -(-contexts[0].store.form.pictures(options.num_pictures) // len(contexts))
    for context in contexts:
        tables.append(record_table(context.split, context.predictions))
        if positions := list(range(min(per_split, len(context.dataset)))):
            shown.append(context.picture_maps(positions))
    if shown:
        tensors = {
            name: torch.cat([part[name] for part in shown])
            for name in shown[0]
            if all(name in part for part in shown)
        }
        contexts[0].write(
            PICTURES_NAME,
            save(
                {
                    name: feature_colors(tensor) if "features" in name else tensor
                    for name, tensor in tensors.items()
                }
            ),
        )
    contexts[0].written[RECORDS_NAME] = write_table(folder / RECORDS_NAME, pa.concat_tables(tables))
