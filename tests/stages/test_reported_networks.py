"""Networks as people have described them in public threads: each is a pass of the right values, or one sentence."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import transforms

import permafrost
from permafrost.store.reader import Store

NETWORKS = """
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import transforms


class Network(nn.Module):
    def __init__(self, classes, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        self.head = nn.Linear(8, classes)
        self.calls = 0
        norm = self.conv[1]
        norm.running_mean.uniform_(-0.2, 0.2)
        if kind == "batch_statistics":
            self.conv[1] = nn.BatchNorm2d(8, track_running_stats=False)
        if kind == "flag":
            norm.track_running_stats = False
        if kind == "norm_of_one":
            self.norm = nn.BatchNorm1d(8, track_running_stats=False)
        if kind == "first_batch":
            self.register_buffer("first", torch.zeros(()))
        if kind == "shared_head":
            self.register_buffer("prototypes", torch.zeros(classes, 8))

    def train(self, mode=True):
        return super().train(True if self.kind == "always_training" else mode)

    def forward(self, images):
        kind = self.kind
        if kind == "center_crop":
            images = transforms.functional.center_crop(images, 28)
        if kind == "letterbox":
            images = F.pad(images, (0, 0, 4, 4))
        if kind == "same_padding":
            images = F.pad(images, (0, 1, 0, 1))
        if kind == "normalized":
            images = (images - 0.5) / 0.5
        if kind == "in_place":
            images -= 0.5
        if kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.head(self.conv(images).mean((2, 3)))
        features = self.conv(images)
        if kind == "mixup":
            features = features.lerp(features.flip(0), 0.3)
        pooled = features.mean((2, 3))
        if kind == "first_batch":
            if self.first == 0:
                self.first.fill_(images.mean().item())
            pooled = pooled / self.first
        if kind == "norm_of_one":
            pooled = self.norm(pooled)
        if kind == "counts":
            self.calls += 1
            pooled = pooled + 0.05 * self.calls
        if kind == "batch_softmax":
            return self.head(pooled).softmax(0)
        if kind == "checkpointed":
            from torch.utils.checkpoint import checkpoint

            return checkpoint(self.head, pooled, use_reentrant=False)
        return self.head(pooled)


def build(classes, kind):
    torch.manual_seed(3)
    return Network(classes, kind)
"""
DATA = [
    *("data=demo", "data.image_size=32", "data.min_digit_size=8", "data.max_digit_size=12"),
    *("data.train_digits=24", "data.test_digits=12", "data.teacher_digits=12"),
    *("data.teacher_placements=1", "data.test_placements=1", "data.train_placements=1"),
]
REFUSED = {
    # xu-ji/IIC#10 and #49: statistics of the test batch
    "batch_statistics": "normalizes by the statistics of the batch",
    # layumi/Person_reID_baseline_pytorch#218: results are better without eval()
    "always_training": "'conv.1' normalizes by the statistics of the batch",
    # pytorch/pytorch#156051: BatchNorm1d without running statistics, and a batch of one
    "norm_of_one": "a batch of one",
    # facebookresearch/mixup-cifar10 and others: mixing that stays in the forward pass
    "mixup": "computes different outputs for the same record",
    # a schedule by the number of calls
    "counts": "counts its passes",
    # a softmax over dim=0, a common slip (pytorch/pytorch#1020)
    "batch_softmax": "computes different outputs for the same record",
    # open-edge-platform/anomalib#3129: a center crop inside of the model
    "center_crop": "crops its images",
    # jacobgil/pytorch-grad-cam#189: images are padded to a square first
    "letterbox": "pads or moves its images",
}
ACCEPTED = (
    "plain",
    "flag",  # pytorch/pytorch#20967: track_running_stats is set later, and the buffers are there
    "same_padding",  # lukemelas/EfficientNet-PyTorch#267: a row and a column of zeros, a fraction of a cell
    "in_place",  # pytorch/pytorch: the input is changed
    "autocast",  # autocast inside of forward()
    "checkpointed",  # activation checkpointing stays on
    "shared_head",  # buffers of the shape of the last layer
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reported")
    (path / "reported_networks.py").write_text(NETWORKS)
    return path


def words_of(kind, mean=0.0, std=1.0):
    return [
        *DATA, "executor=serial", "plugins=[reported_networks.py]", "teacher=module", f"annotate.name={kind}",
        "teacher.factory=reported_networks.py:build", f"teacher.arguments={{kind: {kind}}}", "teacher.layer=conv",
        "teacher.weights=random", f"teacher.mean=[{mean},{mean},{mean}]", f"teacher.std=[{std},{std},{std}]",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_pass_that_would_be_wrong_is_refused(folder, monkeypatch, kind):
    monkeypatch.chdir(folder)

    with pytest.raises(permafrost.UserError) as error:
        permafrost.precompute("store.path=store", *words_of(kind))

    assert REFUSED[kind] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ACCEPTED)
def test_a_pass_has_the_networks_own_values(folder, monkeypatch, kind):
    monkeypatch.chdir(folder)

    (name,) = permafrost.precompute("store.path=store", *words_of(kind)).passes

    import reported_networks

    from permafrost.config.models import ModuleConfig
    from permafrost.models.providers import build_model

    config = ModuleConfig(
        factory="reported_networks.py:build", layer="conv", arguments={"kind": kind}, weights="random",
        mean=(0.0,) * 3, std=(1.0,) * 3,
    )  # fmt: skip
    assert reported_networks.Network
    network = build_model(config, 10).network.eval()
    loader = permafrost.RecordLoader(
        permafrost.open_store("store").select("test"), teacher=name, batch_size=12
    )
    (batch,) = list(loader)
    with torch.no_grad():
        expected = network(batch.images.clone()).float()
    torch.testing.assert_close(
        batch.logits, expected, atol=2e-2 if kind == "autocast" else 2e-3, rtol=0
    )
    assert len(np.unique(batch.logits.numpy())) > 12


def student_of(kind, run):
    return [
        "store.path=store", f"run={run}", "method=kd", "trainer.epochs=1", "trainer.batch_size=8", "augment=none",
        "plugins=[reported_networks.py]", "student=module", "student.factory=reported_networks.py:build",
        f"student.arguments={{kind: {kind}}}", "student.layer=conv", "student.mean=[0,0,0]", "student.std=[1,1,1]",
    ]  # fmt: skip


def plain_pass():
    return permafrost.precompute("store.path=store", *words_of("plain")).passes[0]


@pytest.mark.parametrize("kind", ["batch_statistics", "mixup", "batch_softmax"])
def test_a_student_whose_evaluation_would_depend_on_its_batches_is_refused(
    folder, monkeypatch, kind
):
    monkeypatch.chdir(folder)
    teacher = f"store.teacher=[{plain_pass()}]"

    with pytest.raises(permafrost.UserError, match="different outputs for the same record"):
        permafrost.distill(teacher, *student_of(kind, f"student-{kind}"))


def test_the_first_batch_of_a_training_initializes_a_student_and_its_evaluation_does_not(
    folder, monkeypatch
):
    """As ActNorm of normalizing flows does."""
    monkeypatch.chdir(folder)
    words = student_of("first_batch", "act")

    model = permafrost.distill(f"store.teacher=[{plain_pass()}]", *words).model

    loader = permafrost.RecordLoader(
        permafrost.open_store("store").select("train"), teacher=(), batch_size=8,
        augment=permafrost.augmentation("none"),
    )  # fmt: skip
    first = next(iter(loader)).images.mean()  # as those of a training with the same seed
    torch.testing.assert_close(model.network.first, first, atol=1e-5, rtol=0)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    assert permafrost.evaluate("store.path=store", "run=act", words[6]).splits["test"]["records"]
    again = permafrost.load_student("act", plugins=["reported_networks.py"]).network.state_dict()
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_a_normalization_inside_is_said_with_the_options_that_leave_it_alone(
    folder, monkeypatch, caplog
):
    monkeypatch.chdir(folder)

    permafrost.precompute("store.path=store", *words_of("normalized", 0.485, 0.229))

    assert "normalizes its images itself, (x - mean) / std with mean [0.5, 0.5, 0.5]" in caplog.text
    caplog.clear()
    permafrost.precompute("store.path=store", *words_of("normalized"))
    assert "normalizes its images itself" not in caplog.text


@pytest.mark.slow
def test_epochs_of_a_loader_with_persistent_workers_are_those_without(folder, monkeypatch):
    """huggingface/datasets#6673, starVLA/starVLA#471: workers that keep the first epoch."""
    monkeypatch.chdir(folder)
    permafrost.precompute("store.path=store", *words_of("plain"))
    records = permafrost.open_store("store").select("train")
    (name,) = [
        folder.name for folder in Store("store").pass_folders() if folder.name.startswith("plain-")
    ]
    views = permafrost.augmentation("pad_crop_flip")

    def epochs(workers):
        loader = permafrost.RecordLoader(
            records, teacher=name, augment=views, batch_size=8, num_workers=workers, seed=1
        )
        loader.set_epoch(2)
        return [[(batch.keys, batch.images.sum().item()) for batch in loader] for _ in range(2)]

    assert epochs(1) == epochs(0)


def test_transforms_of_the_weights_inside_are_a_crop():
    """torchvision's own preset, as part of the network that people deploy."""
    network = nn.Sequential(
        transforms.Resize(40),
        transforms.CenterCrop(32),
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.Flatten(),
        nn.Linear(1024, 5),
    )

    with pytest.raises(permafrost.UserError, match="crop"):
        permafrost.explain(network, torch.rand(2, 3, 64, 64), layer="2")
