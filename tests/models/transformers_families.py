"""Families of transformers in this project: what passes, and how far its outputs and pixels are from the library's.

    python -m tests.models.transformers_families           # about a minute
    python -m tests.models.transformers_families --write   # also transformers_families.results.json

Networks are small and have random weights. Differences are those of logits, or of embeddings without a head, for the
same tensors. The second table has the same real network on the library's pixels and on those of a store's frames.
"""

import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from urllib.parse import unquote

import torch
import transformers
from PIL import Image

import permafrost
from permafrost.core.errors import UserError, first_line
from permafrost.core.generators import SeededDraws
from permafrost.models.classifier import Intermediates
from permafrost.models.providers import build_model, freeze, provider_of, published
from permafrost_timm.options import TimmModelConfig
from permafrost_transformers.options import TransformersModelConfig
from tests.support.paths import SHARED_DATA

RESULTS = Path(__file__).with_name("transformers_families.results.json")
PHOTOS = SHARED_DATA / "photos"
WEIGHTS = SHARED_DATA / "weights" / "tf_efficientnet_lite0.safetensors"
SIDE = 64
CLASSES = 3
TEXTS = ("a photo of a cat", "a photo of a dog", "a red car")

_TOKENS = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 32, "image_size": SIDE, "patch_size": 16},
}
_STAGES = {
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1] * 4,
    "embedding_size": 8,
    "groups_width": 8,
}
_PYRAMID = {**_STAGES, "num_attention_heads": [1, 1, 2, 2], "image_size": SIDE}
_WINDOWS = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
_WINDOWS |= {"image_size": SIDE, "hidden_sizes": [8, 16]}
_FOCAL = {**_WINDOWS, "focal_levels": [1, 1], "focal_windows": [3, 3]}
_HIERA = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "image_size": [SIDE, SIDE]}
_MOBILE = {"hidden_sizes": [16] * 3, "neck_hidden_sizes": [8] * 6 + [16], "num_attention_heads": 2}
_NARROW = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128}
_NARROW |= {"depth_multiplier": 0.25}
_LEVIT = {"image_size": SIDE, "hidden_sizes": [16, 32, 48], "depths": [1] * 3}
_TEXT = {**_TOKENS, "vocab_size": 20, "num_hidden_layers": 1, "max_position_embeddings": 8}
_TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_DUAL = {"text_config": _TEXT, "vision_config": _TOKENS, "projection_dim": 12}
FAMILIES = {
    "ViT": ("ViTForImageClassification", _TOKENS),
    "ViT, embedding": ("ViTModel", _TOKENS),
    "DeiT": ("DeiTForImageClassification", _TOKENS),
    "DeiT, distilled": ("DeiTForImageClassificationWithTeacher", _TOKENS),
    "Swin": ("SwinForImageClassification", _WINDOWS),
    "Swin v2": ("Swinv2ForImageClassification", _WINDOWS),
    "BEiT": ("BeitForImageClassification", _TOKENS),
    "DINOv2": ("Dinov2Model", _TOKENS),
    "DINOv2, registers": ("Dinov2WithRegistersModel", _TOKENS),
    "DINOv3 ViT": ("DINOv3ViTModel", _TOKENS),
    "DINOv3 ConvNeXt": ("DINOv3ConvNextModel", _STAGES),
    "SigLIP 2": ("SiglipModel", _DUAL),
    "SigLIP 2, texts": ("SiglipModel", _DUAL),
    "SigLIP 2, NaFlex": ("Siglip2Model", _DUAL),
    "CLIP": ("CLIPModel", _DUAL),
    "CLIP, texts": ("CLIPModel", _DUAL),
    "ConvNeXt": ("ConvNextForImageClassification", _STAGES),
    "ConvNeXt v2": ("ConvNextV2ForImageClassification", _STAGES),
    "MobileViT": ("MobileViTForImageClassification", _MOBILE),
    "PVT": ("PvtForImageClassification", _PYRAMID),
    "PVT v2": ("PvtV2ForImageClassification", _PYRAMID),
    "SegFormer, encoder": ("SegformerModel", _PYRAMID),
    "AIMv2": ("Aimv2VisionModel", _TOKENS),
    "ResNet": ("ResNetForImageClassification", _STAGES),
    "EfficientNet": ("EfficientNetForImageClassification", _NARROW),
    "MobileNetV2": ("MobileNetV2ForImageClassification", _NARROW),
    "RegNet": ("RegNetForImageClassification", _STAGES),
    "FocalNet": ("FocalNetForImageClassification", _FOCAL),
    "LeViT": ("LevitForImageClassification", _LEVIT),
    "PoolFormer": ("PoolFormerForImageClassification", _STAGES),
    "Hiera": ("HieraForImageClassification", _HIERA),
    "I-JEPA": ("IJepaModel", _TOKENS),
    "ViT-MSN": ("ViTMSNModel", _TOKENS),
    "ViT-MAE": ("ViTMAEModel", _TOKENS),
    "data2vec": ("Data2VecVisionForImageClassification", _TOKENS),
    "Perceiver": ("PerceiverForImageClassificationLearned", {"image_size": 32}),
    "TimmWrapper": ("TimmWrapperForImageClassification", {"architecture": "resnet10t"}),
}
"""Name: class of its network, and options of its configuration."""


