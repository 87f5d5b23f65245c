"""Small, reproducible images."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import torch
from PIL import Image

from permafrost.store.image_decoding import decode_pixels
from permafrost.store.record_form import resize_pixels


def png(seed=0, height=8, width=10):
    decoded = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(decoded).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members, kind=tarfile.PAX_FORMAT, mode="w"):
    """Write a tar of {name: bytes, text or JSON}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=kind) as tar:
        for name, data in members.items():
            if not isinstance(data, (bytes, str)):
                data = json.dumps(data)
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_stream(width, height, bits, color_type, stream):
    """PNG whose compressed rows are given."""
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", stream), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_16(values):
    """PNG of 16 bits with 1 to 4 channels, [H, W, C]."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return png_of_stream(width, height, 16, color_type, zlib.compress(rows))


def decode_rgb(data):
    """Decode upright pixels u8 [3, H, W], with channels last in memory, as `decode_pixels` does."""
    return torch.from_numpy(decode_pixels(data)).permute(2, 0, 1)


def decode_frame(data, size):
    """Decode the whole image in the canonical frame of (height, width) `size`: u8 [3, H, W]."""
    return torch.from_numpy(resize_pixels(decode_pixels(data), size)).permute(2, 0, 1)
