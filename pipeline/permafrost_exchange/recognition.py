"""Recognition of the format of targets by their files, for an ingest that names none.

A few files are examined, and one of them is read as the reader of its format would read it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from permafrost.core.errors import ConfigError, UserError, require
from permafrost.storage.files import file_at, iter_lines
from permafrost_exchange.formats.reinforced import RECIPES_CONFIG
from permafrost_exchange.share_format import SHARE_NAME
from permafrost_exchange.target_reader import TargetError, load_pickled
from permafrost_sources.tar_members import list_samples

_LOOKED_AT = 2000
"""Number of files of a folder that are examined."""
_TORCH_ZIP = b"PK\x03\x04"


class Recognition(NamedTuple):
    """Format of some files."""

    kind: str
    """Option format=, empty for files of another format."""
    text: str
    """Description of the files, for a message."""
    options: tuple[str, ...] = ()
    """Options that the files need in addition to format=."""
    lacks: tuple[str, ...] = ()
    """Missing parts."""


def require_arrays(typed: str) -> None:
    """Check that a path is a file of arrays, which is read where no format is named.

    Args:
        typed: Option path=, a file or folder of targets.

    Raises:
        ConfigError: If it is something else. The message says which format it has, and what is missing.
    """
    if (path := Path(typed).absolute()).suffix in (".npz", ".npy") and not path.is_dir():
        return
    require(path.exists(), f"path={typed} does not exist; name the file or folder of the targets")
    recognized = recognize(path)
    require(bool(recognized.kind), f"path={typed} has {recognized.text}")
    settings = ", ".join([f"format={recognized.kind}", *recognized.options])
    missing = f"; it lacks {', and '.join(recognized.lacks)}" if recognized.lacks else ""
    raise ConfigError(
        f"path={typed} has {recognized.text}, and no format is named{missing}; set {settings}"
    )


def recognize(path: Path) -> Recognition:
    """Say which format a file or folder of targets has, and what of it is missing.

    Args:
        path: The file, or the folder.
    """
    if path.is_file():
        return _recognize_file(path)
    if (path / SHARE_NAME).is_file():
        text = "a folder that permafrost share has written; type permafrost attach from=<folder>"
        return Recognition("", text)
    lacks = tuple(
        f"the folder {name}" for name in ("img_emb", "metadata") if not (path / name).is_dir()
    )
    if len(lacks) < 2:
        return Recognition("embeddings", "embeddings of clip-retrieval", _FRAME, lacks)
    files = list(islice(_files(path), _LOOKED_AT))
    first = next((file for file in files if re.fullmatch(r"rank\d+-keys\.txt", file.name)), None)
    if first is not None:
        return _recognize_epoch(path, first)
    names = {file.name for file in files}
    if any(name.endswith(".pth.tar") for name in names):
        is_whole = (path / RECIPES_CONFIG).is_file()
        lacks = () if is_whole else (f"{RECIPES_CONFIG}, which says what recipes mean",)
        return Recognition("imagenet_plus", "reinforced data of ml-dr", _CLASSES, lacks)
    for suffix in (".tar", ".pt", ".parquet", ".npz", ".npy"):
        first = next((file for file in files if file.name.endswith(suffix)), None)
        if first is not None:
            return _recognize_file(first)
    shown = ", ".join(sorted(names)[:3])
    return Recognition(
        "", f"files of another format than those that ingest reads ({shown or 'none'})"
    )


_FRAME = (
    "format.frame= to the part of each image that the teacher received (full, center_crop or unknown)",
)
_CLASSES = ("format.classes= to the number of the teacher's classes (1,000 if it is left out)",)
_POSITION = "format.join=position, as they are named by numbers"


def _files(folder: Path) -> Iterator[Path]:
    """Iterate over the files below a folder in a fixed order."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(root, name) for name in sorted(names))


def _recognize_epoch(path: Path, first: Path) -> Recognition:
    lacks = []
    if first.parent != path:
        lacks.append(f"the name of one epoch: set path={first.parent}")
    if not (values := first.with_name(first.name.replace("-keys.txt", "-values.bin"))).is_file():
        lacks.append(f"{values.name} next to {first.name}")
    options = (*_CLASSES, *([_POSITION] if next(iter_lines(first), "").isdigit() else []))
    return Recognition("tinyvit", "logits of an epoch of TinyViT", options, tuple(lacks))


def _recognize_file(path: Path) -> Recognition:
    if path.suffix in (".npz", ".npy"):
        lacks = () if path.suffix == ".npz" else ("format.names=FILE with the name of each row",)
        return Recognition("npz", "NumPy arrays", _FRAME, lacks)
    if path.suffix == ".parquet":
        return Recognition("parquet", "a table", _FRAME)
    try:
        if path.suffix == ".tar":
            with file_at(path).open() as file:
                is_tar = file.read(4) != _TORCH_ZIP
            if is_tar:
                return _recognize_tar(path)
        return _recognize_content(path, load_pickled(path))
    except UserError as error:
        return Recognition("", f"files of another format than those that ingest reads ({error})")


def _recognize_tar(path: Path) -> Recognition:
    _, members = next(iter(list_samples(path)), ("", {}))
    suffixes = {name.rpartition(".")[2] if "." in name else name for name in members}
    if "paug.json" in members:
        parts = {
            "embeddings (.npz or .pth.gz)": {"npz", "pth.gz"},
            ".json with the SHA-256 of each image: set format.join=key or stem": {"json"},
        }
        lacks = tuple(text for text, kinds in parts.items() if not kinds & members.keys())
        return Recognition("datacompdr", "views of DataCompDR", (), lacks)
    if "safetensors" in suffixes:
        return Recognition("theia", "features of Theia")
    shown = ", ".join(sorted(members)[:4])
    return Recognition(
        "", f"tars with {shown}, which are not targets of a format that ingest reads"
    )


def _recognize_content(path: Path, content: Any) -> Recognition:
    if isinstance(content, list) and len(content) == 3 and np.ndim(content[0]) == 2:
        return Recognition("fkd", "soft labels of FKD", _CLASSES)
    if isinstance(content, dict) and {"output", "ouptut"} & content.keys():
        maps = {"weight", "grad_cam"} & content.keys()
        lacks = () if maps else ("maps (weight or grad_cam); logits alone are read",)
        return Recognition("e2kd", "frozen outputs of e2KD's code", _FRAME, lacks)
    if isinstance(content, np.ndarray) and content.ndim == 4 and len(content) == 2:
        return Recognition("relabel", "label maps of ReLabel", _CLASSES)
    raise TargetError(f"{path.name} has a {type(content).__name__}")
