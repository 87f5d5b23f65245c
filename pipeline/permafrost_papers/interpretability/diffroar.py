"""DiffROAR: the accuracy of probes trained on the most and on the least important pixels of a network.

    PredPower(A, k)  accuracy of a probe trained from scratch on images of which only a fraction k of the coordinates is
                     kept, all others set to the mean of the training images, and tested on images masked the same way
    DiffROAR(A, k) = PredPower(the top k kept) - PredPower(the bottom k kept)

(Shah et al. 2021; Hooker et al. 2019 for retraining.) Values above 0 are good, a random order gives about 0, and for
k = 0 and k = 1 both terms are equal. The attribution is the input gradient of the logit of the predicted class, on
both training and test images: with the true class, the positions alone could reveal the label. A probe that receives
only the positions (mask_only) measures how much they reveal. All evaluated models use the same probe, so only their
masks differ.

Shape letters: N images, C channels, H W their size, G 1 or C groups of ranked coordinates (a pixel, or each of its
channels), K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from permafrost.core.digests import derive_seed
from permafrost.core.errors import require
from permafrost.core.generators import SeededDraws
from permafrost.core.progress import progress
from permafrost.core.records import NO_LABEL
from permafrost.evaluation.context import EvaluationContext, require_one_label
from permafrost.evaluation.evaluator import MORE, Evaluator, Page, Quantity
from permafrost.loading.geometry import view_images
from permafrost.models.resolve import require_images
from permafrost_papers.interpretability.gradient_alignment import input_gradient
from permafrost_papers.interpretability.options import DiffroarOptions
from permafrost_papers.probe_set import balanced_order, write_keys

logger = logging.getLogger("permafrost.evaluate")

Part = Literal["top", "bottom"]
_LEVELS = 256
BuildProbe = Callable[[int], nn.Module]
"""Function from the number of classes to an untrained network."""


@dataclass(frozen=True)
class RankedImages:
    """Images with the rank of each coordinate by attribution."""

    images: Tensor
    """Images u8 [N, C, H, W]."""
    quantiles: Tensor
    """Rank quantiles u8 [N, G, H, W] of `rank_quantiles`, which need a quarter of the memory of ranks."""
    labels: Tensor
    """Labels i64 [N]."""

    def select(self, rows: Tensor, part: Part, fraction: float) -> Tensor:
        """Select the most or the least important coordinates: bool [rows, G, H, W].

        Args:
            rows: Numbers of the images, i64 [rows].
            part: "top" for the most important coordinates, "bottom" for the least important ones.
            fraction: Fraction to select, rounded to a multiple of 1 / 256 for more than 256 coordinates, so by up to
                0.2 % of them.
        """
        quantiles = self.quantiles[rows].short()  # u8 could not be compared with 256
        levels = min(quantiles[0].numel(), _LEVELS)
        count = round(fraction * levels)
        return quantiles < count if part == "top" else quantiles >= levels - count


def rank(attributions: Tensor) -> Tensor:
    """Rank |attributions| [N, G, H, W] within each image, i32, 0 for the highest. Ties follow a fixed random order."""
    strength = attributions.abs().flatten(1)
    generator = torch.Generator().manual_seed(derive_seed(0, "ties of ranks"))
    drawn = torch.randperm(strength.shape[1], generator=generator).to(strength.device)
    order = drawn[strength[:, drawn].argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(strength.shape[1], dtype=torch.int32, device=strength.device)
    ranks = torch.empty_like(order, dtype=torch.int32)
    return ranks.scatter_(1, order, places.expand_as(ranks)).view_as(attributions)


def rank_quantiles(attributions: Tensor) -> Tensor:
    """Compute quantiles u8 of the ranks of |attributions| [N, G, H, W] within each image, 0 for the highest.

    For up to 256 coordinates these are the ranks themselves.
    """
    ranks = rank(attributions)
    if (total := ranks[0].numel()) > _LEVELS:
        ranks = ranks.long() * _LEVELS // total
    return ranks.to(torch.uint8)


def keep_part(
    ranked: RankedImages, rows: Tensor, part: Part, fraction: float, fill: float
) -> Tensor:
    """Return images in which all other coordinates are set to `fill`: f32 [rows, C, H, W].

    Args:
        ranked: The images.
        rows: Numbers of those that are returned, i64 [rows].
        part: Part of the coordinates that is kept.
        fraction: Fraction that is kept.
        fill: Value of all others, in [0, 1].
    """
    images = ranked.images[rows].float() / 255
    return torch.where(ranked.select(rows, part, fraction), images, fill)


def mask_of_part(ranked: RankedImages, rows: Tensor, part: Part, fraction: float) -> Tensor:
    """Return the positions of a part as 0 and 1, without the images: f32 [rows, C, H, W].

    Args:
        ranked: The images.
        rows: Numbers of those whose positions are returned, i64 [rows].
        part: Part of the coordinates.
        fraction: Fraction of the coordinates.
    """
    kept = ranked.select(rows, part, fraction).float()
    return kept.expand(-1, ranked.images.shape[1], -1, -1)


def build_probe(classes: int, width: int) -> nn.Module:
    """Build three convolutions that each halve the image, and a linear layer on their spatial average.

    Args:
        classes: Number of classes.
        width: Number of channels of the first convolution; the others have twice and four times as many.
    """
    layers: list[nn.Module] = []
    channels = 3
    for factor in (1, 2, 4):
        layers += [
            nn.Conv2d(channels, factor * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(factor * width),
            nn.ReLU(),
        ]
        channels = factor * width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers, *head)


def predictive_power(
    train: RankedImages,
    test: RankedImages,
    inputs: Callable[[RankedImages, Tensor], Tensor],
    build: BuildProbe,
    options: DiffroarOptions,
    *,
    seed: int,
    classes: int,
) -> float:
    """Compute the accuracy on `test` of a probe trained on `train`, deterministic for a seed.

    Args:
        train: Images to train on.
        test: Images to test on.
        inputs: Function that transforms both, such as `keep_part` or `mask_of_part` of a part.
        build: Function that builds the untrained probe.
        options: Options of the probe's training.
        seed: Seed of the probe's initialization and of the order of its batches.
        classes: Number K of classes.
    """
    device = train.images.device
    with SeededDraws(derive_seed(seed, "probe")):
        probe = build(classes).to(device).train()
    optimizer = torch.optim.Adam(probe.parameters(), lr=options.lr)
    generator = torch.Generator().manual_seed(derive_seed(seed, "order of the probe"))
    for epoch in range(options.epochs):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * (1 - epoch / options.epochs)
        order = torch.randperm(len(train.labels), generator=generator).to(device)
        for rows in _cut(order, options.batch_size):
            if len(rows) > 1:  # batch norm cannot train on one record
                with torch.enable_grad():
                    loss = F.cross_entropy(probe(inputs(train, rows)), train.labels[rows])
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    probe.eval()
    right = 0
    with torch.no_grad():
        for rows in _cut(torch.arange(len(test.labels), device=device), options.batch_size):
            answers = probe(inputs(test, rows)).argmax(dim=1)
            right += int((answers == test.labels[rows]).sum())
    return right / len(test.labels)


def _cut(rows: Tensor, size: int) -> list[Tensor]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


# ---- diffroar --------------------------------------------------------------------------------------


NAME = "diffroar"


def check_diffroar(context: EvaluationContext) -> None:
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
    asked, available = options.train_records, len(rows)
    hint = (
        f"set evaluate.{NAME}.train_records={needed * classes}"
        if available >= needed * classes
        else f"{split} has only {available} free records, so leave {NAME} out of evaluators"
    )
    require(
        min(asked, available) >= needed * classes,
        f"evaluate.{NAME}.train_records={asked} is {min(asked, available) / classes:.3g} for each of the "
        f"{classes} classes of {split}, and of fewer than {needed} (evaluate.{NAME}.records_per_class) a probe learns "
        f"nothing with any mask, so that DiffROAR is 0 for every network; {hint}",
    )


def evaluate_diffroar(context: EvaluationContext) -> dict[str, Any]:
    """Run `compare` for the evaluated model on some of the split's records."""
    options = context.options.of(DiffroarOptions)
    free = np.sort(_free_rows(context)[: options.train_records])
    rows = np.asarray(context.dataset.rows)[context.dataset.label_numbers != NO_LABEL]
    drawn = np.random.default_rng(derive_seed(0, NAME)).permutation(len(rows))
    probed = {"train": free, "test": np.sort(rows[drawn[: options.test_records]])}
    write_keys(context, NAME, {name: context.store.index.keys(at) for name, at in probed.items()})
    train, test = (_ranked(context, at) for at in probed.values())
    classes = len(context.store.manifest.classes)
    return compare(train, test, partial(build_probe, width=options.width), options, classes)


