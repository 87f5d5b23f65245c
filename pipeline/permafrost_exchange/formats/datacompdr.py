"""Reader of DataCompDR (apple/ml-mobileclip-dr): embeddings of views of images that are fetched elsewhere.

<uid>.paug.json             {"param_aug": JSON text of a list of recipes}
<uid>.npz or <uid>.pth.gz   image_emb [V, d], float32 or bfloat16
<uid>.json                  {"uid": ..., "sha256": of the image's file}
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.storage.untrusted import FormatError, parse_npy
from permafrost_exchange.formats.compressed_recipes import (
    RECIPE_REMARK,
    RecipeLayout,
    convert_recipes,
)
from permafrost_exchange.formats.tar_targets import TarReader, member_bytes
from permafrost_exchange.target_reader import (
    MAX_TARGET_BYTES,
    Arrays,
    ReadRequest,
    TargetError,
    TargetForm,
    unpickled,
)
from permafrost_sources.tar_members import Member

_EMBEDDING = "image_emb"
_OPERATIONS = 2
"""Operations of its RandAugment."""


class DataCompDRReader(TarReader):
    """Recipes as stored views, with the embedding of each."""

    members = ("json", "npz", "pth.gz")
    turns_photographs = False

    def name_of(self, path: Path, key: str, members: dict[str, Member]) -> str:
        if self.config.join in ("key", "stem"):
            return key
        require(
            "json" in members,
            f"{path}: {key} has no .json with the SHA-256 of its image",
            TargetError,
        )
        values = _parse(member_bytes(path, members["json"], f"{key}.json"), f"{path}: {key}.json")
        digest = values.get("sha256")
        if not isinstance(digest, str):
            raise TargetError(f"{path}: {key}.json has no sha256; set format.join=key")
        return digest

    def form(self) -> TargetForm:
        return TargetForm(
            frame="full",
            operations=self._layout.operations,
            remarks=(RECIPE_REMARK,),
        )

    @property
    def _layout(self) -> RecipeLayout:
        names = ("random_resized_crop", "rand_augment")
        return RecipeLayout(names=names, crop=self.config.size, num_operations=_OPERATIONS)

    def parse(
        self, members: dict[str, bytes], request: ReadRequest, row: int, where: str
    ) -> Arrays:
        text = _parse(members.get("paug.json", b"{}"), where).get("param_aug")
        if not isinstance(text, (str, list)):
            raise ValueError("it has no param_aug in .paug.json")
        recipes = json.loads(text) if isinstance(text, str) else text
        if (embeddings := _embeddings(members, where)).ndim != 2 or len(recipes) != len(embeddings):
            raise ValueError(
                f"it has {len(recipes)} recipes, and embeddings {list(embeddings.shape)}"
            )
        count = self.config.views or len(recipes)
        require(
            len(recipes) >= count,
            f"it has {len(recipes)} views, and format.views={count}",
            ValueError,
        )
        views = convert_recipes(
            recipes[:count],
            self._layout,
            int(request.heights[row]),
            int(request.widths[row]),
        )
        return {**views, "pooled": embeddings[:count]}


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TargetError(f"{where} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise TargetError(f"{where} is not a mapping")
    return values


def _embeddings(members: dict[str, bytes], where: str) -> NDArray[Any]:
    if "npz" in members:
        try:
            with zipfile.ZipFile(io.BytesIO(members["npz"])) as archive:
                if (info := archive.getinfo(f"{_EMBEDDING}.npy")).file_size > MAX_TARGET_BYTES:
                    raise ValueError(f"{_EMBEDDING} would have {info.file_size:,} bytes")
                return parse_npy(archive.read(info), "f", (None, None))
        except (zipfile.BadZipFile, KeyError, FormatError, EOFError) as error:
            raise ValueError(f"its .npz has no {_EMBEDDING} that can be read: {error}") from error
    require("pth.gz" in members, "it has neither .npz nor .pth.gz", ValueError)
    with gzip.open(io.BytesIO(members["pth.gz"])) as file:
        data = file.read(MAX_TARGET_BYTES + 1)
    require(
        len(data) <= MAX_TARGET_BYTES,
        f"its .pth.gz unpacks to more than {MAX_TARGET_BYTES:,} bytes",
        ValueError,
    )
    return np.asarray(unpickled(data, f"{where}.pth.gz")[_EMBEDDING])
