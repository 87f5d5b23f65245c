"""JPEGs that are left to the device: on the CPU, batches, passes and students are those of the host's decoder."""

import io
import os
import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from permafrost.annotation.teacher_pass import plan_pass
from permafrost.config.augment import AugmentOptions, OperationConfig
from permafrost.config.data import ImageFolderDataConfig
from permafrost.config.methods import LabelsConfig
from permafrost.config.runs import RUNS
from permafrost.config.store import PassOptions
from permafrost.config.verbs import VerifyConfig
from permafrost.config.views import RandomViewsConfig
from permafrost.core.errors import ConfigError
from permafrost.core.records import EncodedImages
from permafrost.evaluation.equivariance import teacher_equivariance
from permafrost.loading import dataset as dataset_module
from permafrost.loading import jpeg_decoding
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.jpeg_decoding import decode_images, require_decoder
from permafrost.loading.loader import TrainLoader
from permafrost.loading.transfer import move_batch
from permafrost.loading.views import ViewSchedule
from permafrost.models.saved import read_description
from permafrost.store.entries import EntryError
from permafrost.store.file_entry import ManifestError, StoreMismatchError
from permafrost.store.reader import Store
from stages import distill, evaluate, precompute
from tests.support.runs import (
    TRAINER,
    assert_equal_states,
    distill_config,
    evaluation_of,
    weights_of,
)
from tests.support.stores import Frozen, precompute_config

CPU = torch.device("cpu")


