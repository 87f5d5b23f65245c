"""Distance of warped features from the teacher's, measured on a sample of a pass's records before it is committed.

Students read stored features that are warped to their view. What these miss of the variance of the teacher's features
of that view (1 - R^2) depends on the network, so it stands in the manifest for shifts and flips. The evaluator
`equivariance` measures the same for any augmentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.lost_variance import LostVariance, add_lost_variance
from permafrost.annotation.outputs import FeaturesOutput
from permafrost.annotation.samples import Sample, SampleTask
from permafrost.core.batches import Batch, StoredTargets
from permafrost.core.records import FieldSpec
from permafrost.loading.geometry import TargetRequest, center_crop, view_targets
from permafrost.loading.transfer import move_batch
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.frames import FrameBatch
from permafrost.store.manifest import MovedFeatures
from permafrost.store.projections import read_projections

MOVED_RECORDS = 128
"""Number of records that are measured, or all if there are fewer."""
MAX_SHIFT = 1 / 8
"""Largest shift in units of the frame's shorter side, rounded down to whole pixels. That of augment=pad_crop_flip is 4
pixels: as large for images of 32 pixels, and smaller for larger ones."""
_DIGITS = 6
"""Decimals in the manifest, beyond which a sum depends on the device."""


def describe_moved_features(measured: MovedFeatures) -> str:
    """Describe the measurement in one line."""
    shares = [
        f"{name} {', '.join(f'{share:.1%} ({view})' for view, share in views.items())}"
        for name, views in measured.lost.items()
    ]
    return f"{'; '.join(shares)} in a sample of {measured.records} records"


def sample_views(count: int, size: tuple[int, int], first: int = 0) -> dict[str, Tensor]:
    """Return the views canonical_from_view f32 [n, 3, 3] of records of a sample, by name.

    The view "shift" moves the image by whole pixels, as pad_crop does, so that interpolation does not blur it: up to an
    eighth of the shorter side in x and in y, drawn for each number of a record in the sample. "flip" is a horizontal
    flip.

    Args:
        count: Number n of records.
        size: (height, width) of the frame.
        first: Number of the first of the records in the sample.
    """
    largest = max(1, int(MAX_SHIFT * min(size)))
    pixels = np.random.default_rng(0).integers(-largest, largest + 1, (first + count, 2))[first:]
    shift, flip = torch.eye(3).repeat(count, 1, 1), torch.eye(3).repeat(count, 1, 1)
    shift[:, :2, 2] = torch.from_numpy(2 * pixels / (size[1], size[0])).float()
    flip[:, 0, 0] = -1
    return {"shift": shift, "flip": flip}


@dataclass(frozen=True, kw_only=True)
class MeasureMovedFeatures(SampleTask[MovedFeatures]):
    """Task that annotates a sample, warps its features to each view and compares them with the teacher's there."""

    folder: RootedPath
    """Folder of the pass, with the projections of its features."""

    @torch.no_grad()
    def measure(self, sample: Sample) -> tuple[int, MovedFeatures]:
        projections = read_projections(self.folder)
        annotator = self.build_annotator()
        kinds = [kind for kind in annotator.output_kinds if isinstance(kind, FeaturesOutput)]
        annotator = annotator.with_changes(output_kinds=kinds).with_projections(projections)
        specs = {spec.name: spec for spec in annotator.fields()}
        sums: dict[str, dict[str, LostVariance]] = {}
        done = 0
        for frames, keys in self.iter_batches(sample):
            values, _ = annotator.annotate([frames], keys)
            batch = _stored_batch(annotator, frames, keys, specs, values)
            batch = move_batch(batch, annotator.device)
            height, width = frames.frames.shape[-2:]
            for name, views in sample_views(len(keys), (height, width), done).items():
                view = views.to(annotator.device)
                view_batch = replace(batch, canonical_from_view=view)
                (targets,) = view_targets(view_batch, TargetRequest((1, 1), with_maps=False))
                output = annotator.run_views(frames, view)
                add_lost_variance(sums.setdefault(name, {}), targets, output, projections)
            done += len(keys)
        lost = {
            field: {name: round(sums[name][field].share(), _DIGITS) for name in sums}
            for field in next(iter(sums.values()))
        }
        return done, MovedFeatures(records=done, lost=lost)


def _stored_batch(
    annotator: TeacherAnnotator,
    frames: FrameBatch,
    keys: Sequence[str],
    specs: Mapping[str, FieldSpec],
    values: Mapping[str, NDArray[np.generic]],
) -> Batch:
    """Return a batch with the values [n, 1, *shape] of annotated records as targets that were read from the pass.

    Only these targets are read.
    """
    names = [name for name in specs if not name.endswith("_scale")]
    map_from_canonical = (
        torch.linalg.inv(center_crop(frames.heights, frames.widths, annotator.crop_fraction))
        if annotator.crop_fraction is not None
        else torch.eye(3).repeat(len(frames.heights), 1, 1)
    )
    targets = StoredTargets(
        teacher="",
        logits=None,
        intermediates={name: torch.from_numpy(values[name][:, 0]) for name in names},
        scales={
            name: torch.from_numpy(values[f"{name}_scale"][:, 0])
            for name in names
            if f"{name}_scale" in values
        },
        specs={name: specs[name] for name in names},
        map_from_canonical=map_from_canonical,
    )
    numbers = torch.arange(len(keys))
    return Batch(
        keys=tuple(keys),
        record_index=numbers,
        inputs=frames.frames,
        canonical_from_view=None,
        view_index=torch.full_like(numbers, -1),
        original_size=torch.stack([frames.heights, frames.widths], dim=1).float(),
        labels=frames.labels,
        groups=torch.full_like(numbers, -1),
        targets=(targets,),
    )
