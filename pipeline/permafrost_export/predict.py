# mypy: ignore-errors
"""Names the classes of image files by student.onnx: python predict.py student.onnx FILE..."""

import json
import os
import sys

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime reports to its maker otherwise
import onnxruntime
from PIL import Image, ImageOps


def decode(path, bit_range=(0, 65535)):
    """Return the pixels u8 [H, W, 3] that a store has: upright, 16 bits scaled to 8, transparency on white."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # 16 bits of gray, which convert would clip
        black, white = bit_range
        scaled = (np.asarray(image).astype(float) - black) * (255 / (white - black))
        return np.rint(scaled.clip(0, 255)).astype(np.uint8)[..., None].repeat(3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
classes, bit_range = json.loads(facts["classes"]), json.loads(facts["bit_range"])
for path in sys.argv[2:]:
    try:
        pixels = decode(path, bit_range).transpose(2, 0, 1)[None]  # u8 [1, 3, H, W]
    except OSError as error:
        sys.exit(f"{path} cannot be read: {error}")
    (logits,) = session.run(["logits"], {"images": pixels})
    if facts["labels"] == "many":  # each class has a probability and a threshold of its own
        probabilities = 1 / (1 + np.exp(-logits[0].astype(float)))
        chosen = np.flatnonzero(probabilities >= json.loads(facts["thresholds"]))
    else:
        probabilities = np.exp(logits[0] - np.logaddexp.reduce(logits[0]))
        chosen = [int(probabilities.argmax())]
    print(path, ", ".join(f"{classes[c]} {probabilities[c]:.3f}" for c in chosen) or "none")
