"""Functions of the verbs on networks and datasets in memory: the files of the command, and one error for bad input."""

import linecache
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import permafrost
from permafrost.core.interrupts import Interrupted
from permafrost.models.memory_network import digest_code
from permafrost.store.pack import PackShard
from tests.support.processes import environment

PIXELS = torch.randint(
    0, 256, (24, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
)
RECORDS = [(pixels, number % 4) for number, pixels in enumerate(PIXELS)]
NORMALIZED = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
OUTPUTS = ["logits", "maps"]
CODE = """
import torch
from torch import nn

WIDTH = 8


def block(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, 2, 1)


class Net(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.trunk = nn.Sequential(block(3, WIDTH), nn.ReLU(), block(WIDTH, 16))
        self.fc = nn.Linear(16, classes)

    def forward(self, images):
        return self.fc(self.trunk(images).relu().mean((2, 3)))


def build(classes):
    torch.manual_seed(3)
    return Net(classes)
"""


def module_of(code, folder, name):
    """Import a module of this code from a file."""
    (folder / f"{name}.py").write_text(code)
    sys.path.insert(0, str(folder))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    return module_of(CODE, tmp_path_factory.mktemp("nets"), "nets_in_memory")


@pytest.fixture
def teacher(nets):
    return nets.build(4).eval()


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fill(store, **options):
    given = {"outputs": OUTPUTS, "executor": "serial", "layer": "trunk", **NORMALIZED}
    return permafrost.precompute(store=store, **(given | options))


def write_folder(root):
    for number, pixels in enumerate(PIXELS):
        path = root / f"class_{number % 4}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return torchvision.datasets.ImageFolder(str(root))


def stored(store):
    """Return the values of all records, by the bytes of their images."""
    samples = permafrost.load_store(store)
    return {
        (sample.image * 255).round().byte().numpy().tobytes(): (
            int(sample.label),
            sample.logits.numpy().tobytes(),
            sample.maps.numpy().tobytes(),
        )
        for sample in samples.__getitems__(range(len(samples)))
    }


# ---- the command's bytes -------------------------------------------------------------------------


def forms(folder):
    """Return one dataset in all its forms."""
    relative = [(path, folder.classes[label]) for path, label in folder.samples]
    pairs = [(Path(path).absolute(), name) for path, name in relative]
    return {
        "folder": folder,
        "splits": {"train": folder},
        "list": relative,
        "absolute": pairs,
        "frame": pd.DataFrame(relative, columns=["path", "label"]),
        "tensors": [(torchvision.io.decode_image(path), label) for path, label in folder.samples],
        "pillow": [(Image.open(path).convert("RGB"), label) for path, label in folder.samples],
        "floats": [
            {"image": torchvision.io.decode_image(path) / 255, "label": label}
            for path, label in folder.samples
        ],
    }


def test_every_form_of_a_dataset_gives_the_values_that_the_command_stores(nets, teacher):
    """Those of files also give its tars, byte for byte."""
    folder = write_folder(Path("photos"))
    save_file(teacher.state_dict(), "weights.safetensors")
    options = ["data=image_folder", "data.path=photos", "teacher=module", "teacher.layer=trunk"]
    options += [f"teacher.factory={nets.__file__}:build", "teacher.weights=weights.safetensors"]
    options += [f"teacher.{name}={values}" for name, values in NORMALIZED.items()]
    options += ["annotate.outputs=[logits,maps]", "executor=serial", "store.path=command"]
    subprocess.run(
        [sys.executable, "-m", "permafrost", "precompute", *options], env=environment(), check=True
    )
    expected, tars = stored("command"), sorted(Path("command/images").iterdir())

    for form, dataset in forms(folder).items():
        fill(form, teacher=teacher, dataset=dataset)

        assert stored(form) == expected, form
        if form in ("folder", "splits", "absolute"):
            paths = sorted(Path(form, "images").iterdir())
            assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in tars]


