"""Kinds of files and folders of weights by their content, and what converts those of other tools."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from permafrost.storage.files import file_at

_HEAD = 512
_MAX_HEADER = 2**30
"""Largest header of a safetensors file, in bytes."""
_PART = re.compile(r"-0*(\d+)-of-0*(\d+)\.\w+$")
"""Numbers in the name of a part of a network, as transformers writes them."""

_SAVE = "and save its state_dict() with torch.save"
_KERAS = "a network of Keras, whose layers have other axes; use the PyTorch network's own file"

_BEGINNINGS: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (lambda head: not head, "empty; fetch it again"),
    (lambda head: head.startswith(b"\x89HDF\r\n\x1a\n"), _KERAS),
    (
        lambda head: head.startswith(b"version https://git-lfs"),
        "a pointer of Git LFS and not the file; run git lfs pull",
    ),
    (
        lambda head: bool(re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE)),
        "a web page or XML; fetch the file itself",
    ),
    (
        lambda head: head.startswith(b"GGUF"),
        "a GGUF file of llama.cpp, usually quantized; use the PyTorch network's own file",
    ),
    (
        lambda head: head.startswith(b"\x93NUMPY"),
        "a NumPy array; save all tensors by their names with torch.save",
    ),
    (
        lambda head: head[4:8] == b"TFL3",
        "a program of TensorFlow Lite, which has no gradients; use the PyTorch network's own file",
    ),
    (
        lambda head: (
            head[:1] == b"\x08"
            and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x2a", b"\x3a", b"\x42")
        ),
        "an ONNX program, whose weights do not have PyTorch names; use the file that it was exported from",
    ),
    (
        lambda head: head[:1] in (b"\x81", b"\x82", b"\x83", b"\xde") and b"params" in head[:64],
        "a network of Flax; use the PyTorch network's own file, or convert it with transformers "
        "(from_pretrained(..., from_flax=True)), " + _SAVE,
    ),
    (
        lambda head: head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")),
        "a compressed file; decompress it first",
    ),
    (
        lambda head: head[257:262] == b"ustar",
        "a tar archive; unpack it and name the file of weights in it",
    ),
    (
        lambda head: bool(re.match(rb'\s*\{\s*"', head)),
        "a JSON file; if it is the index of a network in several files, join them (load the network with the library "
        "that saved it, " + _SAVE + ")",
    ),
)
"""Conditions on the first bytes, and what such a file is, with the fix."""

_MEMBERS: tuple[tuple[str, str], ...] = (
    (
        r"(^|/)constants\.pkl$|(^|/)code/",
        f"a TorchScript program; load it with torch.jit.load {_SAVE}",
    ),
    (
        r"(^|/)(archive_format|serialized_exported_program\.json|models/.*\.json)$",
        f"a program of torch.export; load it with torch.export.load {_SAVE}",
    ),
    (r"\.weights\.h5$", _KERAS),
    (
        r"\.npy$",
        "an archive of NumPy arrays; read it with numpy.load, and save its tensors by the names of the network with "
        "torch.save",
    ),
)
"""Patterns of the members of a zip archive, and what it is, with the fix."""

_FOLDERS: tuple[tuple[str, str], ...] = (
    (
        ".metadata",
        "a distributed checkpoint of torch; python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} "
        "weights.pt makes one file of it",
    ),
    (
        "zero_to_fp32.py",
        "a checkpoint of DeepSpeed; python {folder}/zero_to_fp32.py {folder} weights.pt makes one file of it",
    ),
    (
        "*mp_rank_*_model_states.pt",
        "a checkpoint of DeepSpeed; the zero_to_fp32.py in the folder above makes one file of it",
    ),
    ("saved_model.pb", "a SavedModel of TensorFlow; use the PyTorch network's own file"),
    ("manifest.ocdbt", "a checkpoint of Orbax (Flax); use the PyTorch network's own file"),
    (
        "adapter_config.json",
        "an adapter of a network; merge it (merge_and_unload of peft) and save that network",
    ),
    (
        "*.index.json",
        "a network in several files, listed in {member}; join them into one (load the network with the library that "
        "saved it, and save its state_dict())",
    ),
    (
        "data.pkl",
        "an unpacked file of torch; pack it again (zip -0 -r weights.pt <folder>, from the folder above)",
    ),
)
"""Members of a folder, and what such a folder is, with the fix."""


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as one of safetensors does, whatever its name is."""
    head = _head(path)
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < _MAX_HEADER


def describe_foreign_file(path: Path) -> str:
    """Say what a file is that is neither of torch nor of safetensors, and what converts it; empty if it may be.

    Raises:
        FileError: If it cannot be read.
    """
    head = _head(path)
    if is_safetensors(path):
        return ""
    if kind := next((what for is_such, what in _BEGINNINGS if is_such(head)), ""):
        return kind
    if not head.startswith(b"PK\x03\x04"):
        return ""
    try:
        with file_at(path).open() as file, zipfile.ZipFile(file) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, OSError):  # truncated, which its reader says
        return ""
    return next(
        (what for name, what in _MEMBERS if any(re.search(name, member) for member in members)), ""
    )


def describe_part(path: Path) -> str:
    """Say that a file is one of several parts of a network by its name, empty if it is not."""
    if (match := _PART.search(path.name)) is None:
        return ""
    return (
        f"it is part {match[1]} of {match[2]} of a network; join them (load the network with the library that saved "
        f"it, {_SAVE})"
    )


def describe_foreign_folder(folder: Path) -> str:
    """Say what a folder without a single file of weights is, and what converts it; empty if that is not known."""
    for pattern, what in _FOLDERS:
        if members := sorted(folder.glob(pattern)) or sorted(folder.glob(f"*/{pattern}")):
            return what.format(folder=folder, member=members[0].name)
    return ""


def _head(path: Path) -> bytes:
    with file_at(path).open() as file:
        return file.read(_HEAD)