def encoded(seed, kind="JPEG", mode="RGB", size=(24, 20), **options):
    """File of a smooth image with some noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def rotated(seed):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(seed, exif=exif)


FILES = {
    "a.jpg": encoded(0),
    "b.png": encoded(1, "PNG"),
    "c.jpg": encoded(2, size=(16, 16)),
    "d.jpg": encoded(3, progressive=True),
    "e.jpg": encoded(4, mode="L", size=(40, 31)),
    "f.jpg": rotated(5),
    "g.jpg": encoded(6, mode="CMYK"),
    "h.jpg": encoded(7, size=(70, 50), subsampling=0),
}
LEFT_TO_THE_DEVICE = {"a", "c", "e", "h"}
POSITIONS = [3, 0, 6, 3, 1, 7, 0, 2, 4, 5, 3]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Store of images of many kinds and sizes."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "images" / "one").mkdir(parents=True)
    for name, data in FILES.items():
        (folder / "images" / "one" / name).write_bytes(data)
    data = ImageFolderDataConfig(path=str(folder / "images"))
    before = Path.cwd()
    os.chdir(folder)
    precompute.run(precompute_config(folder / "store", data=data, image_size=16))
    os.chdir(before)
    return Store(folder / "store")


def dataset_of(store, decoder, threads=1, **options):
    rows = np.arange(store.index.num_rows)
    return StoreDataset(store, rows, jpeg_decoder=decoder, decode_threads=threads, **options)


def letters(keys):
    """Letters of FILES that these keys, such as one%2Fa%2Ejpg, name."""
    return [unquote(key)[4] for key in keys]


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("positions", [POSITIONS, [1], [0], list(range(8))])
def test_a_batch_of_many_kinds_is_that_of_the_host(mixed, monkeypatch, threads, positions):
    monkeypatch.setattr(dataset_module, "_SMALL_FILE", 0)
    wanted = dataset_of(mixed, "cpu").__getitems__(positions)

    read = dataset_of(mixed, "cuda", threads).__getitems__(positions)
    moved = move_batch(read, CPU)

    assert wanted.encoded is None
    assert moved.encoded is None
    assert moved.keys == wanted.keys
    assert torch.equal(moved.inputs, wanted.inputs)
    assert moved.inputs.stride() == wanted.inputs.stride()
    left = (
        set() if read.encoded is None else set(letters(wanted.keys[p] for p in read.encoded.places))
    )
    assert left == LEFT_TO_THE_DEVICE & set(letters(wanted.keys))


def test_only_the_bytes_of_a_jpeg_are_read_and_a_record_that_repeats_once(mixed):
    read = dataset_of(mixed, "cuda").__getitems__(POSITIONS)

    names = letters(read.keys)
    assert len(read.encoded.places) == len(LEFT_TO_THE_DEVICE)
    files = torch.split(read.encoded.data, list(read.encoded.lengths))
    for place, file, where in zip(read.encoded.places, files, read.encoded.where, strict=True):
        assert file.numpy().tobytes() == FILES[f"{names[place]}.jpg"]
        assert where.endswith(f".tar: {read.keys[place]}")
    assert len(read.inputs) == len(read.encoded.host_places) == 8 - len(LEFT_TO_THE_DEVICE)
    for place, first in read.encoded.repeated:
        assert first < place
        assert read.keys[first] == read.keys[place]
    assert read.encoded.records == len(POSITIONS)


def test_the_device_decodes_the_jpegs_and_nothing_else(mixed, monkeypatch):
    """Control: pixels of another decoder reach exactly the records of baseline JPEGs."""
    wanted = dataset_of(mixed, "cpu").__getitems__(POSITIONS)
    decode = jpeg_decoding._decode_jpegs
    asked = []

    def other(files, device):
        asked.append((len(files), device))
        return [255 - pixels for pixels in decode(files, device)]

    monkeypatch.setattr(jpeg_decoding, "_decode_jpegs", other)

    moved = move_batch(dataset_of(mixed, "cuda").__getitems__(POSITIONS), CPU)

    assert asked == [(len(LEFT_TO_THE_DEVICE), CPU)]
    for name, own, pixels in zip(letters(moved.keys), moved.inputs, wanted.inputs, strict=True):
        assert torch.equal(own, pixels) == (name not in LEFT_TO_THE_DEVICE)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_training_receives_the_batches_of_the_host(mixed, processes):
    operations = (OperationConfig(kind="pad_crop", padding=2),)

    def epoch(decoder, loader_processes):
        dataset = dataset_of(mixed, decoder)
        views = ViewSchedule(AugmentOptions(operations=operations), mixed.size, 0)
        loader = TrainLoader(
            dataset, views, batch_size=4, seed=0, loader_processes=loader_processes
        )
        return list(loader.epoch(0, device=CPU))

    for own, wanted in zip(epoch("cuda", processes), epoch("cpu", 0), strict=True):
        assert own.keys == wanted.keys
        assert torch.equal(own.inputs, wanted.inputs)
        assert torch.equal(own.canonical_from_view, wanted.canonical_from_view)


@pytest.mark.parametrize("form", ["raw", "original"])
def test_records_without_jpegs_are_read_as_ever(tmp_path, form):
    """The images of the demo are PNGs."""
    precompute.run(precompute_config(tmp_path / "store", format=form, image_size=16))
    store = Store(tmp_path / "store")

    dataset = dataset_of(store, "cuda")
    read = dataset.__getitems__([0, 5, 0])

    assert dataset.jpeg_decoder == ("cpu" if form == "raw" else "cuda")
    assert read.encoded is None
    assert torch.equal(read.inputs, dataset_of(store, "cpu").__getitems__([0, 5, 0]).inputs)


# ---- errors --------------------------------------------------------------------------------------


def images_of(files, size=(16, 16)):
    return EncodedImages(
        data=torch.from_numpy(np.frombuffer(b"".join(files), np.uint8).copy()),
        lengths=tuple(map(len, files)),
        places=tuple(range(len(files))),
        where=tuple(f"shard.tar: record{number}" for number in range(len(files))),
        host_places=(),
        repeated=(),
        size=size,
    )


def test_a_file_that_cannot_be_decoded_is_named_among_the_others():
    damaged = FILES["c.jpg"][:200] + b"\0" * 400

    with pytest.raises(
        ManifestError, match=r"^shard\.tar: record1 cannot be decoded on cpu .*verify"
    ):
        decode_images(images_of([FILES["a.jpg"], damaged, FILES["e.jpg"]]), torch.empty(0), CPU)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("no decoder")])
def test_an_error_that_is_of_no_file_is_raised_as_it_is(monkeypatch, error):
    decode = jpeg_decoding._decode_jpegs

    def failing(files, device):
        if len(files) > 1:
            raise error
        return decode(files, device)

    monkeypatch.setattr(jpeg_decoding, "_decode_jpegs", failing)

    with pytest.raises(type(error), match=str(error)):
        decode_images(images_of([FILES["a.jpg"], FILES["c.jpg"]]), torch.empty(0), CPU)


def test_a_damaged_record_is_named_by_its_checksum_before_anything_decodes_it(mixed, monkeypatch):
    monkeypatch.setattr(jpeg_decoding, "_decode_jpegs", lambda *_: pytest.fail("it was decoded"))
    dataset = dataset_of(mixed, "cuda")
    take = dataset.store.index.take

    def other_checksum(names, rows):
        columns = take(names, rows)
        return columns | {"image_crc32c": columns["image_crc32c"] ^ 1}

    monkeypatch.setattr(dataset.store.index, "take", other_checksum)

    with pytest.raises(ManifestError, match=r"\.tar .*record one\S+\) is damaged"):
        dataset.__getitems__([0, 1])


def test_a_torchvision_without_nvjpeg_is_no_fault_of_a_file(monkeypatch):
    from torchvision import io

    def decode_jpeg(*asked, **options):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(io, "decode_jpeg", decode_jpeg)

    with pytest.raises(ConfigError, match=r"jpeg_decoder=cuda: .*nvJPEG support; install .*=cpu"):
        decode_images(images_of([FILES["a.jpg"]]), torch.empty(0), CPU)


def test_a_gpu_is_required_and_the_cpu_never_refused():
    require_decoder("cpu", CPU, "trainer.jpeg_decoder", "the device")
    require_decoder("cuda", torch.device("cuda"), "trainer.jpeg_decoder", "the device")
    with pytest.raises(
        ConfigError, match=r"trainer\.jpeg_decoder=cuda .*but the device is cpu; .*=cpu"
    ):
        require_decoder("cuda", CPU, "trainer.jpeg_decoder", "the device")


# ---- passes and students -------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch):
    """Let the CPU stand in for the GPU of jpeg_decoder=cuda."""
    modules = ("annotation.annotator", "training.build", "evaluation.forward")
    for module in modules:
        monkeypatch.setattr(f"permafrost.{module}.require_decoder", lambda *_: None)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tiny_teacher):
    """Store of JPEGs with a pass of the CPU's pixels and one of a GPU's, for which the CPU stands in."""
    folder = tmp_path_factory.mktemp("taught")
    config = precompute_config(folder / "store", tiny_teacher, format="jpeg95", image_size=16)
    before = Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("permafrost.annotation.annotator.require_decoder", lambda *_: None)
        for decoder in ("cpu", "cuda"):
            options = PassOptions(batch_size=8, name=decoder, jpeg_decoder=decoder)
            precompute.run(replace(config, annotate=options))
    os.chdir(before)
    return Frozen(Store(folder / "store"), config)


def student(taught, decoder, **options):
    config = distill_config(taught, **options)
    return replace(config, store=replace(config.store, teacher=(decoder,)))


def test_a_pass_of_a_gpus_pixels_is_another_pass(taught):
    on_cpu, on_gpu = taught.store.open_passes(("cpu", "cuda"))

    assert (on_cpu.jpeg_decoder, on_gpu.jpeg_decoder) == ("cpu", "cuda")
    assert "jpeg_decoder" not in on_cpu.manifest.teacher
    assert on_gpu.manifest.teacher == on_cpu.manifest.teacher | {"jpeg_decoder": "cuda"}
    assert on_gpu.manifest.fingerprint != on_cpu.manifest.fingerprint
    for shard in taught.store.shards:  # the CPU stands in for the GPU
        for name, values in on_cpu.read_shard(shard).items():
            np.testing.assert_array_equal(on_gpu.read_shard(shard)[name], values)


def test_a_manifest_with_an_unknown_decoder_is_refused(taught):
    (made,) = taught.store.open_passes(("cuda",))

    with pytest.raises(EntryError, match=r"teacher\.jpeg_decoder is 'tpu'"):
        replace(made.manifest, teacher=made.manifest.teacher | {"jpeg_decoder": "tpu"})


def test_raw_frames_make_the_same_pass_with_any_decoder(tmp_path, tiny_teacher):
    config = precompute_config(tmp_path / "store", tiny_teacher, format="raw", image_size=16)
    precompute.run(config)
    options = replace(config.annotate, jpeg_decoder="cuda")

    plan = plan_pass(replace(config, annotate=options), Store(tmp_path / "store"))

    assert plan.missing == []


def test_a_pass_without_a_gpu_is_refused_by_the_option(tmp_path, tiny_teacher):
    options = PassOptions(jpeg_decoder="cuda")
    config = precompute_config(
        tmp_path / "store", tiny_teacher, format="jpeg95", image_size=16, annotate=options
    )

    with pytest.raises(
        ConfigError, match=r"annotate\.jpeg_decoder=cuda .*the teacher's device is cpu"
    ):
        precompute.run(config)


def test_stored_views_of_a_gpus_pixels_are_those_of_the_host(tmp_path, tiny_teacher, on_cpu):
    found = []
    for decoder in ("cpu", "cuda"):
        config = precompute_config(
            tmp_path / "store",
            tiny_teacher,
            format="jpeg95",
            image_size=16,
            views=RandomViewsConfig(count=2),
            augment=AugmentOptions(operations=(OperationConfig(kind="horizontal_flip"),)),
            annotate=PassOptions(batch_size=8, name=decoder, jpeg_decoder=decoder),
        )
        precompute.run(config)
        store = Store(tmp_path / "store")
        (views,) = store.open_passes((decoder,), stored_views=True)
        assert store.canonical_of(views).jpeg_decoder == views.jpeg_decoder == decoder
        shard = store.shards[store.shards.number_of(views.shards[0].name)]
        found.append(views.read_shard(shard))

    for name, values in found[0].items():
        np.testing.assert_array_equal(found[1][name], values)


def test_a_student_decodes_as_its_pass_and_is_evaluated_so(taught, on_cpu, monkeypatch):
    results, decoders = {}, {}
    left = []
    decode = jpeg_decoding._decode_jpegs
    monkeypatch.setattr(
        jpeg_decoding,
        "_decode_jpegs",
        lambda files, device: left.append(len(files)) or decode(files, device),
    )
    for decoder in ("cpu", "cuda"):
        left.clear()
        distill.run(student(taught, decoder, run=decoder))
        decoders[decoder] = read_description(RUNS / decoder / "distill").jpeg_decoder
        assert bool(left) == (decoder == "cuda")
        left.clear()
        asked = ("accuracy", "localization", "gradient_alignment")
        results[decoder] = evaluate.run(evaluation_of(taught, asked, run=decoder)).splits
        assert bool(left) == (decoder == "cuda")

    assert decoders == {"cpu": "cpu", "cuda": "cuda"}
    assert_equal_states(weights_of("cuda"), weights_of("cpu"))
    assert results["cuda"] == results["cpu"]


@pytest.mark.parametrize("decoder", ["cpu", "cuda"])
def test_verify_runs_the_teacher_again_on_the_pixels_of_its_pass(taught, monkeypatch, decoder):
    left = []
    decode = jpeg_decoding._decode_jpegs
    monkeypatch.setattr(
        jpeg_decoding,
        "_decode_jpegs",
        lambda files, device: left.append(len(files)) or decode(files, device),
    )
    config = VerifyConfig(
        store=taught.config.store,
        teacher=taught.config.teacher,
        annotate=PassOptions(jpeg_decoder=decoder),
        equivariance=True,
        equivariance_records=8,
    )
    if decoder == "cuda":
        with pytest.raises(ConfigError, match=r"annotate\.jpeg_decoder=cuda .*teacher is cpu"):
            teacher_equivariance(config, taught.store, taught.config.teacher)
        monkeypatch.setattr("permafrost.evaluation.equivariance.require_decoder", lambda *_: None)

    found = teacher_equivariance(config, taught.store, taught.config.teacher)

    assert re.search(r"none +map cosine (1\.0000|0\.9999)", found), found
    assert left == ([8] if decoder == "cuda" else [])


@pytest.mark.parametrize(("of_pass", "asked"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_another_decoder_than_that_of_the_pass_is_refused(taught, on_cpu, of_pass, asked):
    trainer = replace(TRAINER, jpeg_decoder=asked)
    message = (
        rf"trainer\.jpeg_decoder={asked}, but .*{of_pass}-\w+ .*annotate\.jpeg_decoder={of_pass}.*"
        rf"trainer\.jpeg_decoder=null, or .*annotate\.jpeg_decoder={asked}"
    )

    with pytest.raises(StoreMismatchError, match=message):
        distill.run(student(taught, of_pass, trainer=trainer))


def test_passes_of_two_decoders_teach_no_student_together(taught, on_cpu):
    config = distill_config(taught)
    both = replace(config, store=replace(config.store, teacher=("cpu", "cuda")))

    with pytest.raises(
        StoreMismatchError, match=r"differ in jpeg_decoder: cpu-.* has cpu, cuda-.* has cuda"
    ):
        distill.run(both)


def test_a_training_and_an_evaluation_without_a_gpu_are_refused(taught, monkeypatch):
    config = student(taught, "cuda", run="one")
    with pytest.raises(ConfigError, match=r"trainer\.jpeg_decoder=cuda .*the training is cpu"):
        distill.run(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("permafrost.training.build.require_decoder", lambda *_: None)
        distill.run(config)

    with pytest.raises(ConfigError, match=r"evaluate\.jpeg_decoder=cuda .*the evaluation is cpu"):
        evaluate.run(evaluation_of(taught, ("accuracy",)))
    assert evaluate.run(evaluation_of(taught, ("accuracy",), jpeg_decoder="cpu")).splits


def test_the_decoder_of_labels_is_part_of_the_runs_identity(taught, on_cpu):
    def labels(**options):
        trainer = replace(TRAINER, **options)
        return distill_config(taught, method=LabelsConfig(), trainer=trainer, run="labels")

    distill.run(labels(jpeg_decoder="cuda"))

    assert read_description(RUNS / "labels" / "distill").jpeg_decoder == "cuda"
    with pytest.raises(ConfigError, match=r"trainer\.jpeg_decoder=cuda, but this one has None"):
        distill.run(labels())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_decodes_a_batch_within_a_level_or_two():
    files = [encoded(seed, size=(64, 48), quality=95) for seed in range(4)]
    wanted = decode_images(images_of(files, (32, 32)), torch.empty(0), CPU)

    found = decode_images(images_of(files, (32, 32)), torch.empty(0), torch.device("cuda"))

    assert found.device.type == "cuda"
    assert found.stride() == wanted.stride()
    assert (found.cpu().float() - wanted.float()).abs().mean() <= 2
