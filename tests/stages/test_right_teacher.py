"""The teacher that was meant: its own options, classes and preprocessing, and its accuracy as a check of them."""

import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from permafrost.annotation import shard_tasks
from permafrost.config.data import ImageFolderDataConfig
from permafrost.config.models import CifarModelConfig, Picture, TorchvisionModelConfig
from permafrost.core.errors import ConfigError
from permafrost.evaluation.other_networks import build_teacher
from permafrost.library import open_store
from permafrost.models.network import Network
from permafrost.models.providers import build_model, published, with_preprocessing
from permafrost.models.saved import TrainedModel, save_model
from permafrost.store import commit_pass
from permafrost.store.reader import Store
from permafrost_timm.options import TimmModelConfig
from tests.support.kills import killed_at
from tests.support.runs import distill_config, evaluate_config
from tests.support.slow import slow
from tests.support.stores import precompute_config
from tests.support.verbs import distill, evaluate, precompute

SMALL = CifarModelConfig(name="resnet8", width=4)
SQUARE = TimmModelConfig(name="test_resnet", weights="pretrained")


def save_teacher(folder, config=SMALL, classes=(), seed=0, num_classes=10):
    """Save a network with random weights as `teach` does, and return its options with these weights."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    described = TrainedModel(
        config=config, num_classes=num_classes, input_size=(16, 16), classes=classes
    )
    save_model(folder, build_model(config, num_classes), described)
    return replace(config, weights=str(folder / "model.safetensors"))


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "used", "words"),
    [
        ({"stem_stride": 2}, {}, "teacher.stem_stride=2"),
        slow({"std": (0.5, 0.5, 0.5)}, {}, "teacher.std=[0.5,0.5,0.5]"),
        ({}, {"stem_stride": 2}, "teacher.stem_stride=1"),
    ],
)
def test_weights_that_were_trained_with_other_options_are_refused(tmp_path, trained, used, words):
    teacher = save_teacher(tmp_path / "teach", replace(SMALL, **trained))
    other = replace(SMALL, weights=teacher.weights, **used)

    with pytest.raises(ConfigError, match="were trained with other options than") as error:
        precompute.run(precompute_config(tmp_path / "store", other))
    assert f"set {words}, as in model.json" in str(error.value)
    assert precompute.run(precompute_config(tmp_path / "store", teacher)).teacher_records == 72


def test_a_student_is_not_started_from_weights_of_other_options(tmp_path, frozen):
    weights = save_teacher(tmp_path / "teach", replace(SMALL, stem_stride=2)).weights
    config = distill_config(frozen)

    with pytest.raises(ConfigError, match=r"set student\.stem_stride=2"):
        distill.run(replace(config, student=replace(config.student, weights=weights)))


def test_weights_of_another_kind_of_network_are_named(tmp_path):
    weights = save_teacher(tmp_path / "teach").weights
    other = TimmModelConfig(name="resnet18", weights=weights)

    with pytest.raises(ConfigError, match=r"set teacher=cifar teacher\.name=resnet8"):
        precompute.run(precompute_config(tmp_path / "store", other))


def test_a_description_of_another_program_beside_the_weights_is_left_alone(tmp_path):
    teacher = save_teacher(tmp_path / "teach")
    (tmp_path / "teach/model.json").write_text('{"architecture": "resnet8"}')

    assert precompute.run(precompute_config(tmp_path / "store", teacher)).teacher_records == 72


def test_a_crop_of_a_network_that_receives_whole_frames_is_refused(tmp_path):
    teacher = replace(save_teacher(tmp_path / "teach"), crop_fraction=0.9)

    with pytest.raises(ConfigError, match=r"crop_fraction=0\.9 is an option of frame=center_crop"):
        precompute.run(precompute_config(tmp_path / "store", teacher))


def test_weights_of_other_classes_are_refused_unless_their_number_is_named(tmp_path):
    letters = tuple("abcdefghij")
    teacher = save_teacher(tmp_path / "letters", classes=letters)
    config = precompute_config(tmp_path / "store", teacher)
    more = save_teacher(tmp_path / "more", classes=tuple("abcdefghijk"), num_classes=11)

    with pytest.raises(ConfigError, match=r"trained on other classes: .* same classes$"):
        precompute.run(config)
    with pytest.raises(ConfigError, match=r"or set teacher\.classes=11 for outputs of its own"):
        precompute.run(replace(config, teacher=more))
    precompute.run(replace(config, teacher=replace(more, classes=11)))


# ---- accuracy ------------------------------------------------------------------------------------


def test_the_accuracy_of_each_split_is_that_of_an_evaluation(tmp_path):
    teacher = save_teacher(tmp_path / "teach")
    config = precompute_config(tmp_path / "store", teacher)

    accuracy = precompute.run(config).teacher_accuracy

    assert set(accuracy) == set(Store(config.store.path).manifest.records)
    frozen = type("Frozen", (), {"store": Store(config.store.path)})
    for split in ("test", "test_swapped"):
        evaluation = evaluate_config(frozen, run=f"judge-{split}", splits=(split,))
        judged = evaluate.run(replace(evaluation, model="teacher", teacher=teacher))
        assert accuracy[split] == judged.splits[split]["accuracy"]
    assert precompute.run(config).teacher_accuracy == {}  # nothing was computed


def test_a_resumed_pass_counts_the_shards_of_both_calls(tmp_path):
    teacher = save_teacher(tmp_path / "teach")
    whole = precompute.run(precompute_config(tmp_path / "whole", teacher)).teacher_accuracy
    config = precompute_config(tmp_path / "store", teacher)
    with killed_at(commit_pass, "write_marker", 3):
        precompute.run(config)
    assert len(list((tmp_path / "store").glob("teachers/*/commits/*.parquet"))) == 2

    assert precompute.run(config).teacher_accuracy == whole


def test_a_teacher_of_classes_of_its_own_has_no_accuracy(tmp_path):
    teacher = replace(SMALL, weights="random", classes=7)

    assert precompute.run(precompute_config(tmp_path / "store", teacher)).teacher_accuracy == {}


# ---- preprocessing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            TorchvisionModelConfig(name="resnet50", weights="pretrained"),
            (224, 224 / 232, "bilinear"),
        ),
        (
            TorchvisionModelConfig(name="resnet50", weights="pretrained:IMAGENET1K_V1"),
            (224, 0.875, "bilinear"),
        ),
        (
            TimmModelConfig(name="tf_efficientnet_lite0", weights="pretrained"),
            (224, 0.875, "bicubic"),
        ),
        (TimmModelConfig(name="convnext_tiny", weights="pretrained"), (224, 0.95, "bicubic")),
    ],
)
def test_published_weights_receive_what_their_provider_states(config, expected):
    resolved = with_preprocessing(config, 1000)

    assert resolved.frame == "center_crop"
    assert (resolved.input_size, resolved.crop_fraction, resolved.interpolation) == expected
    own = replace(config, input_size=160, crop_fraction=0.5, interpolation="bilinear")
    assert with_preprocessing(own, 1000) == replace(own, frame="center_crop")
    assert with_preprocessing(replace(config, frame="full"), 1000).frame == "full"


BOTH = "teacher.frame=full or teacher.frame=center_crop"
SQUASH = {"crop_mode": "squash", "crop_pct": 1.0, "input_size": (3, 64, 64)}


@pytest.fixture
def publish(monkeypatch):
    """Function that changes what timm publishes of test_resnet, and returns the arguments of timm's transform."""

    def change(values):
        published = replace(timm.get_pretrained_cfg("test_resnet"), **values)
        monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: published)
        return timm.data.resolve_data_config(pretrained_cfg=published.to_dict())

    return change