def test_the_same_call_completes_what_was_interrupted(teacher, monkeypatch):
    pack, count = PackShard.__call__, 0

    def interrupted(self, shard):
        nonlocal count
        count += 1
        if count == 2:
            raise Interrupted(2)
        return pack(self, shard)

    monkeypatch.setattr(PackShard, "__call__", interrupted)
    with pytest.raises(Interrupted):
        fill("here", teacher=teacher, dataset=RECORDS, store__shard_size=8)
    completed = fill("here", teacher=teacher, dataset=RECORDS, store__shard_size=8)
    whole = fill("there", teacher=teacher, dataset=RECORDS, store__shard_size=8)

    assert (completed.packed_records, completed.passes) == (16, whole.passes)
    assert stored("here") == stored("there")
    again = fill("here", teacher=teacher, dataset=RECORDS, store__shard_size=8)
    assert (again.packed_records, again.teacher_records) == (0, 0)


def test_records_have_the_logits_of_the_teacher_in_memory(teacher):
    class Changing(nn.Module):
        """A network that changes its input, and returns what those of transformers do."""

        def __init__(self):
            super().__init__()
            self.inner = teacher

        def forward(self, images):
            images.mul_(0.5)
            return {"logits": self.inner(images * 2)}

    result = fill("s", teacher=Changing().eval(), dataset=RECORDS, layer="inner.trunk")

    assert result.teacher_accuracy.keys() == {"train"}
    samples = permafrost.load_store("s")
    for sample in samples.__getitems__(range(len(samples))):
        number = int(sample.key.partition("-")[0])
        logits = teacher((PIXELS[number] / 255 - 0.5)[None] / 0.25)[0]
        assert (sample.image * 255).round().byte().equal(PIXELS[number])
        assert sample.label == number % 4
        torch.testing.assert_close(sample.logits, logits, atol=1e-3, rtol=1e-3)
    assert next(teacher.parameters()).requires_grad  # the program's own network is left as it was


# ---- identity ------------------------------------------------------------------------------------


def test_the_identity_is_that_of_state_and_code_without_comments(tmp_path, nets, teacher):
    def digest(code, name):
        return digest_code(module_of(code, tmp_path, name).Net())

    first = digest(CODE, "first_net").replace("first_net", "")
    variants = {
        "a comment": CODE.replace("WIDTH = 8", "WIDTH = 8  # channels"),
        "a constant": CODE.replace("WIDTH = 8", "WIDTH = 16"),
        "a helper": CODE.replace("3, 2, 1)", "5, 2, 2)"),
        "forward": CODE.replace(".relu().mean", ".mean"),
    }
    changed = {}
    for number, (what, code) in enumerate(variants.items()):
        # The module has the same name each time, as the identity has it.
        sys.modules.pop("first_net")
        linecache.clearcache()
        changed[what] = digest(code + "\n" * (number + 1), "first_net") != first
    sys.modules.pop("first_net")

    assert changed == {"a comment": False, "a constant": True, "a helper": True, "forward": True}
    name = fill("s", teacher=teacher, dataset=RECORDS).passes[0]
    with torch.no_grad():
        teacher.fc.bias[0] += 1
    assert fill("s", teacher=teacher, dataset=RECORDS).passes[0] != name


def test_code_that_cannot_be_read_is_said(caplog):
    scope = {"__name__": "__main__"}
    exec(CODE, scope)
    result = fill("s", teacher=scope["build"](4).eval(), dataset=RECORDS)

    assert "is identified by its weights alone" in caplog.text
    assert permafrost.open_store("s").arrays()["logits"].shape == (24, 4)
    assert result.teacher_records == 24


# ---- bad input -----------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        yield from RECORDS


class Unsized(Dataset):
    def __getitem__(self, number):
        return RECORDS[number]


class Random(Unsized):
    def __len__(self):
        return 8

    def __getitem__(self, number):
        return torch.rand(3, 16, 16), 0


def with_item(item):
    return [*RECORDS[:5], item, *RECORDS[6:]]


