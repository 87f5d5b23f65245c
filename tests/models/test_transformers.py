"""Networks of transformers from folders: outputs, pictures and class names as the library has them."""

import json

import huggingface_hub.errors
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from permafrost.core.errors import ConfigError, UserError
from permafrost.models.classifier import Intermediates
from permafrost.models.explanations import gradcam
from permafrost.models.providers import build_model, freeze, published, with_preprocessing
from permafrost_transformers import networks as provider
from permafrost_transformers.options import TransformersModelConfig

CLASSES = ("cat", "dog", "owl", "yak")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
TOKENS = SIZES | {"intermediate_size": 48, "patch_size": 8}
TEXTS = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
PYRAMID = STAGES | {"num_attention_heads": [1, 2, 2, 4]}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}

CLASSIFIERS = {
    "ViT": ("ViT", TOKENS),
    "DeiT": ("DeiT", TOKENS),
    "BEiT": ("Beit", TOKENS),
    "DINOv2": ("Dinov2", TOKENS),
    "DINOv2 with registers": ("Dinov2WithRegisters", TOKENS),
    "Swin": ("Swin", SWIN),
    "Swin v2": ("Swinv2", SWIN),
    "ConvNeXt": ("ConvNext", STAGES | {"patch_size": 2}),
    "ConvNeXt v2": ("ConvNextV2", STAGES | {"patch_size": 2}),
    "ResNet": ("ResNet", STAGES | {"embedding_size": 8}),
    "PVT": ("Pvt", PYRAMID | {"image_size": 64}),
    "SegFormer": ("Segformer", PYRAMID),
    "MobileNetV2": ("MobileNetV2", {}),
}


def class_names(names=CLASSES):
    return {"id2label": dict(enumerate(names)), "label2id": {n: k for k, n in enumerate(names)}}


def randomize(network):
    """Give a network weights with which its outputs differ between images, and statistics of its layers."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def saved(folder, name, sizes, *, head="ForImageClassification", processor=True):
    """Save a network with random weights and its processor to a folder, and return it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **(class_names() if head else {}))
    network = randomize(getattr(transformers, f"{name}{head or 'Model'}")(config))
    network.save_pretrained(folder)
    if processor:
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return network


def built(folder, classes=CLASSES, **options):
    config = TransformersModelConfig(name=str(folder), weights="pretrained", **options)
    return freeze(build_model(config, classes))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_has_the_outputs_of_the_library_and_maps(tmp_path, name):
    network = saved(tmp_path, *CLASSIFIERS[name])
    side = CLASSIFIERS[name][1].get("image_size", 64)
    images = torch.rand(3, 3, side, side)

    model = built(tmp_path)
    with torch.no_grad():
        output = model(images, Intermediates(pooled=True))
        expected = network((images - 0.5) / 0.5).logits

    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
    assert output.logits.std(dim=0).max() > 1e-4  # random weights that tell images apart
    maps = gradcam(model, output, output.logits.argmax(dim=1, keepdim=True), sign="signed")
    assert maps.isfinite().all()
    assert maps.abs().amax() > 0
    assert (
        published(TransformersModelConfig(name=str(tmp_path), weights="pretrained")).labels
        == CLASSES
    )


def test_both_heads_of_a_distilled_deit_are_averaged(tmp_path):
    head = "ForImageClassificationWithTeacher"
    network = saved(tmp_path, "DeiT", TOKENS, head=head)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = network((images - 0.5) / 0.5)
        logits = built(tmp_path)(images).logits
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)
    assert not torch.allclose(expected.cls_logits, expected.distillation_logits)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Dinov2", TOKENS),
        ("ViT", TOKENS),
        ("DINOv3ViT", TOKENS | {"num_register_tokens": 4}),
        ("DINOv3ConvNext", STAGES),
        ("Aimv2Vision", TOKENS),
        ("SiglipVision", TOKENS),
        ("PvtV2", PYRAMID | {"image_size": 64}),
    ],
)
def test_a_trunk_without_a_head_has_its_embedding_and_no_logits(tmp_path, name, sizes):
    network = saved(tmp_path, name, sizes, head="")
    side = sizes.get("image_size", 64)
    images = torch.rand(2, 3, side, side)
    config = TransformersModelConfig(name=str(tmp_path), weights="pretrained")
    assert published(config).classes == 0

    model = freeze(build_model(config, 4, may_replace_head=True))
    with torch.no_grad():
        output = model(images, Intermediates(pooled=True, stages=True))
        expected = network((images - 0.5) / 0.5)
    embedding = getattr(expected, "pooler_output", None)
    if embedding is None:
        last = expected.last_hidden_state
        embedding = last[:, 0] if last.ndim == 3 else last.mean(dim=(2, 3))
    torch.testing.assert_close(output.pooled, embedding.flatten(1), rtol=0, atol=1e-5)
    assert output.logits.shape == (2, 4)


