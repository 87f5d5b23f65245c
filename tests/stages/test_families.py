"""Every output, every evaluator and an export of every family of networks: each works, or is one sentence."""

from typing import NamedTuple

import pytest

import permafrost
from permafrost.config.evaluation import EVALUATORS
from permafrost.config.store import OUTPUTS
from permafrost.core.errors import UserError
from tests.support.papers import needs_papers

NETWORKS = """
from torch import nn


class Network(nn.Module):
    def __init__(self, classes, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 1, 1))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, classes)

    def forward(self, images):
        features = self.conv(images)
        if self.kind == "average":
            return self.head(features.mean((2, 3)))
        if self.kind == "maximum":
            return self.head(features.relu_().amax((2, 3)))
        return self.head(self.norm(features.permute(0, 2, 3, 1)).relu().mean((1, 2)))


def build(classes, kind):
    return Network(classes, kind)
"""

DATA = [
    *("data=demo", "data.image_size=32", "data.min_digit_size=10", "data.max_digit_size=16"),
    *("data.train_digits=24", "data.test_digits=12", "data.teacher_digits=4"),
    *("data.teacher_placements=1", "data.test_placements=1", "data.train_placements=1"),
]
ALL_TARGETS = "[logits,maps,attention,class_maps,features,pooled]"
PAIRS = [f"evaluate.diffroar.{name}" for name in ("train_records=24", "records_per_class=1")]
TEACHER = [
    "teacher=cifar",
    "teacher.name=resnet8",
    "teacher.input_size=64",
    "teacher.weights=random",
]
FURTHER = {
    "distance_correlation": TEACHER,
    "unicam": TEACHER,
    "shift": ["evaluate.shift.pixels=4"],
    "diffroar": [*PAIRS, "evaluate.diffroar.epochs=1"],
}


class Kind(NamedTuple):
    """Family of networks, or one of its architectures that is built unlike the others."""

    words: str
    side: int = 64
    more: tuple[str, ...] = ()
    explainer: str = "gradcam"


def of_module(kind: str, layer: str) -> Kind:
    words = ("factory=networks_of_a_test.py:build", f"layer={layer}", f"arguments={{kind: {kind}}}")
    return Kind("module", 64, words)


KINDS = {
    "cifar": Kind("cifar", 64, ("name=resnet8",)),
    "average": of_module("average", "conv"),
    "maximum": of_module("maximum", "conv"),
    "channels_last": of_module("channels_last", "norm"),
    "additive": Kind("additive", 32),
    "bcos": Kind("bcos", 64, ("name=resnet8",), "bcos_weights"),
    "bcos_vit": Kind("bcos", 224, ("name=simple_vit_ti",), "bcos_weights"),
    **{
        name: Kind("torchvision", 64, (f"name={name}",))
        for name in ("resnet18", "squeezenet1_1", "swin_t", "convnext_tiny", "densenet121")
    },
    **{
        name: Kind("timm", side, (f"name={name}",))
        for name, side in [
            *[("vit_tiny_patch16_224", 224), ("eva02_tiny_patch14_224", 224), ("resnet10t", 64)],
            *[("levit_128s", 224), ("mixer_s32_224", 224), ("xcit_nano_12_p16_224", 224)],
            *[("tf_efficientnet_lite0", 64), ("mambaout_femto", 64)],
        ]
    },
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Folder with the file of networks and a store that has each target of a small teacher."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "networks_of_a_test.py").write_text(NETWORKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        permafrost.precompute(
            *("store.path=store", *DATA, *TEACHER, "executor=serial"),
            *("annotate.name=targets", f"annotate.outputs={ALL_TARGETS}"),
        )
    return folder


def refusal_of(call):
    """Return the sentence by which a call is refused, or the empty text. Other errors are those of the test."""
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def words_of(kind, section):
    side = [] if kind.words == "additive" else [f"{section}.input_size={kind.side}"]
    more = [f"{section}.{word}" for word in kind.more]
    plugins = ["plugins=[networks_of_a_test.py]"] if kind.words == "module" else []
    return [f"{section}={kind.words}", *more, *side, *plugins]


@pytest.mark.slow
@needs_papers
@pytest.mark.parametrize("name", KINDS)
def test_every_output_is_stored_or_refused_in_one_sentence(workplace, monkeypatch, name):
    monkeypatch.chdir(workplace)
    kind = KINDS[name]
    if kind.words == "timm":
        pytest.importorskip("timm")
    teacher = [*words_of(kind, "teacher"), "teacher.weights=random", f"explainer={kind.explainer}"]
    refused = {}
    for output_name in OUTPUTS:
        outputs = "[logits]" if output_name == "logits" else f"[logits,{output_name}]"
        words = [f"annotate.outputs={outputs}", "executor=serial", "annotate.batch_size=16"]
        store = [f"store.path={name}", *DATA]
        refused[output_name] = refusal_of(
            lambda store=store, words=words: permafrost.precompute(*store, *teacher, *words)
        )
    assert not refused["logits"]
    assert not refused["maps"]
    for output_name, sentence in refused.items():
        assert "\n" not in sentence, output_name
    is_additive = kind.words == "additive"
    assert [bool(refused[f"superfeature_{part}"]) for part in ("logits", "hidden")] == [
        not is_additive
    ] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_evaluator_and_an_export_of_a_student_work_or_are_refused(
    workplace, monkeypatch, name
):
    monkeypatch.chdir(workplace)
    kind = KINDS[name]
    if kind.words == "timm":
        pytest.importorskip("timm")
    student = [word for word in words_of(kind, "student") if ".input_size=" not in word]
    common = ["store.path=store", f"run={name}", "store.teacher=[targets]"]
    unsupported = refusal_of(
        lambda: permafrost.distill(
            *(*common, *student, "method=kd", "trainer.epochs=1"),
            *("trainer.batch_size=8", "augment=pad_crop_flip", f"augment.size={kind.side}"),
        )
    )
    assert not unsupported
    plugins = [word for word in student if word.startswith("plugins=")]
    refused = {
        evaluator: refusal_of(
            lambda evaluator=evaluator: permafrost.evaluate(
                *(*common, *plugins, f"evaluators=[{evaluator}]", "evaluate.splits=[test]"),
                *FURTHER.get(evaluator, []),
            )
        )
        for evaluator in EVALUATORS
    }
    refused["export"] = refusal_of(
        lambda: permafrost.export("store.path=store", f"run={name}", *plugins)
    )
    assert not refused["accuracy"]
    assert not refused["shift"]
    for what, sentence in refused.items():
        assert "\n" not in sentence, what
