"""Programs of a student for use without this project: ONNX and torch.export, with all preprocessing."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from PIL import ExifTags, Image

import permafrost
from permafrost.config.models import CifarModelConfig, Picture, TorchvisionModelConfig
from permafrost.core.batches import Batch, Rendering
from permafrost.core.errors import ConfigError
from permafrost.loading.geometry import view_images
from permafrost.loading.windows import in_views, pixel_boxes, views_of_picture
from permafrost.models.cifar import CifarResNet
from permafrost.models.classifier import Intermediates, ModelOutput
from permafrost.models.module import ModuleClassifier
from permafrost.models.providers import build_model, freeze
from permafrost.store.facts import Fact, FactSheet, write_sheets
from permafrost.store.record_form import resize_pixels
from permafrost_export import portable
from permafrost_export.portable import (
    ImageProgram,
    RowProgram,
    WrongProgramError,
    check_program,
    encode_model,
    open_program,
    trace,
)
from permafrost_papers.bcos.options import BcosModelConfig
from permafrost_papers.ked.options import AdditiveModelConfig
from tests.support import connections
from tests.support.images import decode_rgb
from tests.support.pages import blocks_of
from tests.support.paths import ROOT
from tests.support.runs import save_student

WHOLE = Picture(size=(16, 16), frames=(16, 16))


def noise(*shape):
    return torch.randint(
        0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )


def small_resnet(seed=0):
    torch.manual_seed(seed)
    return freeze(CifarResNet(CifarModelConfig(name="resnet8", width=4), 10))


def frame_of(image, size):
    """Return an image in a frame that is resized as the program does it."""
    return portable._resize(image[None], size)[0].to(torch.uint8)


def evaluated_logits(network, images, picture):
    """Logits of an evaluation of images of one size, each in a store of frames or of the files."""
    sizes = torch.tensor([images.shape[-2:]] * len(images)).float()
    batch = Batch(
        keys=tuple(map(str, range(len(images)))),
        record_index=torch.arange(len(images)),
        inputs=torch.stack([frame_of(image, picture.frames or (8, 8)) for image in images]),
        canonical_from_view=None,
        view_index=torch.zeros(len(images), dtype=torch.long),
        original_size=sizes,
        labels=torch.zeros(len(images), dtype=torch.long),
        groups=torch.full((len(images),), -1),
    )
    views = views_of_picture(picture, sizes)
    if picture.frames is None:
        left, top, right, bottom = pixel_boxes(views.windows, sizes)[0].tolist()
        cut = [frame_of(image[:, top:bottom, left:right], picture.size) for image in images]
        batch = replace(batch, inputs=torch.stack(cut), has_windows=True)
    batch = in_views(batch, views, Rendering(resize=picture.resize))
    return network(view_images(batch, picture.size)).logits


# ---- preprocessing -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (40, 48), (75, 50), (20, 90)], ids=str)
@pytest.mark.parametrize(
    ("crop", "frames"),
    [
        (None, (32, 32)),
        (None, (40, 48)),
        (0.875, (40, 48)),
        (0.875, (32, 32)),
        (None, None),
        (0.875, None),
    ],
    ids=str,
)
def test_the_program_repeats_an_evaluation(shape, crop, frames):
    network, images = small_resnet(), noise(2, 3, *shape)
    picture = Picture(size=(32, 32), crop=crop, frames=frames)
    program = ImageProgram(network, picture)

    expected = evaluated_logits(network, images, picture)

    torch.testing.assert_close(program(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(72, 72), (60, 90), (80, 64), (480, 640), (30, 40)], ids=str)
def test_pixels_are_those_of_a_store_up_to_a_level_of_a_few(shape):
    image = noise(*shape, 3)

    stored = torch.from_numpy(resize_pixels(image.numpy(), (48, 56))).permute(2, 0, 1)
    off = frame_of(image.permute(2, 0, 1), (48, 56)).int() - stored.int()

    assert (off != 0).float().mean() < 0.05  # 0.13 to 0.24 with one rounding at the end
    assert off.abs().max() <= 1


def test_a_crop_sees_less_than_the_whole_image():
    """Control: the frames of the test above are not alike."""
    network, images = small_resnet(), noise(2, 3, 40, 48)
    whole, cropped = (
        ImageProgram(network, Picture(size=(32, 32), crop=crop, frames=(40, 48)))(images)
        for crop in (None, 0.875)
    )

    assert (whole - cropped).abs().max() > 1e-2


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(frozen, tmp_path_factory):
    """Result of the verb, and the student's network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("exported"))
        save_student(frozen, "one")
        fact = Fact(name="normalization", value="mean 0.5", source="typed")
        sheet = FactSheet(subject="student", facts=(fact,))
        write_sheets(Path("runs/one/distill"), {"student": sheet})
        result = permafrost.export(run="one", store=frozen.store.path)
        paths = result.files | {"card": result.card}
        files = {name: Path(path).read_bytes() for name, path in paths.items()}
        yield files, result, permafrost.load_student("one")


