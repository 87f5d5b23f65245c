"""Method several: the weighted sum of methods, each on a pass of its own, from options to the report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from permafrost.config.augment import AugmentOptions, OperationConfig, RandomViewsConfig
from permafrost.config.builder import build_config, to_plain_dict
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.methods import (
    ATConfig,
    E2KDConfig,
    EmbeddingConfig,
    FeaturesConfig,
    KDConfig,
    LabelsConfig,
    SeveralConfig,
    TeacherTermOptions,
)
from permafrost.config.models import CifarModelConfig, NoModelConfig
from permafrost.config.store import PassOptions, StoreOptions
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.errors import ConfigError
from permafrost.losses.base import LossTerms, build_loss
from permafrost.models.saved import SavedNetwork
from permafrost.runs.folder import PassRecords
from permafrost.runs.mirrors import RUNS
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store
from permafrost.training.build import build_training
from permafrost.training.distill import StudentPlan
from permafrost.training.metric_log import read_metrics
from permafrost.training.step import batch_loss
from permafrost.training.student_passes import with_named_passes
from permafrost_papers.e2kd.options import ReviewKDConfig
from tests.support.papers import needs_papers
from tests.support.runs import (
    TRAINER,
    assert_equal_states,
    distill_config,
    report_config,
    weights_of,
)
from tests.support.stores import Frozen, precompute_config
from tests.support.verbs import distill, evaluate, precompute, report

CLASSIFIER = CifarModelConfig(name="resnet14", width=4, weights="random")
TRUNK = CifarModelConfig(name="resnet8", width=6, weights="random")
FLIPS = AugmentOptions(operations=(OperationConfig(kind="horizontal_flip"),))
FEATURES = FeaturesConfig(stages=(-1, -2), lambda_ce=0.5)


def term(teacher, method, weight=1.0):
    return TeacherTermOptions(teacher=teacher, method=method, weight=weight)


def several(*terms):
    return SeveralConfig(terms=terms)


BOTH = several(
    term("trunk", FEATURES, 0.25),
    term("trunk", EmbeddingConfig()),
    term("classifier", E2KDConfig()),
)


def store_with_passes(path, **options):
    """Store with features and embeddings of a trunk and no logits, and logits and maps of a classifier."""
    for name, teacher, outputs in (
        ("trunk", TRUNK, ("features", "pooled")),
        ("classifier", CLASSIFIER, ("logits", "maps")),
    ):
        annotate = PassOptions(batch_size=8, name=name, outputs=outputs)
        config = precompute_config(path, teacher, annotate=annotate, **options)
        precompute.run(config)
    return Frozen(Store(path), config)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_with_passes(tmp_path_factory.mktemp("several") / "store")


def terms_of(store, method, state=None, teacher=()):
    """Training of a method and its loss on eight records, whose gradients are computed.

    state  parameters of the loss
    """
    named = StoreOptions(path=str(store.store.path), teacher=teacher)
    trainer = replace(TRAINER, device="cpu")
    config = distill_config(store, method=method, store=named, trainer=trainer)
    config = with_named_passes(config, store.store, PassRecords([]))
    spec = StudentPlan(config, RUNS / "one" / "distill").spec()
    training = build_training(spec, spec.loss.distributed)
    if state is not None:
        training.loss.load_state_dict(state)
    training.model.train()
    loss = batch_loss(training, spec.dataset.__getitems__(list(range(8))), spec.input_size)
    loss.total.backward()
    return training, loss


def gradients_of(training):
    return {name: p.grad for name, p in training.model.named_parameters()}


def test_the_loss_is_the_weighted_sum_of_each_method_s_in_value_and_gradients(store):
    training, both = terms_of(store, BOTH)
    states = [loss.state_dict() for loss in training.loss.losses]

    singles = [
        terms_of(store, each.method, state, teacher=(each.teacher,))
        for each, state in zip(BOTH.terms, states, strict=True)
    ]

    weights = [each.weight for each in BOTH.terms]
    expected = sum(w * loss.total for w, (_, loss) in zip(weights, singles, strict=True))
    torch.testing.assert_close(both.total, expected)
    for number, (_, loss) in enumerate(singles, start=1):
        for name, value in loss.terms.items():
            torch.testing.assert_close(both.terms[f"{name}_{number}"], value)
    assert both.statistics["valid_map_fraction_3"] == singles[2][1].statistics["valid_map_fraction"]
    for name, gradient in gradients_of(training).items():
        parts = [gradients_of(single)[name] for single, _ in singles]
        summed = sum(w * part for w, part in zip(weights, parts, strict=True) if part is not None)
        torch.testing.assert_close(gradient, summed, rtol=1e-4, atol=1e-6)


def test_only_the_output_of_a_term_is_read(store):
    training, _ = terms_of(store, BOTH)
    loss = training.loss
    trunk, classifier = (
        next(f.name for f in store.store.pass_folders() if f.name.startswith(name))
        for name in ("trunk", "classifier")
    )

    assert loss.outputs_of(trunk) == ("features", "pooled")
    assert loss.outputs_of(classifier) == ()
    assert loss.needs.maps_every == 1
    assert [needs.logits for needs in loss.needs_of(trunk)] == [False, False]


def test_maps_of_two_intervals_are_needed_at_their_common_divisor():
    loss = build_loss(
        several(
            term("a", E2KDConfig(guided_step_interval=4)),
            term("b", E2KDConfig(guided_step_interval=6)),
        )
    )

    assert loss.needs.maps_every == 2
    assert [loss.needs_of(name)[0].maps_in(4) for name in ("a", "b")] == [True, False]


@pytest.mark.slow
def test_a_student_of_two_kinds_of_teachers_is_trained_evaluated_and_reported(store, caplog):
    caplog.set_level("INFO", "permafrost.evaluate")
    config = distill_config(store, method=BOTH)
    distill.run(config)
    assert distill.run(config).trained_epochs == 0

    names = SavedNetwork(RUNS / "one" / "distill").describe().teachers
    results = evaluate.run(
        EvaluateConfig(
            store=StoreOptions(path=str(store.store.path)),
            evaluate=EvaluateOptions(splits=("test",), num_pictures=0),
            run="one",
        )
    ).splits["test"]
    page = report.run(report_config(store, contact_records=2, cases=2)).html

    assert [name.split("-")[0] for name in names] == ["trunk", "classifier"]
    assert 0 <= results["agreement"] <= 1
    assert "map_cosine" in results
    assert f"one/distill has 2 teachers; agreement and maps are compared with {names[1]}" in (
        caplog.text
    )
    logged = list(read_metrics(RUNS / "one" / "distill"))[-1]
    assert {"features_1", "ce_1", "embedding_2", "kd_3", "map_3"} <= logged.keys()
    text = Path(page).read_text()
    assert "[{teacher trunk-" in text
    assert "weight 0.25}" in text


@pytest.mark.slow
def test_an_interrupted_student_continues_to_the_same_weights(store, monkeypatch):
    from permafrost.training import loop

    distill.run(distill_config(store, method=BOTH, run="whole"))
    step, count = loop.train_step, [0]

    def dying(*args, **options):
        count[0] += 1
        if count[0] == 8:
            raise KeyboardInterrupt
        return step(*args, **options)

    config = distill_config(store, method=BOTH, run="halted")
    monkeypatch.setattr(loop, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        distill.run(config)
    assert (RUNS / "halted" / "distill" / "checkpoint.pt").exists()
    distill.run(config)

    assert_equal_states(weights_of("whole"), weights_of("halted"))


@pytest.mark.slow
def test_replayed_views_of_both_teachers_are_the_same(tmp_path):
    views = {"views": RandomViewsConfig(count=2), "augment": FLIPS}
    replayed = store_with_passes(tmp_path / "store", **views)

    distill.run(
        distill_config(replayed, method=BOTH, mode="replay", views=RandomViewsConfig(count=2))
    )

    losses = [line["total"] for line in read_metrics(RUNS / "one" / "distill")]
    assert losses[-1] < losses[0]
    described = SavedNetwork(RUNS / "one" / "distill").describe().teachers
    assert {name.split("-")[0] for name in described} == {"trunk", "classifier"}


# ---- options ---------------------------------------------------------------------------------------


def test_a_term_is_written_as_a_mapping_or_as_the_name_of_its_method():
    values = {
        "kind": "several",
        "terms": [
            {"teacher": "dino", "method": {"kind": "features", "stages": [1]}, "weight": 2},
            {"teacher": "resnet", "method": "kd"},
        ],
    }

    built = build_config(SeveralConfig, values, "method")

    first, second = term("dino", FeaturesConfig(stages=(1,)), 2.0), term("resnet", KDConfig())
    assert built == several(first, second)
    assert build_config(SeveralConfig, to_plain_dict(built), "method") == built
    assert json.loads(json.dumps(to_plain_dict(built))) == to_plain_dict(built)


@needs_papers
@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([{"method": "kd"}], r"option method\.terms\[0\]\.teacher is missing"),
        ([{"teacher": "a", "method": "nothing"}], r"method\.terms\[0\]\.method=nothing is not"),
        (
            [{"teacher": "a", "method": {"kind": "kd", "tua": 1}}],
            r"unknown option method\.terms\[0\]\.method\.tua",
        ),
        ([{"teacher": "a", "method": "crd"}], r"method\.terms\[0\]\.method=crd cannot be a term"),
        ([{"teacher": "a", "method": "several"}], r"method\.terms\[0\]\.method=several cannot be"),
        ([{"teacher": "a", "method": "kd", "weight": 0}], r"terms\[0\]\.weight must be > 0"),
        (
            [{"teacher": "a", "method": {"kind": "e2kd", "map_control": "shuffled"}}],
            r"map_control is a negative control of a single method",
        ),
    ],
)
def test_terms_that_make_no_sense_are_refused_by_their_place(terms, message):
    with pytest.raises(ConfigError, match=message):
        build_config(SeveralConfig, {"kind": "several", "terms": terms}, "method")


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (several(), ConfigError, r"method\.terms=\[\] compares nothing"),
        (
            several(term("dino", KDConfig())),
            StoreMismatchError,
            r"teacher=dino is not one pass of .*choose among: classifier-\w+, trunk-\w+$",
        ),
        (
            several(term("trunk", KDConfig())),
            StoreMismatchError,
            r"holds no logits, but a term method=kd needs them",
        ),
        (
            several(term("trunk", E2KDConfig())),
            StoreMismatchError,
            r"holds no maps, but a term method=e2kd needs them",
        ),
        (
            several(term("classifier", ReviewKDConfig()), term("trunk", FEATURES)),
            StoreMismatchError,
            r"no output features, but a term method=review_kd .*name its pass with method\.terms$",
        ),
        (
            several(term("classifier", E2KDConfig()), term("classifier", E2KDConfig(tau=2.0))),
            ConfigError,
            r"has 2 terms that compare the maps of classifier-\w+; leave one",
        ),
    ],
)
def test_passes_that_lack_what_a_term_reads_are_refused_in_one_line(store, method, error, message):
    with pytest.raises(error, match=message) as raised:
        distill.run(distill_config(store, method=method))

    assert "\n" not in str(raised.value)


def test_a_live_teacher_and_named_passes_are_refused(store):
    with pytest.raises(ConfigError, match="mode=live has one teacher and no pass; set mode=frozen"):
        distill_config(store, method=BOTH, mode="live", teacher=CLASSIFIER)
    named = StoreOptions(path=str(store.store.path), teacher=("trunk",))
    with pytest.raises(ConfigError, match=r"passes that its terms name \(trunk, classifier\)"):
        distill_config(store, method=BOTH, store=named)
    assert isinstance(distill_config(store, method=BOTH).teacher, NoModelConfig)
    assert not LabelsConfig.is_term
    assert ATConfig.is_term


def balanced(a, b, state=(0.0, 0.0), weight=1.0, **options):
    """Return the method and its total for two terms of values a and b."""
    loss = build_loss(
        SeveralConfig(terms=(term("a", KDConfig(), weight), term("b", KDConfig())), **options)
    )
    loss.weights = {"kd_1": weight, "kd_2": 1.0}
    if loss.config.balance == "uncertainty":
        loss.load_state_dict({"log_variances": torch.tensor(state)}, strict=False)
    parts = [
        LossTerms(total=w * v, terms={name: v})
        for w, v, name in ((weight, a, "kd_1"), (1.0, b, "kd_2"))
    ]
    return loss, loss.combine(parts, 1.0)


def test_the_best_log_variance_is_the_logarithm_of_the_weighted_loss():
    a, b = torch.tensor(8.0), torch.tensor(0.25)
    state = (math.log(16.0), math.log(0.25))

    loss, best = balanced(a, b, state, 2.0, balance="uncertainty")
    best.total.backward()
    _, start = balanced(a, b, (0.0, 0.0), 2.0, balance="uncertainty")

    torch.testing.assert_close(loss.log_variances.grad, torch.zeros(2))
    assert best.total.item() == pytest.approx(2 + sum(state))
    assert start.total.item() == pytest.approx(16.25)
    assert best.statistics["balance_1"].item() == pytest.approx(1 / 16)


def test_the_largest_term_is_never_dropped_and_others_with_the_probability():
    a, b = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    torch.manual_seed(0)

    totals = [balanced(a, b, drop_teachers=0.25)[1].total.item() for _ in range(400)]

    assert {*totals} == {5.0, 8.0}
    assert 60 < totals.count(5.0) < 140
    assert balanced(a, b)[1].total.item() == 8.0


def test_a_balanced_student_resumes_to_the_same_weights(store, monkeypatch):
    method = replace(BOTH, balance="uncertainty", drop_teachers=0.5)
    trainer = replace(TRAINER, checkpoint_every_epochs=1)
    distill.run(distill_config(store, method=method, trainer=trainer, run="whole"))
    stop = iter([None, KeyboardInterrupt()])

    def interrupt(*args):
        if (error := next(stop, None)) is not None:
            raise error

    monkeypatch.setattr("permafrost.training.loop.upload_mirror", interrupt)
    config = distill_config(store, method=method, trainer=trainer)
    with pytest.raises(KeyboardInterrupt):
        distill.run(config)

    distill.run(config)

    assert_equal_states(weights_of("whole"), weights_of("one"))
    assert {"balance_1", "balance_3"} <= set(list(read_metrics(RUNS / "one" / "distill"))[-1])
