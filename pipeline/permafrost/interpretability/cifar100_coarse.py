"""The twenty coarse classes of CIFAR-100 (Krizhevsky 2009), a fact of the data set that its labels do not contain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from permafrost.core.errors import require, shorten

COARSE = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}
"""Fine classes of each coarse class, separated by spaces."""
_COARSE_OF = {fine: coarse for coarse, names in COARSE.items() for fine in names.split()}


def coarse_similarity(classes: Sequence[str], option: str) -> Tensor:
    """Similarity f64 [K, K] of CIFAR-100's classes, by name and in any order: 1 within a coarse class, 0 otherwise.

    Raises ConfigError if a class is none of CIFAR-100.

    option  option and value that asked for it, for the message
    """
    names = [name.strip().lower().replace(" ", "_").replace("-", "_") for name in classes]
    unknown = [own for own, name in zip(classes, names, strict=True) if name not in _COARSE_OF]
    require(
        not unknown,
        f"{option} knows the 100 classes of CIFAR-100 by name, but {len(unknown)} of the store's {len(classes)} are "
        f"others: {shorten(unknown)}; name a file with evaluate.class_similarity.similarity= instead",
    )
    coarse = [_COARSE_OF[name] for name in names]
    require(
        len(set(coarse)) < len(coarse) and len(set(coarse)) > 1,
        f"{option}: the store's {len(classes)} classes belong to {len(set(coarse))} coarse classes, so all pairs are "
        "equally similar; set it to null, or keep more classes with data.only_classes=",
    )
    return torch.tensor([[float(a == b) for b in coarse] for a in coarse], dtype=torch.float64)
