"""AT, CAT-KD and ReviewKD: hand-computed values and the effect of each option."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.annotation.teacher_fields import stage_fields
from permafrost.config.methods import ATConfig
from permafrost.core.batches import Targets
from permafrost.losses.base import build_loss
from permafrost.losses.feature_kd import attention_loss, class_map_loss, pool_cells
from permafrost.models.classifier import Stage, attention_map
from permafrost_papers.e2kd.options import ReviewKDConfig
from permafrost_papers.e2kd.review_kd import Fusion, hierarchical_context_loss, review_levels
from tests.support.live_trainings import gaussian_maps, training_with_live_teacher
from tests.support.outputs import student_output


def grid(*rows: list[float]) -> Tensor:
    """Map [1, h, w] of one record."""
    return torch.tensor([list(rows)], dtype=torch.float64)


def test_attention_is_the_mean_square_over_channels():
    features = torch.tensor([[[[3.0, 0.0], [-2.0, 1.0]], [[1.0, 0.0], [2.0, 1.0]]]])  # [1, 2, 2, 2]

    assert attention_map(features).tolist() == [[[5.0, 0.0], [4.0, 1.0]]]


def test_attention_loss_of_2x2_maps_matches_hand_computation():
    student, teacher = grid([9.0, 0.0], [0.0, 0.0]), grid([0.0, 3.0], [4.0, 0.0])

    loss = attention_loss(student, teacher)

    # At unit norm (1, 0, 0, 0) and (0, 0.6, 0.8, 0), with a squared distance of 1 + 0.36 + 0.64.
    assert loss.item() == pytest.approx(2.0 / 4, abs=1e-12)
    same = torch.cat([teacher, teacher])
    assert attention_loss(torch.cat([student, teacher]), same).item() == pytest.approx(2.0 / 8)


def test_attention_loss_is_the_squared_norm_over_the_places():
    """The published form is the squared norm of the difference per record."""
    student, teacher = gaussian_maps(0, 3, 7, 7).square(), gaussian_maps(1, 3, 7, 7).square()
    difference = F.normalize(student.flatten(1)) - F.normalize(teacher.flatten(1))

    loss = attention_loss(student, teacher)

    assert (loss * 49).item() == pytest.approx(difference.square().sum(dim=1).mean().item())


def test_attention_ignores_the_order_of_channels_and_any_positive_scale():
    features, teacher = gaussian_maps(0, 2, 5, 4, 4), gaussian_maps(1, 2, 4, 4).square()
    expected = attention_loss(attention_map(features), teacher).item()

    shuffled = attention_map(features[:, [3, 1, 4, 0, 2]])

    assert attention_loss(shuffled, teacher).item() == pytest.approx(expected, abs=1e-15)
    assert attention_loss(attention_map(7 * features), 0.01 * teacher).item() == pytest.approx(
        expected, abs=1e-15
    )


def test_the_finer_of_two_attention_maps_is_averaged_over_the_coarser_ones_cells():
    fine = grid(
        [1.0, 3.0, 0.0, 0.0], [5.0, 7.0, 0.0, 0.0], [0.0, 0.0, 8.0, 0.0], [0.0, 0.0, 0.0, 0.0]
    )
    coarse = grid([4.0, 0.0], [0.0, 2.0])

    assert attention_loss(fine, coarse).item() == 0
    assert attention_loss(coarse, fine).item() == 0
    assert attention_loss(fine, coarse.flip(2)).item() > 0.1


def test_an_attention_map_of_zeros_pulls_nowhere():
    student = gaussian_maps(0, 1, 4, 4).square().requires_grad_()

    (gradient,) = torch.autograd.grad(
        attention_loss(student, torch.zeros(1, 4, 4).to(student)), student, retain_graph=True
    )
    dead = torch.zeros(1, 2, 4, 4, requires_grad=True)
    (dead_gradient,) = torch.autograd.grad(
        attention_loss(attention_map(dead), student.float()), dead
    )

    assert gradient.abs().max() < 1e-15
    assert not dead_gradient.any()


def test_at_sums_its_stages():
    stages = [gaussian_maps(seed, 2, 3, size, size) for seed, size in enumerate((8, 4, 2))]
    student = student_output(
        logits=torch.zeros(2, 3), stages=tuple(Stage(output, output) for output in stages)
    )
    taught = {
        f"attention_{n}": gaussian_maps(9, 2, size, size).square()
        for n, size in ((1, 8), (2, 4), (3, 2))
    }
    targets = Targets(teacher="t", logits=torch.zeros(2, 3), intermediates=taught)
    single = [
        attention_loss(attention_map(output), taught[f"attention_{n}"]).item()
        for n, output in enumerate(stages, start=1)
    ]

    found = {
        chosen: build_loss(ATConfig(stages=chosen)).compare(student, targets).item()
        for chosen in ((), (1, 3), (2,))
    }

    assert found[()] == pytest.approx(sum(single), abs=1e-12)
    assert found[1, 3] == pytest.approx(single[0] + single[2], abs=1e-12)
    assert found[2,] == pytest.approx(single[1], abs=1e-12)


@pytest.mark.parametrize(
    ("resolution", "normalize", "expected"),
    [
        (2, False, (1 + 4 + 9 + 16) / 4),
        (1, False, 2.5**2),
        (2, True, 1 / 4),  # a unit vector of four cells against zeros
        (1, True, 1.0),
    ],
)
def test_class_map_loss_of_one_class_matches_hand_computation(resolution, normalize, expected):
    teacher_maps = grid([1.0, 2.0], [3.0, 4.0])[:, None]  # [1, 1, 2, 2]

    loss = class_map_loss(
        torch.zeros_like(teacher_maps), teacher_maps, resolution, normalize=normalize
    )

    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_class_map_loss_is_the_mean_over_records_classes_and_cells():
    student, teacher = gaussian_maps(0, 3, 5, 4, 4), gaussian_maps(1, 3, 5, 6, 6)
    blocks = [
        maps.unflatten(2, (2, side)).unflatten(4, (2, side)).mean(dim=(3, 5))
        for maps, side in ((student, 2), (teacher, 3))
    ]

    loss = class_map_loss(student, teacher, 2)

    expected = (blocks[0] - blocks[1]).square().sum() / (3 * 5 * 4)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


def test_normalized_class_maps_ignore_their_magnitude():
    student, teacher = gaussian_maps(0, 2, 3, 4, 4), gaussian_maps(1, 2, 3, 4, 4)

    plain, scaled = (class_map_loss(student, s * teacher, 2, normalize=True) for s in (1, 1000))

    assert scaled.item() == pytest.approx(plain.item(), abs=1e-12)


def test_hierarchical_context_loss_of_2x2_features_matches_hand_computation():
    teacher = grid([1.0, 2.0], [3.0, 4.0])[:, None]
    zeros = torch.zeros_like(teacher)

    loss = hierarchical_context_loss(zeros, teacher)

    # The grid has weight 1, and its average, the only coarser pooling, weight 1 / 2.
    assert loss.item() == pytest.approx((7.5 + 0.5 * 6.25) / 1.5, abs=1e-12)
    assert hierarchical_context_loss(zeros[..., :1, :1], teacher[..., 1:, 1:]).item() == 16.0


def test_hierarchical_context_loss_pools_to_4_2_and_1_cells():
    student, teacher = gaussian_maps(0, 2, 3, 8, 8), gaussian_maps(1, 2, 3, 8, 8)
    difference = student - teacher
    means = [F.avg_pool2d(difference, 8 // size).square().mean() for size in (8, 4, 2, 1)]

    loss = hierarchical_context_loss(student, teacher)

    weights = (1, 1 / 2, 1 / 4, 1 / 8)
    expected = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert hierarchical_context_loss(student, student).item() == 0


def test_levels_are_the_stages_and_the_average_of_the_last_output():
    output, residual_sum = gaussian_maps(0, 2, 3, 4, 4), gaussian_maps(1, 2, 3, 4, 4)

    stage = Stage(output, residual_sum)
    student = review_levels([stage])
    teacher = stage_fields(student_output(logits=output, stages=(stage,)).output)

    assert torch.equal(student[0], output)
    assert torch.equal(teacher["features_1"], residual_sum)
    assert torch.equal(student[1], output.mean(dim=(2, 3), keepdim=True))
    assert torch.equal(teacher["features_pooled"], output.mean(dim=(2, 3)))


def test_a_fusion_mixes_its_level_with_the_upsampled_deeper_one():
    fusion = Fusion(3, 2, 5, is_deepest=False).eval()
    level, deeper = gaussian_maps(0, 1, 3, 4, 4).float(), gaussian_maps(1, 1, 2, 2, 2).float()
    torch.nn.init.zeros_(fusion.mix.weight)
    fusion.mix.bias.data = torch.tensor([50.0, -50.0])  # selects the level itself
    alone, passed = fusion(level, deeper, (4, 4))
    fusion.mix.bias.data = torch.tensor([-50.0, 50.0])  # selects the deeper level
    _, from_below = fusion(level, deeper, (4, 4))

    assert alone.shape == (1, 5, 4, 4)
    assert torch.allclose(passed, fusion.reduce(level), atol=1e-6)
    assert torch.allclose(
        from_below, deeper.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), atol=1e-6
    )
    assert Fusion(3, 2, 5, is_deepest=True)(level, None, (8, 8))[0].shape == (1, 5, 8, 8)


def test_fusions_have_the_networks_channels_and_at_most_512_between():
    training = training_with_live_teacher(ReviewKDConfig())

    fusions = training.loss.fusions

    assert [f.reduce[0].in_channels for f in fusions] == [4, 8, 16, 16]
    assert [f.expand[0].out_channels for f in fusions] == [6, 12, 24, 24]
    assert {f.reduce[0].out_channels for f in fusions} == {16}
    assert [f.mix is None for f in fusions] == [False, False, False, True]


def test_fusions_have_at_most_512_channels_between_the_networks():
    loss = build_loss(ReviewKDConfig())
    own, taught = torch.zeros(1, 1024, 1, 1), torch.zeros(1, 1, 1, 1)

    loss.build(
        student_output(logits=own, stages=(Stage(own, own),)),
        Targets(
            teacher="t",
            logits=own,
            intermediates={"features_1": taught, "features_pooled": taught[:, :, 0, 0]},
        ),
    )

    assert {f.reduce[0].out_channels for f in loss.fusions} == {512}


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
