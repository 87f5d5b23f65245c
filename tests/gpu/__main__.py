"""Check and measure a CUDA machine in at most nine minutes, without a network.

    python -m tests.gpu
    python -m tests.gpu --minutes 5
    python -m tests.gpu --device cpu --tiny     (the same code with tiny networks, to test it)

Writes runs/gpu/gpu.json and runs/gpu/table.md, and prints the table. The exit code is 1 if a check or a row failed, or
if there is no CUDA device.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

OUT = Path("runs/gpu")
STARTED = time.monotonic()
"""Start of the run, before torch is imported, which may take long."""
PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "numpy": "numpy",
    "PIL": "pillow",
    "simplejpeg": "simplejpeg",
    "pyarrow": "pyarrow",
    "kornia": "kornia",
    "zarr": "zarr",
    "numcodecs": "numcodecs",
    "google_crc32c": "google-crc32c",
    "safetensors": "safetensors",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
    "tqdm": "tqdm",
    "webdataset": "webdataset",
    "braceexpand": "braceexpand",
}
"""Modules that the checks and rows import, with the names of their packages (docs/howto/cluster.md)."""


def main(words: list[str]) -> int:
    """Run the checks and the rows, write and print the results, and return the exit code."""
    options = _parse(words)
    missing = [package for module, package in PACKAGES.items() if not _is_there(module)]
    if missing:
        print(
            f"gpu: {sys.executable} lacks {', '.join(missing)}; install them (docs/howto/cluster.md), or name another "
            "interpreter: make gpu PY=...",
            file=sys.stderr,
        )
        return 1
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch starts CUDA: nothing may use a GPU
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        built = (
            f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        )
        print(
            f"gpu: torch {torch.__version__} ({built}) of {sys.executable} finds no CUDA device; run this on a "
            "machine with an NVIDIA GPU, its driver and a CUDA build of torch, or test the code itself with "
            "--device cpu --tiny",
            file=sys.stderr,
        )
        return 1
    return run(torch.device(options.device), is_tiny=options.tiny, minutes=options.minutes)


def run(device: object, *, is_tiny: bool, minutes: float) -> int:
    """Run all checks and rows within the time, and return the exit code.

    device  torch.device of the run
    """
    import torch

    from tests.gpu.budget import Budget
    from tests.gpu.checks import QUICK_CHECKS, SLOW_CHECKS, run_checks
    from tests.gpu.outcomes import CheckOutcome, Row, as_json, describe_machine
    from tests.gpu.rows import measure_rows
    from tests.gpu.scale import FULL, TINY
    from tests.gpu.table import markdown
    from tests.gpu.workplace import Workplace

    assert isinstance(device, torch.device)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Five seconds are left for make, for the files and for the interpreter's exit.
    budget = Budget(60 * minutes - 5 - (time.monotonic() - STARTED))
    scale = TINY if is_tiny else FULL
    machine = describe_machine(device)
    checks: list[CheckOutcome] = []
    rows: list[Row] = []

    def finish() -> int:
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "gpu.json").write_text(json.dumps(as_json(machine, checks, rows), indent=1) + "\n")
        table = markdown(machine, checks, rows)
        (OUT / "table.md").write_text(table)
        print(table, end="", flush=True)
        return int(any(outcome.status == "fail" for outcome in (*checks, *rows)))

    def give_up() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        running = f"cut off after {minutes:g} minutes, which --minutes raises"
        rows.append(Row(name="the rest", status="fail", reason=running))
        finish()
        os._exit(1)

    folder = Path(tempfile.mkdtemp(prefix="gpu-"))
    timer = budget.cut_off(give_up)
    try:
        run_checks(QUICK_CHECKS, device, scale, budget, checks)
        measure_rows(Workplace(device, scale, folder), budget, rows)
        run_checks(SLOW_CHECKS, device, scale, budget, checks)
    finally:
        timer.cancel()
        shutil.rmtree(folder, ignore_errors=True)
    return finish()


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and few images")
    parser.add_argument("--minutes", type=float, default=9.0, help="limit of the whole run")
    options = parser.parse_args(words)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu takes hours with full networks; add --tiny")
    if options.minutes <= 0.5:
        parser.error(f"--minutes must be > 0.5, got {options.minutes:g}")
    return options


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
