"""DiffROAR: predictive power of the highest attributed coordinates minus that of the lowest attributed ones.

    PredPower(A, k)  accuracy of a probe trained from scratch on images of which only a fraction k of the coordinates is
                     kept, all others set to the mean of the training images, and tested on images masked the same way
    DiffROAR(A, k) = PredPower(the top k kept) - PredPower(the bottom k kept)

(Shah et al. 2021; Hooker et al. 2019 for retraining.) Values above 0 are good, a random order gives about 0, and for
k = 0 and k = 1 both terms are equal. The attribution is the input gradient of the logit of the predicted class, on
both training and test images: with the true class, the positions alone could reveal the label. A probe that receives
only the positions (mask_only) measures how much they reveal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.core.errors import require
from permafrost.core.progress import progress
from permafrost.core.records import NO_LABEL
from permafrost.core.seeds import derive_seed
from permafrost.evaluation.context import EvaluationContext, require_one_label
from permafrost.evaluation.evaluators.evaluator import Evaluator, Page, Quantity
from permafrost.evaluation.metrics import MORE
from permafrost.interpretability.gradient_alignment import input_gradient
from permafrost.interpretability.options import DiffroarOptions
from permafrost.interpretability.roar_probes import (
    BuildProbe,
    RankedImages,
    build_probe,
    keep_part,
    mask_of_part,
    predictive_power,
    rank_quantiles,
)
from permafrost.loading.geometry import view_images
from permafrost.loading.selection import balanced_order
from permafrost.models.resolve import require_images

NAME = "diffroar"


def check_diffroar(context: EvaluationContext) -> Mapping[str, str]:
    """Raise ConfigError unless there are images with one label each to train on besides the evaluated ones."""
    require_images(context.store, f"evaluators={NAME}", "leave it out of evaluators")
    require_one_label(context, NAME)
    options = context.options.of(DiffroarOptions)
    split, needed = options.train_split, options.records_per_class
    rows = _free_rows(context)
    require(
        len(rows) > 1,
        f"evaluate.{NAME}.train_split={split} has no labeled records other than those of {context.split}, and a probe "
        "must not be tested on its training records; name another split",
    )
    classes = len(np.unique(context.store.index.values("label", rows)))
    asked, held = options.train_records, len(rows)
    hint = (
        f"set evaluate.{NAME}.train_records={needed * classes}"
        if held >= needed * classes
        else f"{split} has only {held} free records, so leave {NAME} out of evaluators"
    )
    require(
        min(asked, held) >= needed * classes,
        f"evaluate.{NAME}.train_records={asked} is {min(asked, held) / classes:.3g} for each of the {classes} classes "
        f"of {split}, and of fewer than {needed} (evaluate.{NAME}.records_per_class) a probe learns nothing with any "
        f"mask, so that DiffROAR is 0 for every network; {hint}",
    )
    return {}


def evaluate_diffroar(context: EvaluationContext) -> dict[str, Any]:
    """Run `compare` for the evaluated model on some of the split's records."""
    options = context.options.of(DiffroarOptions)
    train = _ranked(context, _training_rows(context))
    test = _ranked(context, _test_rows(context))
    classes = len(context.store.manifest.classes)
    return compare(train, test, build_probe(options.width), options, classes)


def compare(
    train: RankedImages,
    test: RankedImages,
    build: BuildProbe,
    options: DiffroarOptions,
    classes: int,
) -> dict[str, Any]:
    """Train the probes and compute DiffROAR.

    difference             DiffROAR, by the fraction kept in per cent, as are sd, power and mask_only
    sd                     standard deviation of DiffROAR over all pairs of runs
    power.top, .bottom     predictive power of the top and bottom coordinates
    mean                   mean of DiffROAR over the fractions
    mask_only              accuracy of a probe that receives only the positions of the top coordinates
    unmasked               accuracy of a probe that receives the whole images
    chance                 share of the most frequent class of the test records

    A predictive power that mask_only reaches may come from the positions instead of the pixel values: if the shape of
    an object determines its class, the outline of the positions is sufficient.
    """
    fill = _mean(train.images) / 255
    parts = ("top", "bottom")
    runs: dict[str, dict[str, list[float]]] = {part: {} for part in parts}
    mask_only: dict[str, float] = {}

    def power(inputs: Any, seed: int) -> float:
        bar.update(1)
        return predictive_power(train, test, inputs, build, options, seed=seed, classes=classes)

    total = len(options.keep) * (2 * len(options.seeds) + 1) + 1
    with progress(NAME, total=total, unit="probe") as bar:
        for fraction in options.keep:
            name = f"{100 * fraction:g}%"
            for part in ("top", "bottom"):
                seen = keep_part(part, fraction, fill)
                runs[part][name] = [power(seen, seed) for seed in options.seeds]
            mask_only[name] = power(mask_of_part("top", fraction), options.seeds[0])
        unmasked = power(keep_part("top", 1.0, fill), options.seeds[0])
    pairs = {
        name: np.subtract.outer(top, runs["bottom"][name]) for name, top in runs["top"].items()
    }
    difference = {name: float(values.mean()) for name, values in pairs.items()}
    return {
        "train_records": len(train.labels),
        "test_records": len(test.labels),
        "difference": difference,
        "sd": {name: float(values.std()) for name, values in pairs.items()},
        "mean": float(np.mean(list(difference.values()))),
        "power": {
            part: {name: float(np.mean(values)) for name, values in runs[part].items()}
            for part in parts
        },
        "mask_only": mask_only,
        "unmasked": unmasked,
        "chance": float(test.labels.bincount().max()) / len(test.labels),
    }


