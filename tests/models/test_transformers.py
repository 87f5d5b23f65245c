"""Networks of transformers: the library's outputs and pixels, and what is refused."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file

from permafrost.core.errors import ConfigError, UserError
from permafrost.models.network import Network
from permafrost.models.providers import build_model, freeze, name_weights, published
from permafrost.models.trained_weights import require_texts
from permafrost_transformers import classifiers as provider
from permafrost_transformers.options import TransformersModelConfig
from permafrost_transformers.processors import prepare
from tests.models.transformers_families import (
    CLASSES,
    FAMILIES,
    SIDE,
    TEXTS,
    difference_of_family,
    options_of_family,
    save_family,
    save_processor,
)
from tests.support.runs import assert_equal_states

_NOT_FOLLOWED = {"SigLIP 2, NaFlex", "ViT-MAE", "Perceiver", "TimmWrapper"}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()


@pytest.fixture
def vit(tmp_path):
    save_family("ViT", tmp_path)
    return TransformersModelConfig(name=str(tmp_path), weights="pretrained")


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - _NOT_FOLLOWED))
def test_outputs_are_those_of_the_library(name, tmp_path):
    difference, model = difference_of_family(name, tmp_path)

    assert difference < 1e-5
    assert isinstance(model.network, torch.nn.Module)


@pytest.mark.parametrize("name", sorted(_NOT_FOLLOWED))
def test_families_that_cannot_be_followed_are_refused_in_one_line(name, tmp_path):
    save_family(name, tmp_path)

    with pytest.raises(UserError, match=r"(name|name=)\b") as refusal:
        build_model(options_of_family(name, tmp_path), CLASSES)
    assert "\n" not in str(refusal.value)


def test_a_pass_through_the_classifier_gives_the_logits_and_the_grid_of_a_convolutional_network(
    tmp_path,
):
    network = save_family("ConvNeXt", tmp_path)
    model = freeze(build_model(options_of_family("ConvNeXt", tmp_path), CLASSES))
    images = torch.rand(2, 3, SIDE, SIDE)

    output = model(images)

    torch.testing.assert_close(output.logits, network((images - 0.5) / 0.5).logits)
    assert output.features.shape == (2, 16, 2, 2)
    assert model.pools_by_average


@pytest.mark.parametrize("name", ["ViT", "DeiT", "BEiT", "CLIP", "SigLIP 2"])
def test_positions_are_interpolated_for_images_of_another_size(name, tmp_path):
    save_family(name, tmp_path)
    model = freeze(build_model(options_of_family(name, tmp_path), CLASSES))

    assert model(torch.rand(2, 3, 96, 96)).logits.shape == (2, CLASSES)


def test_a_size_that_a_network_does_not_take_is_its_own_error(tmp_path):
    save_family("LeViT", tmp_path)
    model = freeze(build_model(options_of_family("LeViT", tmp_path), CLASSES))

    with pytest.raises(ConfigError, match=r"Levit.* cannot be run on images .*96, 96"):
        model(torch.rand(2, 3, 96, 96))


# ---- heads and weights ---------------------------------------------------------------------------


def test_other_classes_get_a_new_head_on_the_same_trunk(vit):
    other = build_model(vit, 5, may_replace_head=True).network
    same = build_model(vit, CLASSES).network

    assert other.classifier.weight.shape == (5, 16)
    assert_equal_states(other.vit.state_dict(), same.vit.state_dict())
    with pytest.raises(ConfigError, match=r"has 3 outputs, but 5 are needed"):
        Network(vit, 5).describe()


def test_logits_of_a_network_without_a_head_are_refused_and_its_embedding_is_not(tmp_path):
    save_family("DINOv2", tmp_path)
    config = options_of_family("DINOv2", tmp_path)

    assert published(config).classes == 0
    with pytest.raises(ConfigError, match=r"has 0 outputs, .*annotate.outputs=\[pooled\]"):
        Network(config, 5).describe()
    network = Network(config, 5)
    assert network.digest(reads_head=False) == network.digest(reads_head=False)


def test_random_weights_have_the_architecture_of_the_folder_and_a_file_of_a_run_is_read(
    vit, tmp_path
):
    trained = build_model(replace(vit, weights="random"), 5)
    save_file(trained.network.state_dict(), tmp_path / "trained.safetensors")
    config = replace(vit, weights=str(tmp_path / "trained.safetensors"))
    images = torch.rand(2, 3, SIDE, SIDE)

    expected = freeze(trained)(images).logits
    assert expected.shape == (2, 5)
    assert torch.equal(freeze(build_model(config, 5))(images).logits, expected)


def test_a_pooler_without_weights_is_left_out(tmp_path):
    network = save_family("ViT", tmp_path)
    network.vit.save_pretrained(tmp_path)  # which has no pooler
    model = build_model(TransformersModelConfig(name=str(tmp_path), weights="pretrained"), CLASSES)
    pixels = torch.rand(2, 3, SIDE, SIDE)
    model.network.head = torch.nn.Identity()

    expected = network.vit.eval()(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(model.eval().network(pixels), expected)


def test_weights_that_lack_tensors_are_refused(vit, tmp_path):
    change_json(tmp_path / "config.json", num_hidden_layers=3)

    with pytest.raises(ConfigError, match=r"lacks 16 tensors of ViTForImageClassification.*save"):
        build_model(vit, CLASSES)


def test_names_of_classes_are_compared_and_generic_ones_are_none(vit, tmp_path):
    assert published(vit).labels == ()
    change_json(tmp_path / "config.json", id2label={"0": "cat", "1": "dog", "2": "car"})

    assert published(vit).labels == ("cat", "dog", "car")
    with pytest.raises(ConfigError, match=r"output 0 is cat, and class 0 of the store is dog"):
        Network(vit, ("dog", "cat", "car")).describe()


# ---- texts ---------------------------------------------------------------------------------------


def test_texts_are_part_of_the_identity_and_name_their_classes(tmp_path, caplog):
    save_family("CLIP, texts", tmp_path)
    config = options_of_family("CLIP, texts", tmp_path)
    digest = Network(config, ("cat", "dog", "car")).digest()

    with pytest.raises(
        ConfigError,
        match=r"teacher.prompts: 2 lines .* of dog, .*photo of a cat.*name another class",
    ):
        Network(config, ("dog", "cat", "car")).digest()
    with caplog.at_level(logging.WARNING):
        require_texts(TEXTS, ("cat", "dog", "automobile"), "prompts")
    assert "1 lines do not name their class, such as that of automobile" in caplog.text
    (tmp_path / "prompts.txt").write_text("cat\ndog\na blue car\n")
    other = Network(config, ("cat", "dog", "car")).digest()
    assert other != digest
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("quick_gelu", "gelu"))
    assert Network(config, ("cat", "dog", "car")).digest() not in (digest, other)
    save_family("DINOv2", tmp_path)
    with pytest.raises(ConfigError, match=r"needs CLIP or SigLIP, and .* is Dinov2Model"):
        build_model(config, CLASSES)


# ---- processors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("ViT", {}, (SIDE, None, "bilinear")),
        ("DINOv3ViT", {}, (SIDE, None, "bilinear")),
        ("CLIP", {"size": {"shortest_edge": 224}}, (224, 1.0, "bicubic")),
        ("Bit", {"size": {"shortest_edge": 256}}, (224, 0.875, "bicubic")),
        ("ConvNext", {"size": {"shortest_edge": 224}}, (224, 0.875, "bicubic")),
        ("ConvNext", {"size": {"shortest_edge": 384}}, (384, None, "bicubic")),
        (
            "PoolFormer",
            {"size": {"shortest_edge": 224}, "crop_pct": 0.9},
            (224, 224 / 248, "bicubic"),
        ),
    ],
)
def test_pixels_are_those_of_the_processor(vit, tmp_path, kind, options, expected, caplog):
    processor = save_processor(tmp_path, kind, **options)
    with caplog.at_level(logging.INFO):
        info = published(vit)

    assert (info.input_size, info.crop_fraction, info.interpolation) == expected
    assert f"{kind}ImageProcessor (torchvision)" in caplog.text
    image = torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
    assert (prepare(image, info) - pixels).abs().max() < 2 / 255 / min(info.std)


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        ({}, 0.5, 0.5),
        ({"do_normalize": False}, 0, 1),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, 0.5, 0.5),
        ({"do_rescale": False, "image_mean": [51] * 3, "image_std": [102] * 3}, 0.2, 0.4),
    ],
)
def test_scales_of_pixels_are_folded_into_mean_and_std(vit, tmp_path, options, mean, std):
    save_processor(tmp_path, **options)
    info = published(vit)

    assert info.mean == pytest.approx((mean,) * 3, abs=1e-6)
    assert info.std == pytest.approx((std,) * 3, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ViT", {"size": {"height": 64, "width": 32}}, r"has size=.*64.*32"),
        ("ViT", {"size": {"longest_edge": 64, "shortest_edge": 32}}, r"has size=.*longest_edge"),
        ("ViT", {"size": {"shortest_edge": 64}}, r"has size=.*shortest_edge"),
        ("ViT", {"resample": 1}, r"has resample=1"),
        ("ViT", {"resample": 0}, r"has resample=0"),
        ("ViT", {"resample": 4}, r"has resample=4"),
        ("ViT", {"do_resize": False}, r"has do_resize=False"),
        ("ViT", {"do_pad": True}, r"has do_pad=True"),
        ("CLIP", {"size": {"shortest_edge": 128}}, r"has crop_size=.*224"),
        ("CLIP", {"size": {"height": 256, "width": 256}}, r"has crop_size=.*224"),
        ("Siglip2", {"size": None}, r"has max_num_patches=256"),
        ("MobileViT", {"size": {"shortest_edge": 256}}, r"has do_flip_channel_order=True"),
        ("Beit", {"do_reduce_labels": True}, r"has do_reduce_labels=True"),
        ("Levit", {"size": {"shortest_edge": 224}}, r"computes other pixels than its fields say"),
    ],
)
def test_a_processor_that_no_option_follows_is_refused(vit, tmp_path, kind, options, message):
    save_processor(tmp_path, kind, **options)

    with pytest.raises(ConfigError, match=f"{kind}ImageProcessor {message}.*set mean=, std="):
        published(vit)


def test_options_take_the_place_of_a_missing_processor(vit, tmp_path):
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no preprocessor_config.json.*set mean=, std="):
        published(vit)

    moments = {"mean": (0.1,) * 3, "std": (0.2,) * 3}
    info = published(replace(vit, input_size=SIDE, frame="full", **moments))
    assert (info.input_size, info.mean, info.std) == (SIDE, (0.1,) * 3, (0.2,) * 3)
    build_model(replace(vit, weights="random", **moments), 5)


# ---- the hub -------------------------------------------------------------------------------------


def test_the_commit_of_the_hub_is_the_name_of_its_weights(tmp_path, monkeypatch):
    commit, asked = "0" * 40, []
    save_family("ViT", tmp_path / commit)

    def snapshot(name, *, revision, allow_patterns):
        asked.append((revision, "model.safetensors" in allow_patterns))
        return str(tmp_path / commit)

    monkeypatch.setattr(provider, "snapshot_download", snapshot)
    provider._fetch.cache_clear()
    config = name_weights(TransformersModelConfig(name="owner/vit", weights="pretrained"))
    build_model(config, CLASSES)

    assert config.weights == f"pretrained:{commit}"
    assert asked == [(None, False), (commit, True), (commit, False)]
    with pytest.raises(ConfigError, match="only an id has revisions"):
        build_model(replace(config, name=str(tmp_path / commit)), CLASSES)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", r"is gated; .*HF_TOKEN"),
        ("RepositoryNotFoundError", r"is neither a folder nor an id .*HF_TOKEN if it is private"),
        ("RevisionNotFoundError", r"has no such revision; correct weights="),
        ("LocalEntryNotFoundError", r"is not in the local cache, .*HF_HUB_OFFLINE=1.*folder"),
        ("OfflineModeIsEnabled", r"cannot be fetched with HF_HUB_OFFLINE=1; unset it"),
        ("HFValidationError", r"is neither a folder nor an id of the Hugging Face hub"),
    ],
)
def test_answers_of_the_hub_are_one_line_with_a_remedy(monkeypatch, error, message):
    kind = getattr(hub_errors, error)

    def fail(*args, **options):
        raise kind.__new__(kind, "several\nlines")  # without the response of the hub

    monkeypatch.setattr(provider, "snapshot_download", fail)
    with pytest.raises(UserError, match=f"name=owner/{error} {message}") as refusal:
        published(TransformersModelConfig(name=f"owner/{error}", weights="pretrained"))
    assert "\n" not in str(refusal.value)


def test_code_of_a_hub_and_pickled_weights_are_refused(vit, tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"does not read pickled weights; .*save_pretrained"):
        build_model(vit, CLASSES)

    (tmp_path / "own.py").write_text("raise SystemExit('this code has run')\n")
    change_json(tmp_path / "config.json", model_type="own", auto_map={"AutoConfig": "own.Settings"})
    with pytest.raises(ConfigError, match=r"runs code of its own \(auto_map in config.json\)"):
        build_model(vit, CLASSES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "of_tomorrow"}, r"cannot be read .*of_tomorrow.*name another"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, r"cannot be read|lacks"),
    ],
)
def test_what_the_library_cannot_read_is_one_line(vit, tmp_path, changes, message):
    change_json(tmp_path / "config.json", **changes)

    with pytest.raises(UserError, match=message) as refusal:
        build_model(vit, CLASSES)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match=re.escape("name=, weights=None: name a folder")):
        build_model(TransformersModelConfig(), CLASSES)
    assert Path(vit.name).is_dir()
