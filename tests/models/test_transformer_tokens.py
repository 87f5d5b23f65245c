"""Patch tokens of timm's transformers as stages, compared with timm's own forward_intermediates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch

from permafrost.annotation.teacher_fields import stage_fields
from permafrost.config.methods import FeaturesConfig
from permafrost.config.store import PassOptions
from permafrost.core.errors import ConfigError
from permafrost.models.classifier import Intermediates
from permafrost.models.explanations import explainer_named, forward_to_explain
from permafrost.models.providers import build_model, freeze
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from permafrost.training.metric_log import read_metrics
from permafrost_timm.classifiers import PROVIDER
from permafrost_timm.options import TimmModelConfig
from tests.support.runs import distill_config
from tests.support.stores import Frozen, precompute_config
from tests.support.verbs import distill, precompute

NAMES = (
    "vit_small_patch16_224.dino",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_224.mae",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
)
"""Published architectures: with a class token, registers, a norm before the blocks, a pool by attention, rotations."""
OF_EVA = {"global_pool": "avg"}
DEPTH = 5


def tiny(name, size, **options):
    """Network of a published architecture with few channels and five blocks, whose weights are random."""
    torch.manual_seed(0)
    network = timm.create_model(
        name, img_size=size, embed_dim=48, depth=DEPTH, num_heads=3, num_classes=5, **options
    )
    with torch.no_grad():  # timm's initial weights leave class tokens and biases zero
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    config = TimmModelConfig(name=name, mean=(0.5,) * 3, std=(0.25,) * 3)
    return freeze(PROVIDER.wrap(config, network))


@pytest.mark.parametrize("name", NAMES)
def test_stages_are_the_normed_patch_tokens_of_timm_on_their_grid(name):
    patch = 14 if "patch14" in name else 16
    size = (2 * patch, 3 * patch)
    model = tiny(name, size, **(OF_EVA if "rope" in name else {}))
    images = torch.rand(2, 3, *size)

    output = model(images, Intermediates(stages=True, pooled=True))
    plain = model(images)

    expected = model.network.forward_intermediates(
        model.normalize(images), indices=[1, 2, 3, 4], norm=True, intermediates_only=True
    )
    assert len(output.stages) == 4
    for stage, tokens in zip(output.stages, expected, strict=True):
        assert stage.output.shape == (2, 48, 2, 3)
        torch.testing.assert_close(stage.output, tokens, rtol=1e-5, atol=1e-5)
    last = model.network.forward_features(model.normalize(images))
    patches = last[:, model.network.num_prefix_tokens :].transpose(1, 2).reshape(2, 48, 2, 3)
    torch.testing.assert_close(output.stages[-1].output, patches, rtol=1e-5, atol=1e-5)
    head = model.network.forward_head
    pooled = patches.mean(dim=(2, 3)) if model.pools_by_average else head(last, pre_logits=True)
    torch.testing.assert_close(output.pooled, pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits, head(last), rtol=1e-4, atol=1e-5)
    assert torch.equal(plain.features, output.features)
    torch.testing.assert_close(plain.logits, output.logits, rtol=1e-5, atol=1e-6)


def test_fields_of_a_transformer_are_its_chosen_stages_and_their_average():
    model = tiny("vit_small_patch14_reg4_dinov2", (28, 42))
    output = model(torch.rand(2, 3, 28, 42), Intermediates(stages=True))

    fields = stage_fields(output, (-1, 2))

    assert list(fields) == ["features_2", "features_4", "features_pooled"]
    average = fields["features_4"].mean(dim=(2, 3))
    torch.testing.assert_close(fields["features_pooled"], average)


def test_gradcam_of_pooled_tokens_is_in_closed_form_and_that_of_autograd():
    """The published DINOv3 has no last layer; one with random weights is explained as any ViT that pools."""
    model = tiny("vit_small_patch16_dinov3", (32, 48))
    images, classes = torch.rand(2, 3, 32, 48), torch.tensor([[0], [3]])

    output = forward_to_explain(model, images)
    closed = explainer_named("gradcam")(model, output, classes)
    assert model.head is not None
    model.closed_form = None
    by_autograd = explainer_named("gradcam")(model, forward_to_explain(model, images), classes)

    assert closed.shape == (2, 1, 1, 2, 3)
    assert closed.any()
    torch.testing.assert_close(closed, by_autograd, rtol=1e-4, atol=1e-6)


def test_images_that_are_no_whole_patches_are_refused_and_one_that_reads_a_class_token_is_laid_out():
    model = tiny("vit_small_patch16_dinov3", (32, 32))
    with pytest.raises(ConfigError, match=r"patches of 16x16 pixels, got images of 40x32; set"):
        model(torch.rand(1, 3, 40, 32))
    model = tiny("vit_small_patch16_rope_224", (32, 32))
    model(torch.rand(1, 3, 32, 32))
    assert str(model.layout) == "b 1+hw c"


@pytest.mark.slow
def test_a_pass_has_the_tokens_of_a_named_transformer_at_the_teachers_input_size(tmp_path):
    teacher = TimmModelConfig(name="vit_tiny_patch16_224", input_size=48, weights="random")
    options = PassOptions(
        batch_size=8, outputs=("features", "pooled"), features_stages=(-1,), features_mirror=False
    )
    config = precompute_config(tmp_path / "store", teacher, annotate=options)
    precompute.run(config)
    store = Frozen(Store(tmp_path / "store"), config)
    (made,) = store.store.open_passes()

    shapes = {spec.name: spec.shape for spec in made.manifest.fields}
    assert shapes["features_4"] == (192, 3, 3)
    assert shapes["pooled"] == (192,)

    student = TimmModelConfig(name="resnet10t")
    method = FeaturesConfig(stages=(-1,), teacher_stages=(4,))
    base = distill_config(Frozen(store.store, config), method=method)
    distill.run(replace(base, student=student))
    losses = [line["total"] for line in read_metrics(RUNS / "one" / "distill")]
    assert losses[-1] < losses[0]


def test_a_transformer_is_a_student_of_features():
    config = TimmModelConfig(name="vit_tiny_patch16_224", input_size=32)
    model = build_model(config, 5)

    output = model(torch.rand(2, 3, 32, 32), Intermediates(stages=True))
    output.stages[0].output.sum().backward()

    with_gradient = [n for n, p in model.named_parameters() if p.grad is not None]
    assert any("blocks.2." in name for name in with_gradient)
    assert not any("blocks.3." in name for name in with_gradient)


def test_the_pooled_feature_of_a_pair_of_classifiers_is_the_average_of_their_inputs():
    """A distilled DeiT classifies two tokens, each with a layer of its own, and averages their outputs."""
    model = tiny("deit_tiny_distilled_patch16_224", (32, 48))
    images = torch.rand(2, 3, 32, 48)
    tokens = model.inner.forward_features(model.normalize(images))

    output = model(images, Intermediates(pooled=True))

    torch.testing.assert_close(output.pooled, (tokens[:, 0] + tokens[:, 1]) / 2)
    torch.testing.assert_close(output.logits, model.inner(model.normalize(images)))
    torch.testing.assert_close(output.logits, model(images).logits)
