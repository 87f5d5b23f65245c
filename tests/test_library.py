"""The library: what `import permafrost` offers, selections and tables of a store, explanations, verbs as functions."""

import doctest
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import permafrost
from permafrost.config.compose import compose
from permafrost.config.points import arguments_of_options
from permafrost.core.errors import ConfigError
from permafrost.models.classifier import Normalize
from permafrost.models.explanations import gradcam
from permafrost.models.providers import build_model, freeze
from permafrost.runs.mirrors import RUNS
from permafrost.storage.signed_files import write_json
from tests.support.composition import config_of
from tests.support.papers import needs_papers
from tests.support.processes import environment
from tests.support.runs import save_student

EPOCH = {"trainer": {"epochs": 1, "batch_size": 8}}


@pytest.fixture(scope="module")
def store(frozen):
    return permafrost.open_store(frozen.store.path)


# ---- names ---------------------------------------------------------------------------------------


def test_every_public_name_is_documented_and_imported_on_first_use():
    for name in permafrost.__all__:
        assert getattr(permafrost, name).__doc__, name

    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = permafrost.other
    names = "torch", "pyarrow", "transformers"
    code = f"import sys, permafrost; print(*[name in sys.modules for name in {names}])"
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["False"] * 3


EXAMPLES = ("RecordLoader", "augmentation", "explain", "kd_loss", "load_student", "map_cosine")


@pytest.mark.parametrize("name", [*EXAMPLES, "open_store"])
def test_the_example_of_a_public_name_runs(frozen, tmp_path, monkeypatch, name):
    """Those of the verbs are on the pages (tests/docs/test_commands.py)."""
    monkeypatch.chdir(tmp_path)
    student = save_student(frozen, "one") if name == "load_student" else None
    member = getattr(permafrost, name)
    names = vars(sys.modules[member.__module__]) | {"path": frozen.store.path, "student": student}

    (example,) = (
        test
        for test in doctest.DocTestFinder(recurse=False).find(member, name, globs=names)
        if test.examples
    )

    assert doctest.DocTestRunner().run(example).failed == 0


# ---- a store -------------------------------------------------------------------------------------


def test_records_are_selected_by_class_shots_and_key(store):
    every = store.select("train")
    name = store.manifest.classes[3]
    of_class = store.select("train", classes=[name])
    keys = every.keys_at([5, 2])

    assert set(of_class.label_numbers.tolist()) == {3}
    assert len(store.select("train", shots=1)) == len(store.manifest.classes)
    assert sorted(store.select("train", keys=keys).keys_at()) == sorted(keys)
    with pytest.raises(ConfigError, match="no split"):
        store.select("nowhere")
    with pytest.raises(ConfigError, match="classes="):
        store.select(classes=["zebra"])
    with pytest.raises(ConfigError, match="1 of the 2 keys"):
        store.select(keys=[keys[0], "absent"])


def test_a_table_joins_keys_labels_and_outputs(store):
    table = store.table("test", fields=["logits", "map"])
    (batch, *_) = permafrost.RecordLoader(
        store.select("test"), shuffle=False, batch_size=len(table)
    )
    frame = table.to_pandas()
    arrays = store.arrays("test", fields=["logits", "map"])

    assert table["key"].to_pylist() == list(batch.keys)
    assert frame["label"].tolist() == batch.labels.tolist()
    assert set(frame["split"]) == {"test"}
    assert np.array_equal(arrays["logits"], batch.logits.numpy())
    unit = arrays["map"] / np.abs(arrays["map"]).max(axis=(1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(unit, batch.maps.numpy(), rtol=1e-6)
    assert len(store.table()) == store.num_records()
    assert store.table(fields=()).column_names == ["key", "split", "label"]
    with pytest.raises(ConfigError, match="no split 'trian'"):
        store.table("trian")
    with pytest.raises(ConfigError, match="no field nothing; it has"):
        store.table(fields=["nothing"])


# ---- explanations --------------------------------------------------------------------------------


def test_explain_gives_gradcam_of_a_network_in_batches(tiny_teacher):
    model = freeze(build_model(tiny_teacher, 10))
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    output = model(images)
    classes = output.logits.argmax(dim=1, keepdim=True)

    model.train()
    model.layer1.eval()
    whole = permafrost.explain(model, images)
    assert model.training
    assert not model.layer1.training
    parts = permafrost.explain(model, images.split(2), target_class=classes)

    assert torch.equal(whole.target_class, classes)
    torch.testing.assert_close(whole.maps, gradcam(model, output, classes))
    torch.testing.assert_close(parts.maps, whole.maps)
    with pytest.raises(ConfigError, match=r"must return logits \[B, K\]"):
        permafrost.explain(nn.Sequential(nn.Conv2d(3, 4, 3)), images)
    with pytest.raises(ConfigError, match=r"images are torch\.float32 \[3, 16, 16\] instead of"):
        permafrost.explain(model, images[0])
    with pytest.raises(ConfigError, match=r"torch\.uint8"):
        permafrost.explain(model, images.byte())


def test_explain_normalizes_as_a_network_that_does_it_first():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 5))
    images, mean, std = torch.rand(4, 3, 16, 16), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

    explained = permafrost.explain(network, images, layer="1", mean=mean, std=std, batch_size=3)
    wrapped = nn.Sequential(Normalize(mean, std), *network)
    expected = permafrost.explain(wrapped, images, layer="2", batch_size=3)

    assert all(map(torch.equal, explained, expected))
    assert not torch.equal(explained.maps, permafrost.explain(network, images, layer="1").maps)
    for wrong in ({"mean": [0.5]}, {"std": [0.5, 0.5, 0.0]}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.* of the 3 channels"):
            permafrost.explain(network, images, layer="1", **wrong)


# ---- words of options ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"store": Path("a b/s"), "run": "x"}, ['store.path="a b/s"', "run=x"]),
        ({"method": "e2kd", "tau": 4}, ["method=e2kd", "method.tau=4"]),
        ({"trainer__epochs": 3}, ["trainer.epochs=3"]),
        ({"trainer": {"epochs": 3, "clip_norm": None}}, ["trainer={epochs: 3, clip_norm: null}"]),
        (
            {"student": {"kind": "cifar", "name": "resnet8", "width": 4}},
            ["student={kind: cifar, name: resnet8, width: 4}"],
        ),
        ({"subset": {"shots": 5}, "seed": 1}, ["subset={shots: 5}", "seed=1"]),
        ({"augment": {"size": 24}}, ["augment={size: 24}"]),
        ({"experiment": "demo", "epochs": 2}, ["experiment=demo", "trainer.epochs=2"]),
    ],
)
def test_keyword_arguments_are_words_of_the_command_line(options, words):
    assert arguments_of_options("distill", [], options) == words


