"""Evaluator `unicam`: maps of the features of one network beyond another, for a few records of a split (maps.py).

unicam-<split>.safetensors in the evaluation's folder contains, for each <x>_given_<y>/depth<d> (and, except for the
objective, <x>_given_<y>/mean of several depths, with maps on the finest of their grids),

    objective f32 [r]            J, the mean over banks
    <reduction>/map f16 [r, h, w]  mean over banks on the grid of x, signed, divided by its highest absolute value
    <reduction>/min, max f32 [r]   extremes of the map before that division
    <reduction>/empty bool [r]     true if nothing in the map is positive
    <reduction>/reliability f32 [r]  mean cosine of the maps of two banks, nan with one bank

and in its header the record keys, the banks' hashes and the compared networks. unicam-<split>.parquet has the keys of
the explained records and of each bank (columns set and key). metrics.json contains the means. Class embeddings, such
as those of the class names by a text encoder, or class means of a pass (prototypes.py) may take the place of one-hot
labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from permafrost.core.digests import sha256_keys
from permafrost.core.errors import ConfigError, require
from permafrost.core.records import escape_key
from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.evaluator import LESS, MORE, PLAIN, Evaluator, Page, Quantity
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.evaluation.map_colors import overlays
from permafrost.storage.files import file_at
from permafrost.storage.untrusted import FormatError, parse_npy
from permafrost.store.image_decoding import png_of
from permafrost.store.manifest import MANIFEST_NAME
from permafrost_papers.probe_set import (
    LEAST_OF_A_CLASS,
    balanced_positions,
    check_probes,
    class_blocks,
    multi_hot_labels,
    write_keys,
)
from permafrost_papers.unicam.estimators import (
    MIN_RECORDS,
    label_features,
)
from permafrost_papers.unicam.maps import (
    REDUCTIONS,
    Bank,
    NetworkActivations,
    ProbeSplit,
    activations_artifact,
    check_depths,
    collect_activations,
    explain_record,
    feature_of,
    mean_of_depths,
    reliability,
    teacher_views,
)
from permafrost_papers.unicam.options import (
    ComparedFeaturesOptions,
    UnicamOptions,
    compared_networks,
    wanted_pairs,
)
from permafrost_papers.unicam.prototypes import class_means, prototype_pass


def load_class_embeddings(
    context: EvaluationContext, options: ComparedFeaturesOptions
) -> Tensor | None:
    """Load the class embeddings f64 [K, e] of a .npy file or a pass, None for one-hot labels.

    Args:
        context: Evaluation of the split.
        options: Options of the evaluator.

    Raises:
        ConfigError: If the file does not exist, or is not a matrix with a row for each class, or the pass does not fit.
    """
    if options.embeddings is None:
        return None if options.prototypes is None else class_means(context, options)
    num_classes = len(context.store.manifest.classes)
    option = f"{options.section}.embeddings={options.embeddings}"
    path = Path(options.embeddings)
    require(
        path.is_file(), f"{option} does not exist; correct the path, or set it to null for one-hot"
    )
    try:
        values = parse_npy(file_at(path).read(), "fiu", (num_classes, None))
    except FormatError as error:
        raise ConfigError(
            f"{option} is not a matrix of numbers with a row for each of the {num_classes} classes, in order: {error}; "
            "write it with numpy.save"
        ) from error
    return torch.from_numpy(values.astype(np.float64))


def check_compared(context: EvaluationContext, options: ComparedFeaturesOptions) -> dict[str, str]:
    """Check the baseline and the class embeddings, and return the SHA-256 of their files by path."""
    files: dict[str, str] = {}
    if options.baseline is not None:
        files |= context.networks.check_student(f"{options.section}.baseline", options.baseline)
    if options.embeddings is not None:
        load_class_embeddings(context, options)
        files[options.embeddings] = file_at(Path(options.embeddings)).sha256()
    if options.prototypes is not None:
        manifest = prototype_pass(context, options).folder / MANIFEST_NAME
        files[str(manifest)] = file_at(manifest).sha256()
    return files


def student_of(
    name: str, context: EvaluationContext, options: ComparedFeaturesOptions
) -> EvaluatedModel:
    """Return the baseline's network if it is named, the evaluated one otherwise."""
    baseline = options.baseline if name == "baseline" else None
    return context.model if baseline is None else context.networks.student(baseline)


