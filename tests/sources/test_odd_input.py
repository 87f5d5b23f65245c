"""Damaged, hostile or mistaken input: one clear error in constant memory, or the requested result."""

import io
import json
import logging
import resource
import struct
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from permafrost.config.data import ImageTableDataConfig
from permafrost.config.methods import E2KDConfig
from permafrost.config.models import CifarModelConfig, TorchvisionModelConfig
from permafrost.core.errors import ConfigError
from permafrost.models.classifier import WeightsError
from permafrost.models.explanations import gradcam, map_grid, require_places, warn_of_coarse_grid
from permafrost.models.providers import build_model, name_weights, provider_of
from permafrost.models.saved import TrainedModel
from permafrost.models.weights import load_weights, read_state_dict
from permafrost.sources.source import build_source
from permafrost.storage.files import file_at
from permafrost.store.commit_pass import ConstantLogitsError
from permafrost.store.image_decoding import ImageError, inspect_image
from permafrost_papers.ked.data_options import TinyImageNetDataConfig
from permafrost_report.figures import training_curves
from permafrost_report.pictures import PictureRow, picture_grid
from permafrost_sources.options import WebDatasetDataConfig
from permafrost_timm.options import TimmModelConfig
from tests.support.images import write_tar
from tests.support.processes import bare_environment, run_program
from tests.support.runs import distill_config
from tests.support.stores import precompute_config
from tests.support.verbs import distill, precompute


def wide_png(seed=0, size=(8, 8)):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def listed(path, **options):
    source = build_source(WebDatasetDataConfig(path=str(path), **options))
    return list(source.records()), source.classes