def test_a_mapping_that_is_a_value_stays_whole():
    options = {"variants": {"kd": ["method=kd"]}, "grid": {"method.tau": [1, 4]}}

    words = arguments_of_options("sweep", [], options)

    assert words == ['variants={kd: ["method=kd"]}', "grid={method.tau: [1, 4]}"]


def test_held_out_records_are_those_that_a_training_leaves_out(frozen):
    opened = permafrost.open_store(frozen.store.path)

    held_out = np.asarray(opened.select("holdout", holdout=1).rows)

    every, kept = (np.asarray(opened.select("train", holdout=n).rows) for n in (0, 1))
    assert len(held_out) > 0
    assert sorted([*kept, *held_out]) == sorted(every)
    with pytest.raises(ConfigError, match=r"select\('holdout', holdout=10\)"):
        opened.select("holdout")


@needs_papers
def test_a_name_that_no_section_or_several_have_is_an_error_that_says_so():
    with pytest.raises(
        ConfigError, match=r"distill takes no temperature= \(did you mean method\.tau=4\?\)"
    ):
        compose("distill", arguments_of_options("distill", [], {"temperature": 4}))
    with pytest.raises(
        ConfigError, match=r"distill takes no tua= \(did you mean method\.tau=4\?\)"
    ):
        compose("distill", arguments_of_options("distill", [], {"tua": 4}))
    with pytest.raises(ConfigError, match=r"write student\.width= or teacher\.width="):
        arguments_of_options("distill", ["mode=live", "teacher=cifar"], {"width": 4})


# ---- verbs ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_verb_and_its_function_make_the_same_run(store, tmp_path, monkeypatch):
    """The identity, and so every option, is that of the command line."""
    monkeypatch.chdir(tmp_path)
    student = {"kind": "cifar", "name": "resnet8", "width": 4}
    path = str(store.path)

    made = permafrost.distill(
        store=path,
        run="mine",
        student=student,
        method="e2kd",
        tau=2,
        augment="pad_crop_flip",
        **EPOCH,
    )
    words = [
        *(f"store.path={path}", "run=mine", "student=cifar", "student.name=resnet8"),
        *("student.width=4", "method=e2kd", "method.tau=2", "augment=pad_crop_flip"),
        *("trainer.epochs=1", "trainer.batch_size=8"),
    ]
    repeated = permafrost.distill(*words)
    judged = permafrost.evaluate(store=path, run="mine", splits=["test"])
    page = permafrost.report(store=path, run="mine", augment="pad_crop_flip")

    assert made.trained_epochs == 1
    assert repeated.trained_epochs == 0  # other options would be an error
    assert made.model(torch.rand(2, 3, 16, 16)).logits.shape == (2, 10)
    assert permafrost.load_student("mine").network.state_dict().keys()
    stored = json.loads((RUNS / "mine/evaluate/metrics.json").read_text())
    assert judged.splits == stored["splits"]
    assert Path(page.html).is_file()
    with pytest.raises(permafrost.UserError, match=r"method\.tau"):
        permafrost.distill(*words, tau=3)


# ---- a saved network -----------------------------------------------------------------------------


def test_a_saved_network_has_the_options_of_its_run(frozen):
    folder = save_student(frozen, "one")
    described = json.loads((folder / "model.json").read_text())["model"]

    for weights in (folder, folder / "model.safetensors"):
        words = ["teacher=saved", f"teacher.weights={weights}", "teacher.interpolation=bicubic"]
        teacher = config_of("precompute", *words).teacher

        assert (teacher.kind, teacher.name, teacher.width) == (
            *(described["kind"], described["name"], described["width"]),
        )
        assert teacher.weights == str(folder / "model.safetensors")
        assert (teacher.input_size, teacher.interpolation) == (16, "bicubic")


def test_a_saved_network_that_is_not_there_is_an_error_with_a_way_out():
    with pytest.raises(ConfigError, match=r"teacher=saved needs teacher\.weights=.*runs/none"):
        compose("precompute", ["teacher=saved", "teacher.weights=runs/none"])


def test_a_saved_network_does_not_choose_the_code_that_builds_it(tmp_path):
    write_json(
        tmp_path / "model.json",
        {"model": {"kind": "module", "factory": "os:system"}, "input_size": [8, 8]},
    )

    with pytest.raises(ConfigError, match=r"os:system builds; name its file or module, plugins="):
        compose("precompute", ["teacher=saved", f"teacher.weights={tmp_path}"])
