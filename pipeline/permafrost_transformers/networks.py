"""Image networks of transformers: a classifier as it is, a trunk without a head, or CLIP and SigLIP with prompts.

They are explained at the last grid that their logits depend on, as any module is. What their image processor does to a
picture becomes options of the teacher, and is compared with the processor itself on an image.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.v2.functional as transforms
import transformers
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from permafrost.config.models import is_published
from permafrost.core.errors import ConfigError, FileError, first_line, require, shorten
from permafrost.core.progress import log_once
from permafrost.models.classifier import (
    Classifier,
    Normalize,
    PretrainedInfo,
    Provider,
    WeightsError,
)
from permafrost.models.module import ModuleClassifier
from permafrost.models.providers import model_normalization
from permafrost.storage.files import file_at
from permafrost_transformers.options import TransformersModelConfig

logger = logging.getLogger("permafrost.models")

_TWO_TOWERS = ("clip", "siglip", "siglip2")
"""Types of networks for images and texts whose logits are their scaled cosines."""
_SAME_PIXELS = 0.03
"""Largest difference of an image processor's pixels in [0, 1] from those of its options."""
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
_REMEDIES = {
    "gated": "accept its terms on its page, and set HF_TOKEN to a token of yours",
    "connect": "connect to the hub, or fetch it where there is a network and name its folder",
    "offline": "unset HF_HUB_OFFLINE, or name a folder",
    "safetensors": "convert its pickled weights elsewhere: from_pretrained(...).save_pretrained(folder)",
    "custom code": "load it in a function of yours that runs this code, and name it: kind=module",
    "not a valid model|Repo id|404": "correct the folder or the id; a private one needs HF_TOKEN",
}
"""Remedies by what the library says."""


# ---- reading a folder or the hub --------------------------------------------------------------------