BAD_DATASETS = {
    "a stream": (Stream(), "dataset=Stream is not a map-style dataset"),
    "no length": (Unsized(), "has no length"),
    "None": (with_item(None), r"dataset\[5\] is NoneType instead of an image"),
    "no image": (with_item((None, 1)), r"dataset\[5\] is NoneType"),
    "an entry": (with_item({"pixels": 1}), r"dataset\[5\] has pixels and no entry `image`"),
    "sizes": (with_item((PIXELS[0][:, :8], 1)), "16x8 pixels, and .* 16x16; name the side"),
    "above 1": ([(PIXELS[0].float(), 0)], "values from .* instead of 0 to 1; leave out the norm"),
    "NaN": ([(torch.full((3, 16, 16), np.nan), 0)], "values from nan"),
    "whole numbers": ([(PIXELS[0].long(), 0)], r"int64 \[16, 16, 3\] instead of an image"),
    "channels last": ([(PIXELS[0].permute(1, 2, 0), 0)], r"a tensor \[16, 16, 3\] instead of"),
    "a name": ([(PIXELS[0], "cat")], "has the label 'cat'"),
    "a fraction": ([(PIXELS[0], 0.5)], "has the label '0.5'"),
    "random": (Random(), "gives another image each time, so a transform"),
    "empty": ([], "dataset=list has no records"),
    "a path": ("photos", "dataset='photos' is a path; read a folder as data='image_folder'"),
    "no file": (["nowhere.jpg"], "nowhere.jpg; correct data.root or the table"),
    "a number": (5, "dataset=int is not a map-style dataset"),
}


@pytest.mark.parametrize("name", BAD_DATASETS)
def test_a_dataset_that_cannot_be_stored_is_one_error(teacher, name):
    dataset, message = BAD_DATASETS[name]

    with pytest.raises(permafrost.UserError, match=message):
        fill("s", teacher=teacher, dataset=dataset)


def test_a_folder_with_a_transform_is_refused_with_the_way(teacher):
    write_folder(Path("photos"))
    dataset = torchvision.datasets.ImageFolder("photos", torchvision.transforms.ToTensor())

    with pytest.raises(
        permafrost.UserError, match=r"has a transform.*augment=.*crops to frame=.*image_size="
    ):
        fill("s", teacher=teacher, dataset=dataset)


def test_a_network_that_cannot_be_a_teacher_is_one_error(nets, teacher):
    bad = {
        "on meta; move": nets.Net().to("meta").eval(),
        "is in train mode": nets.Net(),
        "has no parameters": nn.Flatten().eval(),
        "instead of a torch.nn.Module": nets.Net,
    }
    for message, network in bad.items():
        with pytest.raises(permafrost.UserError, match=message):
            fill("s", teacher=network, dataset=RECORDS)
    with pytest.raises(permafrost.UserError, match="has no default mean and std; set both"):
        fill("s", teacher=teacher, dataset=RECORDS, mean=None, std=None)
    with pytest.raises(permafrost.UserError, match="leave one out"):
        fill("s", teacher=teacher, dataset=RECORDS, data="digits")


def test_sizes_may_differ_if_the_frame_has_one(teacher):
    dataset = with_item((PIXELS[0][:, :8], 1))

    assert fill("s", teacher=teacher, dataset=dataset, image_size=16).packed_records == 24


def test_classes_of_several_names_are_one_text(teacher):
    """ImageNet's classes in torchvision are tuples of names."""
    folder = write_folder(Path("photos"))
    folder.classes = [("tench", "Tinca tinca"), ("goldfish",), ("shark",), ("ray",)]
    fill("s", teacher=teacher, dataset=folder)

    classes = permafrost.open_store("s").manifest.classes
    assert classes == ("tench, Tinca tinca", "goldfish", "shark", "ray")


def test_a_column_of_splits_is_read(teacher):
    write_folder(Path("photos"))
    paths = sorted(map(str, Path("photos").rglob("*.png")))
    frame = pd.DataFrame({"path": paths, "label": "a", "split": ["train", "test"] * 12})
    fill("s", teacher=teacher, dataset=frame)

    assert permafrost.open_store("s").manifest.records == {"train": 12, "test": 12}


def test_outputs_count_the_classes_that_a_dataset_does_not_name(teacher):
    few = [(pixels, number % 2) for number, pixels in enumerate(PIXELS)]
    fill("few", teacher=teacher, dataset=few)
    fill("none", teacher=teacher, dataset=TensorDataset(PIXELS))

    assert permafrost.open_store("few").manifest.classes == ("0", "1", "2", "3")
    assert permafrost.open_store("none").arrays()["logits"].shape == (24, 4)


