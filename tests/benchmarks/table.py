"""The figures as Markdown tables, which `python -m docs.tables` writes into docs/results/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks.figures import Figure

RESULTS = Path(__file__).with_name("results.json")
"""Figures of the last run that was recorded in the repository."""
TITLES = {
    "precompute_vs_bare_loop": "precompute (ResNet-20, GradCAM, commits), speed against a bare decode + forward loop",
    "precompute_kept_memory_vs_returned": "that pass in a process that keeps freed memory, speed against the default",
    "bcos_precompute_vs_bare_loop": "precompute of a B-cos ResNet-20, against a bare loop that also explains",
    "gradcam_vs_logits": "precompute with GradCAM, cost against logits alone",
    "ray_vs_serial": "precompute on Ray with one actor, speed against the serial executor",
    "gap_between_shards": "the same, gap between two shards as a fraction of a shard's time",
    "ray_2_actors_vs_1": "precompute with a teacher that only waits, speed with 2 actors against twice that with 1",
    "ray_4_actors_vs_1": "the same, 4 actors",
    "ray_8_actors_vs_1": "the same, 8 actors",
    "array_2_tasks_vs_1": "a pass by two tasks of a job array with that teacher, speed of the shards against one task",
    "array_claims_of_2000_shards": "2,000 empty shards of a job array, cost against the serial executor",
    "pass_sleeping_logits": (
        "pass of logits whose teacher sleeps as long as an H100 computes, speed against the longest of computing, "
        "decoding (one thread) and writing, 224 px"
    ),
    "pass_sleeping_gradcam": "the same, logits and GradCAM maps",
    "pass_sleeping_features": "the same, logits and features of 2,048 channels",
    "pass_sleeping_bcos": "the same, logits and B-cos maps of 6 x 224 x 224",
    "frozen_e2kd_step_vs_labels": "frozen e2KD step, cost against a step on labels (ResNet-20)",
    "frozen_vs_live_e2kd_step": "frozen e2KD step, speed against a live ResNet-56 teacher (ResNet-20)",
    "features_kd_step_224px_vs_kd": (
        "KD step that reads and moves a ResNet-50's last stage, too, cost against KD (ResNet-18, 224 px)"
    ),
    "frozen_review_kd_step_vs_kd": "frozen ReviewKD step with all stages of a ResNet-56, cost against KD (ResNet-20)",
    "frozen_vs_live_review_kd_step": "the same, speed against a live ResNet-56 teacher",
    "mixed_kd_step_vs_kd": "KD step on mixtures (MixUp and CutMix) with stored targets, cost against KD (ResNet-20)",
    "mixed_e2kd_step_vs_e2kd": "the same for e2KD, explaining the classes of both records",
    "mixed_e2kd_step_of_own_maps_vs_e2kd": "the same, explaining those of the record itself",
    "explained_step_vs_kd_gradcam": "e2KD step of a student explained by GradCAM, cost against KD (ResNet-20)",
    "explained_step_vs_kd_gradient": "the same, the gradient at the pixels",
    "explained_step_vs_kd_input_x_gradient": "the same, input x gradient",
    "explained_step_vs_kd_integrated_gradients": "the same, Integrated Gradients of 4 points",
    "explained_step_vs_kd_smoothgrad": "the same, SmoothGrad of 4 samples",
    "explained_graph_vs_kd_gradcam": "tensors that this step keeps for its backward pass, GradCAM against KD",
    "explained_graph_vs_kd_gradient": "the same, the gradient at the pixels",
    "explained_graph_vs_kd_input_x_gradient": "the same, input x gradient",
    "explained_graph_vs_kd_integrated_gradients": "the same, Integrated Gradients of 4 points",
    "explained_graph_vs_kd_smoothgrad": "the same, SmoothGrad of 4 samples",
    "bcos_frozen_e2kd_step_vs_labels": "frozen e2KD step of a B-cos ResNet-8, cost against a step on labels",
    "ten_frozen_vs_ten_live_students": "ten frozen students for one epoch and the pass, speed against ten live ones",
    "ten_frozen_vs_ten_sharing_students": "the same, against ten students that share one live teacher in one job",
    "ten_frozen_vs_ten_sharing_students_100_epochs": "the same, 100 epochs",
    "replayed_vs_live_epoch": "epoch of e2KD on one of 16 stored views, speed against a live ResNet-56 (ResNet-20)",
    "pass_resnet50_224px_vs_plain": "work of an actor with a ResNet-50 at 224 px, fastest precision and channels-last, "
    "speed against float32 and channels-first",
    "pass_vit_b_224px_vs_library": "work of an actor with a ViT-B of transformers at 224 px, logits and embedding, "
    "speed against decoding and the library's own forward pass",
    "step_resnet18_224px_vs_plain": "frozen e2KD step of a ResNet-18 at 224 px, the same",
    "step_resnet20_32px_vs_plain": "frozen e2KD step of a ResNet-20 at 32 px, the same",
    "replay_4_views_vs_1": "replay of 4 stored views per decoded image, speed per view against one view",
    "replay_strong_vs_plain_views": "rendered replay of views with RandAugment, cost against shifts and flips, 32 px",
    "randaugment_vs_torchvision_32px": "RandAugment of a batch, speed against torchvision image by image, 32 px",
    "randaugment_vs_torchvision_224px": "the same, 224 px",
    "stream_vs_webdataset_32px": "stream with targets, speed against a stock `webdataset` zip, 32 px",
    "stream_vs_webdataset_224px": "the same, 224 px",
    "checksums_epoch_32px": "an epoch of reading with every byte's checksum compared, cost against none, 32 px",
    "checksums_epoch_224px": "the same, 224 px",
    "public_loader_0_workers": "`RecordLoader` with rendered views, speed against the loader of `distill`, 32 px",
    "public_loader_2_workers": "the same, 2 workers of each",
    "samples_0_workers": "`load_store` in a `DataLoader` of 0 workers, speed against `RecordLoader` of as many, 32 px",
    "samples_1_workers": "`load_store` in a `DataLoader` of 1 workers, speed against `RecordLoader` of as many, 32 px",
    "samples_2_workers": "`load_store` in a `DataLoader` of 2 workers, speed against `RecordLoader` of as many, 32 px",
    "ray_dataset_32px_vs_loader": "`ray_dataset`, frames and logits, speed against `RecordLoader`, 32 px",
    "ray_dataset_224px_vs_loader": "the same, 224 px",
    "bytes_vs_values": "bytes of a whole pass (Zarr, commit markers, manifest) against its values",
    "bytes_vs_one_pt_per_image": "the same against one `.pt` per image, in disk blocks",
    "precompute_memory_50k_vs_10k": "precompute, peak memory with 50,000 records against 10,000",
    "distill_memory_50k_vs_10k": "distill, the same",
    "stream_equal_32px_1_worker": "equal decoding, 32 px, 1 worker",
    "stream_equal_32px_2_workers": "equal decoding, 32 px, 2 workers",
    "stream_best_32px_1_worker": "own decoders, 32 px, 1 worker",
    "stream_best_32px_2_workers": "own decoders, 32 px, 2 workers",
    "stream_equal_224px_1_worker": "equal decoding, 224 px, 1 worker",
    "stream_equal_224px_2_workers": "equal decoding, 224 px, 2 workers",
    "stream_best_224px_1_worker": "own decoders, 224 px, 1 worker",
    "stream_best_224px_2_workers": "own decoders, 224 px, 2 workers",
    "stream_warm_photographs_1_worker": "photographs, warm cache, 1 worker",
    "stream_warm_photographs_2_workers": "photographs, warm cache, 2 workers",
    "stream_cold_photographs_1_worker": "photographs, cold cache, 1 worker",
    "stream_cold_photographs_2_workers": "photographs, cold cache, 2 workers",
    "photographs_2_decode_threads": "reading photographs at full size with two decoding threads, speed against one",
    "photographs_decode_vs_torchcodec": "decoding photographs to the same pixels, speed against torchcodec",
    "crops_photographs_1_worker": "random crops of photographs, 1 worker",
    "crops_photographs_2_workers": "random crops of photographs, 2 workers",
    "crops_photographs_vs_decoding": "an epoch of random crops of photographs, cost against decoding whole files alone",
    "crops_scaled_decoding_vs_full": "crops of 64 pixels with `augment.scaled_decoding`, speed against full decoding",
    "crops_scaled_decoding_error": "the same, mean difference of a pixel against white",
}


def markdown(figures: Sequence[Figure]) -> str:
    """Markdown table with one row per figure of one baseline."""
    lines = ["| | ratio | 95 % interval | aim | ours | baseline |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {TITLES[f.name]} | {_mark(f)} | {_interval(f)} | {f.aim} | {f.ours:,.3g} {f.unit} | "
        f"{f.theirs:,.3g} {f.unit} |"
        for f in figures
        if not f.sides
    ]
    return "\n".join(lines) + "\n"


def markdown_of_sides(figures: Sequence[Figure]) -> str:
    """Markdown tables with a row per figure of several baselines and a column per side; empty without such figures."""
    tables: dict[tuple[str, ...], list[str]] = {}
    for f in figures:
        if not f.sides:
            continue
        header = (f.unit, *f.sides, "ours against the best", "95 % interval", "aim")
        values = [f"{seconds:,.3g}" for seconds in f.sides.values()]
        cells = [TITLES[f.name], *values, _mark(f), _interval(f), f.aim]
        tables.setdefault(header, []).append(f"| {' | '.join(cells)} |")
    return "\n".join(
        "\n".join([f"| {' | '.join(header)} |", "|" + "---|" * len(header), *lines]) + "\n"
        for header, lines in tables.items()
    )


def _mark(figure: Figure) -> str:
    ratio = f"{figure.ratio:.3g}"
    return f"**{ratio}**" if figure.aim and figure.is_met else ratio


def _interval(figure: Figure) -> str:
    return "" if figure.low == figure.high else f"{figure.low:.3g} to {figure.high:.3g}"


def load(path: Path) -> list[Figure]:
    """Read the figures that a run wrote."""
    return [Figure(**line) for line in json.loads(path.read_text())]


def record(path: Path, figures: Sequence[Figure]) -> None:
    """Write figures into a file, in the order of TITLES, in which those that were not measured stay as they are."""
    known = {figure.name: figure for figure in (load(path) if path.exists() else [])}
    known |= {figure.name: figure for figure in figures}
    lines = [asdict(known[name]) for name in TITLES if name in known]
    path.write_text(json.dumps(lines, indent=1) + "\n")


def describe_drift(figures: Sequence[Figure], earlier: Sequence[Figure]) -> str:
    """Name the figures that are worse than the earlier ones beyond both intervals, or say that there are none."""
    before = {figure.name: figure for figure in earlier}
    worse = [f for f in figures if f.name in before and f.is_worse_than(before[f.name])]
    if not worse:
        return "no figure is worse than the recorded one beyond both intervals\n"
    lines = [
        f"worse than recorded: {f.name} {f.ratio:.3g}, was {before[f.name].ratio:.3g}"
        for f in worse
    ]
    return "\n".join(lines) + "\n"