# ---- residual maps ---------------------------------------------------------------------------------


NAME = "unicam"

Maps = list[list[Tensor]]
"""Maps f64 [h, w] of each explained record, one for each bank."""


def check_unicam(context: EvaluationContext) -> Mapping[str, str]:
    """Check labels, the teacher's activations or network, the baseline and the depths.

    Returns:
        SHA-256 of the files that are read, by their path.

    Raises:
        ConfigError: If one of them is missing or does not fit.
        StoreMismatchError: If the network of the teacher did not make the pass.
    """
    options = context.options.of(UnicamOptions)
    option = f"evaluate.{NAME}.embeddings" if options.is_one_hot else None
    check_probes(NAME, context.dataset, context.split, MIN_RECORDS * options.banks, option)
    option = f"evaluate.{NAME}.depths"
    check_depths(option, context.model, options.depths, "the student")
    probe_split = _probe_split(context)
    if "teacher" in compared_networks(options):
        is_stored = activations_artifact(context, probe_split, options.depths).exists
        context.networks.check_teacher(NAME, is_stored=is_stored)
        if not is_stored:
            check_depths(option, context.networks.teacher, options.depths, "the teacher")
    files = check_compared(context, options)
    if options.baseline is not None:
        check_depths(
            option, context.networks.student(options.baseline), options.depths, "the baseline"
        )
    return files


def evaluate_unicam(context: EvaluationContext) -> dict[str, Any]:
    """Write the maps, and return means over the explained records by pair, depth and reduction."""
    options = context.options.of(UnicamOptions)
    probe_split = _probe_split(context)
    views = {
        name: teacher_views(context, probe_split, options.depths)
        if name == "teacher"
        else collect_activations(
            context, student_of(name, context, options), probe_split, options.depths
        )
        for name in compared_networks(options)
    }
    labels = label_features(
        multi_hot_labels(context.dataset, probe_split.positions.tolist()),
        load_class_embeddings(context, options),
    )
    tensors: dict[str, Tensor] = {}
    for x, given in wanted_pairs(options.pairs, options.baseline):
        pair = f"{x}_given_{given}"
        by_depth: dict[str, list[Maps]] = {name: [] for name in options.reductions}
        for depth in options.depths:
            objectives, maps = _explain(probe_split, depth, views[x], views[given], labels, options)
            tensors[f"{pair}/depth{depth}/objective"] = objectives
            for name, of_records in maps.items():
                by_depth[name].append(of_records)
                tensors |= _pack(f"{pair}/depth{depth}/{name}", of_records)
        if len(options.depths) > 1:
            for name, of_depths in by_depth.items():
                tensors |= _pack(f"{pair}/mean/{name}", mean_of_depths(of_depths))
    name = f"{NAME}-{context.split}.safetensors"
    _write(context, probe_split, name, tensors)
    if options.overlays:
        _write_overlays(context, probe_split, tensors)
    numbered = {f"bank{n}": bank for n, bank in enumerate(probe_split.banks, start=1)}
    sets = {"explained": np.arange(probe_split.explained), **numbered}
    keys = np.array(context.dataset.keys_at(probe_split.positions), object)
    write_keys(context, NAME, {name: keys[places].tolist() for name, places in sets.items()})
    return {
        "records": probe_split.explained,
        "banks": len(probe_split.banks),
        "bank_records": len(probe_split.banks[0]),
        "bank_sha256": list(probe_split.bank_sha256),
        "classes": probe_split.classes,
        "file": name,
        **_means(tensors),
    }


