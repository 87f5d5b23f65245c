"""Golden outputs: bytes of given images and arrays in a store, and numbers of a teacher, a student and its evaluation.

Bytes that depend on no float are compared exactly on every machine. What a network computes is rounded differently by
every processor and version of torch, so its numbers are compared up to TOLERANCE, and its bytes only between two runs
on the same machine. Record new outputs in tests/golden.json with this command, and give the reason in the commit:

    python -m tests.test_golden
"""

from __future__ import annotations

import hashlib
import json
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from permafrost.config.augment import AugmentOptions, OperationConfig
from permafrost.config.data import ImageFolderDataConfig
from permafrost.config.distillation import DistillConfig
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.methods import E2KDConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import PassOptions, StoreOptions, SubsetOptions
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.records import FieldSpec
from permafrost.models.providers import build_model
from permafrost.runs.mirrors import RUNS
from permafrost.store.fields import WebDatasetFields
from permafrost.store.reader import Store
from permafrost.store.zarr_fields import ZarrFields
from permafrost.training.metric_log import read_metrics
from tests.support.images import png_of_stream
from tests.support.index_table import index_table
from tests.support.stores import precompute_config
from tests.support.tensors import encode_maxabs
from tests.support.verbs import distill, evaluate, precompute

pytestmark = pytest.mark.usefixtures("records_drawn_anew")
GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 50
TOLERANCE = 2e-2
"""Relative difference that is allowed between numbers of two machines. Kernels for AVX2 and AVX-512 differ by 2e-3
after these 50 steps, and a changed method differs by more than 2e-2."""
_COUNTS = ("accuracy", "agreement", "fraction", "iou", "per_second")
"""Parts of the names of numbers that are left out: times, and shares of few records or pixels, one of which a rounding
may move."""


# ---- bytes of given images and arrays ------------------------------------------------------------


def sha256(parts: Iterable[bytes]) -> str:
    """Digest of all parts, independent of their order."""
    digests = sorted(hashlib.sha256(part).digest() for part in parts)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode a grayscale image without compression, whose bytes would depend on the version of zlib."""
    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    block = b"\x01" + struct.pack("<HH", len(rows), len(rows) ^ 0xFFFF) + rows
    stream = b"\x78\x01" + block + struct.pack(">I", zlib.adler32(rows))
    return png_of_stream(width, height, 8, 0, stream)


def write_images(folder: Path) -> ImageFolderDataConfig:
    """Write 28 images of 16x16 pixels in two splits and two classes."""
    for number in range(28):
        path = folder / ("train", "test")[number % 4 == 3] / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png((np.arange(256).reshape(16, 16) * (number + 1)).astype("u1")))
    return ImageFolderDataConfig(path=str(folder))


def given_arrays(rows: int) -> tuple[tuple[FieldSpec, ...], dict[str, np.ndarray]]:
    """Fields of all types and codecs, and values whose encoding rounds no sum."""
    numbers = np.arange(rows * 48, dtype=np.float32).reshape(rows, 1, 3, 4, 4) - 300
    moved = {"when_moved": "warp", "frame": "full"}
    specs, values = [], {}
    for dtype in ("float32", "float16", "int8"):
        encoded, scale = encode_maxabs(numbers, dtype, (-2, -1))
        name = f"map_{dtype}"
        specs += [
            FieldSpec(name=name, shape=(3, 4, 4), dtype=dtype, codec="maxabs", **moved),
            FieldSpec(name=f"{name}_scale", shape=(3,), dtype="float32"),
        ]
        values |= {name: encoded, f"{name}_scale": scale}
    specs.append(FieldSpec(name="target_class", shape=(1,), dtype="int32"))
    values["target_class"] = np.arange(rows, dtype=np.int32).reshape(rows, 1, 1)
    return tuple(specs), values


def golden_bytes(folder: Path) -> dict[str, Any]:
    """Write given images and arrays to stores in `folder`, and return digests of their bytes."""
    data = write_images(folder / "images")
    found: dict[str, Any] = {}
    for kind in ("original", "raw"):
        path = folder / kind
        precompute.run(precompute_config(path, data=data, shard_size=8, format=kind, image_size=16))
        store = Store(path)
        # Versions of Arrow write the same table in different bytes, so files of tables are compared by their rows.
        rows = index_table(store).to_pylist()
        manifest = json.loads((path / "manifest.json").read_text())
        for name in ("self_sha256", "index", "shards"):
            del manifest[name]
        found[kind] = {
            "shards": {
                shard.path: hashlib.sha256((path / shard.path).read_bytes()).hexdigest()
                for shard in store.manifest.shards
            },
            "rows": sha256(repr(sorted(row.items())).encode() for row in rows),
            "manifest": manifest,
        }
    specs, values = given_arrays(5)
    keys = [f"key{row}" for row in range(5)]
    for layout in (
        ZarrFields(folder / "zarr", specs, 1, 8, 1),
        WebDatasetFields(folder / "webdataset", specs, 1, 8, 1),
    ):
        layout.folder.mkdir()
        layout.create()
        layout.write_shard(0, "train-000000", keys, values)
        found[layout.folder.name] = {
            str(path.relative_to(layout.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(layout.folder.rglob("*"))
            if path.is_file()
        }
    return found


def test_bytes_of_given_images_and_arrays_are_what_they_were(tmp_path: Path) -> None:
    assert golden_bytes(tmp_path) == json.loads(GOLDEN.read_text())["bytes"]


# ---- numbers that a network computes -------------------------------------------------------------


def members(tar: Path) -> list[bytes]:
    with tarfile.open(tar) as archive:
        return [archive.extractfile(member).read() for member in archive]


def summary(array: np.ndarray) -> list[float]:
    """Mean, standard deviation and largest magnitude."""
    values = np.asarray(array, dtype=np.float64)
    return [float(values.mean()), float(values.std()), float(np.abs(values).max())]


def pass_bytes(store: Store) -> str:
    """Digest of the arrays of a store's pass."""
    (teacher,) = store.open_passes()
    files = [
        path
        for path in sorted(Path(str(teacher.folder)).rglob("*"))
        if path.is_file() and path.suffix not in (".json", ".parquet")
    ]
    return sha256(
        part for f in files for part in (members(f) if f.suffix == ".tar" else [f.read_bytes()])
    )