def test_a_published_squash_gives_the_logits_of_timms_transform(tmp_path, publish):
    """Images of one color, whose resizing is exact; by its padding, the network answers otherwise at another size."""
    transform = timm.data.create_transform(**publish(SQUASH | {"interpolation": "bicubic"}))
    torch.manual_seed(0)
    network = timm.create_model("test_resnet").eval()
    teacher = replace(SQUARE, weights=str(tmp_path / "published.safetensors"), classes=1000)
    save_file(network.state_dict(), teacher.weights)
    images = [Image.new("RGB", (200, 120), color) for color in ("red", "green", "orange")]
    for number, image in enumerate(images):
        (tmp_path / f"photos/{number}").mkdir(parents=True)
        image.save(tmp_path / f"photos/{number}/one.png")
    data = ImageFolderDataConfig(path=str(tmp_path / "photos"))
    precompute.run(precompute_config(tmp_path / "store", teacher, data=data, image_size=160))
    store = open_store(tmp_path / "store")
    table, described = store.arrays(), store.open_passes([])[0].manifest.teacher

    inputs = torch.stack([transform(image) for image in images])
    with torch.no_grad():
        theirs, larger = network(inputs), network(inputs[:, :, :1, :1].expand(-1, -1, 160, 160))
    ours = torch.tensor(table["logits"][np.argsort(table["label"])])
    assert (ours - theirs).abs().max() < 0.1 * (larger - theirs).abs().max()
    picture = "whole image at 64x64, bicubic from frames of 160x160"
    assert str(Picture.from_manifest(described, store.size)) == picture
    assert build_teacher(teacher, store, "cpu").input_size == (64, 64)


