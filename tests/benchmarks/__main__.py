"""Measure the figures: all of them, or those whose names begin with one of the given words.

    python -m tests.benchmarks
    python -m tests.benchmarks stream bytes_vs_values
    python -m tests.benchmarks --record     (also writes the figures into results.json, the recorded results)
    python -m tests.benchmarks scale        (figures of scale.py, which are measured only if they are named)
    python -m tests.benchmarks profile      (where the time goes, profiles.py, likewise)
    python -m tests.benchmarks busy         (a training beside other processes, busy.py, likewise)
    .venv/bin/python -m tests.benchmarks object_storage (reading from a bucket, likewise)
    python -m tests.benchmarks precision    (forward passes in several precisions, precision_times.py, likewise)
    python -m tests.benchmarks fidelity     (passes in bfloat16 compared with float32, fidelity.py, likewise)

Writes runs/bench/bench.json and runs/bench/table.md, prints the tables, and names the figures that are worse than the
recorded ones. The ratio of a figure that misses its aim is not bold, and the exit code stays 0, because a busy machine
is not a failure. A figure that ends with an error is named at the end, after all others, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

# Set before torch is imported: two processes whose OpenMP threads spin on each other's cores run at a fifth
# of their speed.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")


from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from permafrost.config.environment import keep_freed_memory
from permafrost.core.errors import first_line
from tests.benchmarks import (
    busy,
    fidelity,
    object_storage,
    precision_times,
    profiles,
    scale,
)
from tests.benchmarks.allocator import allocator_figure
from tests.benchmarks.arrays import NAMES as ARRAY_NAMES
from tests.benchmarks.arrays import array_figures
from tests.benchmarks.bcos import bcos_precompute_figure, bcos_step_figure
from tests.benchmarks.crops import crops_figures, crops_names
from tests.benchmarks.figures import Figure
from tests.benchmarks.memory import memory_figures
from tests.benchmarks.on_ray import (
    ACTORS,
    DATASET_SIDES,
    actors_figures,
    actors_name,
    dataset_figures,
    dataset_name,
    twin_figures,
)
from tests.benchmarks.peer import MissingPeerError
from tests.benchmarks.precomputing import precompute_figures
from tests.benchmarks.reading import (
    LOADER_WORKERS,
    SAMPLE_WORKERS,
    bytes_figures,
    checksums_32_figure,
    checksums_224_figure,
    public_loader_figures,
    public_loader_name,
    samples_figures,
    samples_name,
    stream_32_figure,
    stream_224_figure,
)
from tests.benchmarks.replaying import replay_figure
from tests.benchmarks.settings import pass_figure, step_settings_figures, transformer_pass_figure
from tests.benchmarks.sleeping import sleeping_figures, sleeping_names
from tests.benchmarks.steps import (
    EXPLAINED_STEPS,
    FEATURES_STEPS,
    MIXED_STEPS,
    explained_step_figures,
    features_step_figures,
    mixed_step_figures,
    step_figures,
)
from tests.benchmarks.streams import (
    photograph_figures,
    photograph_names,
    stream_names,
    streams_32_figures,
    streams_224_figures,
)
from tests.benchmarks.strong_views import (
    IMAGES,
    randaugment_figures,
    randaugment_name,
    strong_replay_figure,
)
from tests.benchmarks.students import NAME, REPLAYED, SHARING, SHARING_LONG, students_figures
from tests.benchmarks.table import (
    RESULTS,
    TITLES,
    describe_drift,
    load,
    markdown,
    markdown_of_sides,
    record,
)

logger = logging.getLogger("permafrost.bench")

GROUPS: dict[Callable[[Path], list[Figure]], tuple[str, ...]] = {
    precompute_figures: ("precompute_vs_bare_loop", "gradcam_vs_logits"),
    allocator_figure: ("precompute_kept_memory_vs_returned",),
    bcos_precompute_figure: ("bcos_precompute_vs_bare_loop",),
    step_figures: ("frozen_e2kd_step_vs_labels", "frozen_vs_live_e2kd_step"),
    features_step_figures: FEATURES_STEPS,
    mixed_step_figures: MIXED_STEPS,
    explained_step_figures: EXPLAINED_STEPS,
    bcos_step_figure: ("bcos_frozen_e2kd_step_vs_labels",),
    students_figures: (NAME, SHARING, SHARING_LONG, REPLAYED),
    pass_figure: ("pass_resnet50_224px_vs_plain",),
    transformer_pass_figure: ("pass_vit_b_224px_vs_library",),
    step_settings_figures: ("step_resnet18_224px_vs_plain", "step_resnet20_32px_vs_plain"),
    replay_figure: ("replay_4_views_vs_1",),
    strong_replay_figure: ("replay_strong_vs_plain_views",),
    randaugment_figures: tuple(map(randaugment_name, IMAGES)),
    streams_32_figures: stream_names(32),
    streams_224_figures: stream_names(224),
    photograph_figures: photograph_names(),
    crops_figures: crops_names(),
    stream_32_figure: ("stream_vs_webdataset_32px",),
    stream_224_figure: ("stream_vs_webdataset_224px",),
    checksums_32_figure: ("checksums_epoch_32px",),
    checksums_224_figure: ("checksums_epoch_224px",),
    public_loader_figures: tuple(public_loader_name(workers) for workers in LOADER_WORKERS),
    samples_figures: tuple(map(samples_name, SAMPLE_WORKERS)),
    bytes_figures: ("bytes_vs_values", "bytes_vs_one_pt_per_image"),
    twin_figures: ("ray_vs_serial", "gap_between_shards"),
    dataset_figures: tuple(map(dataset_name, DATASET_SIDES)),
    actors_figures: tuple(actors_name(actors) for actors in ACTORS[1:]),
    array_figures: ARRAY_NAMES,
    sleeping_figures: sleeping_names(),
    memory_figures: ("precompute_memory_50k_vs_10k", "distill_memory_50k_vs_10k"),
}
"""Functions that measure figures, each with the names of the figures that it returns."""
ONLY_NAMED = (photograph_figures, crops_figures)
"""Functions whose figures are measured only if a word names them, because they take ten minutes each."""
OUT = Path("runs/bench")


def main(arguments: list[str]) -> None:
    """Measure the figures, write them to files and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("words", nargs="*", help="beginnings of the names of figures; none for all")
    parser.add_argument("--record", action="store_true", help=f"also write into {RESULTS.name}")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    keep_freed_memory()  # as the stages do
    of_its_own = {
        "profile": profiles,
        "busy": busy,
        "precision": precision_times,
        "fidelity": fidelity,
        "object_storage": object_storage,
    }
    named = {"scale": scale.main} | {
        beginning: partial(_measure_module, module, recorded=options.record)
        for beginning, module in of_its_own.items()
    }
    for beginning, measure_named in named.items():
        words = [word for word in options.words if word.startswith(beginning)]
        if words:
            measure_named(words)
            options.words = [word for word in options.words if word not in words]
            if not options.words:
                return
    figures, failed = measure(options.words, OUT / "bench.json")
    if figures:
        _print_figures(figures, recorded=options.record)
    if failed:
        sys.exit(f"not measured: {'; '.join(failed)}")