def _explain(
    probe_split: ProbeSplit,
    depth: int,
    x: NetworkActivations,
    given: NetworkActivations,
    labels: Tensor,
    options: UnicamOptions,
) -> tuple[Tensor, dict[str, Maps]]:
    """Compute the objectives f32 [r] of one pair at one depth, and the maps by reduction."""
    every = (x[f"features/{depth}"], given[f"features/{depth}"], labels)
    banks = [Bank.of(*(values[bank] for values in every)) for bank in probe_split.banks]
    objectives: list[float] = []
    maps: dict[str, Maps] = {name: [] for name in options.reductions}
    for place, activation in enumerate(x[f"grids/{depth}"]):
        explained = [
            explain_record(
                activation,
                lambda grids: feature_of(depth, grids),
                given[f"features/{depth}"][place],
                labels[place],
                _without_record(bank, members, place),
            )
            for bank, members in zip(banks, probe_split.banks, strict=True)
        ]
        objectives.append(float(np.mean([of_bank.objective for of_bank in explained])))
        for name, of_records in maps.items():
            reduce = REDUCTIONS[name]
            of_records.append([reduce(activation, of_bank.gradient) for of_bank in explained])
    return torch.tensor(objectives), maps


def _without_record(bank: Bank, members: NDArray[np.int64], position: int) -> Bank:
    """Return the bank without the explained record, if that is one of its members."""
    places = np.flatnonzero(members == position)
    return bank.without(int(places[0])) if len(places) else bank


def _pack(prefix: str, maps: Maps) -> dict[str, Tensor]:
    """Convert the maps to tensors of the file, with names that begin with `prefix`."""
    means = torch.stack([torch.stack(banks).mean(dim=0) for banks in maps])
    low, high = means.amin(dim=(1, 2)), means.amax(dim=(1, 2))
    scale = torch.maximum(low.abs(), high.abs())
    unit = means / torch.where(scale > 0, scale, 1.0)[:, None, None]
    return {
        f"{prefix}/map": unit.half(),
        f"{prefix}/min": low.float(),
        f"{prefix}/max": high.float(),
        f"{prefix}/empty": high <= 0,
        f"{prefix}/reliability": torch.tensor([reliability(banks) for banks in maps]),
    }


# ---- who and what --------------------------------------------------------------------------------


def _probe_split(context: EvaluationContext) -> ProbeSplit:
    options = context.options.of(UnicamOptions)
    dataset = context.dataset
    explained = balanced_positions(dataset, options.seed, NAME, "records")
    order = balanced_positions(dataset, options.seed, NAME, "bank")
    size = min(options.bank_records, len(order) // options.banks)
    least = LEAST_OF_A_CLASS * options.banks
    blocks = None
    if options.is_one_hot:  # with embeddings a bank may contain one record of a class
        drawn_from = [size * options.banks]
        blocks = class_blocks(dataset, order, drawn_from, options.seed, NAME, least=least)
    if blocks is not None:  # all banks and the explained records use the same classes
        labels = dataset.label_numbers
        drawn_labels = labels[np.concatenate([np.empty(0, np.int64), *blocks])]
        explained, order = (
            chosen[np.isin(labels[chosen], drawn_labels)] for chosen in (explained, order)
        )
        size = min(options.bank_records, len(order) // options.banks)
    require(
        size >= MIN_RECORDS,
        f"evaluators={NAME} has banks of {size} records of classes that repeat, but needs at least {MIN_RECORDS}; "
        f"lower evaluate.{NAME}.banks, or name another split in evaluate.splits",
    )
    explained = explained[: options.records]
    drawn = [order[number * size : (number + 1) * size] for number in range(options.banks)]
    positions = np.concatenate([explained, np.setdiff1d(np.concatenate(drawn), explained)])
    places = {position: place for place, position in enumerate(positions.tolist())}
    return ProbeSplit(
        positions=positions,
        explained=len(explained),
        banks=tuple(np.array([places[position] for position in bank.tolist()]) for bank in drawn),
        bank_sha256=tuple(sha256_keys(dataset.keys_at(bank)) for bank in drawn),
        classes=len(np.unique(dataset.label_numbers[order]))
        if not dataset.has_many_labels
        else len(context.store.manifest.classes),
    )


# ---- what is kept --------------------------------------------------------------------------------


def _write(
    context: EvaluationContext, probe_split: ProbeSplit, name: str, tensors: Mapping[str, Tensor]
) -> None:
    from safetensors.torch import save

    options = context.options.of(UnicamOptions)
    compared = {"student": context.fingerprint}
    if "teacher" in compared_networks(options):
        compared["teacher"] = context.networks.described_teacher["weights_sha256"]
    if options.baseline is not None:
        (compared["baseline"],) = context.networks.check_student(
            "baseline", options.baseline
        ).values()
    header = {
        "keys": context.dataset.keys_at(probe_split.positions[: probe_split.explained]),
        "bank_sha256": list(probe_split.bank_sha256),
        "networks": compared,
        "frame": context.frame,
    }
    context.write(
        name,
        save(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            metadata={key: json.dumps(value) for key, value in header.items()},
        ),
    )


def _write_overlays(
    context: EvaluationContext, probe_split: ProbeSplit, tensors: Mapping[str, Tensor]
) -> None:
    """Write the pictures of evaluate.unicam.overlays."""
    options = context.options.of(UnicamOptions)
    positions = probe_split.positions[: probe_split.explained].tolist()
    images = torch.cat([255 * views.cpu() for views in context.iter_views(positions)])
    frames = images.round().byte().permute(0, 2, 3, 1).numpy()
    # Keys of a store of someone else may not be names of files.
    names = [escape_key(unquote(key)) for key in context.dataset.keys_at(positions)]
    depth = "mean" if len(options.depths) > 1 else f"depth{options.depths[0]}"
    for x, given in wanted_pairs(options.pairs, options.baseline):
        pair = f"{x}_given_{given}"
        maps = tensors[f"{pair}/{depth}/{options.reductions[0]}/map"].float().numpy()
        for name, picture in zip(names, overlays(frames, maps), strict=True):
            pixels = (255 * picture).round().astype(np.uint8)
            factor = max(1, _SIDE // pixels.shape[1])
            data = png_of(Image.fromarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1)))
            context.write(f"{NAME}-{context.split}/{pair}/{name}.png", data)


_MEANS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "objective": {"objective": torch.mean},
    "empty": {"empty_fraction": torch.mean},
    "reliability": {"reliability": torch.mean, "reliability_min": torch.min},
}
"""Numbers of each kind of tensor, over the records for which it is defined."""