def pass_numbers(store: Store) -> dict[str, list[float]]:
    """Summaries of the fields of the first shard for training."""
    (teacher,) = store.open_passes()
    shard = next(shard for shard in store.manifest.shards if shard.split == "train")
    rows = teacher.read_shard(shard)
    return {
        name: summary(rows[name])
        for name in sorted(rows)
        if np.size(rows[name]) and name != "target_class"
    }


def continuous(values: dict[str, Any]) -> dict[str, float]:
    """Numbers that change as little as their inputs do."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, float) and not any(part in name for part in _COUNTS)
    }


def golden_run(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Run the three stages in `folder`, and return the numbers and the digests of their outputs."""
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = CifarModelConfig(name="resnet8", width=4)
    weights = folder / "teacher.safetensors"
    save_file(build_model(teacher, 10).state_dict(), weights)
    teacher = replace(teacher, weights=str(weights))
    annotate = PassOptions(
        batch_size=8, outputs=("logits", "maps", "attention", "class_maps", "pooled")
    )
    numbers: dict[str, Any] = {}
    digests: dict[str, str] = {}
    for backend in ("zarr", "webdataset"):
        path = folder / backend
        precompute.run(precompute_config(path, teacher, backend=backend, annotate=annotate))
        numbers[backend] = pass_numbers(Store(path))
        digests[backend] = pass_bytes(Store(path))
    store = StoreOptions(path=str(folder / "zarr"))
    distill.run(
        DistillConfig(
            store=store,
            student=replace(teacher, weights=None),
            method=E2KDConfig(tau=4.0),
            augment=AugmentOptions(operations=(OperationConfig(kind="pad_crop", padding=2),)),
            optimizer=OptimizerOptions(),
            trainer=TrainerOptions(epochs=10, batch_size=8, num_threads=1, log_every_steps=10),
            subset=SubsetOptions(),
            run=str(folder / "run"),
        )
    )
    student = RUNS / folder / "run" / "distill"
    state = load_file(student / "model.safetensors")
    log = list(read_metrics(student, STEPS))
    assert log[-1]["step"] == STEPS
    digests["student"] = sha256(tensor.numpy().tobytes() for tensor in state.values())
    numbers["student"] = [continuous(line) for line in log]
    options = EvaluateOptions(splits=("test",), num_pictures=4)
    evaluate.run(EvaluateConfig(store=store, evaluate=options, run=str(folder / "run")))
    measured = json.loads((student.parent / "evaluate" / "metrics.json").read_text())["splits"]
    digests["evaluation"] = sha256([json.dumps(measured, sort_keys=True).encode()])
    numbers["evaluation"] = continuous(measured["test"])
    return numbers, digests


def differences(found: Any, recorded: Any, path: str = "") -> list[str]:
    """Lines that describe numbers of two trees that differ by more than the tolerance."""
    if isinstance(recorded, dict | list):
        named = recorded if isinstance(recorded, dict) else range(len(recorded))
        assert len(found) == len(recorded), path
        return [
            line
            for name in named
            for line in differences(found[name], recorded[name], f"{path}/{name}")
        ]
    same = found == pytest.approx(recorded, rel=TOLERANCE, abs=1e-3)
    return [] if same else [f"{path}: {found}, recorded {recorded}"]


def test_a_network_computes_what_it_did_and_the_same_bytes_twice(tmp_path: Path) -> None:
    numbers, digests = golden_run(tmp_path / "one")
    _, again = golden_run(tmp_path / "two")

    assert digests == again
    recorded = json.loads(GOLDEN.read_text())["numbers"]
    assert not differences(numbers, recorded)
    # Negative control: a loss that differs by a twentieth is a difference in each of its lines.
    moved = [line | {"kd": line["kd"] * 1.05} for line in numbers["student"]]
    assert len(differences(numbers | {"student": moved}, recorded)) == len(moved)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        values = {"bytes": golden_bytes(Path(place)), "numbers": golden_run(Path(place) / "run")[0]}
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n")