def _measure_module(module: Any, words: Sequence[str], *, recorded: bool) -> None:
    """Measure what a module has of its own, print it, and record it if asked."""
    measured = module.measure(words)
    print(module.markdown(measured), end="")
    if recorded:
        rows = measured if isinstance(measured, dict) else [asdict(one) for one in measured]
        module.RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def _print_figures(figures: list[Figure], *, recorded: bool) -> None:
    tables = "\n".join(filter(None, [markdown(figures), markdown_of_sides(figures)]))
    (OUT / "table.md").write_text(tables)
    print(tables)
    print(describe_drift(figures, load(RESULTS)), end="")
    if recorded:
        record(RESULTS, figures)


def measure(words: list[str], path: Path) -> tuple[list[Figure], list[str]]:
    """Measure the figures whose names begin with one of the words, or all without words.

    path  file to which each figure is written as soon as it is measured

    Returns the figures, and the names of those that ended with an error, each with the error.
    """
    chosen = {
        function: names
        for function, names in GROUPS.items()
        if (not words and function not in ONLY_NAMED)
        or any(name.startswith(word) for word in words for name in names)
    }
    if not chosen:
        sys.exit(f"no figure begins with {' or '.join(words)}; choose from: {', '.join(TITLES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    figures: list[Figure] = []
    failed: list[str] = []
    for function, names in chosen.items():
        logger.info("measuring %s", ", ".join(names))
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            try:
                measured = function(Path(folder))
                record(path, measured)
                figures += measured
            except MissingPeerError as error:
                logger.info("left out: %s", error)
            except Exception as error:
                logger.exception("failed: %s", ", ".join(names))
                failed.append(f"{', '.join(names)} ({first_line(error)})")
        logger.info("took %.0f s", time.monotonic() - started)
    return figures, failed


if __name__ == "__main__":
    main(sys.argv[1:])