def _mean(images: Tensor) -> float:
    """Mean of images u8 [N, ...], without a copy of all of them in another dtype."""
    sums = [images[start : start + 256].sum() for start in range(0, len(images), 256)]
    return int(torch.stack(sums).sum()) / images.numel()


def _free_rows(context: EvaluationContext) -> NDArray[np.int64]:
    """Rows of the index to train on, in balanced order over classes: labeled, and not among the evaluated records."""
    rows = balanced_order(
        context.store.index, context.options.of(DiffroarOptions).train_split, seed=0
    )
    labels = context.store.index.values("label", rows)
    free = ~np.isin(rows, np.asarray(context.dataset.rows)) & (labels != NO_LABEL)
    kept: NDArray[np.int64] = rows[free]
    return kept


def _training_rows(context: EvaluationContext) -> NDArray[np.int64]:
    return np.sort(_free_rows(context)[: context.options.of(DiffroarOptions).train_records])


def _test_rows(context: EvaluationContext) -> NDArray[np.int64]:
    options, dataset = context.options.of(DiffroarOptions), context.dataset
    rows = np.asarray(dataset.rows)[dataset.label_numbers != NO_LABEL]
    drawn = np.random.default_rng(derive_seed(0, NAME)).permutation(len(rows))
    return np.sort(rows[drawn[: options.test_records]])


def _ranked(context: EvaluationContext, rows: NDArray[np.int64]) -> RankedImages:
    """Load records with the rank quantiles of the model's attributions, on the model's device."""
    model = context.model
    images = torch.empty(len(rows), 3, *model.input_size, dtype=torch.uint8, device=model.device)
    groups = 1 if context.options.of(DiffroarOptions).unit == "pixel" else 3
    quantiles = images.new_empty(len(rows), groups, *model.input_size)
    labels = images.new_empty(len(rows), dtype=torch.int64)
    done = 0
    for batch in replace(context, dataset=context.open_rows(rows)).iter_batches():
        seen = view_images(batch, model.input_size)
        gradient = input_gradient(seen, lambda x: model.network(x).logits.max(dim=1).values)
        if context.options.of(DiffroarOptions).unit == "pixel":
            gradient = gradient.abs().sum(dim=1, keepdim=True)
        here = slice(done, done + len(seen))
        images[here] = (seen * 255).round().to(torch.uint8)
        quantiles[here] = rank_quantiles(gradient)
        labels[here] = batch.labels
        done += len(seen)
    return RankedImages(images, quantiles, labels)


EVALUATOR = Evaluator(
    evaluate_diffroar,
    check_diffroar,
    Page(
        "DiffROAR",
        "Predictive power of the gradients' order",
        "Predictive power of the pixels with the highest gradients minus that of those with the lowest, by the "
        "share that is kept (Shah et al. 2021). Above 0, the gradients select pixels that a retrained network can "
        "use. The mask alone should not predict the class.",
        (
            Quantity(
                "difference",
                "DiffROAR by the share of pixels that is kept, in per cent",
                "Accuracy with the top pixels minus accuracy with the bottom pixels; 0 is a random order.",
                MORE,
                "line",
            ),
            Quantity(
                "mean",
                "DiffROAR, mean over the shares",
                "Mean of these differences over all shares; 0 is a random order.",
                MORE,
            ),
            Quantity(
                "mask_only",
                "Accuracy of a probe on the mask alone",
                "Accuracy of a probe that sees the kept positions only; above chance, they reveal the class.",
                is_main=False,
            ),
            Quantity(
                "unmasked",
                "Accuracy of a probe on whole images",
                "Accuracy of the same probe network without a mask: the most that a masked image can reach.",
                is_main=False,
            ),
            Quantity(
                "chance",
                "Share of the most frequent class",
                "Accuracy of always predicting the most frequent class: the chance level of the probes.",
                is_main=False,
            ),
        ),
    ),
)