def compare(
    train: RankedImages,
    test: RankedImages,
    build: BuildProbe,
    options: DiffroarOptions,
    classes: int,
) -> dict[str, Any]:
    """Train the probes and compute DiffROAR.

    The numbers are:

    - difference: DiffROAR, by the fraction kept in per cent, as are sd, power and mask_only;
    - sd: standard deviation of DiffROAR over all pairs of runs, left out for one seed;
    - power.top and power.bottom: predictive power of the top and bottom coordinates;
    - mean: mean of DiffROAR over the fractions;
    - mask_only: accuracy of a probe that receives only the positions of the top coordinates;
    - unmasked: accuracy of a probe that receives the whole images;
    - chance: fraction of the test records with the most frequent class.

    A predictive power that mask_only reaches may come from the positions instead of the pixel values: if the shape of
    an object determines its class, the outline of the positions is sufficient.

    Args:
        train: Images to train on.
        test: Images to test on.
        build: Function that builds an untrained probe.
        options: Options of the evaluator.
        classes: Number K of classes.

    Returns:
        The numbers by name, with train_records and test_records.
    """
    # The mean, without a copy of all images in another dtype.
    sums = [images.sum() for images in torch.split(train.images, 256)]
    fill = int(torch.stack(sums).sum()) / train.images.numel() / 255
    parts: tuple[Part, ...] = ("top", "bottom")
    runs: dict[str, dict[str, list[float]]] = {part: {} for part in parts}
    mask_only: dict[str, float] = {}

    def power(inputs: Any, seed: int) -> float:
        bar.update(1)
        return predictive_power(train, test, inputs, build, options, seed=seed, classes=classes)

    total = len(options.keep) * (2 * len(options.seeds) + 1) + 1
    with progress(NAME, total=total, unit="probe") as bar:
        for fraction in options.keep:
            name = f"{100 * fraction:g}%"
            for part in parts:
                masked_inputs = partial(keep_part, part=part, fraction=fraction, fill=fill)
                runs[part][name] = [power(masked_inputs, seed) for seed in options.seeds]
            mask_only[name] = power(
                partial(mask_of_part, part="top", fraction=fraction), options.seeds[0]
            )
        unmasked = power(partial(keep_part, part="top", fraction=1.0, fill=fill), options.seeds[0])
    pairs = {
        name: np.subtract.outer(top, runs["bottom"][name]) for name, top in runs["top"].items()
    }
    difference = {name: float(values.mean()) for name, values in pairs.items()}
    sd = {name: float(values.std()) for name, values in pairs.items()}
    numbers = {
        "train_records": len(train.labels),
        "test_records": len(test.labels),
        "difference": difference,
        # One seed shows no spread.
        **({"sd": sd} if len(options.seeds) > 1 else {}),
        "mean": float(np.mean(list(difference.values()))),
        "power": {
            part: {name: float(np.mean(values)) for name, values in runs[part].items()}
            for part in parts
        },
        "mask_only": mask_only,
        "unmasked": unmasked,
        "chance": float(test.labels.bincount().max()) / len(test.labels),
    }
    for sentence in revealing_positions(numbers):
        logger.warning("%s", sentence)
    return numbers


