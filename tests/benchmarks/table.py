"""The figures as a Markdown table, which `python -m docs.tables` writes into docs/results/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.figures import Figure

RESULTS = Path(__file__).with_name("results.json")
"""Figures of the last run that was recorded in the repository."""
TITLES = {
    "precompute_vs_bare_loop": "precompute (ResNet-20, GradCAM, commits), speed against a bare decode + forward loop",
    "gradcam_vs_logits": "precompute with GradCAM, cost against logits alone",
    "frozen_e2kd_step_vs_labels": "frozen e2KD step, cost against a step on labels (ResNet-20)",
    "frozen_vs_live_e2kd_step": "frozen e2KD step, speed against a live ResNet-56 teacher (ResNet-20)",
    "stream_vs_webdataset_32px": "stream with targets, speed against a stock `webdataset` zip, 32 px",
    "stream_vs_webdataset_224px": "the same, 224 px",
    "checksums_epoch_32px": "an epoch of reading with every byte's checksum compared, cost against none, 32 px",
    "checksums_epoch_224px": "the same, 224 px",
    "bytes_vs_payload": "bytes of a whole pass (Zarr, receipts, manifest) against its payload",
    "bytes_vs_one_pt_per_image": "the same against one `.pt` per image, in disk blocks",
    "gap_between_shards": "gap between two shards on Ray, as a share of a shard's time",
    "precompute_memory_50k_vs_10k": "precompute, peak memory with 50,000 records against 10,000",
    "distill_memory_50k_vs_10k": "distill, the same",
}


def markdown(figures: Sequence[Figure]) -> str:
    """Markdown table with one row per figure."""
    lines = ["| | ratio | 95 % interval | aim | ours | baseline |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {TITLES[f.name]} | {_mark(f)} | {_interval(f)} | {f.aim} | {f.ours:,.3g} {f.unit} | "
        f"{f.theirs:,.3g} {f.unit} |"
        for f in figures
    ]
    return "\n".join(lines) + "\n"


def _mark(figure: Figure) -> str:
    ratio = f"{figure.ratio:.3g}"
    return f"**{ratio}**" if figure.aim and figure.is_met else ratio


def _interval(figure: Figure) -> str:
    return "" if figure.low == figure.high else f"{figure.low:.3g} to {figure.high:.3g}"


def load(path: Path) -> list[Figure]:
    """Read the figures that a run wrote."""
    return [Figure(**line) for line in json.loads(path.read_text())]