@pytest.mark.slow
def test_programs_of_the_embedding_are_files_of_their_own(frozen):
    save_student(frozen, "one")
    network, images = permafrost.load_student("one"), noise(3, 3, 16, 16)

    result = permafrost.export("export.output=pooled", run="one", store=frozen.store.path)

    expected = network(images / 255, Intermediates(pooled=True)).pooled
    assert {Path(path).name for path in result.files.values()} == {
        "embedding.onnx",
        "embedding.pt2",
    }
    for name, path in result.files.items():
        found = open_program(Path(path).read_bytes(), name, "images")(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("file_format", ["onnx", "torch"])
def test_a_file_gives_the_logits_of_an_evaluation(exported, file_format):
    files, result, network = exported
    assert 0 < result.largest_difference < 1e-4

    for shape, tolerance in [
        ((1, 3, 16, 16), 1e-4),
        ((3, 3, 16, 16), 1e-4),
        ((2, 3, 61, 43), 0.02),  # a resized pixel may be rounded the other way
    ]:
        images = noise(*shape)
        expected = evaluated_logits(network, images, WHOLE)
        actual = open_program(files[file_format], file_format, "images")(images)
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
        assert expected.abs().max() > 0.1


def test_the_program_of_the_page_names_the_class(exported, tmp_path, monkeypatch, capsys):
    files, _, network = exported
    *_, program = blocks_of(ROOT / "docs/howto/own-loop.md", "python")
    (tmp_path / "student.onnx").write_bytes(files["onnx"])
    images = noise(2, 3, 16, 16)
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program.py", "student.onnx", "0.png", "1.png"])

    assert (ROOT / "pipeline/permafrost_export/predict.py").read_text().endswith(program.code)
    exec(program.code, {})

    probabilities = network(images / 255).logits.softmax(dim=1)
    best = probabilities.max(dim=1)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [
        [f"{number}.png", str(int(index))] for number, index in enumerate(best.indices)
    ]
    for line, probability in zip(lines, best.values, strict=True):
        assert float(line[2]) == pytest.approx(float(probability), abs=6e-4)
    assert len(program.code.splitlines()) <= 40


def with_alpha(mode):
    image = Image.fromarray(noise(9, 13, 4).numpy(), "RGBA")
    return image.convert(mode)


def with_orientation():
    image = Image.fromarray(noise(9, 13, 3).numpy())
    image.getexif()[ExifTags.Base.Orientation] = 6
    return image


PICTURES = {
    "RGB": lambda: Image.fromarray(noise(9, 13, 3).numpy()),
    "RGBA": lambda: with_alpha("RGBA"),
    "LA": lambda: with_alpha("LA"),
    "palette with transparency": lambda: with_alpha("RGBA").quantize(16),
    "palette": lambda: with_alpha("RGB").quantize(16),
    "1 bit": lambda: with_alpha("1"),
    "16 bits": lambda: Image.fromarray(noise(9, 13).numpy().astype("uint16") * 251),
    "turned": with_orientation,
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_program_of_the_page_decodes_as_a_store_does(name, tmp_path, monkeypatch):
    *_, program = blocks_of(ROOT / "docs/howto/own-loop.md", "python")
    picture = PICTURES[name]()
    picture.save(tmp_path / "picture.png", exif=picture.getexif())
    code, _, _ = program.code.partition("session = ")
    namespace = {}
    exec(code, namespace)

    pixels = namespace["decode"](tmp_path / "picture.png")

    stored = decode_rgb((tmp_path / "picture.png").read_bytes())
    assert pixels.shape == (13, 9, 3) if name == "turned" else (9, 13, 3)
    assert torch.equal(torch.tensor(pixels).permute(2, 0, 1), torch.as_tensor(stored))


def test_a_file_of_torch_has_its_facts(exported):
    files, _, _ = exported
    facts = {"classes": "", "run": "", "input": ""}

    torch.export.load(io.BytesIO(files["torch"]), extra_files=facts)

    assert facts["run"] == "one"
    assert facts["classes"].startswith("[")
    assert facts["input"] == "decoded RGB images u8 [B, 3, H, W]"


class Columns(torch.nn.Module):
    """Network of the rows of a table."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 3)

    def forward(self, rows):
        features = torch.relu(self.layer(rows))
        return ModelOutput(logits=features, features=features[:, :, None, None])


def test_a_program_of_rows_takes_any_number_of_them():
    program = RowProgram(freeze(Columns()))

    data = encode_model(trace(program, torch.rand(2, 5)), "torch", "rows", {})

    rows = torch.rand(7, 5)
    torch.testing.assert_close(open_program(data, "torch", "rows")(rows), program(rows))


# ---- errors --------------------------------------------------------------------------------------


def test_a_program_of_another_network_is_not_written():
    images = noise(2, 3, 16, 16)
    other, network = (ImageProgram(small_resnet(seed), WHOLE) for seed in (0, 1))
    data = encode_model(trace(other, images), "torch", "images", {})

    assert check_program(data, "torch", other, images) < 1e-5
    with pytest.raises(WrongProgramError, match="the output of the torch program differs by"):
        check_program(data, "torch", network, images)


class Own(torch.nn.Module):
    """Network of one's own without a closed form, which is examined in its first forward pass."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, 2)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, images):
        return self.head(torch.relu(self.conv(images)).amax(dim=(2, 3)))


@pytest.mark.parametrize("file_format", ["onnx", "torch"])
def test_a_network_of_ones_own_is_examined_before_it_is_traced(file_format):
    network = freeze(ModuleClassifier(Own(), "conv"))
    program = ImageProgram(network, WHOLE)
    images = noise(2, 3, 16, 16)

    data = encode_model(trace(program, images), file_format, "images", {})

    assert check_program(data, file_format, program, images) < 1e-5


def check_programs(config, size):
    """Export a network for any number of images in both formats."""
    torch.manual_seed(0)
    network = freeze(build_model(config, 10))
    program = ImageProgram(network, Picture(size=size, frames=size))
    images = noise(5, 3, *size)
    for file_format in ("onnx", "torch"):
        data = encode_model(trace(program, images[:2]), file_format, "images", {})
        difference = check_program(data, file_format, program, images)
        assert difference < 1e-4 * max(1.0, float(program(images).detach().abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        AdditiveModelConfig(name="trunk", weights="random"),
        AdditiveModelConfig(name="mlp", input_size=32, grid=(4, 4), weights="random"),
        AdditiveModelConfig(name="conv", grid=(4, 4), weights="random"),
        TorchvisionModelConfig(name="vit_b_16", weights="random", input_size=32),
    ],
    ids=str,
)
def test_the_number_of_images_of_a_program_is_free(config):
    check_programs(config, (32, 32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet8", (16, 16)), ("vitc_ti", (64, 64)), ("simple_vit_ti", (64, 64))],
)
def test_a_bcos_network_has_a_program_of_each_format(name, size):
    """The norms of patches are sums, whose divisor torch.onnx would leave out."""
    check_programs(BcosModelConfig(name=name, weights="random"), size)


class Undecided(Columns):
    """Network that branches on values."""

    def forward(self, rows):
        return super().forward(rows if rows.sum() > 0 else -rows)


def test_a_network_that_cannot_be_traced_is_an_error():
    with pytest.raises(ConfigError, match="cannot trace this network"):
        trace(RowProgram(Undecided()), torch.rand(2, 5))


def test_an_export_has_a_card_with_what_is_known_of_the_student(exported):
    files, result, _ = exported

    header, text = files["card"].decode().split("---", 2)[1:]
    assert yaml.safe_load(header)["library_name"] == "pytorch"
    assert "| network | cifar" in text
    assert r"| student: normalization | mean 0.5 \[typed\] |" in text
    assert Path(result.card).parent == Path(result.files["onnx"]).parent


def test_a_student_goes_to_the_hub_with_its_license_alone(frozen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_student(frozen, "one")
    monkeypatch.setitem(sys.modules, "huggingface_hub", ModuleType("huggingface_hub"))

    with pytest.raises(ConfigError, match="names no license"):
        permafrost.export(run="one", store=frozen.store.path, to="hf://me/student")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="needs huggingface_hub"):
        permafrost.export(run="one", store=frozen.store.path, to="hf://me/student")


@pytest.mark.skipif(bool(connections.WHY_NOT), reason=connections.WHY_NOT)
@pytest.mark.parametrize("program", ["the export", "predict.py"])
def test_onnxruntime_reports_nothing_to_its_maker(exported, tmp_path, program):
    """It keeps an identifier and a queue of events in the home folder, and sends them 7 seconds later."""
    model, picture = tmp_path / "student.onnx", tmp_path / "one.png"
    model.write_bytes(exported[0]["onnx"])
    Image.fromarray(noise(3, 16, 16).permute(1, 2, 0).numpy()).save(picture)
    check = "from permafrost_export.portable import *; open_program(open({!r}, 'rb').read(), 'onnx', 'x')"
    words = {
        "the export": ["-c", check.format(str(model))],
        "predict.py": ["pipeline/permafrost_export/predict.py", str(model), str(picture)],
    }
    recorded = connections.recorded_environment(connections.compile_recorder(tmp_path), tmp_path)
    subprocess.run([sys.executable, *words[program]], cwd=ROOT, env=recorded, check=True)

    assert connections.asked_beyond_this_machine(tmp_path) == set()
    assert connections.reports_of_libraries(tmp_path) == []


@pytest.mark.skipif(bool(connections.WHY_NOT), reason=connections.WHY_NOT)
def test_a_connection_is_noticed(tmp_path):
    """Control: a name and an address beyond this machine, asked for by a child process."""
    code = (
        "import socket as s; u = s.socket(s.AF_INET, s.SOCK_DGRAM); u.connect(('192.0.2.77', 9)); "
        "u.connect(('127.0.0.1', 9)); s.getaddrinfo('other.invalid', 1)"
    )
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], stderr=-3)"
    recorded = connections.recorded_environment(connections.compile_recorder(tmp_path), tmp_path)
    subprocess.run([sys.executable, "-c", nested], env=recorded, check=True)

    assert connections.asked_beyond_this_machine(tmp_path) == {
        "connect-udp 192.0.2.77",
        "getaddrinfo other.invalid",
    }


def test_missing_packages_are_named(frozen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_student(frozen, "one")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    with pytest.raises(
        ConfigError, match=r"needs the package onnxruntime; pip install onnx onnxscript onnxruntime"
    ):
        permafrost.export(run="one", store=frozen.store.path)
    with pytest.raises(ConfigError, match="runs/gone/distill holds no finished model"):
        permafrost.export(run="gone", store=frozen.store.path)
