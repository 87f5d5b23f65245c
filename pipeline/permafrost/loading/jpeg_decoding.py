"""Decoding of a batch's JPEGs on a device (torchvision, nvJPEG), resized to the canonical frame there.

The pixels of a GPU differ from those of the CPU by a level or two of 255, so a pass names its decoder, and its students
use the same one. Images that are not baseline JPEGs are decoded on the host and copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from permafrost.config.store import JpegDecoder
from permafrost.core.errors import ConfigError, require
from permafrost.core.records import EncodedImages
from permafrost.store.file_entry import ManifestError
from permafrost.store.frames import resize_frame


def require_decoder(
    decoder: JpegDecoder, device: torch.device, option: str, device_option: str
) -> None:
    """Raise ConfigError if a GPU is to decode, but `device` is none.

    option, device_option  names of the options that decide on the two, for messages
    """
    require(
        decoder == "cpu" or device.type == "cuda",
        f"{option}=cuda (or null, with a pass or a student that was made so) decodes JPEGs on a CUDA device, but "
        f"{device_option} is {device}; run it on a CUDA device, or set {option}=cpu (for a training, with a pass of "
        "annotate.jpeg_decoder=cpu)",
    )


def decode_images(encoded: EncodedImages, on_host: Tensor, device: torch.device) -> Tensor:
    """Decode a batch's images on a device, and return all its frames u8 [B, 3, H, W] with channels last in memory.

    on_host  frames that the host has decoded, in the order of `encoded.host_places`
    Raises ManifestError that names the file and the record that cannot be decoded.
    """
    memory = torch.empty(encoded.records, *encoded.size, 3, dtype=torch.uint8, device=device)
    frames = memory.permute(0, 3, 1, 2)
    for place, pixels in zip(encoded.places, _decode(encoded, device), strict=True):
        frames[place] = resize_frame(pixels, encoded.size)
    for place, frame in zip(encoded.host_places, on_host, strict=True):
        frames[place] = frame
    for place, first in encoded.repeated:
        frames[place] = frames[first]
    return frames


def _decode(encoded: EncodedImages, device: torch.device) -> list[Tensor]:
    """Decode all files at once: u8 [3, h, w] each, at their own size."""
    files = list(torch.split(encoded.data, list(encoded.lengths)))
    try:
        return _decode_jpegs(files, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        for file, where in zip(files, encoded.where, strict=True):
            try:
                _decode_jpegs([file], device)
            except RuntimeError as error:
                raise ManifestError(
                    f"{where} cannot be decoded on {device} ({error}); run permafrost verify, and if it finds no "
                    "damage, decode on the CPU (annotate.jpeg_decoder=cpu)"
                ) from error
        raise


def _decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    if device.type == "cuda":
        # The decoder writes on a stream of its own, into memory that earlier work of this stream may still read.
        torch.cuda.current_stream(device).synchronize()
    try:
        decoded: list[Tensor] = decode_jpeg(files, ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        if "nvJPEG support" in str(error):
            raise ConfigError(
                f"jpeg_decoder=cuda: {error}; install torchvision's wheel for CUDA, or decode on the CPU "
                "(annotate.jpeg_decoder=cpu)"
            ) from error
        raise
    return decoded
