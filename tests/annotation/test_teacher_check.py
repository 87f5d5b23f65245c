"""A look at a teacher before its pass: probabilities, rounding, the order of classes, constant maps."""

import logging
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.teacher_check import (
    CheckTeacher,
    TeacherCheck,
    TeacherError,
    _other_order,
    describe_outputs,
)
from permafrost.config.models import ModuleConfig
from permafrost.config.plugins import load_plugins
from permafrost.config.store import PassOptions
from permafrost.core.errors import ConfigError
from permafrost.core.records import IMPOSSIBLE_LOGIT, NO_LABEL
from permafrost.models.module import ModuleClassifier
from permafrost.store.commit_pass import ConstantLogitsError
from permafrost.store.reader import Store
from tests.support.slow import slow
from tests.support.stores import precompute_config
from tests.support.verbs import precompute

NAMES = tuple(map(str, range(10)))


def drawn_logits(records=200, classes=10, scale=4.0, seed=0):
    return np.random.default_rng(seed).normal(scale=scale, size=(records, classes))


def checked(logits, labels=None, classes=NAMES, returns="logits", **others):
    """Describe and judge the outputs of a teacher."""
    if labels is None:
        labels = np.full(len(logits), NO_LABEL)
    described = describe_outputs(np.asarray(logits, float), torch.as_tensor(labels), len(classes))
    check = TeacherCheck(**described, returns=returns, **others)
    check.require_sound(classes)
    return check


# ---- what the outputs are ------------------------------------------------------------------------


def softmax(logits):
    return torch.from_numpy(logits).softmax(dim=1).numpy()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (softmax, "are probabilities and not logits.*remove the softmax.*returns=probabilities"),
        (lambda z: np.log(softmax(z)), "are log-probabilities.*remove the log_softmax"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_probabilities_are_not_taken_for_logits(make, message, dtype):
    outputs = make(drawn_logits()).astype(dtype)

    checked(drawn_logits())
    with pytest.raises(TeacherError, match=message):
        checked(outputs)
    # Once converted, both are log-probabilities.
    checked(np.log(softmax(drawn_logits())), returns="probabilities")
    checked(np.log(softmax(drawn_logits())), returns="log_probabilities")


@pytest.mark.parametrize("returns", ["probabilities", "log_probabilities"])
def test_logits_are_not_taken_for_probabilities(returns):
    with pytest.raises(TeacherError, match=rf"teacher\.returns={returns}, but the .*rows that"):
        checked(drawn_logits(), returns=returns)


def test_probabilities_of_single_classes_are_doubtful(caplog):
    with caplog.at_level(logging.WARNING):
        checked(drawn_logits())
        assert not caplog.records
        checked(1 / (1 + np.exp(-drawn_logits())))
    assert "all outputs of the teacher are between 0 and 1" in caplog.text


def test_a_teacher_of_one_output_is_not_called_a_softmax():
    checked(np.ones((20, 1)) * np.linspace(-3, 3, 20)[:, None], classes=("0",))


# ---- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        (drawn_logits(), ""),
        (drawn_logits(scale=1e-3), ""),
        (drawn_logits(scale=100), ""),
        (drawn_logits() + 300, "float16 has steps of 6"),
        (drawn_logits() + 1500, "float16 has steps of"),
        (drawn_logits(scale=0.01) + 0.3, "float16 has steps of"),
        (drawn_logits() * 1e5, r"beyond the 65,504 of float16"),
        # Distances to prototypes: the largest logits are those with the smallest magnitude.
        (np.linspace(-3353, -498, 1000) + drawn_logits(64, 1000, 0.5), "they diverge by"),
    ],
)
def test_logits_are_stored_in_float32_where_float16_loses_them(logits, reason):
    check = checked(logits, classes=tuple(map(str, range(logits.shape[1]))))
    assert check.needs_float32().find(reason) >= 0
    assert bool(check.needs_float32()) == bool(reason)


# ---- labels --------------------------------------------------------------------------------------


