"""Reader of the features of Theia (rai-opensource/theia): tars of safetensors of one teacher.

<teacher>/<set>-<number>.tar    <stem>.<teacher>.safetensors or <stem>.safetensors
    embedding    bfloat16 [C, h, w]
    cls_token    bfloat16 [C], of teachers that have one
"""

from __future__ import annotations

from safetensors.torch import load

from permafrost_exchange.formats.tar_targets import TarReader
from permafrost_exchange.target_reader import Arrays, ReadRequest, TargetForm


class TheiaReader(TarReader):
    """Dense features, and the class token as an embedding."""

    members = ("safetensors",)
    turns_photographs = False

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
        tensors = {
            name: tensor.float().numpy()
            for name, tensor in load(next(iter(members.values()))).items()
        }
        if (embedding := tensors.get("embedding")) is None or embedding.ndim != 3:
            raise ValueError(f"it has {', '.join(tensors)}, and no embedding [C, h, w]")
        arrays = {"features_1": embedding[None]}
        if "cls_token" in tensors:
            arrays["pooled"] = tensors["cls_token"].reshape(1, -1)
        return arrays
