"""Compare a teacher's answers to views cut from photographs with its answers to the same views of their frames.

    python -m tests.loading.compare_frames

The teacher is an EfficientNet-Lite0 with published weights. Two stores have the same 200 photographs, one as their
files and one as frames of 256 pixels, and each has a pass of 10 random crops of 224 pixels. Prints, by the area of a
crop, the divergence of the answers to frames from those to the files, in nats, the share of equal first classes, the
accuracy of the first class for both, and the energy of horizontal gradients of frames relative to that of files.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo

import permafrost
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import view_images
from permafrost.loading.loader import TrainLoader
from permafrost.loading.subset import rows_of_split
from permafrost.store.reader import Store
from tests.support.paths import SHARED_DATA

VIEWS = 10
SIDE = 224
AREAS = ((0.08, 0.15), (0.15, 0.35), (0.35, 1.0), (0.08, 1.0))


def answers(folder: Path, form: str) -> dict[tuple[str, int], tuple[torch.Tensor, float, float]]:
    """Log-probabilities, gradient energy and area of each view of a store in this format."""
    permafrost.precompute(
        "data=image_folder",
        f"data.path={SHARED_DATA / 'photos'}",
        f"store.path={folder}",
        f"store.format={form}",
        "store.image_size=256",
        "teacher=timm",
        "teacher.name=tf_efficientnet_lite0",
        f"teacher.weights={SHARED_DATA / 'weights/tf_efficientnet_lite0.safetensors'}",
        "teacher.classes=1000",
        "annotate.outputs=[logits]",
        "views=random",
        f"views.count={VIEWS}",
        "augment=resized_crop_flip",
        "executor=serial",
        f"run={folder}-run",
    )
    store = Store(folder)
    (teacher,) = store.open_passes(stored_views=True)
    dataset = StoreDataset(store, rows_of_split(store.index, "train"), [teacher])
    size = (SIDE, SIDE)
    loader = TrainLoader(dataset, None, view_size=size, batch_size=50, seed=0)
    seen = {}
    for epoch in range(VIEWS):
        for batch in loader.epoch(epoch):
            images = view_images(batch, size) * 255
            energies = (images.diff(dim=3) ** 2).mean(dim=(1, 2, 3))
            areas = torch.linalg.det(batch.canonical_from_view[:, :2, :2]).abs()
            logs = F.log_softmax(batch.targets[0].logits.float(), dim=1)
            for key, view, *values in zip(
                batch.keys, batch.view_index.tolist(), logs, energies, areas, strict=True
            ):
                seen[key, view] = (values[0], float(values[1]), float(values[2]))
    return seen


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        files, frames = (answers(Path(folder, form), form) for form in ("original", "raw"))
    assert files.keys() == frames.keys()
    logs, others = (
        torch.stack([answer for answer, *_ in each.values()])
        for each in (files, {place: frames[place] for place in files})
    )
    energies = np.array([(files[place][1], frames[place][1]) for place in files])
    areas = np.array([area for *_, area in files.values()])
    divergence = (logs.exp() * (logs - others)).sum(dim=1).numpy()
    same = (logs.argmax(dim=1) == others.argmax(dim=1)).numpy()
    wnids = ImageNetInfo().label_names()
    labels = torch.tensor([wnids.index(re.search(r"n\d{8}", key).group()) for key, _ in files])
    right = [(each.argmax(dim=1) == labels).numpy() for each in (logs, others)]
    print("area of the crop    views  divergence  equal first  accuracy: files, frames  energy")
    for low, high in AREAS:
        chosen = (areas >= low * 0.99) & (areas <= high)
        ratio = energies[chosen, 1].sum() / energies[chosen, 0].sum()
        print(
            f"{low:.2f} to {high:.2f} {chosen.sum():12} {divergence[chosen].mean():11.3f} {same[chosen].mean():12.3f}"
            f" {right[0][chosen].mean():16.3f} {right[1][chosen].mean():7.3f} {ratio:7.3f}"
        )


if __name__ == "__main__":
    main()