def save_family(name, folder):
    """Save a small network of a family with the processor of ViT, and return it."""
    kind, settings = getattr(transformers, FAMILIES[name][0]), FAMILIES[name][1]
    with SeededDraws(0):
        network = kind(kind.config_class(**{**settings, "num_labels": CLASSES})).eval()
    network.save_pretrained(folder)
    save_processor(folder)
    if "texts" in name:
        save_texts(folder)
    return network


def save_processor(folder, kind="ViT", **options):
    options = {"size": {"height": SIDE, "width": SIDE}, **options}
    processor = getattr(transformers, f"{kind}ImageProcessor")(**options)
    processor.save_pretrained(folder)
    return processor


def save_texts(folder):
    """Save a tokenizer of words, and the file of texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    (Path(folder) / "prompts.txt").write_text("\n".join(TEXTS) + "\n")


def options_of_family(name, folder, **options):
    prompts = str(Path(folder) / "prompts.txt") if "texts" in name else None
    return TransformersModelConfig(
        name=str(folder), weights="pretrained", prompts=prompts, **options
    )


@torch.no_grad()
def expected_outputs(name, network, folder, pixels):
    """Compute the library's own logits, or its embedding of a network without a head."""
    if "texts" in name:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        is_siglip = name.startswith("SigLIP")
        tokens = tokenizer(
            list(TEXTS),
            return_tensors="pt",
            truncation=True,
            padding="max_length" if is_siglip else True,
            max_length=_TEXT["max_position_embeddings"],
        )
        return network(pixel_values=pixels, **tokens).logits_per_image
    if hasattr(network, "get_image_features"):
        return network.get_image_features(pixels).pooler_output
    outputs = network(pixels)
    if hasattr(outputs, "logits"):
        return outputs.logits
    if getattr(outputs, "pooler_output", None) is not None:
        return outputs.pooler_output.flatten(1)
    hidden = outputs.last_hidden_state
    if hidden.ndim == 4:
        return hidden.mean(dim=(2, 3))
    return hidden.mean(dim=1) if name == "I-JEPA" else hidden[:, 0]


def difference_of_family(name, folder):
    """Return the largest difference of the outputs, and the layer that is explained."""
    network = save_family(name, folder)
    config = options_of_family(name, folder)
    model = freeze(provider_of(config).build(config, published(config).classes))
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    expected = expected_outputs(name, network, folder, (images - 0.5) / 0.5)
    actual = model.network(model.normalize(images))
    actual = actual if isinstance(actual, torch.Tensor) else actual.logits
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max()), model


def describe_family(name):
    with tempfile.TemporaryDirectory() as folder:
        try:
            difference, model = difference_of_family(name, folder)
        except UserError as error:
            return {"result": "refused", "why": str(error).replace(folder, "<folder>")}
        entry = {"result": "passes", "difference": difference, "kind": type(model.network).__name__}
        try:
            if not (outputs := published(options_of_family(name, folder)).classes):
                model = freeze(build_model(options_of_family(name, folder), CLASSES))
            model(torch.rand(2, 3, SIDE, SIDE))
            entry["layer"] = model.layer
            entry["head"] = "own" if outputs else "new"
        except UserError as error:
            entry["maps"] = str(error)
        try:
            model(torch.rand(2, 3, SIDE, SIDE), Intermediates(pooled=True))
            entry["pooled"] = True
        except UserError:
            entry["pooled"] = False
        return entry


