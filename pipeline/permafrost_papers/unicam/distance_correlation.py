"""Evaluator `distance_correlation`: shared and residual features of student and teacher (UniCAM's FSS and RS).

For each layer of the student and the paired layer of the teacher, over a fixed set of records:

    fss            R*(teacher, student)
    relevance      R*(x, labels) of each network
    rs             RS(x | given; labels), semi-partial, of each pair of networks x_given_y
    pdcor          the same with `given` also removed from the labels
    progression    R*(layer, the network's deepest layer)
    fss_p          p-value of fss under independence, by the t-test for high dimensions
    relevance_p    p-value of relevance under independence, by permutations of the labels
    rs_p           p-value of rs if the true value is 0, by permutations and by the jackknife
    fss_low, ...   ends of the 95 % intervals over records, by the jackknife, of fss and rs
    fss_biased     V-statistic of the released code on features of unit norm, for parity only

distance_correlation-<split>.parquet has the keys of each block, in order. A teacher's distances are cached in the store
and computed once. The tensors in <store>/artifacts/distances-<fp8>/ are
named "<layer>/<block>", condensed, float64. The form is `plain` (features as they are) or `unit` (features of each
record divided by their norm), with a separate artifact each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from permafrost.core.digests import derive_seed
from permafrost.core.errors import require
from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.evaluator import LESS, MORE, Evaluator, Page, Quantity
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.store.artifacts import Artifact
from permafrost_papers.probe_set import (
    ProbeSet,
    activations,
    check_layers,
    check_probes,
    layer_features,
    layer_names,
    multi_hot_labels,
    pair_layers,
    probe_set,
    write_keys,
)
from permafrost_papers.unicam.estimators import (
    MIN_RECORDS,
    InnerProducts,
    feature_distances,
    label_features,
)
from permafrost_papers.unicam.options import (
    DistanceCorrelationOptions,
    compared_networks,
    wanted_pairs,
)
from permafrost_papers.unicam.residual_maps import check_compared, load_class_embeddings, student_of
from permafrost_papers.unicam.teacher_artifact import teacher_artifact

Form = Literal["plain", "unit"]
Distances = dict[str, list["Tensor"]]
"""Layer, from the finest to the deepest -> condensed distances f64 [n (n - 1) / 2] of each block."""


@torch.no_grad()
def network_distances(
    context: EvaluationContext, model: EvaluatedModel, probes: ProbeSet, forms: Sequence[Form]
) -> dict[Form, Distances]:
    """Compute the distances of each form by running the network. All features of a block are held in memory.

    Args:
        context: Evaluation of the split.
        model: Network to run.
        probes: Blocks of records.
        forms: Forms of the features.

    Returns:
        Condensed distances of each form, layer and block.
    """
    distances_by_form: dict[Form, Distances] = {form: {} for form in forms}
    for block in probes.blocks:
        parts: dict[str, list[Tensor]] = {}
        for images in replace(context, model=model).iter_views(block.tolist()):
            for layer, values in layer_features(activations(model.network, images)).items():
                parts.setdefault(layer, []).append(values.cpu())
        for layer in list(parts):
            features = torch.cat(parts.pop(layer))
            for form in forms:
                distances = feature_distances(features, l2norm=form == "unit")
                distances_by_form[form].setdefault(layer, []).append(distances)
    return distances_by_form


# ---- the teacher's -------------------------------------------------------------------------------


def teacher_layers(context: EvaluationContext, probes: ProbeSet, form: Form) -> list[str]:
    """Return the names of the teacher's layers, from the artifact in the store or from the network."""
    if (artifact := _artifact(context, probes, form)).exists:
        return list(artifact.description["layers"])
    return layer_names(context.networks.teacher)


def teacher_distances(
    context: EvaluationContext, probes: ProbeSet, forms: Sequence[Form]
) -> dict[Form, Distances]:
    """Load the distances of each form from the store. Missing ones are computed with the network and stored.

    Args:
        context: Evaluation of the split.
        probes: Blocks of records.
        forms: Forms of the features.

    Returns:
        Condensed distances of each form, layer and block.
    """
    missing = [form for form in forms if not _artifact(context, probes, form).exists]
    asked = network_distances(context, context.networks.teacher, probes, missing) if missing else {}
    for form, distances in asked.items():
        tensors = {
            f"{layer}/{number}": condensed
            for layer, blocks in distances.items()
            for number, condensed in enumerate(blocks)
        }
        _artifact(context, probes, form).save(tensors, {"layers": list(distances)})
    return {form: asked.get(form) or _load(context, probes, form) for form in forms}


def _artifact(context: EvaluationContext, probes: ProbeSet, form: Form) -> Artifact:
    return teacher_artifact(
        context,
        "distances",
        records=[len(block) for block in probes.blocks],
        keys_sha256=probes.keys_sha256,
        form=form,
    )


def _load(context: EvaluationContext, probes: ProbeSet, form: Form) -> Distances:
    manifest, tensors = _artifact(context, probes, form).load()
    return {
        layer: [tensors[f"{layer}/{number}"] for number in range(len(probes.blocks))]
        for layer in manifest.description["layers"]
    }


