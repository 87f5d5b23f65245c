"""Time and memory of a preview of many names, beside readers that look at the same names and say nothing.

    python -m tests.benchmarks preview [--record]

| data | baseline |
|---|---|
| a million images in 1,000 class folders | `torchvision.datasets.ImageFolder(root)`, which holds their list |
| 200 tars of 1,000 samples each | `tarfile` over their headers |

Each is a process of its own; seconds include its imports. The files are made in /dev/shm where there is one, so names
are read from memory. On a disk that has not been read yet, both sides wait for it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from PIL import Image

RESULTS = Path(__file__).with_suffix(".json")
CLASSES, IMAGES_OF_A_CLASS = 1000, 1000
TARS, SAMPLES_OF_A_TAR = 200, 1000
ROUNDS = 3
_IMAGE_FOLDER = "import sys; from torchvision.datasets import ImageFolder; ImageFolder(sys.argv[1])"
_TARFILE = (
    "import sys, tarfile; from pathlib import Path\n"
    "for path in sorted(Path(sys.argv[1]).glob('*.tar')):\n"
    "    with tarfile.open(path) as tar:\n"
    "        for member in tar: pass"
)


@dataclass(frozen=True, kw_only=True)
class PreviewTimes:
    """Seconds and peak resident memory of a preview and of its baseline, medians over the rounds."""

    data: str
    records: int
    seconds: float
    mib: float
    baseline_seconds: float
    baseline_mib: float


def main(words: Sequence[str] = (), *, recorded: bool = False) -> None:
    """Measure both kinds of data, and print a line for each."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        times = [_measure_folder(Path(folder) / "set"), _measure_tars(Path(folder) / "tars")]
    for one in times:
        print(
            f"{one.data}: {one.seconds:.1f} s, {one.mib:.0f} MiB; baseline {one.baseline_seconds:.1f} s, "
            f"{one.baseline_mib:.0f} MiB; ratio {one.seconds / one.baseline_seconds:.2f}"
        )
    if recorded:
        RESULTS.write_text(json.dumps([asdict(one) for one in times], indent=1) + "\n")


def _image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(buffer, "JPEG")
    return buffer.getvalue()


def _measure_folder(root: Path) -> PreviewTimes:
    for number in range(CLASSES):
        folder = root / f"class{number:04d}"
        folder.mkdir(parents=True)
        first = folder / "000000.jpg"
        first.write_bytes(_image())
        for place in range(1, IMAGES_OF_A_CLASS):
            os.link(first, folder / f"{place:06d}.jpg")
    words = ["data=image_folder", f"data.path={root}"]
    times = _measure("image folder", CLASSES * IMAGES_OF_A_CLASS, words, _IMAGE_FOLDER, root)
    shutil.rmtree(root)
    return times


def _measure_tars(root: Path) -> PreviewTimes:
    root.mkdir()
    image = _image()
    for number in range(TARS):
        with tarfile.open(root / f"train-{number:06d}.tar", "w") as tar:
            for place in range(SAMPLES_OF_A_TAR):
                for suffix, data in (("jpg", image), ("cls", str(place % 10).encode())):
                    member = tarfile.TarInfo(f"{number:03d}{place:05d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    words = ["data=webdataset", f"data.path={root}", "executor=serial"]
    return _measure("200 tars", TARS * SAMPLES_OF_A_TAR, words, _TARFILE, root)


def _measure(data: str, records: int, words: list[str], baseline: str, root: Path) -> PreviewTimes:
    """Run preview and baseline in turn."""
    previews, baselines = [], []
    for _ in range(ROUNDS):
        baselines.append(_run([sys.executable, "-c", baseline, str(root)]))
        previews.append(_run([sys.executable, "-m", "stages.preview", *words]))
    (seconds, mib), (plain_seconds, plain_mib) = (
        tuple(median(values) for values in zip(*runs, strict=True))
        for runs in (previews, baselines)
    )
    return PreviewTimes(
        data=data,
        records=records,
        seconds=seconds,
        mib=mib,
        baseline_seconds=plain_seconds,
        baseline_mib=plain_mib,
    )


def _run(command: list[str]) -> tuple[float, float]:
    """Run a command, and return its seconds and its peak resident memory in MiB."""
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            # That of getrusage is at least the memory of this process, from which the other one was made.
            high = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
            peak = max(peak, *(int(line.split()[1]) for line in high), 0)
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]} failed")
    return time.perf_counter() - started, peak / 1024
