"""B-cos layers against their formulas, and the mode that treats their factors as constants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from permafrost_papers.bcos.layers import (
    BcosConv2d,
    BcosLinear,
    BcosSettings,
    CenteredNorm,
    ExplanationMode,
    LogitLayer,
    UncenteredBatchNorm2d,
    add_inverse,
    hold_factor,
)


def gaussian_of(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def aligned(patches: torch.Tensor, weight: torch.Tensor, b: float = 2.0) -> torch.Tensor:
    """Outputs |cos|^(B - 1) * w_hat x of every patch [n, d] with every weight [m, d]: [n, m]."""
    cosine = F.cosine_similarity(patches[:, None], weight[None], dim=2, eps=0.0)
    unit = weight / weight.norm(dim=1, keepdim=True)
    return cosine.abs() ** (b - 1) * (patches @ unit.T)


@pytest.mark.parametrize("b", [1.0, 2.0, 3.0])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (3, 1, 0), (7, 2, 3)],
)
def test_a_convolution_is_each_patchs_product_times_its_cosine(kernel, stride, padding, b):
    torch.manual_seed(0)
    conv = BcosConv2d(BcosSettings(b=b), 4, 8, kernel, stride, padding).double()
    x = 100 * gaussian_of(2, 4, 9, 7)  # so large that the epsilon of the norm is negligible

    found = conv(x).detach()

    weight = conv.linear.weight.detach()
    patches = F.unfold(x, kernel, padding=padding, stride=stride)  # [2, d, places]
    places = patches.transpose(1, 2).flatten(0, 1)
    expected = aligned(places, weight.flatten(1), b).view(2, -1, 8).transpose(1, 2)
    tolerance = {1.0: 1e-12, 2.0: 1e-9, 3.0: 1e-5}[b]  # a general B adds 1e-6 to the cosine
    assert torch.allclose(
        found.flatten(2), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


@pytest.mark.parametrize(("b", "tolerance"), [(1.0, 1e-12), (2.0, 1e-9), (2.5, 1e-5)])
def test_a_linear_layer_is_the_product_times_the_cosine(b, tolerance):
    torch.manual_seed(0)
    linear = BcosLinear(BcosSettings(b=b), 5, 7).double()
    x = gaussian_of(3, 4, 5)

    expected = aligned(x.flatten(0, 1), linear.linear.weight, b).view(3, 4, 7)

    assert torch.allclose(linear(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: BcosConv2d(BcosSettings(), 3, 4, 3, padding=1), (2, 3, 6, 6)),
        (lambda: BcosLinear(BcosSettings(), 5, 4), (2, 5)),
    ],
    ids=["conv", "linear"],
)
def test_a_layer_ignores_its_weights_scale_and_follows_its_inputs(layer, shape):
    layer = layer().double()
    x = 10 * gaussian_of(*shape)
    before = layer(x)

    assert torch.allclose(layer(3 * x), 3 * before, rtol=1e-6)
    with torch.no_grad():
        layer.linear.weight *= torch.rand(len(layer.linear.weight), 1, dtype=torch.float64).view(
            -1, *[1] * (layer.linear.weight.ndim - 1)
        )
    assert torch.allclose(layer(x), before, rtol=1e-9)


def test_a_zero_input_gives_zero_and_finite_derivatives():
    torch.manual_seed(0)
    for layer, x in (
        (BcosConv2d(BcosSettings(), 2, 3, 3, padding=1), torch.zeros(1, 2, 4, 4)),
        (BcosLinear(BcosSettings(), 4, 3), torch.zeros(2, 4)),
    ):
        layer, x = layer.double(), x.double().requires_grad_()

        out = layer(x)
        (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        parts = torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])

        assert not out.any()
        assert all(part.isfinite().all() for part in (first, *parts))


@pytest.mark.parametrize("batch", [1, 3])
def test_an_uncentered_batch_norm_divides_by_the_deviation_and_subtracts_nothing(batch):
    norm = UncenteredBatchNorm2d(BcosSettings(), 2).double().train()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -0.5]))
    x = gaussian_of(batch, 2, 3, 4) + 5

    found = norm(x)

    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    var = ((x - mean) ** 2).mean(dim=(0, 2, 3))  # biased variance
    gain = (norm.weight / (var + 1e-5).sqrt()).view(1, 2, 1, 1)
    assert torch.allclose(found, gain * x, atol=1e-12)
    assert torch.allclose(norm.running_var, 0.9 + 0.1 * var, atol=1e-12)
    assert not norm.running_mean.any()
    assert norm.num_batches_tracked == 1
    assert norm.bias is None
    assert list(norm.state_dict()) == [
        *("weight", "running_mean", "running_var", "num_batches_tracked")
    ]
    gain = (norm.weight / (norm.running_var + 1e-5).sqrt()).view(1, 2, 1, 1)
    assert torch.allclose(norm.eval()(x), gain * x, atol=1e-12)
    assert norm.num_batches_tracked == 1


def test_centered_norms_are_torchs_without_a_bias():
    tokens, maps = gaussian_of(2, 3, 8) + 2, gaussian_of(2, 4, 3, 3) + 2
    of_tokens = CenteredNorm(BcosSettings(), 8).double()
    of_maps = CenteredNorm(BcosSettings(), 4, is_spatial=True).double()
    for norm in (of_tokens, of_maps):
        nn.init.normal_(norm.weight)

    assert torch.allclose(
        of_tokens(tokens), F.layer_norm(tokens, (8,), of_tokens.weight), atol=1e-12
    )
    assert torch.allclose(of_maps(maps), F.group_norm(maps, 1, of_maps.weight), atol=1e-12)


def test_the_input_has_six_channels_that_sum_to_three():
    images = torch.rand(2, 3, 4, 4)

    encoded = add_inverse(images)

    assert encoded.shape == (2, 6, 4, 4)
    assert torch.equal(encoded[:, :3], images)
    assert torch.allclose(encoded.sum(dim=1), torch.full((2, 4, 4), 3.0))


def test_the_logit_layer_divides_and_adds():
    assert LogitLayer(2.0, -3.0)(torch.tensor([4.0, 6.0])).tolist() == [-1.0, 0.0]
    small = torch.tensor([0.0, 0.0078125], dtype=torch.bfloat16)
    assert LogitLayer(1.0, -6.90625)(small).tolist() == [-6.90625, -6.8984375]


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_squares_that_half_precision_cannot_hold_do_not_matter(precision):
    torch.manual_seed(0)
    x = torch.rand(2, 8, 6, 6) * 400  # a patch's squared norm is about 4 million
    layers = nn.Sequential(
        BcosConv2d(BcosSettings(), 8, 8, 3, padding=1), UncenteredBatchNorm2d(BcosSettings(), 8)
    )
    token_layers = nn.Sequential(CenteredNorm(BcosSettings(), 6), BcosLinear(BcosSettings(), 6, 4))
    with torch.no_grad():
        expected = layers(x), token_layers(x)

        with torch.autocast("cpu", dtype=precision):
            found = layers(x.to(precision)), token_layers(x.to(precision))

    for one, other in zip(found, expected, strict=True):
        assert one.dtype == precision
        assert (one.float() - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [(torch.mul, ((2, 1, 3), (2, 4, 3))), (torch.matmul, ((2, 3, 3), (2, 3, 4)))],
    ids=["scale", "attend"],
)
def test_an_operation_is_differentiable_twice_and_leaves_its_factor_out_in_the_mode(
    operation, shapes
):
    mode = ExplanationMode()
    factor, x = (gaussian_of(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))

    def run(f, v):
        return operation(hold_factor(f, mode), v)

    assert torch.autograd.gradcheck(run, (factor, x))
    assert torch.autograd.gradgradcheck(run, (factor, x))

    out = run(factor, x)
    with mode():
        of_factor, of_x = torch.autograd.grad(
            out.square().sum(), (factor, x), create_graph=True, allow_unused=True
        )
    assert of_factor is None
    # The gradient that is computed in the mode still depends on the factor: it is 2 * factor * out.
    (second,) = torch.autograd.grad(of_x.sum(), factor)
    assert second.abs().max() > 0


def test_the_mode_is_off_after_an_error_and_does_not_nest():
    mode = ExplanationMode()

    def fail():
        with mode():
            assert mode.is_on
            raise KeyError

    with pytest.raises(KeyError):
        fail()

    assert not mode.is_on
    with mode(), pytest.raises(RuntimeError, match="cannot be nested"), mode():
        pass
    assert not mode.is_on


def test_a_loss_differentiated_in_the_mode_is_an_error_for_that_network_alone():
    modes = [ExplanationMode(), ExplanationMode()]
    layers = [BcosLinear(BcosSettings(mode), 3, 2) for mode in modes]
    for mode, layer in zip(modes, layers, strict=True):
        mode.guard(layer)
    losses = [layer(torch.ones(1, 3)).sum() for layer in layers]

    with modes[0]():
        losses[1].backward()
        with pytest.raises(RuntimeError, match=r"inside explanation mode.*leave the mode"):
            losses[0].backward(retain_graph=True)

    losses[0].backward()
    assert all(layer.linear.weight.grad is not None for layer in layers)