# ---- pixels --------------------------------------------------------------------------------------

PROCESSORS = {
    "ViT, squash 224 bilinear": ("ViT", {"size": {"height": 224, "width": 224}}),
    "CLIP, crop 224 of 224 bicubic": (
        "CLIP",
        {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}},
    ),
    "ConvNeXt, crop_pct 224/256": ("ConvNext", {"size": {"shortest_edge": 224}}),
    "ConvNeXt, 384": ("ConvNext", {"size": {"shortest_edge": 384}}),
    "BiT, crop 224 of 256 bicubic": (
        "Bit",
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
    ),
}


def divergence_of_processor(kind, options, folder):
    """Return the mean KL divergence in nats of a real network on a store's frames from it on the library's pixels."""
    save_family("ViT", folder)
    processor = save_processor(folder, kind, **options)
    info = published(TransformersModelConfig(name=str(folder), weights="pretrained"))
    store, photos = Path(folder) / "store", Path(folder) / "photos"
    for path in sorted(PHOTOS.iterdir())[::10]:  # 20 of 200
        shutil.copytree(path, photos / path.name)
    permafrost.precompute(
        *("data=image_folder", f"data.path={photos}"),
        *(f"store.path={store}", "store.image_size=256"),
        *("teacher=timm", "teacher.name=tf_efficientnet_lite0", f"teacher.weights={WEIGHTS}"),
        *("teacher.classes=1000", f"teacher.input_size={info.input_size}"),
        f"teacher.interpolation={info.interpolation}",
        *(
            ["teacher.frame=full"]
            if info.crop_fraction is None
            else ["teacher.frame=center_crop", f"teacher.crop_fraction={info.crop_fraction}"]
        ),
        *("annotate.outputs=[logits]", "executor=serial", f"run={folder}/run"),
    )
    table = permafrost.open_store(store).table().to_pandas()
    config = TimmModelConfig(
        name="tf_efficientnet_lite0", weights=str(WEIGHTS), input_size=info.input_size
    )
    model = freeze(build_model(config, 1000))
    mean, std = (torch.tensor(values)[:, None, None] for values in (info.mean, info.std))
    divergences = []
    for key, logits in zip(table["key"], table["logits"], strict=True):
        image = Image.open(photos / unquote(key)).convert("RGB")
        pixels = processor(images=image, return_tensors="pt")["pixel_values"] * std + mean
        logs, others = (
            torch.log_softmax(values, dim=-1)
            for values in (model(pixels).logits[0], torch.tensor(logits))
        )
        divergences.append(float((logs.exp() * (logs - others)).sum()))
    return sum(divergences) / len(divergences)


def main(arguments):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    families = {}
    for name in FAMILIES:
        try:
            families[name] = describe_family(name)
        except Exception as error:
            families[name] = {
                "result": "FAILED",
                "why": f"{type(error).__name__}: {first_line(error)}",
            }
        entry = families[name]
        facts = [
            f"{key}={value}" for key, value in entry.items() if key not in ("result", "difference")
        ]
        difference = f"{entry['difference']:.1e}" if "difference" in entry else ""
        print(f"{name:20} {entry['result']:8} {difference:8} {', '.join(facts)[:180]}", flush=True)
    print()
    pixels = {}
    for name, (kind, options) in PROCESSORS.items():
        if not (PHOTOS.is_dir() and WEIGHTS.is_file()):
            pixels[name] = f"skipped: {PHOTOS} or {WEIGHTS} is missing"
        else:
            with tempfile.TemporaryDirectory() as folder:
                pixels[name] = round(divergence_of_processor(kind, options, folder), 3)
        print(f"{name:32} {pixels[name]}", flush=True)
    if "--write" in arguments:
        tables = {"transformers": transformers.__version__, "families": families, "pixels": pixels}
        RESULTS.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