# ---- distance correlation --------------------------------------------------------------------------


NAME = "distance_correlation"
_LABELS = "labels"


def check_distances(context: EvaluationContext) -> Mapping[str, str]:
    """Check labels, the teacher's distances or network, the baseline, the layers and the embeddings.

    Returns:
        SHA-256 of the files that are read, by their path.

    Raises:
        ConfigError: If one of them is missing or does not fit.
        StoreMismatchError: If the network of the teacher did not make the pass.
    """
    options = context.options.of(DistanceCorrelationOptions)
    option = f"evaluate.{NAME}.embeddings" if options.is_one_hot else None
    check_probes(NAME, context.dataset, context.split, MIN_RECORDS, option)
    if "teacher" in compared_networks(options):
        artifacts = [_artifact(context, _probes(context), form) for form in _forms(options)]
        is_stored = all(artifact.exists for artifact in artifacts)
        context.networks.check_teacher(NAME, is_stored=is_stored)
    files = check_compared(context, options)
    if options.layers:
        others = teacher_layers(context, _probes(context), _forms(options)[0])
        check_layers(f"evaluate.{NAME}.layers", options.layers, layer_names(context.model), others)
    return files


def evaluate_distances(context: EvaluationContext) -> dict[str, Any]:
    """Compute the numbers in the module's docstring, by layer of the student."""
    options = context.options.of(DistanceCorrelationOptions)
    probes = _probes(context)
    forms = _forms(options)
    write_keys(
        context,
        NAME,
        {
            f"block{number}": context.dataset.keys_at(block)
            for number, block in enumerate(probes.blocks, start=1)
        },
    )
    distances_by_network = {
        name: teacher_distances(context, probes, forms)
        if name == "teacher"
        else network_distances(context, student_of(name, context, options), probes, forms)
        for name in dict.fromkeys(["student", *compared_networks(options)])
    }
    main = {name: by_form[forms[0]] for name, by_form in distances_by_network.items()}
    layers = _paired(main, options.layers)
    embeddings = load_class_embeddings(context, options)
    labels = [
        feature_distances(
            label_features(multi_hot_labels(context.dataset, block.tolist()), embeddings)
        )
        for block in probes.blocks
    ]
    table = _table(main, labels, options.permutations, options.seed)
    numbers: dict[str, Any] = {
        "records": table.records,
        "blocks": table.blocks,
        "probe_sha256": probes.keys_sha256,
        "classes": probes.classes,
        "layers": layers,
    }
    if "teacher" in main:
        pairs = {
            layer_name: (f"teacher.{layer_of['teacher']}", f"student.{layer_name}")
            for layer_name, layer_of in layers.items()
        }
        fss = {layer_name: table.correlation(*pair) for layer_name, pair in pairs.items()}
        numbers["fss"] = {layer_name: float(value) for layer_name, value in fss.items()}
        numbers["fss_p"] = {layer_name: table.p_value(value) for layer_name, value in fss.items()}
        for end, name in enumerate(("fss_low", "fss_high")):
            numbers[name] = {layer: table.interval(*pair)[end] for layer, pair in pairs.items()}
        if options.biased:
            unit = {name: by_form["unit"] for name, by_form in distances_by_network.items()}
            biased = _table(unit, [])
            numbers["fss_biased"] = {
                layer_name: float(biased.correlation(*pair)) for layer_name, pair in pairs.items()
            }
    for name, distances in main.items():
        title = "" if name == "student" else f"{name}_"
        deepest = f"{name}.{list(distances)[-1]}"
        numbers[f"{title}relevance"] = {
            layer: float(table.correlation(f"{name}.{layer}", _LABELS)) for layer in distances
        }
        numbers[f"{title}relevance_p"] = {
            layer: table.permutation_p(f"{name}.{layer}") for layer in distances
        }
        numbers[f"{title}progression"] = {
            layer: float(table.correlation(f"{name}.{layer}", deepest)) for layer in distances
        }
    return numbers | _residuals(table, layers, options)


def _residuals(
    table: InnerProducts,
    layers: Mapping[str, Mapping[str, str]],
    options: DistanceCorrelationOptions,
) -> dict[str, Any]:
    """Compute rs, its interval, rs_p and pdcor: x_given_y -> layer of the student -> value."""
    functions: dict[str, Callable[[str, str], float]] = {
        "rs": lambda x, given: float(table.semi_partial(x, given, _LABELS)),
        "rs_low": lambda x, given: table.interval(x, _LABELS, given)[0],
        "rs_high": lambda x, given: table.interval(x, _LABELS, given)[1],
        "rs_p": table.residual_p,
        "pdcor": lambda x, given: float(table.partial(x, given, _LABELS)),
    }
    return {
        metric: {
            f"{x}_given_{given}": {
                layer_name: function(f"{x}.{layer_of[x]}", f"{given}.{layer_of[given]}")
                for layer_name, layer_of in layers.items()
            }
            for x, given in wanted_pairs(options.pairs, options.baseline)
        }
        for metric, function in functions.items()
    }


# ---- what is compared ----------------------------------------------------------------------------


