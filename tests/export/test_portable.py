"""Programs of a student for use without this project: ONNX and torch.export, with all preprocessing."""

import io
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import onnx
import pillow_heif
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
from permafrost.storage.signed_files import write_json
from permafrost.store.facts import Fact, FactSheet, write_sheets
from permafrost.store.record_form import resize_pixels
from permafrost_export import portable, predict
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
from tests.support import connections, run_files
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


def saved_noise(folder, number=2):
    """Images of noise, saved as 0.png and so on in a folder."""
    images = noise(number, 3, 16, 16)
    for name, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    return images


def test_the_program_next_to_the_card_names_the_class(exported, tmp_path, monkeypatch, capsys):
    files, _, network = exported
    *_, program = blocks_of(ROOT / "docs/howto/own-loop.md", "python")
    (tmp_path / "student.onnx").write_bytes(files["onnx"])
    images = saved_noise(tmp_path)
    (tmp_path / "photo.jpg").write_bytes((tmp_path / "1.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "predict", predict)

    predict.print_classes("student.onnx", "0.png", "1.png")
    exec(program.code, {})

    probabilities = network(images / 255).logits.softmax(dim=1)
    best = probabilities.max(dim=1)
    *lines, of_page = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [
        [f"{number}.png", str(int(index))] for number, index in enumerate(best.indices)
    ]
    for line, probability in zip(lines, best.values, strict=True):
        assert float(line[2]) == pytest.approx(float(probability), abs=6e-4)
    assert of_page == lines[1][1:2]


def test_a_damaged_file_is_left_out_and_the_others_of_its_folder_are_named(
    exported, tmp_path, capsys
):
    """A HEIC with a wrong suffix is read, in any order of the files."""
    (tmp_path / "student.onnx").write_bytes(exported[0]["onnx"])
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    saved_noise(folder)
    (folder / "0-cut.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / ".DS_Store").write_text("no picture")
    with Image.open(folder / "1.png") as image:
        pillow_heif.from_pillow(image).save(folder / "below/phone.jpg", quality=-1)

    with pytest.raises(SystemExit, match="files left out: 2"):
        predict.print_classes(str(tmp_path / "student.onnx"), str(folder))

    printed = capsys.readouterr()
    lines = [line.split() for line in printed.out.splitlines()]
    assert [Path(line[0]).name for line in lines] == ["0.png", "1.png", "phone.jpg"]
    assert lines[1][1] == lines[2][1]
    assert [Path(line.split(" (")[0]).name for line in printed.err.splitlines()] == [
        ".DS_Store",
        "0-cut.png",
    ]
    assert "truncated" in printed.err
    assert printed.err.count("HEIC needs pillow-heif") == 1


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
def test_predict_decodes_as_a_store_does(name, tmp_path):
    picture = PICTURES[name]()
    picture.save(tmp_path / "picture.png", exif=picture.getexif())

    pixels = predict.decode(tmp_path / "picture.png")

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


# ---- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(72, 72), (60, 90), (20, 30)], ids=str)
@pytest.mark.parametrize(
    ("size", "crop", "frames"),
    [
        ((32, 40), None, None),
        ((32, 32), 0.875, None),
        ((32, 32), None, (32, 32)),
        ((28, 28), 0.875, (32, 32)),
        ((16, 20), 0.875, (32, 48)),
        ((48, 48), None, (32, 32)),
    ],
    ids=str,
)
def test_predict_resizes_a_frame_as_the_program_of_images_does(shape, size, crop, frames):
    """Pillow's resize and torch's differ by a level of a few pixels, and a sampled pixel is rounded."""
    picture = Picture(size=size, crop=crop, frames=frames)
    image = noise(1, 3, *shape)
    seen = []
    program = ImageProgram(small_resnet(), picture)
    program.run = lambda inputs: seen.append(inputs * 255)
    program(image)

    how = json.loads(json.dumps(asdict(picture)))
    frame = predict.resize_frame(image[0].permute(1, 2, 0).numpy(), **how)

    off = (torch.tensor(frame).permute(2, 0, 1) - seen[0][0]).abs()
    assert frame.dtype == "uint8"
    assert off.max() <= 2
    assert off.mean() < 0.35  # .25 of rounding alone; without antialiasing above 10


def exported_with(frozen, tmp_path, monkeypatch, *options):
    monkeypatch.chdir(tmp_path)
    save_student(frozen, "one")
    result = permafrost.export(*options, run="one", store=frozen.store.path)
    return result, onnx.load(result.files["onnx"])


def test_a_fixed_program_takes_one_frame_without_a_resize_and_is_quantized(
    frozen, tmp_path, monkeypatch
):
    """The float program stays as it is without export.int8."""
    options = ("export.input_size=fixed", "export.formats=[onnx]")
    alone, model = exported_with(frozen, tmp_path, monkeypatch, *options)
    before = Path(alone.files["onnx"]).read_bytes()
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))

    result = permafrost.export(*options, "export.int8=true", run="one", store=frozen.store.path)

    (entry,) = model.graph.input
    assert [dim.dim_value for dim in entry.type.tensor_type.shape.dim] == [1, 3, 16, 16]
    assert "Resize" not in {node.op_type for node in model.graph.node}
    assert Path(result.files["onnx"]).read_bytes() == before
    quantized = onnx.load(result.files["int8"])
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in quantized.graph.node}
    assert quantized.graph.node[0].op_type == "Cast"  # the input stays as it is
    assert {p.key: p.value for p in quantized.metadata_props}.items() >= {
        p.key: p.value for p in model.metadata_props
    }.items()
    assert result.int8["records"] == frozen.store.num_records("test")
    assert result.int8["same_class"] >= 0.5
    assert 0 < result.int8["largest_difference"] < 2
    assert set(result.int8) > {"accuracy_float", "accuracy_int8", "milliseconds_int8"}
    card = Path(result.card).read_text()
    assert "| int8 | split test, records" in card
    assert "before the program, as predict.py does" in card
    assert not [*(tmp_path / "scratch").iterdir()]

    exported_again = permafrost.export(run="one", store=frozen.store.path)

    assert not Path(result.files["int8"]).exists()
    assert not exported_again.int8