def test_a_pooler_that_the_weights_lack_is_left_out(tmp_path):
    saved(tmp_path, "ViT", TOKENS)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"architectures": ["ViTModel"]}))
    images = torch.rand(2, 3, 32, 32)
    config = TransformersModelConfig(name=str(tmp_path), weights="pretrained")
    model = freeze(build_model(config, 4, may_replace_head=True))
    with torch.no_grad():
        output = model(images, Intermediates(pooled=True))
        tokens = model.network.trunk((images - 0.5) / 0.5).last_hidden_state
    torch.testing.assert_close(output.pooled, tokens[:, 0])


# ---- CLIP and SigLIP -------------------------------------------------------------------------------


def two_towers(folder, name):
    words = {word: n for n, word in enumerate(["<pad>", "<eos>", "a", "photo", "of", *CLASSES])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", model_max_length=8
    ).save_pretrained(folder)
    texts = TEXTS | {"vocab_size": len(words), "max_position_embeddings": 8, "eos_token_id": 1}
    config = getattr(transformers, f"{name}Config")(
        vision_config=TOKENS,
        text_config=texts | ({"projection_size": 32} if name == "Siglip" else {}),
    )
    torch.manual_seed(0)
    network = randomize(getattr(transformers, f"{name}Model")(config))
    with torch.no_grad():
        network.logit_scale.fill_(2.5)
        if name == "Siglip":
            network.logit_bias.fill_(-3.0)
    network.save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(
        folder
    )
    return network


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_prompts_make_a_classifier_of_two_towers(tmp_path, name):
    network = two_towers(tmp_path, name)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a photo of a {each}\n" for each in CLASSES))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    padding = "max_length" if name == "Siglip" else True
    tokens = tokenizer(prompts.read_text().splitlines(), padding=padding, return_tensors="pt")
    images = torch.rand(3, 3, 32, 32)

    model = built(tmp_path, prompts=str(prompts))
    picture = published(TransformersModelConfig(name=str(tmp_path), prompts=str(prompts)))
    mean, std = (torch.tensor(values)[:, None, None] for values in (picture.mean, picture.std))
    with torch.no_grad():
        logits = model(images).logits
        expected = network(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"] if name == "CLIP" else None,
            pixel_values=(images - mean) / std,
        ).logits_per_image

    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert logits.std() > 1e-3
    prompts.write_text("a photo of a cat\n")
    with pytest.raises(ConfigError, match="has 1 lines, and there are 4 classes"):
        build_model(
            TransformersModelConfig(name=str(tmp_path), prompts=str(prompts), classes=4), CLASSES
        )


# ---- image processors ------------------------------------------------------------------------------