def labels_and_logits(order, accuracy=0.8, records=256, seed=0):
    """Labels, and logits of a teacher whose output order[label] is right with this frequency."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(len(order), size=records)
    predicted = np.asarray(order)[labels]
    is_wrong = generator.random(records) > accuracy
    predicted[is_wrong] = generator.integers(len(order), size=int(is_wrong.sum()))
    logits = drawn_logits(records, len(order), 1.0, seed)
    logits[np.arange(records), predicted] += 10
    return labels, logits


@pytest.mark.parametrize("accuracy", [0.1, 0.5, 0.8, 1.0])
def test_labels_in_their_order_are_right_at_any_accuracy(accuracy, caplog):
    for seed in range(20):
        labels, logits = labels_and_logits(range(10), accuracy, seed=seed)
        checked(logits, labels)
    assert not caplog.records


def test_labels_in_the_order_of_text_are_recognized_with_one_record_a_class():
    """Folders 0 to 199 sorted as text, as ImageNetV2 has them."""
    names = tuple(sorted(map(str, range(200))))
    order = [int(name) for name in names]
    labels = np.arange(200)
    logits = drawn_logits(200, 200, 1.0)
    logits[labels, order] += 10

    with pytest.raises(TeacherError, match=r"class 10 is taken for output 10 \(107\)"):
        checked(logits, labels, names)


@pytest.mark.parametrize("shift", [1, -1])
def test_shifted_outputs_are_recognized(shift):
    labels, logits = labels_and_logits(np.roll(range(10), -shift))
    with pytest.raises(TeacherError, match=rf"outputs are shifted by \{shift:+d}"):
        checked(logits, labels, tuple("abcdefghij"))


@pytest.mark.parametrize("seed", range(5))
def test_any_other_order_is_found_on_one_half_and_confirmed_on_the_other(seed):
    order = np.random.default_rng(seed).permutation(10)
    labels, logits = labels_and_logits(order, seed=seed)
    with pytest.raises(TeacherError, match=r"is right for .*, and would be for [78]") as caught:
        checked(logits, labels, tuple("abcdefghij"))
    assert "another order than the classes" in str(caught.value)


def test_two_exchanged_classes_are_named():
    order = [0, 2, 1, *range(3, 10)]
    labels, logits = labels_and_logits(order, 1.0)
    with pytest.raises(TeacherError, match=r"class b is taken for output 2 \(c\), c is taken for"):
        checked(logits, labels, tuple("abcdefghij"))


@pytest.mark.parametrize(("sureness", "is_refused"), [(1.0, True), (0.2, True), (0.05, False)])
def test_an_order_of_outputs_as_even_as_those_of_an_untrained_network_is_a_warning(
    sureness, is_refused, caplog
):
    """An untrained network maps three colors to classes in some order, one of which is right."""
    labels, logits = labels_and_logits([1, 2, 0], accuracy=1.0)
    if is_refused:
        with pytest.raises(TeacherError, match="outputs are shifted by"):
            checked(logits * sureness, labels, ("red", "green", "blue"))
        return
    with caplog.at_level(logging.WARNING):
        checked(logits * sureness, labels, ("red", "green", "blue"))
    assert "outputs are shifted by" in caplog.text
    assert "as even as those of an untrained network" in caplog.text


def test_a_teacher_that_confuses_classes_has_no_other_order():
    """Control: it says one class for all, or confuses two of them half of the time."""
    labels, logits = labels_and_logits(range(10), 1.0)
    same = logits.copy()
    same[:, 3] += 100
    checked(same, labels)
    for_two = logits.copy()
    confused = (labels == 1) & (np.arange(len(labels)) % 2 == 0)
    for_two[confused, 2] += 100
    checked(for_two, labels)


def test_accuracy_below_chance_is_doubtful(caplog):
    labels = np.arange(256) % 4
    logits = np.zeros((256, 4))
    logits[np.arange(256), (labels + 1 + np.arange(256) // 4 % 3) % 4] = (
        5  # any class but the right one
    )
    with caplog.at_level(logging.WARNING):
        checked(logits, labels, tuple("abcd"))
    assert "and guessing would be for" in caplog.text


# ---- maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "constant", "message"),
    [
        ((7, 7), 0, None),
        ((7, 7), 199, None),
        ((7, 7), 200, "all 200 maps of a sample are constant on their grid"),
        ((2, 768), 0, "2x768 cells for images of 224x224 pixels"),
        ((14, 7), 0, "14x7 cells"),
        ((225, 225), 0, "225x225 cells"),
    ],
)
def test_maps_must_be_maps(grid, constant, message):
    others = {"maps": 200, "constant_maps": constant, "grid": grid, "input_size": (224, 224)}
    if message is None:
        checked(drawn_logits(), **others)
        return
    with pytest.raises(TeacherError, match=message):
        checked(drawn_logits(), **others)


# ---- passes --------------------------------------------------------------------------------------

NETWORKS = """
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self, outputs, end, offset, scale):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3, 4), nn.Linear(8, outputs)
        self.end, self.offset, self.scale = end, offset, scale

    def forward(self, images):
        logits = self.scale * self.head(self.conv(images).relu().mean(dim=(2, 3))) + self.offset
        return logits if self.end is None else getattr(logits, self.end)(dim=1)

