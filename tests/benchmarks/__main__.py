"""Measure the figures: all of them, or those whose names begin with one of the given words.

    python -m tests.benchmarks
    python -m tests.benchmarks stream bytes_vs_payload
    python -m tests.benchmarks scale        (figures of scale.py, which are measured only if they are named)

Writes runs/bench/bench.json and runs/bench/table.md, and prints the table. The ratio of a figure that
misses its aim is not bold. The exit code stays 0, because a busy machine is not a failure.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

# Set before torch is imported: two processes whose OpenMP threads spin on each other's cores run at a fifth
# of their speed.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")


from collections.abc import Callable

from tests.benchmarks import scale
from tests.benchmarks.figures import Figure
from tests.benchmarks.memory import memory_figures
from tests.benchmarks.precomputing import gap_figure, precompute_figures
from tests.benchmarks.reading import (
    bytes_figures,
    checksums_32_figure,
    checksums_224_figure,
    stream_32_figure,
    stream_224_figure,
)
from tests.benchmarks.steps import step_figures
from tests.benchmarks.table import TITLES, markdown

logger = logging.getLogger("permafrost.bench")

GROUPS: dict[Callable[[Path], list[Figure]], tuple[str, ...]] = {
    precompute_figures: ("precompute_vs_bare_loop", "gradcam_vs_logits"),
    step_figures: ("frozen_e2kd_step_vs_labels", "frozen_vs_live_e2kd_step"),
    stream_32_figure: ("stream_vs_webdataset_32px",),
    stream_224_figure: ("stream_vs_webdataset_224px",),
    checksums_32_figure: ("checksums_epoch_32px",),
    checksums_224_figure: ("checksums_epoch_224px",),
    bytes_figures: ("bytes_vs_payload", "bytes_vs_one_pt_per_image"),
    gap_figure: ("gap_between_shards",),
    memory_figures: ("precompute_memory_50k_vs_10k", "distill_memory_50k_vs_10k"),
}
"""Functions that measure figures, each with the names of the figures that it returns."""
OUT = Path("runs/bench")


def main(words: list[str]) -> None:
    """Measure the figures, write them to files and print the table."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    scale_words = [word for word in words if word.startswith("scale")]
    if scale_words:
        scale.main(scale_words)
        if words == scale_words:
            return
    figures: list[Figure] = []
    for measure, names in GROUPS.items():
        if words and not any(name.startswith(word) for word in words for name in names):
            continue
        logger.info("measuring %s", ", ".join(names))
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            figures += measure(Path(folder))
    if not figures:
        sys.exit(f"no figure begins with {' or '.join(words)}; choose from: {', '.join(TITLES)}")
    OUT.mkdir(parents=True, exist_ok=True)
    lines = [asdict(figure) for figure in figures]
    (OUT / "bench.json").write_text(json.dumps(lines, indent=1) + "\n")
    (OUT / "table.md").write_text(markdown(figures))
    print(markdown(figures), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