# ---- students ------------------------------------------------------------------------------------

TRAINING = {"store": "s", "epochs": 2, "batch_size": 8, "method": "kd", **NORMALIZED}


@pytest.fixture
def student(nets, teacher):
    fill("s", teacher=teacher, dataset=RECORDS)
    torch.manual_seed(5)
    return nets.Net()


def test_a_network_in_memory_is_trained_evaluated_and_loaded(nets, student, caplog):
    before = student.fc.weight.detach().clone()
    result = permafrost.distill(student=student, run="mine", **TRAINING)

    assert result.model is student
    assert not student.fc.weight.equal(before)
    images = torch.rand(2, 3, 16, 16)
    loaded = permafrost.load_student("mine", network=nets.Net())
    torch.testing.assert_close(loaded(images).logits, student.eval()((images - 0.5) / 0.25))
    options = {"store": "s", "run": "mine", "splits": ["train"], **NORMALIZED}
    saved = permafrost.evaluate(student=student, **options)
    assert Path(saved.metrics) == Path("runs/mine/evaluate/metrics.json")
    with torch.no_grad():
        student.fc.bias[0] += 100
    changed = permafrost.evaluate(student=student, **options)
    assert "were changed since: it is evaluated as it is" in caplog.text
    assert (changed.metrics, changed.splits["train"]["accuracy"]) == ("", 0.25)
    assert saved.splits["train"]["kl_to_teacher"] < changed.splits["train"]["kl_to_teacher"]


def test_other_code_or_normalization_is_not_the_student_of_the_run(nets, student, tmp_path, caplog):
    permafrost.distill(student=student, run="mine", **TRAINING)
    options = {"store": "s", "run": "mine", "splits": ["train"]}
    kept = permafrost.evaluate(student=student, **options, **NORMALIZED)
    other = module_of(CODE.replace(".relu().mean", ".mean"), tmp_path, "other_net").Net()
    other.load_state_dict(student.state_dict())

    changed = permafrost.evaluate(student=other, **options, **NORMALIZED)
    shifted = permafrost.evaluate(student=student, **options, mean=[0.9] * 3, std=[0.25] * 3)

    assert kept.metrics
    for result in (changed, shifted):
        assert result.metrics == ""
        assert result.splits["train"]["kl_to_teacher"] != kept.splits["train"]["kl_to_teacher"]
    caplog.clear()
    permafrost.load_student("mine", network=other)
    assert "was trained with other code of Net" in caplog.text


def test_a_run_is_known_by_the_network_that_loaded_it(nets, student):
    permafrost.distill(student=student, run=Path("mine"), **TRAINING)
    loaded = permafrost.load_student("runs/mine", network=nets.Net())

    measured = permafrost.evaluate(store="s", run="mine", splits=["train"])
    assert measured.metrics
    options = {"store": "s", "splits": ["train"], **NORMALIZED}
    alone = permafrost.evaluate(student=student.requires_grad_(False), **options)
    assert alone.splits == measured.splits
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images).logits, student.eval()((images - 0.5) / 0.25))


def test_values_of_other_kinds_are_options_or_one_error(nets, student):
    views = permafrost.augmentation("pad_crop_flip")
    normalized = {"mean": torch.tensor([0.5] * 3), "std": np.full(3, 0.25)}
    trained = permafrost.distill(student=student, augment=views, **TRAINING | normalized)

    assert trained.trained_epochs == 2
    wrong = {
        "store is list, which is not a value": {"store": [student]},
        "has no parameter that requires a gradient": {"student": nets.Net().requires_grad_(False)},
    }
    for message, options in wrong.items():
        with pytest.raises(permafrost.UserError, match=message):
            permafrost.distill(**{"student": nets.Net(), **TRAINING, **options})
    with pytest.raises(permafrost.UserError, match=r"student\.classes=5 are not the 4 classes"):
        permafrost.evaluate(student=nets.Net(5), store="s", splits=["train"], **NORMALIZED)