def build(outputs, end=None, offset=0.0, scale=30.0):
    return Network(outputs, end, offset, scale)
"""


@pytest.fixture
def passes(tmp_path, monkeypatch):
    """Function that stores a pass of a network of one's own, and returns its records' values and dtypes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("permafrost.config.plugins._PLACES", {})
    (tmp_path / "nets.py").write_text(NETWORKS)
    load_plugins(["nets.py"])

    def store(outputs=("logits",), returns="logits", logits_dtype="auto", **arguments):
        teacher = ModuleConfig(
            factory="nets.py:build", layer="conv", weights="random", arguments=arguments,
            returns=returns,
        )  # fmt: skip
        annotate = PassOptions(batch_size=8, outputs=outputs, logits_dtype=logits_dtype)
        config = precompute_config(tmp_path / "store", teacher, annotate=annotate)
        name = precompute.run(config).passes[0]
        opened = Store(tmp_path / "store").open_pass(name)
        shard = next(iter(opened.store.shards))
        return opened, opened.read_shard(shard)["logits"][:, 0]

    yield store
    sys.modules.pop("nets", None)


def test_the_logits_of_probabilities_are_stored(passes):
    _, logits = passes()
    _, of_probabilities = passes(returns="probabilities", end="softmax")
    _, of_logarithms = passes(returns="log_probabilities", end="log_softmax")

    expected = torch.as_tensor(np.asarray(logits, np.float32)).log_softmax(dim=1)
    for stored in (of_probabilities, of_logarithms):
        actual = torch.as_tensor(np.asarray(stored, np.float32))
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(actual.softmax(1), expected.softmax(1), rtol=0, atol=2e-3)


@torch.no_grad()
def test_an_impossible_class_has_a_finite_logit():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.Flatten(), torch.nn.Softmax(1))
    model = ModuleClassifier(network, "0", returns="probabilities")
    logits = model(torch.full((1, 3, 1, 1), 1e4)).logits
    assert float(logits.min()) == IMPOSSIBLE_LOGIT == np.finfo(np.float16).min
    assert float(logits.max()) == 0


def test_impossible_classes_do_not_count_among_the_steps_of_float16():
    """Votes of 51 people, many of which are 0, as a network would return them."""
    votes = np.random.default_rng(0).multinomial(51, [0.55, 0.3, 0.1, 0.04, 0.01], 64)
    assert (votes == 0).any()
    with np.errstate(divide="ignore"):
        logits = np.maximum(np.log(votes / 51), IMPOSSIBLE_LOGIT)

    described = describe_outputs(logits, torch.from_numpy(votes.argmax(axis=1)), 5)
    check = TeacherCheck(**described, returns="probabilities")

    assert check.needs_float32() == ""
    assert not check.is_constant
    check.require_sound(list("abcde"))


def test_a_softmax_is_refused_before_anything_is_stored(passes, tmp_path):
    with pytest.raises(TeacherError, match="remove the softmax"):
        passes(end="softmax")
    with pytest.raises(ConfigError, match="has no maps; remove the softmax"):
        passes(outputs=("logits", "maps"), returns="probabilities", end="softmax")
    with pytest.raises(TeacherError, match="returns=log_probabilities, but"):
        passes(returns="log_probabilities")
    assert not list((tmp_path / "store").glob("teachers/*"))


@pytest.mark.parametrize("offset", [slow(300.0), 1500.0])
def test_an_offset_of_the_logits_is_not_lost(passes, offset, caplog):
    _, plain = passes()
    with caplog.at_level(logging.INFO):
        opened, moved = passes(offset=offset)
    assert "annotate.logits_dtype=auto: float32, because float16 has steps of" in caplog.text
    assert moved.dtype == np.float32
    assert plain.dtype == np.float16
    np.testing.assert_allclose(moved - offset, plain, atol=0.02)

    caplog.clear()
    again, _ = passes(offset=offset)  # the pass that exists
    explicit, _ = passes(offset=offset, logits_dtype="float32")
    assert again.name == explicit.name == opened.name
    narrow, _ = passes(offset=300.0, logits_dtype="float16")
    assert narrow.name != opened.name