def _forms(options: DistanceCorrelationOptions) -> list[Form]:
    """Forms of the features. All numbers except fss_biased use the first."""
    forms: list[Form] = ["unit" if options.l2norm else "plain"]
    return [*forms, "unit"] if options.biased and not options.l2norm else forms


def _probes(context: EvaluationContext) -> ProbeSet:
    options = context.options.of(DistanceCorrelationOptions)
    probes = probe_set(
        context.dataset,
        options.probe_records,
        options.block_records,
        options.seed,
        NAME,
        classes_differ=not options.is_one_hot,
    )
    require(
        min(map(len, probes.blocks), default=0) >= MIN_RECORDS,
        f"evaluators={NAME} has blocks with fewer than {MIN_RECORDS} records of classes that repeat; raise "
        f"evaluate.{NAME}.probe_records={options.probe_records}, name another split in evaluate.splits, or set "
        f"class embeddings with evaluate.{NAME}.embeddings",
    )
    return probes


def _paired(
    networks: Mapping[str, Distances], explicit: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Layer of the student -> network -> its paired layer."""
    student_layers = list(networks["student"])
    layers = {layer: {"student": layer} for layer in student_layers}
    for name, distances in networks.items():
        is_explicit = name == "teacher" and explicit
        paired = explicit if is_explicit else pair_layers(student_layers, list(distances))
        layers = {
            layer: layer_of | {name: paired[layer]}
            for layer, layer_of in layers.items()
            if layer in paired
        }
    return layers


def _table(
    networks: Mapping[str, Distances],
    labels: list[Tensor],
    permutations: int = 0,
    seed: int = 0,
) -> InnerProducts:
    """Inner products of every layer of every network, named <network>.<layer>, and of the labels, over all blocks.

    Args:
        labels: Distances of the labels by block, or [] for the biased form without labels.
    """
    named = {
        f"{name}.{layer}": blocks
        for name, distances in networks.items()
        for layer, blocks in distances.items()
    }
    if labels:
        named[_LABELS] = labels
    return reduce(
        InnerProducts.merge,
        (
            InnerProducts.from_distances(
                {name: blocks[block] for name, blocks in named.items()},
                biased=not labels,
                permutations=permutations,
                seed=derive_seed(seed, "permutations", block),
            )
            for block in range(len(next(iter(named.values()))))
        ),
    )


EVALUATOR = Evaluator(
    evaluate_distances,
    check_distances,
    Page(
        "Distilled",
        "Distilled and residual features",
        "Bias-corrected squared distance correlation of features: 1 means equal up to rotation, shift and scale. FSS "
        "compares the student with its teacher; networks that see the same images have more than 0, also untrained "
        "ones. RS is the relevance of one network's features to the labels that remains after removing the other's "
        "features (UniCAM, eq. B1). A negative RS means that nothing was added: both networks are more similar than "
        "their relevances explain, as networks on the same images are. Intervals are over records.",
        (
            Quantity(
                "fss",
                "FSS: teacher against student, by layer of the student",
                "Similarity of the student's features to the teacher's; equal ones have 1.",
                MORE,
                "line",
            ),
            Quantity(
                "rs.teacher_given_student",
                "RS: in the teacher, not in the student",
                "Relevance to the labels of what the teacher's features contain and the student's lack; 0 is nothing.",
                LESS,
                "line",
            ),
            Quantity(
                "rs.student_given_baseline",
                "RS: in the student beyond the baseline (distilled)",
                "Relevance to the labels of what the student's features contain and the baseline's lack; 0 is nothing.",
                MORE,
                "line",
            ),
            Quantity(
                "rs.student_given_teacher",
                "RS: in the student, not in the teacher",
                "Relevance to the labels of what the student's features contain and the teacher's lack; 0 is nothing.",
                is_main=False,
            ),
            Quantity(
                "rs.baseline_given_student",
                "RS: in the baseline, not in the student",
                "Relevance to the labels of what the baseline's features contain and the student's lack; 0 is nothing.",
                is_main=False,
            ),
            Quantity(
                "relevance",
                "Relevance: features against labels",
                "Distance correlation of the features with the labels; features that ignore the labels have about 0.",
                MORE,
                is_main=False,
            ),
            Quantity(
                "progression",
                "Progression: each layer against the deepest",
                "Similarity of each layer's features to those of the same network's deepest layer, which has 1.",
                is_main=False,
            ),
            Quantity(
                "fss_p",
                "FSS: p-value under independence",
                "Probability of an FSS at least this large if the features of both networks were independent, which "
                "they hardly are for the same images.",
                is_main=False,
            ),
            Quantity(
                "rs_p",
                "RS: p-value",
                "Probability of an RS at least this large if nothing remained.",
                is_main=False,
            ),
            Quantity(
                "pdcor",
                "Partial distance correlation",
                "RS with the other network's features also removed from the labels.",
                is_main=False,
            ),
            Quantity(
                "fss_biased",
                "V-statistic of the released code, which tends to 1 for any two networks",
                "FSS without bias correction, large for unrelated networks too; for comparison with the paper only.",
                is_main=False,
            ),
        ),
    ),
)
