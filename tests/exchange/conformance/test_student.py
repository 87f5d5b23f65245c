"""Three epochs of a student from FKD's soft labels, here and by a small loader that follows FKD's own."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

import permafrost
from permafrost.config.augment import AugmentOptions
from tests.exchange.conformance.make_files import CLASSES, SIDE, VIEWS
from tests.exchange.conformance.measure import Workplace

TOP = 5


class FKDViews(Dataset):
    """One crop of each photograph with its label, as FKD's data set returns them for num_crops=1."""

    def __init__(self, labels, photographs):
        self.labels, self.photographs = labels, photographs
        self.drawn = [0] * len(photographs)
        """Number of the view of each photograph, which FKD draws by randperm."""

    def __len__(self):
        return len(self.photographs)

    def __getitem__(self, number):
        path, view = self.photographs[number], self.drawn[number]
        file = self.labels / "train" / path.parent.name / f"{path.stem}.tar"
        coordinates, mirrored, labels = torch.load(file, weights_only=False)
        image = Image.open(path).convert("RGB")
        top, left, height, width = coordinates[view] * np.array(
            [image.height, image.width, image.height, image.width]
        )
        edges = (round(left), round(top), round(left + width), round(top + height))
        image = image.crop(edges).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        if mirrored[view]:
            image = ImageOps.mirror(image)
        classes, values = torch.from_numpy(labels[view])
        target = torch.full((CLASSES,), float(1 - values.sum()) / (CLASSES - TOP))
        target[classes.long()] = values
        pixels = torch.from_numpy(np.asarray(image, np.float32)) / 255
        return pixels.permute(2, 0, 1), target, number


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("student"))


def test_batches_of_three_epochs_are_those_of_a_loader_like_theirs(place):
    done = place.ingest("fkd_k5", "format=fkd", f"format.classes={CLASSES}")
    here = permafrost.RecordLoader(
        permafrost.open_store(place.store).select("train"),
        teacher=done.name,
        replay=True,
        augment=AugmentOptions(size=SIDE),
        batch_size=4,
    )
    numbers = {key: number for number, key in enumerate(done.keys)}
    data = FKDViews(place.folder / "fkd_k5", place.photographs)
    seen = set()
    for _ in range(3):
        batches = list(here)
        order = [numbers[key] for batch in batches for key in batch.keys]
        assert sorted(order) == list(range(len(data)))  # each photograph once an epoch
        views = [int(view) for batch in batches for view in batch.stored.view_index]
        for number, view in zip(order, views, strict=True):
            data.drawn[number] = view
        seen |= set(zip(order, views, strict=True))
        theirs = DataLoader(data, batch_size=4, sampler=order)
        for batch, (images, targets, _) in zip(batches, theirs, strict=True):
            outcomes = batch.targets()[0].logits
            shares = torch.zeros(len(batch), CLASSES, dtype=torch.float64)
            values = torch.cat([outcomes.values, outcomes.rest], dim=1).double().softmax(dim=1)
            shares += values[:, TOP:] / (CLASSES - TOP)
            shares.scatter_(1, outcomes.classes.long(), values[:, :TOP])
            assert (shares - targets).abs().max() < 1e-6
            for image, other in zip(batch.images, images, strict=True):
                pair = torch.stack([image.flatten(), other.flatten()])
                assert torch.corrcoef(pair)[0, 1] > 0.995
    assert len({view for _, view in seen}) == VIEWS
