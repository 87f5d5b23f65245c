"""Stores beside transformers, datasets, Accelerate, Lightning and pyright (make test-hub); skipped without them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import permafrost
from tests.support.paths import ROOT
from tests.support.processes import environment

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), np.uint8)
NORMALIZED = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def small_resnet():
    transformers = pytest.importorskip("transformers", reason="run make test-hub")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 4}
    config = transformers.ResNetConfig(layer_type="basic", **sizes)
    return transformers.ResNetForImageClassification(config).eval()


def fill(**options):
    given = {"outputs": ["logits", "maps"], "store": "s", "executor": "serial", **NORMALIZED}
    return permafrost.precompute(**(given | options))


def test_a_network_of_transformers_is_a_teacher_as_it_is():
    network = small_resnet()
    dataset = [(Image.fromarray(pixels), n % 4) for n, pixels in enumerate(PIXELS)]

    fill(teacher=network, dataset=dataset, layer="resnet.encoder.stages.0")

    sample = permafrost.load_store("s")[3]
    with torch.no_grad():
        expected = network((sample.image[None] - 0.5) / 0.25).logits[0]
    torch.testing.assert_close(sample.logits, expected, atol=2e-3, rtol=2e-3)
    assert sample.maps.shape == (1, 1, 8, 8)


def test_a_dataset_of_datasets_keeps_the_bytes_of_its_images():
    datasets = pytest.importorskip("datasets", reason="run make test-hub")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])}
    )
    images = [Image.fromarray(pixels) for pixels in PIXELS]
    made = datasets.Dataset.from_dict(
        {"image": images, "label": [n % 4 for n in range(24)]}, features=features
    )
    splits = datasets.DatasetDict({"train": made, "test": made.select(range(4, 8))})
    fill(teacher=small_resnet(), dataset=splits, layer="resnet.encoder.stages.0")

    store = permafrost.open_store("s")
    assert store.manifest.classes == ("a", "b", "c", "d")
    assert store.manifest.records == {"train": 24, "test": 4}
    for sample in permafrost.load_store("s").__getitems__(range(24)):
        number = int(sample.key.split("-")[1])
        pixels = torch.from_numpy(PIXELS[number]).permute(2, 0, 1)
        assert (sample.image * 255).round().byte().equal(pixels)
        assert sample.label == number % 4
    with pytest.raises(permafrost.UserError, match="has the format torch"):
        fill(teacher=small_resnet(), dataset=made.with_format("torch"), store="other")


@pytest.fixture
def samples():
    dataset = [(torch.from_numpy(p).permute(2, 0, 1), n % 4) for n, p in enumerate(PIXELS)]
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    fill(teacher=network.eval(), dataset=dataset, layer="0")
    return permafrost.load_store("s", augment="pad_crop_flip")


def test_accelerate_prepares_a_loader_of_samples(samples):
    accelerate = pytest.importorskip("accelerate", reason="run make test-hub")
    accelerator = accelerate.Accelerator(cpu=True)
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8))
    loader = DataLoader(samples, batch_size=8, shuffle=True)
    network, optimizer, loader = accelerator.prepare(
        student, torch.optim.SGD(student.parameters(), lr=0.01), loader
    )
    keys = []
    for batch in loader:
        loss = permafrost.kd_loss(network(batch.image), batch.logits, tau=2.0)
        accelerator.backward(loss)
        optimizer.step()
        keys += batch.key
    assert len(set(keys)) == 24


def test_lightning_trains_on_samples_of_each_epoch(samples):
    lightning = pytest.importorskip("lightning", reason="run make test-hub")
    means = []

    class Student(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8))

        def on_train_epoch_start(self):
            samples.set_epoch(self.current_epoch)
            means.append(0.0)

        def training_step(self, batch, _):
            means[-1] += float(batch.image.mean())
            return permafrost.kd_loss(self.network(batch.image), batch.logits, tau=2.0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", **quiet)
    trainer.fit(Student(), DataLoader(samples, batch_size=8))

    assert len(means) == 2
    assert means[0] != means[1]


CHECKERS = {"mypy": ["mypy", "--strict"], "pyright": ["pyright", "--pythonpath", sys.executable]}


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_a_typed_script_passes_and_wrong_types_do_not(checker):
    """The script's first line asks pyright to be strict."""
    pytest.importorskip(checker, reason="run make test-hub")
    text = (ROOT / "tests/hub/typed_script.py").read_text()
    wrong = {
        "dataset=Squares()": "dataset=5",
        "std=(0.5, 0.5, 0.5)": 'std="half"',
        "epochs=1": 'epochs="one"',
        'splits=["train"]': "splits=7",
        'augment="pad_crop_flip"': "augment=3",
    }
    scripts = {"right.py": text}
    scripts |= {f"wrong{n}.py": text.replace(*pair) for n, pair in enumerate(wrong.items())}
    for name, script in scripts.items():
        Path(name).write_text(script)
        command = [sys.executable, "-m", *CHECKERS[checker], name]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert (name == "right.py") == (done.returncode == 0), done.stdout
