"""Golden outputs: a small store in both backends, a student after 50 steps, and its evaluation.

tests/golden.json contains SHA-256 digests of bytes and summaries of the same numbers. Digests are compared if torch
has the recorded version and CPU capability. Otherwise kernels round differently, and the summaries are compared.
Record new outputs with this command, and give the reason in the commit:

    python -m tests.test_golden
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.augment import AugmentOptions, OperationConfig
from pipeline.config.distillation import DistillConfig
from pipeline.config.evaluation import EvaluateOptions
from pipeline.config.methods import E2KDConfig
from pipeline.config.models import CifarModelConfig
from pipeline.config.runs import RUNS
from pipeline.config.store import PassOptions, StoreOptions, SubsetOptions
from pipeline.config.training import OptimizerOptions, TrainerOptions
from pipeline.config.verbs import EvaluateConfig
from pipeline.models.providers import build_model
from pipeline.store.reader import Store
from stages import distill, evaluate, precompute
from tests.support.stores import precompute_config

GOLDEN = Path(__file__).with_name("golden.json")
ENVIRONMENT = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
STEPS = 50
_TIMES = ("records_per_second",)


def sha256(parts: Iterable[bytes]) -> str:
    """Digest of all parts, independent of their order."""
    digests = sorted(hashlib.sha256(part).digest() for part in parts)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def members(tar: Path) -> list[bytes]:
    with tarfile.open(tar) as archive:
        return [archive.extractfile(member).read() for member in archive]


def summary(array: np.ndarray) -> list[float]:
    """Mean, standard deviation and largest magnitude."""
    values = np.asarray(array, dtype=np.float64)
    return [float(values.mean()), float(values.std()), float(np.abs(values).max())]


def describe_store(store: Store) -> dict[str, Any]:
    """Digests and summaries of a store's shards and pass, independent of file names."""
    shards = [store.path / shard.path for shard in store.manifest.shards]
    teacher = store.open_passes()[0]
    files = [
        path
        for path in sorted(teacher.folder.rglob("*"))
        if path.is_file() and path.suffix not in (".json", ".parquet")
    ]
    contents = [
        part for f in files for part in (members(f) if f.suffix == ".tar" else [f.read_bytes()])
    ]
    shard = next(shard for shard in store.manifest.shards if shard.split == "train")
    rows = teacher.read_shard(shard)
    return {
        "shards": {"sha256": sha256(path.read_bytes() for path in shards)},
        "images": {"sha256": sha256(part for path in shards for part in members(path))},
        "chunks": {"sha256": sha256(contents), "files": len(files)},
        "fields": sorted(summary(array) for array in rows.values() if np.size(array)),
    }


def golden_run(folder: Path) -> dict[str, Any]:
    """Run the three stages in `folder`, and return digests and summaries of their outputs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = CifarModelConfig(name="resnet8", width=4)
    weights = folder / "teacher.safetensors"
    save_file(build_model(teacher, 10).state_dict(), weights)
    teacher = replace(teacher, weights=str(weights))
    annotate = PassOptions(
        batch_size=8, payloads=("logits", "map", "attention", "class_maps", "pooled")
    )
    found: dict[str, Any] = {}
    for backend in ("zarr", "webdataset"):
        path = folder / backend
        precompute.run(precompute_config(path, teacher, backend=backend, annotate=annotate))
        found[backend] = describe_store(Store(path))
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
    log = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == STEPS
    losses = {name: [line[name] for line in log] for name in log[0] if name not in _TIMES}
    found["student"] = {
        "sha256": sha256(tensor.numpy().tobytes() for tensor in state.values()),
        "losses": losses,
    }
    options = EvaluateOptions(splits=("test",), num_pictures=4)
    evaluate.run(EvaluateConfig(store=store, evaluate=options, run=str(folder / "run")))
    numbers = json.loads((student.parent / "evaluate" / "metrics.json").read_text())["splits"]
    found["evaluation"] = {
        "sha256": sha256([json.dumps(numbers, sort_keys=True).encode()]),
        "numbers": {
            name: value for name, value in numbers["test"].items() if isinstance(value, float)
        },
    }
    return found


def differences(
    found: Any, recorded: Any, same: Callable[[Any, Any], bool], path: str = ""
) -> list[str]:
    """Lines that describe the differences between two trees of results."""
    if isinstance(recorded, dict):
        return [
            line
            for name in recorded
            for line in differences(found[name], recorded[name], same, f"{path}/{name}")
        ]
    return [] if same(found, recorded) else [f"{path}: {found}, recorded {recorded}"]


def close(found: Any, recorded: Any) -> bool:
    """Return whether values are equal up to rounding. Digests always count as equal."""
    return isinstance(recorded, str) or found == pytest.approx(recorded, rel=2e-2, abs=1e-3)


def test_outputs_are_what_they_were(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    found = json.loads(json.dumps(golden_run(tmp_path)))

    exact = golden["environment"] == ENVIRONMENT
    assert not differences(found, golden["outputs"], (lambda a, b: a == b) if exact else close)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        outputs = golden_run(Path(place))
    values = {"environment": ENVIRONMENT, "outputs": outputs}
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n")