def _load(config: TransformersModelConfig, source: Any, /, **options: Any) -> Any:
    """Call `from_pretrained` of a class of the library for the named folder or id, without code of its own.

    Raises:
        WeightsError: If the library cannot, with its reason and a remedy.
    """
    revision = str(config.weights).partition(":")[2] if is_published(config.weights) else ""
    try:
        with _quiet():
            return source.from_pretrained(
                config.name, revision=revision or "main", trust_remote_code=False, **options
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        text = str(error)
        remedy = next((value for key, value in _REMEDIES.items() if _mentions(text, key)), "")
        raise WeightsError(
            f"transformers cannot read {config.name} ({first_line(error)}); {remedy or 'correct the folder or the id'}"
        ) from error


def _mentions(text: str, words: str) -> bool:
    return any(word.lower() in text.lower() for word in words.split("|"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the library's bars and its tables of weights, which are checked here."""
    log = transformers.utils.logging
    verbosity, has_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if has_bars:
            log.enable_progress_bar()


@lru_cache(maxsize=8)
def published_transformers(config: TransformersModelConfig) -> PretrainedInfo:
    """Return what the folder or the hub says about the weights: classes, image processor, and the commit.

    Raises:
        WeightsError: If it cannot be read.
        ConfigError: If its image processor computes what no option can.
    """
    options = _load(config, AutoConfig)
    names = tuple(map(str, options.id2label.values())) if _classifier_of(options) else ()
    picture = _read_processor(config, options)
    return PretrainedInfo(
        name=getattr(options, "_commit_hash", None) or "",
        classes=len(_read_prompts(config)) if config.prompts else len(names),
        fixed_size=False,
        labels=() if all(name.startswith("LABEL_") for name in names) else names,
        **picture,
    )


def _classifier_of(options: Any) -> str:
    """Return the name of the class of a classifier, empty for a network that has no head."""
    name = str((options.architectures or [""])[0])
    return name if "ForImageClassification" in name else ""


def _read_prompts(config: TransformersModelConfig) -> list[str]:
    lines = file_at(Path(str(config.prompts))).read().decode().splitlines()
    return [line.strip() for line in lines if line.strip()]


def digest_prompts(config: TransformersModelConfig) -> dict[str, str]:
    """Return the SHA-256 of the file of prompts, by option."""
    return {"prompts": file_at(Path(config.prompts)).sha256()} if config.prompts else {}


# ---- the image processor ----------------------------------------------------------------------------


def _read_processor(config: TransformersModelConfig, options: Any) -> dict[str, Any]:
    """Return mean, std, size, crop and interpolation of the image processor.

    Without a processor, mean and std have to be options, and the picture is the whole image at the configured size.
    """
    vision = getattr(options, "vision_config", options)
    size = getattr(vision, "image_size", 224)
    is_named = config.mean is not None
    try:
        processor = _load(config, AutoImageProcessor)
    except WeightsError as error:
        if not is_named:
            raise ConfigError(
                f"{config.name} has no image processor that can be read ({first_line(error)}); add its "
                "preprocessor_config.json, or set mean= and std=, and input_size= and frame= unless whole images of "
                f"{size} pixels are right"
            ) from error
        return {"mean": config.mean, "std": config.std, "input_size": size, "crop_fraction": None}
    try:
        picture = _picture_of(processor)
        difference = _difference(processor, picture)
        reason = "" if difference <= _SAME_PIXELS else f"its pixels differ by {difference:.2g}"
    except (ConfigError, TypeError, KeyError, ValueError, AttributeError) as error:
        picture, reason = {}, first_line(error)
    changes = [key for key, value in processor.to_dict().items() if key.startswith("do_") and value]
    backend = getattr(processor, "backend", "its own")
    if reason and not (is_named and config.frame != "auto"):
        raise ConfigError(
            f"{config.name}: {type(processor).__name__} (size={_plain(processor, 'size')}, "
            f"crop_size={_plain(processor, 'crop_size')}, {', '.join(changes)}) is not followed: {reason}; set mean=, "
            "std=, input_size=, and frame=full or frame=center_crop to what shall take its place"
        )
    if reason:
        return {"mean": config.mean, "std": config.std, "input_size": size}
    text = ", ".join(f"{key} {value}" for key, value in picture.items())
    log_once(
        logger,
        logging.INFO,
        f"{config.name}: {type(processor).__name__} (backend {backend}): {text}",
    )
    return picture


def _plain(processor: Any, name: str) -> Any:
    """Return an option of a processor as numbers."""
    value: Any = getattr(processor, name, None)
    values = value.items() if hasattr(value, "items") else getattr(value, "__dict__", {}).items()
    plain = {key: number for key, number in values if number is not None}
    return plain or value


def _picture_of(processor: Any) -> dict[str, Any]:
    """Return what the options of a processor say: size and crop in pixels, interpolation, mean and std.

    Raises:
        ConfigError: If no square picture follows from them.
    """
    size, crop = _plain(processor, "size"), _plain(processor, "crop_size")
    resample = int(processor.resample)
    require(
        resample in _INTERPOLATIONS,
        f"resample={resample} is neither bilinear (2) nor bicubic (3)",
    )
    sides = {size["height"], size["width"]} if "height" in size else {size["shortest_edge"]}
    (resized,) = sides
    is_square = "height" in size
    fraction, side = None if is_square else 1.0, resized
    if getattr(processor, "do_center_crop", False):
        (side,) = {crop["height"], crop["width"]}
        require(
            not is_square or side == resized,
            "it crops an image that it has made square",
        )
        fraction = None if is_square else side / resized
    if (share := getattr(processor, "crop_pct", None)) is not None and not is_square:
        # Of a ConvNeXt, which has squares from 384 pixels on; of others before their crop.
        is_whole = not getattr(processor, "do_center_crop", False) and resized >= 384
        fraction = None if is_whole else side / int(resized / share)
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean, std = processor.image_mean, processor.image_std
    if not processor.do_normalize:
        mean, std = (0.0,) * 3, (1.0,) * 3
    return {
        "input_size": side,
        "crop_fraction": fraction,
        "interpolation": _INTERPOLATIONS[resample],
        "mean": tuple(value / scale for value in mean),
        "std": tuple(value / scale for value in std),
    }


def _difference(processor: Any, picture: Mapping[str, Any]) -> float:
    """Return the largest difference in [0, 1] between a processor's pixels of an image and those of its picture."""
    down, across = torch.linspace(0, 1, 300)[:, None], torch.linspace(0, 1, 400)
    # Smooth, so that libraries may round the place of a crop differently.
    channels = [0.3 * down + 0.7 * across, 0.9 * down + 0.1 * across, 1 - 0.5 * down - 0.5 * across]
    image = (torch.stack(channels) * 255).round().to(torch.uint8)
    side, fraction = picture["input_size"], picture["crop_fraction"]
    shape = [side, side] if fraction is None else [round(side / fraction)]
    mode = transforms.InterpolationMode(picture["interpolation"])
    expected = transforms.resize(image, shape, mode, antialias=True)
    expected = transforms.center_crop(expected, [side, side]).float() / 255
    returned = processor(images=image, return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(picture[name])[:, None, None] for name in ("mean", "std"))
    if returned.shape != expected.shape:
        raise ConfigError(f"it returns images {[*returned.shape]} in place of {[*expected.shape]}")
    return float((returned * std + mean - expected).abs().max())


# ---- building ---------------------------------------------------------------------------------------


class TransformersClassifier(ModuleClassifier):
    """A network of transformers, whose position embeddings are interpolated for images of another size."""

    def call_options(self, images: Tensor) -> dict[str, Any]:
        """Return interpolate_pos_encoding=True if the network takes it and the images are not of its size."""
        vision = getattr(self.inner.config, "vision_config", self.inner.config)
        takes_it = "interpolate_pos_encoding" in inspect.signature(self.inner.forward).parameters
        if not takes_it or getattr(vision, "image_size", None) in (None, images.shape[-1]):
            return {}
        return {"interpolate_pos_encoding": True}


class Headed(nn.Module):
    """A trunk with a linear head on its embedding: a new one, or the texts of prompts.

    The embedding of a trunk is its pooled output, of one without such an output its first token, or the average of its
    grid.
    """

    def __init__(self, trunk: Any, outputs: int, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk, self.config = trunk, trunk.config
        self.projection = projection or nn.Identity()
        self.is_normalized = False
        width = getattr(projection, "out_features", None)
        if width is None:
            sizes = getattr(self.config, "hidden_sizes", None)
            width = sizes[-1] if sizes else self.config.hidden_size
        self.head = nn.Linear(width, outputs)

    def forward(self, images: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        more = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
        output = self.trunk(images, **more)
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            last = output.last_hidden_state
            pooled = last[:, 0] if last.ndim == 3 else last.mean(dim=(2, 3))
        embedding = self.projection(pooled.flatten(1))
        if self.is_normalized:
            embedding = normalize(embedding, dim=1)
        logits: Tensor = self.head(embedding)
        return logits


def build_transformers(config: TransformersModelConfig, outputs: int) -> Classifier:
    """Build the network with published weights for `weights: pretrained`, otherwise with new ones.

    Raises:
        WeightsError: If the folder or the hub has no such weights.
        ConfigError: If prompts are named for a network that reads no texts.
    """
    options = _load(config, AutoConfig)
    require(
        config.prompts is None or options.model_type in _TWO_TOWERS,
        f"prompts={config.prompts}: {config.name} is of type {options.model_type}, which reads no texts; leave it "
        "out, or choose CLIP or SigLIP",
    )
    kind = getattr(transformers, _classifier_of(options), AutoModel)
    if kind is not AutoModel:
        options.num_labels = outputs
    if config.input_size and not is_published(config.weights) and hasattr(options, "image_size"):
        options.image_size = config.input_size
    network = _network_of(config, kind, options)
    if options.model_type in _TWO_TOWERS and kind is AutoModel:
        network = _image_tower(config, network, outputs)
    elif kind is AutoModel:
        network = Headed(network, outputs)
    return TransformersClassifier(
        network,
        config.layer,
        Normalize(*model_normalization(config)),
        layout=config.layout,
        may_initialize=config.weights is None,
    )


def _network_of(config: TransformersModelConfig, kind: Any, options: Any) -> Any:
    """Return the library's network in float32, with the published weights if they are asked for.

    Raises:
        WeightsError: If weights are missing, other than those of a head for other classes.
    """
    if not is_published(config.weights):
        return kind._from_config(options) if kind is not AutoModel else kind.from_config(options)
    network, report = _load(
        config,
        kind,
        config=options,
        use_safetensors=True,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    missing = {str(key) for key in report["missing_keys"]}
    if missing and all(key.startswith("pooler.") for key in missing):
        network.pooler = None  # it would be an untrained one
        missing = set()
    others = [
        key
        for key, *_ in report["mismatched_keys"]
        if "classifier" not in key and "head" not in key
    ]
    if missing or others:
        raise WeightsError(
            f"{config.name} lacks weights of {type(network).__name__}: {shorten(sorted([*missing, *others]), 3)}; name "
            "a folder that has them, or weights=random for an untrained network"
        )
    return network


def _image_tower(config: TransformersModelConfig, network: Any, outputs: int) -> Headed:
    """Return the images' tower of CLIP or SigLIP, with the texts of the prompts as its head if there are any."""
    projection = getattr(network, "visual_projection", None)
    if config.prompts is None:
        return Headed(network.vision_model, outputs, projection)
    prompts = _read_prompts(config)
    require(
        len(prompts) == outputs,
        f"prompts={config.prompts} has {len(prompts)} lines, and there are {outputs} classes; write a line for each",
    )
    tower = Headed(network.vision_model, outputs, projection)
    tokenizer = _load(config, AutoTokenizer)
    is_clip = network.config.model_type == "clip"
    padding = True if is_clip else "max_length"  # as in their trainings
    tokens = tokenizer(prompts, padding=padding, truncation=True, return_tensors="pt")
    mask = {"attention_mask": tokens["attention_mask"]} if is_clip else {}
    with torch.no_grad():
        texts = network.eval().get_text_features(input_ids=tokens["input_ids"], **mask)
        texts = normalize(getattr(texts, "pooler_output", texts), dim=1)
        tower.head.weight.copy_(network.logit_scale.exp() * texts)
        tower.head.bias.copy_(getattr(network, "logit_bias", torch.zeros(1)).expand(outputs))
    tower.is_normalized = True
    return tower


def save_pretrained(folder: Path, model: Classifier, trained: Any) -> None:
    """Write config.json and model.safetensors as the library does, and the processor of the network's source.

    Args:
        folder: Folder to write.
        model: Trained network.
        trained: Its description.

    Raises:
        ConfigError: If the network is a trunk, for whose head the library has no class.
        FileError: If the folder cannot be written.
    """
    network: Any = model.network
    require(
        not isinstance(network, Headed),
        f"transformers has no class for {type(network.trunk).__name__} with a head; choose another format"
        if isinstance(network, Headed)
        else "",
    )
    network.config.id2label = dict(enumerate(trained.classes))
    network.config.label2id = {name: number for number, name in enumerate(trained.classes)}
    try:
        with _quiet():
            network.save_pretrained(folder)
            _load(trained.config, AutoImageProcessor).save_pretrained(folder)
    except OSError as error:
        raise FileError(f"{folder} cannot be written ({first_line(error)})") from error


PROVIDER = Provider(build_transformers, published_transformers, save_pretrained)
