"""The extension that makes torch's CUDA build accept a device that is not there, compiled once for each torch."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("device.cpp")


def missing_part() -> str | None:
    """Return why there can be no pretended GPU here, None if there can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build"
    if torch.cuda.is_available():
        return "this machine has a GPU"
    if shutil.which("g++") is None:
        return "there is no g++"
    return None


def load_extension() -> Any:
    """Compile the extension, unless that was done before, and import it."""
    text = SOURCE.read_bytes() + torch.__version__.encode() + sysconfig.get_platform().encode()
    folder = Path(tempfile.gettempdir()) / f"pretended-gpu-{hashlib.sha256(text).hexdigest()[:16]}"
    path = folder / "pretended_cuda.so"
    if not path.exists():
        _compile(path)
    spec = importlib.util.spec_from_file_location("pretended_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(path: Path) -> None:
    root = Path(torch.__path__[0])
    folders = [
        root / "include",
        root / "include/torch/csrc/api/include",
        sysconfig.get_paths()["include"],
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        subprocess.run(
            ["g++", "-O1", "-fPIC", "-shared", "-std=c++20", str(SOURCE), "-o", str(made)]
            + [f"-I{folder}" for folder in folders]
            + [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", "-ltorch_python"],
            check=True,
        )
        made.rename(path)