def revealing_positions(numbers: Mapping[str, Any]) -> list[str]:
    """Return a sentence if the positions alone predict the class as well as the pixels at them.

    Args:
        numbers: Result of `compare`.
    """
    power, mask_only = numbers["power"]["top"], numbers["mask_only"]
    if not (kept := [name for name in mask_only if mask_only[name] >= power[name]]):
        return []
    return [
        f"with {', '.join(kept)} kept, a probe of the positions alone is as good as one of the pixels, so the "
        "difference says nothing about the pixels"
    ]


def _free_rows(context: EvaluationContext) -> NDArray[np.int64]:
    """Rows of the index to train on, in balanced order over classes: labeled, and not among the evaluated records."""
    rows = balanced_order(
        context.store.index, context.options.of(DiffroarOptions).train_split, seed=0
    )
    labels = context.store.index.values("label", rows)
    free = ~np.isin(rows, np.asarray(context.dataset.rows)) & (labels != NO_LABEL)
    return np.compress(free, rows)


def _ranked(context: EvaluationContext, rows: NDArray[np.int64]) -> RankedImages:
    """Load records with the rank quantiles of the model's attributions, on the model's device."""
    model = context.model
    images = torch.empty(len(rows), 3, *model.input_size, dtype=torch.uint8, device=model.device)
    groups = 1 if context.options.of(DiffroarOptions).unit == "pixel" else 3
    quantiles = images.new_empty(len(rows), groups, *model.input_size)
    labels = images.new_empty(len(rows), dtype=torch.int64)
    done = 0
    for batch in replace(context, dataset=context.open_rows(rows)).iter_batches():
        view = view_images(batch, model.input_size)
        gradient = input_gradient(
            view, lambda pixels: model.network(pixels).logits.max(dim=1).values
        )
        if context.options.of(DiffroarOptions).unit == "pixel":
            gradient = gradient.abs().sum(dim=1, keepdim=True)
        here = slice(done, done + len(view))
        images[here] = (view * 255).round().to(torch.uint8)
        quantiles[here] = rank_quantiles(gradient)
        labels[here] = batch.labels
        done += len(view)
    return RankedImages(images, quantiles, labels)


EVALUATOR = Evaluator(
    evaluate_diffroar,
    check_diffroar,
    Page(
        "DiffROAR",
        "Predictive power of the gradients' order",
        "Predictive power of the pixels with the highest gradients minus that of those with the lowest, by the "
        "share that is kept (Shah et al. 2021). Above 0, the gradients select pixels that a retrained network can "
        "use. That says little where a probe of the positions alone is as good, as then the outline of the mask "
        "reveals the class.",
        remarks="permafrost_papers.interpretability.diffroar:revealing_positions",
        quantities=(
            Quantity(
                "difference",
                "DiffROAR by the fraction of pixels that is kept, in per cent",
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
                "Accuracy of a probe that sees only which pixels are kept; above chance, the positions reveal the "
                "class.",
                is_main=False,
            ),
            Quantity(
                "unmasked",
                "Accuracy of a probe on whole images",
                "Accuracy of the same probe network without a mask. A masked image may have more, because its "
                "positions are chosen by a network that has learned the classes.",
                is_main=False,
            ),
            Quantity(
                "chance",
                "Fraction of the most frequent class",
                "Accuracy of always predicting the most frequent class: the chance level of the probes.",
                is_main=False,
            ),
        ),
    ),
)
