"""Reader of the features of Theia (rai-opensource/theia): tars of safetensors of one teacher.

<teacher>/<set>-<number>.tar    <stem>.<teacher>.safetensors or <stem>.safetensors
    embedding    bfloat16 [C, h, w]
    cls_token    bfloat16 [C], of teachers that have one
"""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from permafrost.exchange.tar_targets import TarReader
from permafrost.exchange.target_reader import Arrays, ReadRequest, TargetForm

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 2**16
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class TheiaReader(TarReader):
    """Dense features, and the class token as an embedding."""

    members = ("safetensors",)

    def form(self) -> TargetForm:
        return TargetForm(
            frame="full",
            remarks=(
                "the teachers received images of 224 pixels that were resized before; bfloat16 is stored in "
                "format.dtype, relative to the largest value of each channel",
            ),
        )

    def parse(
        self, members: dict[str, bytes], request: ReadRequest, row: int, where: str
    ) -> Arrays:
        tensors = read_tensors(next(iter(members.values())))
        embedding = tensors.get("embedding")
        if embedding is None or embedding.ndim != 3:
            raise ValueError(f"it has {', '.join(tensors)}, and no embedding [C, h, w]")
        arrays = {"features_1": embedding[None]}
        if "cls_token" in tensors:
            arrays["pooled"] = tensors["cls_token"].reshape(1, -1)
        return arrays


def read_tensors(data: bytes) -> dict[str, NDArray[np.generic]]:
    """Return the tensors of a safetensors file as arrays, bfloat16 as float32.

    Args:
        data: The whole file.

    Raises:
        ValueError: If it is another file.
    """
    size = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if size > min(_MOST_HEADER_BYTES, len(data)):
        raise ValueError("its header is not that of safetensors")
    header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + size])
    body = memoryview(data)[_LENGTH_BYTES + size :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        values = np.frombuffer(body[start:stop], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            values = (values.astype("<u4") << 16).view("<f4")
        tensors[name] = values
    return tensors
