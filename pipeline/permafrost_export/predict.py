# mypy: ignore-errors
"""Names the classes of image files by student.onnx: python predict.py student.onnx FILE_OR_FOLDER...

A file that cannot be read is left out with its reason, and the exit code is then 1.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

with contextlib.suppress(ImportError):  # HEIC, as phones write it
    import pillow_heif

    pillow_heif.register_heif_opener()


def decode(path, bit_range=(0, 65535)):
    """Return the pixels u8 [H, W, 3] that a store has: upright, 16 bits scaled to 8, transparency on white."""
    image = Image.open(path)
    image.load()
    with contextlib.suppress(
        Exception
    ):  # of damaged EXIF data, without which a store reads it, too
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of gray, which convert would clip
        black, white = bit_range
        scaled = (np.asarray(image).astype(float) - black) * (255 / (white - black))
        return np.rint(scaled.clip(0, 255)).astype(np.uint8)[..., None].repeat(3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def resize_frame(pixels, size, crop=None, frames=None, **_):
    """Return the frame u8 [h, w, 3] of an image, resized as for the student's training: antialiased and rounded.

    Args:
        pixels: Pixels u8 [H, W, 3] of `decode`.
        size: (h, w) of the network's input.
        crop: Side of a center crop relative to the shorter side; None for the whole image.
        frames: (height, width) to which the whole image is resized before the crop; None to cut the image itself.
    """
    height, width = pixels.shape[:2]
    image, shorter = Image.fromarray(pixels), (crop or 0) * min(height, width)
    if frames is None and crop is not None:
        side = int(shorter + 0.5)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    image = image.resize((frames or size)[::-1], Image.Resampling.BILINEAR)
    if frames is None or (crop is None and frames == size):
        return np.asarray(image)
    parts = [shorter / side if crop else 1 for side in (width, height)]
    box = [
        (1 + sign * p) * n / 2 for sign in (-1, 1) for p, n in zip(parts, frames[::-1], strict=True)
    ]
    how = size[::-1], Image.Transform.EXTENT, box, Image.Resampling.BILINEAR
    bands = [np.asarray(band.convert("F").transform(*how)) for band in image.split()]
    return np.rint(np.stack(bands, axis=2)).astype(np.uint8)


def network_input(path, facts):
    """Return the input u8 [1, 3, H, W] of a program for a file.

    Args:
        path: File, or an open one.
        facts: Metadata of the program.
    """
    pixels = decode(path, json.loads(facts["bit_range"]))
    if "resize_before" in facts:  # a program of frames
        pixels = resize_frame(pixels, **json.loads(facts["resize_before"]))
    return pixels.transpose(2, 0, 1)[None]


def name_classes(session, path):
    """Return the predicted classes of a file with their probabilities, as text."""
    facts = session.get_modelmeta().custom_metadata_map
    pixels, classes = network_input(path, facts), json.loads(facts["classes"])
    (logits,) = session.run(["logits"], {session.get_inputs()[0].name: pixels})
    if facts["labels"] == "many":  # each class has a probability and a threshold of its own
        probabilities = 1 / (1 + np.exp(-logits[0].astype(float)))
        chosen = np.flatnonzero(probabilities >= json.loads(facts["thresholds"]))
    else:
        probabilities = np.exp(logits[0] - np.logaddexp.reduce(logits[0]))
        chosen = [int(probabilities.argmax())]
    return ", ".join(f"{classes[c]} {probabilities[c]:.3f}" for c in chosen) or "none"


def print_classes(program, *paths):
    """Print the classes of each file, and end with an error if files were left out."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else onnxruntime reports to its maker
    import onnxruntime

    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    left_out = []
    for path in paths:
        for file in sorted(p for p in Path(path).rglob("*") if p.is_file()) or [path]:
            try:
                print(file, name_classes(session, file))
            except Exception as error:  # Pillow's parsers raise many types of exceptions
                hint = "; HEIC needs pillow-heif" * ("identify" in str(error))
                print(f"left out: {file} ({error}{hint})", file=sys.stderr)
                left_out.append(file)
    if left_out:
        sys.exit(f"files left out: {len(left_out)}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    print_classes(*sys.argv[1:])
