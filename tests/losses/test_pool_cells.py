"""Averages over the cells of a grid, with gradients whose sums have a fixed order on every device."""

import pytest
import torch
import torch.nn.functional as F

from permafrost.losses.feature_kd import pool_cells


def pooled_and_gradient(pool, values, size):
    values = values.clone().requires_grad_()
    pooled = pool(values, size)
    pooled.square().sum().backward()
    return pooled.detach(), values.grad


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (3, 8, 12)])
@pytest.mark.parametrize("size", [(8, 12), (4, 4), (2, 6), 4, 1])
def test_whole_cells_have_the_bits_of_torch(shape, size):
    values = torch.randn(shape)
    for one, other in zip(
        pooled_and_gradient(pool_cells, values, size),
        pooled_and_gradient(F.adaptive_avg_pool2d, values, size),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (3, 7, 5)])
@pytest.mark.parametrize("size", [(4, 2), (3, 3), (7, 4), (9, 11), 2])
def test_parts_of_cells_are_averaged_as_by_torch(shape, size):
    values = torch.randn(shape, dtype=torch.float64)
    for one, other in zip(
        pooled_and_gradient(pool_cells, values, size),
        pooled_and_gradient(F.adaptive_avg_pool2d, values, size),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