def test_a_training_without_a_run_leaves_nothing(nets, student):
    result = permafrost.distill(student=student, **TRAINING)
    measured = permafrost.evaluate(student=student, store="s", splits=["train"], **NORMALIZED)

    assert (result.student, result.next, measured.metrics) == ("", "", "")
    assert not Path("runs").exists()
    options = {name: value for name, value in TRAINING.items() if name != "method"}
    network = nets.Net()
    before = network.fc.weight.detach().clone()
    taught = permafrost.teach(teacher=network, splits=["train"], **options)
    assert taught.weights == ""
    assert 0 <= taught.accuracy["train"] <= 1
    assert not network.fc.weight.equal(before)


def test_a_student_of_other_outputs_than_its_teacher_is_one_error(nets, student):
    with pytest.raises(permafrost.UserError, match=r"returns 5 logits, but .* of 4 classes; build"):
        permafrost.distill(student=nets.Net(5), **TRAINING)


def test_a_network_of_torchvision_stores_the_features_of_its_stages():
    teacher = torchvision.models.resnet18(num_classes=4).eval()
    options = {"outputs": ["logits", "features"], "input_size": 64, "layer": None}
    fill("s", teacher=teacher, dataset=RECORDS, **options)

    values = permafrost.open_store("s").arrays("train", fields=("features_4",))
    assert values["features_4"].shape == (24, 2, 512, 2, 2)  # of the image and of its mirror image


def test_a_run_of_another_program_needs_its_network(nets, student):
    permafrost.distill(student=student, run="mine", **TRAINING)
    del student
    code = "import permafrost; permafrost.load_student('mine')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )

    assert "Net is a network in the memory of a Python program" in done.stderr
    assert "permafrost.load_student(run, network=...)" in done.stderr


# ---- lists ---------------------------------------------------------------------------------------


def test_lists_have_what_options_take():
    networks = permafrost.list_networks("resnet18*")

    assert {"torchvision/resnet18", "timm/resnet18"} <= set(networks)
    assert not [name for name in networks if not name.partition("/")[2].startswith("resnet18")]
    assert {"kd", "e2kd", "labels"} <= set(permafrost.list_methods())
    assert {"gradcam"} <= set(permafrost.list_explainers())
    assert {"accuracy", "localization"} <= set(permafrost.list_evaluators())


class Encoder(nn.Module):
    """Transformer whose class is read from a token, so that no layer returns a grid [B, C, h, w] after its patches."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), tokens], dim=1)
        return self.head(self.encoder(tokens)[:, 0])


def test_transformers_teach_and_learn_maps_without_a_reshape():
    torch.manual_seed(0)
    teacher = Encoder().eval()
    fill("s", teacher=teacher, dataset=RECORDS, layer=None, outputs=[*OUTPUTS, "features"])

    (made,) = permafrost.open_store("s").open_passes()
    assert made.manifest.made_with["layer"] == "encoder.layers.1.norm1"
    assert made.manifest.made_with["layout"] == "b 1+hw c"
    shapes = {field.name: field.shape for field in made.manifest.fields}
    assert shapes["map"][-2:] == shapes["features_1"][-2:] == shapes["features_2"][-2:] == (4, 4)
    permafrost.distill(student=Encoder(), run="mine", **TRAINING | {"method": "e2kd"})
    measured = permafrost.evaluate(store="s", run="mine", splits=["train"])
    assert -1 <= measured.splits["train"]["map_cosine"] <= 1


def test_a_network_without_a_grid_has_logits_and_no_maps():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    options = {"layer": None, "outputs": ["logits"]}
    fill("s", teacher=network.eval(), dataset=RECORDS, **options)

    sample = permafrost.load_store("s")[0]
    expected = network((sample.image[None] - 0.5) / 0.25)[0]
    torch.testing.assert_close(sample.logits, expected, atol=1e-3, rtol=1e-3)
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    permafrost.distill(student=student, run="mine", **TRAINING)
    measured = permafrost.evaluate(store="s", run="mine", splits=["train"])
    assert 0 <= measured.splits["train"]["accuracy"] <= 1
    with pytest.raises(permafrost.UserError, match="has no features for its maps: no layer"):
        fill("s", teacher=network, dataset=RECORDS, layer=None)
