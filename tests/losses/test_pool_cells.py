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


WHOLE = [(8, 12), (4, 4), (2, 6), 4, 1]
PARTS = [(4, 2), (3, 3), (7, 4), (9, 11), 2]


@pytest.mark.parametrize(
    ("grid", "size", "dtype", "tolerance"),
    [
        *[((8, 12), size, torch.float32, 0) for size in WHOLE],
        *[((7, 5), size, torch.float64, 1e-12) for size in PARTS],
    ],
)
@pytest.mark.parametrize("records", [(2, 3), (3,)])
def test_cells_are_averaged_as_by_torch_and_whole_ones_to_the_bit(
    records, grid, size, dtype, tolerance
):
    values = torch.randn(*records, *grid, dtype=dtype)
    for one, other in zip(
        pooled_and_gradient(pool_cells, values, size),
        pooled_and_gradient(F.adaptive_avg_pool2d, values, size),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
