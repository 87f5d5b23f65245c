"""Photographs of all aspect ratios, from their files to the maps in a student's views."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from permafrost.annotation import annotator as annotate
from permafrost.config.augment import AugmentOptions, OperationConfig
from permafrost.config.data import ImageFolderDataConfig
from permafrost.config.models import CifarModelConfig, TorchvisionModelConfig
from permafrost.config.store import PassOptions, StoreOptions
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import view_maps
from permafrost.loading.random_views import ViewSchedule
from permafrost.models.classifier import Classifier, GapLinear
from permafrost.store.reader import Store
from permafrost_report.options import ReportConfig, ReportOptions
from tests.support.paths import SHARED_DATA
from tests.support.slow import slow
from tests.support.stores import precompute_config
from tests.support.verbs import precompute, report
from tests.support.view_matrices import matrices_of

PHOTOS = SHARED_DATA / "photos"
SPOT = (-0.3, 0.4)
"""Coordinates x and y in the teacher's input frame."""
GRID, SIGMA = 64, 1.2
"""Side of the map in cells, and standard deviation of the spot in cells."""
VIEWS = AugmentOptions(
    size=224,
    operations=(
        OperationConfig(kind="rotation", p=1.0, degrees=15.0),
        OperationConfig(kind="resized_crop", scale=(0.25, 1.0)),
        OperationConfig(kind="horizontal_flip"),
    ),
)


class SpotTeacher(Classifier):
    """Teacher with constant logits whose map is a spot at a fixed position."""

    def __init__(self, *_, **options):
        super().__init__()
        self.linear = nn.Linear(1, 2, bias=False)
        nn.init.ones_(self.linear.weight)

    network = property(lambda self: self)
    head = property(lambda self: GapLinear(self.linear))

    def forward_trunk(self, images):
        places = (2 * torch.arange(GRID) + 1) / GRID - 1
        x, y = (torch.exp(-((places - at) ** 2) / 2 / (2 * SIGMA / GRID) ** 2) for at in SPOT)
        return (y[:, None] * x).expand(len(images), 1, GRID, GRID), None

    def forward_head(self, features, context):
        return self.linear(features.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory):
    """Folder with the narrowest and the widest of the real photographs, or with gray images of such sizes."""
    folder = tmp_path_factory.mktemp("shapes")
    sizes = {}
    for path in sorted(PHOTOS.glob("*/*.jpg")):
        with Image.open(path) as image:
            sizes[path] = image.width / image.height
    chosen = (
        [min(sizes, key=sizes.get), max(sizes, key=sizes.get)] if sizes else [(68, 121), (900, 300)]
    )
    for number, photo in enumerate(chosen):
        target = folder / f"class{number}" / "photo.jpg"
        target.parent.mkdir()
        if isinstance(photo, Path):
            target.write_bytes(photo.read_bytes())
        else:
            Image.new("RGB", photo, "gray").save(target)
    return folder


def photo_config(folder, store, teacher, **options):
    data = ImageFolderDataConfig(path=str(folder))
    annotate_options = options.pop("annotate", PassOptions(batch_size=8))
    return precompute_config(store, teacher, data=data, annotate=annotate_options, **options)


@pytest.mark.parametrize("frame", [slow("full"), "center_crop"])
def test_a_spot_lies_where_the_matrix_sends_it_on_the_narrowest_and_the_widest_photograph(
    tmp_path, monkeypatch, photo_folder, frame
):
    monkeypatch.setattr(annotate, "build_model", SpotTeacher)
    teacher = CifarModelConfig(name="resnet8", weights="random", frame=frame, input_size=GRID)
    precompute.run(photo_config(photo_folder, tmp_path / "store", teacher))
    store = Store(tmp_path / "store")
    dataset = StoreDataset(store, np.arange(2), store.open_passes())
    heights, widths = dataset.sizes().double().unbind(dim=1)
    aspects = widths / heights
    assert aspects.min() < 1 < aspects.max()
    checked = 0

    for record in range(2):
        schedule = ViewSchedule(VIEWS, store.size, seed=record, one_aspect=False)
        matrices = matrices_of(schedule, 0, 0, aspects[record].expand(2048))
        (map_from_canonical,) = dataset.__getitems__([record]).targets[0].map_from_canonical
        spot = torch.tensor([*SPOT, 1.0])
        map_from_view = map_from_canonical @ matrices
        expected = (torch.linalg.inv(map_from_view) @ spot)[:, :2]
        spread = torch.linalg.inv(map_from_view)[:, :2, :2].norm(dim=(1, 2)) * 2 * SIGMA / GRID
        whole = (expected.abs().amax(dim=1) + 4 * spread < 1).nonzero()[:200, 0]
        assert len(whole) == 200, "too few draws show the whole spot"

        shown = dataset.__getitems__([record] * len(whole))
        batch = replace(shown, canonical_from_view=matrices[whole])
        maps = view_maps(batch, batch.targets[0], (224, 224))[:, 0, 0]

        places = (2 * torch.arange(224) + 1) / 224 - 1
        mass = maps.sum(dim=(1, 2))
        center = torch.stack(
            [(maps.sum(dim=1) * places).sum(dim=1), (maps.sum(dim=2) * places).sum(dim=1)], dim=1
        )
        distance = (center / mass[:, None] - expected[whole]).norm(dim=1)
        assert distance.max() < 0.02
        checked += len(whole)
        # Negative control: a map that ignores the photograph's proportions misses by more.
        naive = (torch.linalg.inv(square_views(record)) @ spot)[:, :2][whole]
        assert (center / mass[:, None] - naive).norm(dim=1).mean() > 0.02
    assert checked == 400


def square_views(seed):
    """Views of the same draws for square photographs."""
    schedule = ViewSchedule(VIEWS, (256, 256), seed=seed, one_aspect=False)
    return matrices_of(schedule, 0, 0, torch.ones(2048))


def test_several_teachers_lie_in_one_store_and_on_one_contact_sheet(tmp_path, photo_folder):
    folder = tmp_path / "store"
    for name, size in (("resnet8", 32), ("resnet14", 24)):
        teacher = CifarModelConfig(name=name, weights="random", input_size=size)
        precompute.run(photo_config(photo_folder, folder, teacher))

    result = report.run(
        ReportConfig(store=StoreOptions(path=str(folder)), augment=VIEWS, report=ReportOptions())
    )

    page = Path(result.html).read_text()
    names = [path.name for path in Store(folder).pass_folders()]
    assert len(names) == 2
    assert all(name in page for name in names)
    assert page.count('<img src="data:image/webp;base64,') == 2 * (1 + 2) * (1 + 2)


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the photographs of ../shared/data")
@pytest.mark.parametrize(
    ("name", "grid"), [("resnet50", 7), ("convnext_tiny", 7), ("vit_b_16", 14)]
)
def test_large_networks_annotate_real_photographs(tmp_path, name, grid):
    for path in sorted(PHOTOS.glob("*/*.jpg"))[::40]:
        target = tmp_path / "photos" / path.parent.name / path.name
        target.parent.mkdir(parents=True)
        target.write_bytes(path.read_bytes())
    teacher = TorchvisionModelConfig(name=name, weights="random", input_size=224)

    result = precompute.run(photo_config(tmp_path / "photos", tmp_path / "store", teacher))

    store = Store(tmp_path / "store")
    (teacher_pass,) = store.open_passes()
    assert result.teacher_records == store.index.num_rows == 5
    values = teacher_pass.read_shard(store.manifest.shards[0])
    assert values["map"].shape == (5, 1, 1, 1, grid, grid)
    assert (values["map"].max(axis=(3, 4, 5)) == 1).all()