# ---- tars from elsewhere -------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["2147483647", "99999999999", "1000000", "9" * 17])
@pytest.mark.parametrize("suffix", ["cls", "json"])
def test_a_label_that_would_take_all_memory_names_its_record(tmp_path, label, suffix):
    text = label if suffix == "cls" else json.dumps({"label": int(label)})
    path = write_tar(tmp_path / "a.tar", {"s.png": wide_png(), f"s.{suffix}": text})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(ConfigError, match=r"a\.tar: s has label \d+.*below 1,000,000"):
        listed(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": "012"}, "labels is '012', not a list"),
        ({"label": True}, "label 'True', which is neither a number"),
        ({"label": 1, "group": True}, "group is 'True'"),
        ({"group": 10**20}, "group is '1000"),
        ({"group": -(2**31)}, "group is '-2147483648'"),
        ({"boxes": [{"x0": 5, "y0": 1, "x1": 2, "y1": 3}]}, "has no area"),
        ({"boxes": [{"x0": float("nan"), "y0": 1, "x1": 2, "y1": 3}]}, "has no area"),
        ({"boxes": [{"x0": 0, "y0": 0, "x1": float("inf"), "y1": 3}]}, "has no area"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_json_is_not_taken_at_face_value(tmp_path, values, message):
    text = values if isinstance(values, str) else json.dumps(values)
    path = write_tar(tmp_path / "a.tar", {"s.png": wide_png(), "s.json": text})

    with pytest.raises(ConfigError, match=message) as error:
        listed(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 600


def test_a_class_of_five_thousand_digits_is_no_number(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"s.png": wide_png(), "s.cls": "9" * 5000})

    with pytest.raises(ConfigError, match="which is neither a number") as error:
        listed(path)
    assert len(str(error.value)) < 400


def test_a_tar_that_promises_a_hundred_terabytes_is_one_error(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("s.png")
        member.pax_headers = {"size": str(10**14)}
        tar.addfile(member)
    with pytest.raises(ConfigError, match=str(path)):
        listed(path)


# ---- tables --------------------------------------------------------------------------------------


def table(tmp_path, label):
    (tmp_path / "a.png").write_bytes(wide_png())
    (tmp_path / "t.csv").write_text(f"path,label\na.png,{label}\n")
    return build_source(ImageTableDataConfig(path=str(tmp_path / "t.csv")))


@pytest.mark.parametrize("label", ["2147483647", "1000000", "18446744073709551615", "7" * 4400])
def test_a_tables_label_that_would_take_all_memory_names_its_row(tmp_path, label):
    with pytest.raises(ConfigError, match=r"t\.csv, row 2, column label") as error:
        _ = table(tmp_path, label).classes
    assert len(str(error.value)) < 400


def test_a_path_with_a_null_character_is_a_missing_file(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"path,label\na\0b.png,1\n")

    with pytest.raises(ConfigError):
        list(build_source(ImageTableDataConfig(path=str(tmp_path / "t.csv"))).records())


# ---- a class without boxes -----------------------------------------------------------------------


def write_tiny_imagenet(tmp_path, with_boxes):
    names = ("n01", "n02")
    (tmp_path / "wnids.txt").write_text("\n".join(names))
    for name in names:
        folder = tmp_path / "train" / name / "images"
        folder.mkdir(parents=True)
        (folder / f"{name}_0.JPEG").write_bytes(wide_png(size=(64, 64)))
        if name in with_boxes:
            (folder.parent / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t1\t2\t30\t40\n")
    (tmp_path / "val" / "images").mkdir(parents=True)
    (tmp_path / "val" / "val_annotations.txt").write_text("")
    return str(tmp_path)


def test_a_class_without_a_file_of_boxes_is_an_error_with_a_way_out_that_works(tmp_path, caplog):
    path = write_tiny_imagenet(tmp_path, ["n01"])

    caplog.set_level(logging.WARNING, "permafrost.sources")
    with pytest.raises(ConfigError, match=r"n02_boxes\.txt is missing.*data\.on_error=skip"):
        list(build_source(TinyImageNetDataConfig(path=path)).records())
    records = list(build_source(TinyImageNetDataConfig(path=path, on_error="skip")).records())

    assert [len(record.boxes) for record in records] == [1, 0]
    assert "has no boxes for 1 images" in caplog.text


# ---- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
        b"%PDF-1.4\n",
        b"GRIB" + bytes(64),
        b"\x89HDF\r\n\x1a\n" + bytes(64),
    ],
)
def test_only_formats_of_a_fixed_list_are_opened_whatever_a_name_says(data, monkeypatch):
    """PIL would pass an EPS file to Ghostscript if that is installed."""
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(subprocess, "check_call", None)

    with pytest.raises(ImageError, match="not an image of a known kind"):
        inspect_image(data)


# ---- weights -------------------------------------------------------------------------------------

SMALL = CifarModelConfig(name="resnet8", width=4)


def weights_files(folder):
    """Files by name, none of which contains weights of SMALL."""
    state = build_model(SMALL, 10).state_dict()
    save_file(state, folder / "sound.safetensors")
    torch.save(state, folder / "sound.pth")
    tensors, archive = ((folder / f"sound.{s}").read_bytes() for s in ("safetensors", "pth"))
    scripted = folder / "scripted.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), scripted)
    return {
        "cut.pth": archive[: len(archive) // 2],
        "empty.pth": b"",
        "junk.pth": bytes(range(256)) * 8,
        "scripted.pt": scripted.read_bytes(),
        "zip.pth": b"PK\x03\x04" + bytes(60),
        "cut.safetensors": tensors[: len(tensors) // 2],
        "empty.safetensors": b"",
        "huge_header.safetensors": struct.pack("<Q", 2**60) + b"{}",
        "junk.safetensors": bytes(range(256)) * 8,
        "deep.safetensors": struct.pack("<Q", 100_000) + b"[" * 100_000,
    }


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_of_weights_is_one_error_that_names_it(tmp_path):
    for name, data in weights_files(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(WeightsError) as error:
            read_state_dict(path)
        assert str(path) in str(error.value), name
        assert "\n" not in str(error.value), name


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensor: tensor.zero_(), "contains only zeros"),
        (lambda tensor: tensor.fill_(float("nan")), "not finite, in "),
        (lambda tensor: tensor.fill_(float("inf")), "not finite, in "),
    ],
)
def test_weights_that_nobody_trained_are_refused(tmp_path, spoil, message):
    state = build_model(SMALL, 10).state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            spoil(tensor)
    save_file(state, tmp_path / "w.safetensors")

    with pytest.raises(WeightsError, match=message):
        load_weights(build_model(SMALL, 10), tmp_path / "w.safetensors")


def test_weights_may_be_given_their_digest(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(build_model(SMALL, 10).state_dict(), path)
    config = replace(SMALL, weights=str(path))

    build_model(replace(config, sha256=file_at(path).sha256().upper()), 10)
    with pytest.raises(WeightsError, match="the option sha256 is 0000"):
        build_model(replace(config, sha256="0" * 64), 10)
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        replace(config, sha256="abc")


def test_published_weights_get_their_exact_name_and_others_are_refused():
    config = TorchvisionModelConfig(name="resnet50", weights="pretrained")

    assert name_weights(config).weights == "pretrained:IMAGENET1K_V2"
    assert name_weights(replace(config, name="resnet18")).weights == "pretrained:IMAGENET1K_V1"
    first = replace(config, weights="pretrained:IMAGENET1K_V1")
    assert name_weights(first) == first
    with pytest.raises(ConfigError, match="pretrained:IMAGENET1K_V1, pretrained:IMAGENET1K_V2"):
        build_model(replace(config, weights="pretrained:IMAGENET1K_V9"), 10)
    assert name_weights(replace(SMALL, weights="w.pth")).weights == "w.pth"
    tag = timm.get_pretrained_cfg("resnet18").tag
    of_timm = TimmModelConfig(name="resnet18", weights="pretrained")
    assert name_weights(of_timm).weights == f"pretrained:{tag}"


# ---- constant logits -----------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", [16, 64])
def test_a_teacher_of_constant_logits_is_refused(tmp_path, tiny_teacher, shard_size):
    state = build_model(replace(SMALL, weights=tiny_teacher.weights), 10).state_dict()
    head = [name for name in state if state[name].shape[:1] == (10,)]
    state[next(name for name in head if state[name].ndim == 2)].zero_()
    save_file(state, tmp_path / "dead.safetensors")
    dead = replace(SMALL, weights=str(tmp_path / "dead.safetensors"))

    with pytest.raises(ConstantLogitsError, match=r"check teacher\.weights"):
        precompute.run(precompute_config(tmp_path / "store", dead, shard_size=shard_size))
    assert not list((tmp_path / "store").glob("teachers/*/manifest.json"))


# ---- explanations of one cell --------------------------------------------------------------------


def test_a_student_whose_explanation_has_one_cell_is_refused_with_the_way_out(frozen):
    student = TimmModelConfig(name="resnet10t")
    config = replace(distill_config(frozen, method=E2KDConfig(lambda_map=5.0)), student=student)
    message = r"1x1 cells on images of 16x16 pixels.*raise augment\.size"

    with pytest.raises(ConfigError, match=message):
        distill.run(config)
    assert map_grid(build_model(student, 10), (16, 16), gradcam) == (1, 1)
    assert map_grid(build_model(student, 10), (64, 64), gradcam) == (2, 2)


def test_a_teacher_of_one_cell_is_refused_and_a_coarse_one_is_warned_of(caplog):
    caplog.set_level(logging.WARNING, "permafrost.explainers")
    with pytest.raises(ConfigError, match=r"the maps of t have a grid of 1x1 cells"):
        require_places((1, 1), (32, 32), "the maps of t", "raise teacher.input_size")
    require_places((1, 2), (32, 32), "the maps of t", "raise teacher.input_size")
    warn_of_coarse_grid((2, 2), (8, 8))
    assert caplog.text == ""
    warn_of_coarse_grid((2, 2), (9, 9))
    warn_of_coarse_grid((7, 32), (7, 7))
    assert caplog.text.count("grid of") == 2


# ---- exports -------------------------------------------------------------------------------------


@pytest.mark.parametrize("license_name", [None, "CC0-1.0"])
def test_an_export_says_nothing_of_weights_that_it_does_not_hold(tmp_path, license_name):
    config = TimmModelConfig(name="resnet18", license=license_name)
    classes = tuple(f"kind {number}" for number in range(10))
    trained = TrainedModel(config=config, num_classes=10, classes=classes, input_size=(64, 64))

    provider_of(config).export(tmp_path / "my-run/distill/export", build_model(config, 10), trained)

    path = tmp_path / "my-run/distill/export/config.json"
    written = json.loads(path.read_text())
    settings = written["pretrained_cfg"]
    assert settings["tag"] == "my-run"
    assert settings.get("license") == license_name
    assert written["label_names"] == list(classes)
    published = timm.get_pretrained_cfg("resnet18").to_dict()
    for name in ("origin_url", "paper_ids", "notes", "hf_hub_id", "url", "description"):
        assert name not in settings
    assert published["tag"] not in path.read_text()
    assert timm.create_model(f"local-dir:{path.parent}", pretrained=True).num_classes == 10


# ---- other input ---------------------------------------------------------------------------------


def test_a_class_name_with_dollars_is_text_and_no_formula():
    name = r"cost $5 \frac{ $"
    lines = {name: [[{"step": 1, "total": 1.0}, {"step": 2, "total": 0.5}]]}

    training_curves(lines)
    picture_grid([PictureRow(name, [np.zeros((4, 4, 3))], [name], notes=[name])])


@pytest.mark.parametrize(
    "words",
    [["store.path=/dev/null"], pytest.param(["store.path=/proc/x/y"], marks=pytest.mark.slow)],
)
def test_a_place_where_nothing_can_be_written_is_one_line(tmp_path, words):
    done = run_program(
        [sys.executable, "-m", "stages.precompute", "data=demo", "teacher=none", *words],
        cwd=tmp_path,
        env=bare_environment(PATH=""),
    )

    assert done.returncode == 1
    (line,) = done.stderr.strip().split("\n")
    assert line.startswith("permafrost precompute: error: /")