def _means(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Numbers of _MEANS by name: pair -> depth -> (reduction ->) value."""
    means: dict[str, Any] = {}
    for path, values in tensors.items():
        *places, last, kind = path.split("/")
        known = values[~values.isnan()].float()
        for name, reduce in _MEANS.get(kind, {}).items():
            if len(known):
                entry = means.setdefault(name, {})
                for place in places:
                    entry = entry.setdefault(place, {})
                entry[last] = float(reduce(known))
    return means


_SIDE = 224
"""Width in pixels up to which an overlay is enlarged by a whole factor."""
_QUANTITIES = (
    (
        "reliability",
        "Reliability: cosine between banks",
        "Cosine of the maps from two banks of records: 1 if the choice of records does not matter.",
        MORE,
    ),
    (
        "objective",
        "J: relevance of the first network that remains without the second",
        "Relevance to the labels of the first network's features without the second's; 0 is nothing.",
        PLAIN,
    ),
    (
        "empty_fraction",
        "Fraction of maps without a positive value",
        "Fraction of maps in which no place increases the relevance, between 0 and 1.",
        LESS,
    ),
)
"""Name, caption, meaning and metric of what is measured for each pair of networks."""

EVALUATOR = Evaluator(
    evaluate_unicam,
    check_unicam,
    Page(
        "UniCAM",
        "Maps of distilled and residual features",
        "Maps of the relevance to the labels that one network has and another lacks (UniCAM), each record compared "
        "with fixed banks of other records. Reliability is the cosine of the maps of two banks.",
        tuple(
            Quantity(
                f"{name}.{x}_given_{given}",
                f"{caption}; {x}, without {given}",
                meaning,
                metric,
                is_main=name == "reliability",
            )
            for name, caption, meaning, metric in _QUANTITIES
            for x, given in permutations(("student", "teacher", "baseline"), 2)
        ),
        pictures="permafrost_papers.unicam.unicam_pictures:unicam_figures",
    ),
)