PROCESSORS = {
    "squash": (transformers.ViTImageProcessor, {"size": {"height": 48, "width": 48}}),
    "bicubic crop": (
        transformers.CLIPImageProcessor,
        {"size": {"shortest_edge": 56}, "crop_size": 48},
    ),
    "ConvNeXt": (
        transformers.ConvNextImageProcessor,
        {"size": {"shortest_edge": 48}, "crop_pct": 0.875},
    ),
    "large ConvNeXt": (transformers.ConvNextImageProcessor, {"size": {"shortest_edge": 384}}),
    "BiT": (transformers.BitImageProcessor, {"size": {"shortest_edge": 64}, "crop_size": 48}),
    "not normalized": (
        transformers.ViTImageProcessor,
        {"do_normalize": False, "size": {"height": 48, "width": 48}},
    ),
    "in [-1, 1]": (
        transformers.ViTImageProcessor,
        {
            "rescale_factor": 1 / 127.5,
            "size": {"height": 48, "width": 48},
            "image_mean": [1.0] * 3,
            "image_std": [1.0] * 3,
        },
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_picture_is_that_of_the_image_processor(tmp_path, name):
    """The same pixels, from an image that is resized as the options say."""
    kind, options = PROCESSORS[name]
    saved(tmp_path, "ResNet", STAGES | {"embedding_size": 8}, processor=False)
    processor = kind(**options)
    processor.save_pretrained(tmp_path)
    config = TransformersModelConfig(name=str(tmp_path), weights="pretrained")
    frame = with_preprocessing(config, len(CLASSES))
    side = frame.input_size
    rows, columns = np.mgrid[0:240, 0:320]
    pixels = np.stack([rows, columns * 0.75, 240 - rows], axis=-1).astype(np.uint8)

    image = Image.fromarray(pixels)
    if frame.frame == "center_crop":
        short = round(side / frame.crop_fraction)
        image = image.resize(
            (round(short * 4 / 3), short), Image.Resampling[frame.interpolation.upper()]
        )
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    else:
        image = image.resize((side, side), Image.Resampling[frame.interpolation.upper()])
    model = built(tmp_path)
    values = model.normalize(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)
    expected = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(values, expected, rtol=0, atol=0.03)


UNFOLLOWED = {
    "a strip": (
        transformers.ViTImageProcessor,
        {"size": {"height": 32, "width": 64}},
        "too many values to unpack",
    ),
    "lanczos": (
        transformers.ViTImageProcessor,
        {"resample": 1},
        r"resample=1 is neither bilinear \(2\)",
    ),
    "a crop of a square": (
        transformers.DeiTImageProcessor,
        {},
        "crops an image that it has made square",
    ),
    "flipped channels": (
        transformers.MobileViTImageProcessor,
        {"crop_size": 224},
        "do_flip_channel_order.*its pixels differ",
    ),
    "patches of any size": (transformers.Siglip2ImageProcessor, {}, "is not followed"),
}


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_a_processor_that_cannot_be_followed_is_named(tmp_path, name):
    kind, options, message = UNFOLLOWED[name]
    saved(tmp_path, "ResNet", STAGES | {"embedding_size": 8}, processor=False)
    kind(**options).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"{kind.__name__}.*{message}.*set mean=") as caught:
        built(tmp_path)
    assert "\n" not in str(caught.value)
    enough = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": 32, "frame": "full"}
    assert built(tmp_path, **enough)(torch.rand(1, 3, 32, 32)).logits.shape == (1, 4)


# ---- bad input -------------------------------------------------------------------------------------


def without_processor(folder):
    (folder / "preprocessor_config.json").unlink()


def with_pickled_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_code(folder):
    path = folder / "config.json"
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (folder / "own.py").write_text("raise SystemExit('this code was run')")


def with_other_weights(folder):
    saved(folder, "ResNet", STAGES | {"embedding_size": 8}, processor=False)
    config = transformers.ViTConfig(
        **TOKENS, **class_names(), architectures=["ViTForImageClassification"]
    )
    config.save_pretrained(folder)


BAD_FOLDERS = {
    without_processor: "has no image processor that can be read.*preprocessor_config.json, or set mean=",
    with_pickled_weights: "no file named model.safetensors.*convert its pickled weights",
    with_code: "custom code.*load it in a function of yours",
    with_other_weights: "lacks weights of ViTForImageClassification",
}


@pytest.mark.parametrize("spoil", BAD_FOLDERS)
def test_a_folder_that_cannot_be_read_is_one_sentence(tmp_path, spoil):
    saved(tmp_path, "ViT", TOKENS)
    spoil(tmp_path)
    with pytest.raises(UserError, match=BAD_FOLDERS[spoil]) as caught:
        built(tmp_path)
    assert "\n" not in str(caught.value)


HUB = {
    "gated": (
        huggingface_hub.errors.GatedRepoError,
        "You are trying to access a gated repo.",
        "set HF_TOKEN",
    ),
    "missing": (
        huggingface_hub.errors.RepositoryNotFoundError,
        "404: Repository Not Found",
        "correct the folder or the id; a private one needs HF_TOKEN",
    ),
    "offline": (
        huggingface_hub.errors.OfflineModeIsEnabled,
        "Cannot reach the hub: offline mode is enabled.",
        "unset HF_HUB_OFFLINE",
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_what_the_hub_answers_is_one_sentence_with_a_remedy(monkeypatch, name):
    kind, text, remedy = HUB[name]

    def fetch(*args, **options):
        raise OSError(f"{text}\nmore lines") from kind.__new__(kind)

    monkeypatch.setattr(provider.AutoConfig, "from_pretrained", fetch)
    with pytest.raises(UserError, match=remedy) as caught:
        built("someone/network")
    assert "\n" not in str(caught.value)


def test_other_classes_are_refused_and_a_student_gets_a_new_head(tmp_path):
    saved(tmp_path, "ViT", TOKENS)
    config = TransformersModelConfig(name=str(tmp_path), weights="pretrained")
    student = build_model(config, ("a", "b"), may_replace_head=True)
    assert student(torch.rand(2, 3, 32, 32)).logits.shape == (2, 2)
    small = build_model(TransformersModelConfig(name=str(tmp_path), input_size=16), CLASSES)
    assert small(torch.rand(2, 3, 16, 16)).logits.shape == (2, 4)


def test_images_of_another_size_have_interpolated_positions(tmp_path):
    network = saved(tmp_path, "ViT", TOKENS)
    images = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        output = built(tmp_path)(images)
        expected = network((images - 0.5) / 0.5, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
    assert output.features.shape[2:] == (6, 6)
