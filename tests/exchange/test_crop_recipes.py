"""Recipes of views of apple/ml-dr, against the second reader where their writer makes no file of the kind."""

import numpy as np
import pytest
import torch
from PIL import Image

from permafrost.loading.recipes import recipe_from
from permafrost.loading.windows import stored_views_of
from permafrost_exchange.formats.compressed_recipes import convert_recipes, layout_of
from tests.exchange.conformance import second_reader
from tests.exchange.conformance.measure import corners_here, corners_there
from tests.support.view_matrices import matrices_of_fields

CROP = {"random_crop": {"size": 32, "padding": 4}, "random_horizontal_flip": {"p": 0.5}}


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (50, 50)])
@pytest.mark.parametrize("size", [32, [32], [32, 48]])
def test_an_image_is_resized_before_the_crop(height, width, size):
    """A number is the size of the shorter side, as in the committed configuration for CIFAR-100."""
    augmentation = {"resize": {"size": size}, **CROP}
    recipes = [[size, (0, 0), True], [size, (8, 3), False]]
    image = Image.fromarray(np.zeros((height, width, 3), np.uint8))
    views = []
    for resize, crop, flip in recipes:
        one = {"random_crop": crop, "random_horizontal_flip": flip}
        resize = resize[0] if len(np.atleast_1d(resize)) == 1 and size != 32 else resize
        views.append(second_reader.replay(image, {"resize": resize, **one}, augmentation))

    made = convert_recipes(recipes, layout_of(augmentation), height, width)

    here = corners_here(matrices_of_fields(made), 1)
    assert np.allclose(here, corners_there(views), atol=1e-6)


def test_a_name_that_their_code_ignores_is_ignored():
    layout = layout_of({"random_resize_crop": {"size": 32}, "random_horizontal_flip": {"p": 0.5}})
    made = convert_recipes([[True]], layout, 40, 60)

    assert layout.ignored == ("random_resize_crop",)
    assert layout.view_size(40, 60) == (40, 60)
    assert matrices_of_fields(made)[0].tolist() == [[-1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_recipe_with_more_values_than_its_configuration_is_refused():
    """Values would be taken for those of another operation."""
    layout = layout_of({"random_resize_crop": {"size": 32}, "random_horizontal_flip": {"p": 0.5}})

    with pytest.raises(ValueError, match="a recipe has 2 values, and its configuration lists"):
        convert_recipes([[(0, 0, 8, 8), True]], layout, 40, 60)


@pytest.mark.parametrize(
    ("augmentation", "said"),
    [
        ({"center_crop": {"size": 32}}, "center_crop"),
        ({"random_crop": {"size": 32, "padding_mode": "reflect"}}, "random_crop.padding_mode"),
        ({"resize": {"size": 32, "max_size": 64}}, "resized by"),
        ({"random_resized_crop": {"size": [32, 48]}}, "one crop of a size"),
        ({"rand_augment": {"num_ops": 9}}, "9 operations"),
    ],
)
def test_what_views_here_cannot_show_is_refused(augmentation, said):
    with pytest.raises(ValueError, match=said):
        layout_of(augmentation)


def test_a_translation_is_a_fraction_of_the_side_that_it_moves_along():
    """Views of the whole image have two sides."""
    layout = layout_of({"rand_augment": {"num_ops": 1}})
    recipes = [[[(3, 12.0)]], [[(4, 12.0)]]]

    made = convert_recipes(recipes, layout, 40, 60)

    sizes = torch.tensor([[40, 60]]).expand(2, 2)
    recipe = recipe_from(layout.operations)
    matrices = stored_views_of(made, recipe, sizes, (32, 32), "").canonical_from_view.numpy()
    assert np.allclose(matrices[0, :2, 2], [-2 * 12 / 60, 0], atol=3e-4)  # of float16
    assert np.allclose(matrices[1, :2, 2], [0, -2 * 12 / 40], atol=3e-4)


def test_an_operation_that_torchvision_does_not_have_is_refused():
    layout = layout_of({"rand_augment": {"num_ops": 1}})

    for name in ("Twirl", 14):
        with pytest.raises(ValueError, match="there is no operation"):
            convert_recipes([[[(name, 1.0)]]], layout, 40, 60)