@pytest.mark.parametrize(
    ("published", "stated", "remedy", "options"),
    [
        ({"crop_mode": "border"}, "crop_mode=border", BOTH, {"frame": "full"}),
        (SQUASH | {"crop_pct": 0.9}, "crop_mode=squash and crop_pct=0.9", BOTH, {"frame": "full"}),
        ({"crop_mode": "corner"}, "crop_mode=corner", BOTH, {"frame": "center_crop"}),
        (
            {"interpolation": "box"},
            "interpolation=box",
            "teacher.interpolation=bilinear",
            {"interpolation": "bilinear"},
        ),
        ({"input_size": (3, 9, 8)}, "input_size=9x8", "teacher.input_size=8", {"input_size": 8}),
    ],
)
def test_what_an_input_cannot_have_is_refused_until_an_option_replaces_it(
    publish, published, stated, remedy, options
):
    publish(published)
    message = f"timm test_resnet was published with {stated}, which is not supported; set {remedy}"

    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        with_preprocessing(SQUARE, 1000)
    resolved = with_preprocessing(replace(SQUARE, **options), 1000)
    assert {name: getattr(resolved, name) for name in options} == options


def test_a_file_of_published_classes_is_taken_for_published_weights(tmp_path):
    config = TimmModelConfig(name="tf_efficientnet_lite0", weights=str(tmp_path / "weights.pth"))

    assert with_preprocessing(config, 1000).frame == "center_crop"
    assert with_preprocessing(config, 10).frame == "full"
    assert with_preprocessing(replace(config, classes=1000), 10).frame == "center_crop"
    assert with_preprocessing(replace(config, weights="random"), 1000).frame == "full"
    assert with_preprocessing(SMALL, 10).frame == "full"


def test_a_network_that_was_trained_here_receives_whole_frames(tmp_path):
    config = save_teacher(tmp_path / "teach", TimmModelConfig(name="test_resnet"))

    assert published(config).classes == 1000
    assert with_preprocessing(replace(config, classes=1000), 10).frame == "full"


def test_a_pass_without_a_crop_keeps_its_fingerprint(tiny_teacher):
    description = Network(tiny_teacher, 10).describe()

    assert description["frame"] == "full"
    assert set(description["preprocessing"]) == {"mean", "std", "input_size"}
    assert not {"frame", "crop_fraction", "interpolation"} & set(description["architecture"])


def test_a_published_network_sees_photographs_in_their_proportions(tmp_path):
    """A circle in a wide photograph has equal width and height in the teacher's input, and not in the whole frame."""
    height, width = 200, 400
    y, x = np.mgrid[:height, :width]
    circle = ((x - width / 2) ** 2 + (y - height / 2) ** 2 < 50**2)[:, :, None]
    (tmp_path / "photos/a").mkdir(parents=True)
    (tmp_path / "photos/b").mkdir()
    image = Image.fromarray(np.where(circle, 255, 0).repeat(3, axis=2).astype(np.uint8))
    for name in ("a", "b"):
        image.save(tmp_path / f"photos/{name}/one.png")
    state = build_model(TimmModelConfig(name="test_resnet"), 1000).network.state_dict()
    save_file(state, tmp_path / "published.safetensors")
    weights = str(tmp_path / "published.safetensors")
    teacher = TimmModelConfig(
        name="test_resnet", weights=weights, classes=1000, interpolation="bicubic"
    )
    data = ImageFolderDataConfig(path=str(tmp_path / "photos"))
    sides = {}
    for frame in ("auto", "full"):
        inputs = []
        config = precompute_config(
            tmp_path / frame, replace(teacher, frame=frame, input_size=160), data=data
        )
        with pytest.MonkeyPatch.context() as patch:
            original = shard_tasks.TeacherAnnotator._annotate_inputs

            def record(self, images, records, outputs, original=original, inputs=inputs):
                inputs.append(images)
                return original(self, images, records, outputs)

            patch.setattr(shard_tasks.TeacherAnnotator, "_annotate_inputs", record)
            precompute.run(config)
        bright = inputs[0][0, 0] > 0.5
        sides[frame] = (int(bright.any(dim=0).sum()), int(bright.any(dim=1).sum()))
        assert inputs[0].min() >= 0
        assert inputs[0].max() <= 1

    assert abs(sides["auto"][0] - sides["auto"][1]) <= 1
    assert sides["full"][1] == pytest.approx(2 * sides["full"][0], abs=2)


def test_an_evaluator_takes_the_network_of_a_pass_whatever_its_frame(tmp_path):
    config = precompute_config(tmp_path / "store", replace(SMALL, weights="random"))
    cropped = replace(config.teacher, frame="center_crop", crop_fraction=0.5)
    precompute.run(replace(config, teacher=cropped))
    frozen = type("Frozen", (), {"store": Store(config.store.path)})
    evaluation = replace(evaluate_config(frozen), model="teacher")

    assert evaluate.run(replace(evaluation, teacher=config.teacher)).splits["test"]["records"] > 0
    with pytest.raises(Exception, match="is not the network that made"):
        evaluate.run(replace(evaluation, run="b", teacher=replace(config.teacher, frame="full")))


def test_options_of_a_crop_are_refused_with_whole_frames():
    with pytest.raises(ConfigError, match=r"crop_fraction=0\.9 is an option of frame=center_crop"):
        replace(SMALL, frame="full", crop_fraction=0.9)