@pytest.mark.parametrize("opset", [14, 17, 21])
def test_a_program_of_frames_has_the_opset_that_is_asked_for(frozen, tmp_path, monkeypatch, opset):
    options = ("export.input=frames", f"export.opset={opset}", "export.formats=[onnx]")
    result, model = exported_with(frozen, tmp_path, monkeypatch, *options)

    onnx.checker.check_model(model, full_check=True)
    assert [each.version for each in model.opset_import if not each.domain] == [opset]
    assert model.ir_version <= {14: 7, 17: 8, 21: 10}[opset]
    assert {each.key: each.value for each in model.metadata_props}["opset"] == str(opset)
    assert f"| opset | {opset} |" in Path(result.card).read_text()
    images = noise(3, 3, 16, 16)
    found = open_program(Path(result.files["onnx"]).read_bytes(), "onnx", "images")(images)
    expected = permafrost.load_student("one")(images / 255).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_export_is_compared_on_files_if_the_store_has_them(exported, frozen):
    files, result, _ = exported
    printed = result.printed()["on_files"]
    if frozen.store.manifest.canonical.format == "original":
        assert result.on_files["records"] == min(32, frozen.store.num_records("test"))
        assert result.on_files["same_class"] == 1
        assert result.on_files["largest_difference"] < 0.05
        assert printed.startswith("split test, records")
    else:
        assert not result.on_files
        assert printed.startswith("not compared: the store holds no original files")
    assert f"| on files | {printed[:12]}" in files["card"].decode()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["export.opset=17"], "needs 18; set export.input=frames"),
        (["export.opset=9", "export.input=frames"], "cannot hold this network"),
        (["export.int8=true"], "set export.input_size=fixed"),
        (
            ["export.int8=true", "export.input_size=fixed", "export.formats=[torch]"],
            "leave export.formats with onnx",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_errors_with_a_remedy(
    frozen, tmp_path, monkeypatch, options, message
):
    with pytest.raises(ConfigError, match=message):
        exported_with(frozen, tmp_path, monkeypatch, *options)


def test_a_sweep_is_refused_with_its_own_students_the_selected_first(frozen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_student(frozen, "other")
    rows = [
        {"variant": "kd", "point": {}, "seed": seed, "run": f"students/kd-{seed}"}
        for seed in range(3)
    ]
    run_files.write_table(Path("runs/sweep"), rows)

    with pytest.raises(ConfigError) as error:
        permafrost.export(run="sweep", store=frozen.store.path)
    assert str(error.value).endswith(
        "one of its 3: run=sweep/students/kd-0, run=sweep/students/kd-1, run=sweep/students/kd-2"
    )
    chosen = [row | {"value": 0.5, "chosen": row["seed"] == 2} for row in rows]
    table = {"runs": rows, "select": "val.accuracy", "candidates": chosen}
    write_json(Path("runs/sweep/sweep.json"), table)
    with pytest.raises(ConfigError, match=r"3: run=sweep/students/kd-2 \(selected by val.acc"):
        permafrost.export(run="sweep", store=frozen.store.path)


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
    ("name", "size"), [("resnet8", (16, 16)), ("vitc_ti", (64, 64)), ("simple_vit_ti", (64, 64))]
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
    assert "| resize | in the program, with antialiasing" in text
    assert "pip install onnxruntime numpy pillow pillow-heif" in text
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