def test_equal_logits_are_an_error_only_if_they_are_equal(passes):
    with pytest.raises(ConstantLogitsError, match=r"set annotate\.logits_dtype=float32"):
        passes(offset=1500.0, scale=0.1, logits_dtype="float16")


def test_classes_in_another_order_are_refused(tmp_path, frozen, tiny_teacher):
    """The labels are what the teacher says, up to a cycle of the outputs."""
    state = load_file(tiny_teacher.weights)
    config = precompute_config(tmp_path / "store", tiny_teacher)
    task = CheckTeacher(
        store_path=frozen.store.folder, teacher=tiny_teacher, classes=10,
        explainer=config.explainer, config=config.annotate, num_threads=1,
    )  # fmt: skip
    sample = [(shard, shard.records) for shard in frozen.store.shards]
    report = asdict(task(sample).report)
    assert report["records"] == len(report["labels"]) == 72
    assert report["grid"] == (4, 4)

    state["linear.weight"] = state["linear.weight"].roll(1, 0)
    state["linear.bias"] = state["linear.bias"].roll(1, 0)
    save_file(state, tmp_path / "rolled.safetensors")
    rolled = replace(
        task, teacher=replace(tiny_teacher, weights=str(tmp_path / "rolled.safetensors"))
    )
    moved = asdict(rolled(sample).report)
    assert moved["predicted"] == [(label + 1) % 10 for label in report["predicted"]]
    values = {**report, "labels": moved["predicted"], "grid": (4, 4), "input_size": (16, 16)}
    if len(set(report["predicted"])) > 1:
        with pytest.raises(TeacherError, match=r"shifted by -1"):
            TeacherCheck(**values).require_sound(NAMES)


# ---- other records ---------------------------------------------------------------------------------


def test_the_probes_run_the_teacher_on_two_dozen_records_beside_its_sample(
    frozen, tiny_teacher, monkeypatch
):
    """One per cent of a pass of 50,000 records would be 500."""
    counts = []
    forward = TeacherAnnotator._forward

    def count(self, inputs, outputs):
        counts.append(len(inputs))
        return forward(self, inputs, outputs)

    monkeypatch.setattr(TeacherAnnotator, "_forward", count)
    config = precompute_config(frozen.store.path, tiny_teacher)
    task = CheckTeacher(
        store_path=frozen.store.folder, teacher=tiny_teacher, classes=frozen.store.manifest.classes,
        explainer=config.explainer, config=replace(config.annotate, precision="float32"), num_threads=1,
    )  # fmt: skip
    sample = [(shard, shard.records) for shard in frozen.store.shards]

    records = task(sample).records

    assert records == sum(shard.records for shard in frozen.store.shards)
    assert 10 <= sum(counts) - records <= 24


def test_the_probes_of_a_network_of_ones_own_run_it_on_two_dozen_images():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    counts = []
    network.register_forward_pre_hook(lambda module, inputs: counts.append(len(inputs[0])))

    ModuleClassifier(network, "1").eval()(torch.rand(1, 3, 16, 16))

    assert sum(counts) <= 36


def test_an_order_of_many_classes_needs_no_matrix_of_all():
    """The square of 200,000 classes would be 320 GB."""
    count = 200_000
    rng = np.random.default_rng(0)
    labels = rng.choice(count, 40, replace=False).repeat(6)
    order = rng.permutation(count)
    classes = [f"{n}x" for n in range(count)]

    assert "another order than the classes" in _other_order(labels, order[labels], classes)
    assert _other_order(labels, labels, classes) == ""


# ---- warnings before the pass is paid for --------------------------------------------------------


@pytest.mark.parametrize(("constant", "words"), [(34, "68% of the maps are empty"), (20, "")])
def test_a_share_of_empty_maps_is_said_on_the_sample(caplog, constant, words):
    checked(drawn_logits(), maps=50, constant_maps=constant, grid=(7, 7))

    assert words in caplog.text
    assert ("empty" in caplog.text) == bool(words)


@pytest.mark.parametrize(
    ("scale", "words"), [(100.0, ""), (1.0, "nearly uniform"), (1e5, "name a single class")]
)
def test_similarities_without_their_scale_and_certain_targets_are_said(caplog, scale, words):
    similarities = np.random.default_rng(0).uniform(-0.36, 0.72, (64, 3))

    checked(scale * similarities, classes=("a", "b", "c"))

    texts = ("nearly uniform", "name a single class")
    assert [text in caplog.text for text in texts] == [text == words for text in texts]
