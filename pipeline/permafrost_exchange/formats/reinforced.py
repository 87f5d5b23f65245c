"""Reader of the reinforced data sets of apple/ml-dr (ImageNet+, CIFAR-100+, Flowers-102+, Food-101+).

    config.pth.tar     the options of the teacher's pass
    <number>.pth.tar   (number, [{"params": recipe, "prob": (probabilities, classes)}, ...])

The number counts the images of the training folder, sorted as ImageFolder of torchvision does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from permafrost.core.errors import require
from permafrost_exchange.formats.compressed_recipes import (
    RECIPE_REMARK,
    RecipeLayout,
    convert_recipes,
    layout_of,
)
from permafrost_exchange.target_reader import (
    Arrays,
    FileReader,
    ReadRequest,
    TargetError,
    TargetForm,
    load_pickled,
    top_outcomes,
)

RECIPES_CONFIG = "config.pth.tar"


class ReinforcedReader(FileReader):
    """Recipes as stored views, with the largest logits of each."""

    suffix = ".pth.tar"

    def record_files(self) -> Iterator[Path]:
        return (path for path in self.files() if path.name != RECIPES_CONFIG)

    @cached_property
    def layout(self) -> RecipeLayout:
        """Layout of the recipes, from the options of the teacher's pass."""
        if not (path := self.path / RECIPES_CONFIG).is_file():
            raise TargetError(
                f"{path} is missing, which says what the numbers of a recipe mean; unpack all of reinforced_data"
            )
        content = load_pickled(path)
        try:
            return layout_of(content["reinforce"]["image_augmentation"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TargetError(f"{path}: {error}") from error

    def form(self) -> TargetForm:
        remarks = [RECIPE_REMARK]
        if self.layout.ignored:
            remarks.append(
                f"{RECIPES_CONFIG} names {', '.join(self.layout.ignored)}, which its own code ignores, so views are "
                "made without"
            )
        return TargetForm(
            frame="full",
            classes=self.config.classes,
            temperatures=(self.config.temperature,),
            operations=self.layout.operations,
            remarks=tuple(remarks),
        )

    def parse(self, content: Any, request: ReadRequest, row: int) -> Arrays:
        number, samples = content
        require(
            str(number) == request.places[row], f"it says that it is of image {number}", ValueError
        )
        count = self.config.views or len(samples)
        require(
            len(samples) >= count,
            f"it has {len(samples)} views, and format.views={count}",
            ValueError,
        )
        samples = samples[:count]
        views = convert_recipes(
            [sample["params"] for sample in samples],
            self.layout,
            int(request.heights[row]),
            int(request.widths[row]),
        )
        probabilities = np.array([sample["prob"][0] for sample in samples], np.float64)
        classes = np.array([sample["prob"][1] for sample in samples])
        # That code does so, too, where the stored probabilities leave no rest.
        softened = (probabilities.sum(axis=1) > 1) | (self.config.rest == "zeros")
        exponentials = np.exp(probabilities)
        shares = exponentials / exponentials.sum(axis=1, keepdims=True)
        probabilities = np.where(softened[:, None], shares, probabilities)
        rest = 1 - probabilities.sum(axis=1)
        top = top_outcomes(
            probabilities, classes, self.config.classes, self.config.temperature, rest
        )
        return {**views, **top}
