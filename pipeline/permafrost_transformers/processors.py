"""Image processors of transformers, read as the options of an input and compared with what they compute."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.image_utils import SizeDict

from permafrost.core.errors import require
from permafrost.core.progress import log_once
from permafrost.models.classifier import PretrainedInfo, nearly_equal

logger = logging.getLogger("permafrost.models")

OPTIONS = "mean=, std=, input_size= and frame="
_FOLLOWED = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
"""Options that take the place of a processor."""
_RESAMPLE: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}


def read_processor(folder: Path, info: PretrainedInfo, name: str) -> PretrainedInfo:
    """Return the facts about a network with those of its image processor, which is compared with them.

    Args:
        folder: Folder of the network.
        info: Facts about the network.
        name: Name of the network, for messages.

    Raises:
        ConfigError: If the folder has no image processor, or its fields or its class ask for what no option does.
    """
    files = ("preprocessor_config.json", "processor_config.json")
    require(
        any((folder / file).is_file() for file in files),
        f"{name} has no preprocessor_config.json, which says how its images are prepared; put that of the original "
        f"network into its folder, or set {OPTIONS}",
    )
    processor: Any = AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False)
    kind, size, fields = type(processor).__name__, processor.size or SizeDict(), vars(processor)
    shorter, percent = size.shortest_edge, fields.get("crop_pct")
    crop = processor.crop_size if fields.get("do_center_crop") else None
    side = crop.height if crop else shorter if percent else size.height
    # Fields of processors that cut an image of any size into patches or tiles.
    are_followed = {
        **{step: not fields[step] for step in sorted({*fields} - _FOLLOWED) if step[:3] == "do_"},
        **{
            field: fields.get(field) is None
            for field in ("max_num_patches", "image_grid_pinpoints", "min_pixels", "max_pixels")
        },
        "do_resize": processor.do_resize,
        "resample": processor.resample in _RESAMPLE,
        "size": side and not size.longest_edge and (shorter or size.height == size.width),
        "crop_size": not crop
        or crop.height == crop.width == (size.height or crop.width) <= (shorter or crop.width),
    }
    for field, is_followed in are_followed.items():
        require(
            bool(is_followed),
            f"{name}: its {kind} has {field}={fields.get(field)}, which no option follows; choose another "
            f"network, or set {OPTIONS}, which replace the processor",
        )
    is_squashed = not shorter or (percent and not crop and shorter >= 384)  # ConvNeXt squashes
    resized = None if is_squashed else int(shorter / (percent or 1))
    # Mean and std are those of pixels in [0, 1].
    scale = round(255 * processor.rescale_factor, 6) if processor.do_rescale else 255
    moments = (
        (processor.image_mean, processor.image_std)
        if processor.do_normalize
        else ((0,) * 3, (1,) * 3)
    )
    mean, std = (tuple(float(value / scale) for value in values) for values in moments)
    info = info._replace(
        input_size=side,
        crop_fraction=side / resized if resized else None,
        interpolation=_RESAMPLE[processor.resample],
        mean=mean,
        std=std,
    )
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 320, 400), generator=generator, dtype=torch.uint8)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
    require(
        nearly_equal(pixels, prepare(image, info), 0.05),  # each step may round to 8 bits
        f"{name}: its {kind} computes other pixels than its fields say; choose another network, or set {OPTIONS}, "
        "which replace the processor",
    )
    part = "whole image" if resized is None else f"center crop of {info.crop_fraction:g}"
    log_once(
        logger,
        logging.INFO,
        f"images of {name} are prepared as by its {kind} ({processor.backend}): {part} at {side}x{side}, "
        f"{info.interpolation}",
    )
    return info


def prepare(image: Tensor, info: PretrainedInfo) -> Tensor:
    """Resize, crop and normalize an image as a processor of these facts does: u8 [3, H, W] -> f32 [3, s, s]."""
    side, fraction = info.input_size, info.crop_fraction
    size = [side, side] if fraction is None else [round(side / fraction)]
    resized = F.resize(image, size, F.InterpolationMode(info.interpolation), antialias=True)
    top, left = ((length - side) // 2 for length in resized.shape[1:])
    cropped: Tensor = resized[:, top : top + side, left : left + side] / 255
    return (cropped - torch.tensor(info.mean)[:, None, None]) / torch.tensor(info.std)[
        :, None, None
    ]
