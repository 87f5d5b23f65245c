"""Explainers from a pass to the evaluation of a student: equal maps, scales, and explainers that differ by name."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

from permafrost import RecordLoader, open_store
from permafrost import explain as explain_images
from permafrost.config.compose import compose
from permafrost.config.explainers import EXPLAINERS, ExplainerConfig, OtherConfig, explainer_of_line
from permafrost.config.methods import E2KDConfig
from permafrost.config.store import PassOptions, StoreOptions
from permafrost.config.verbs import build_verb_config
from permafrost.core.errors import ConfigError
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_images, view_targets
from permafrost.loading.subset import rows_of_split
from permafrost.models.explanations import explainer_named, forward_to_explain
from permafrost.models.providers import build_model, freeze
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from permafrost.training.metric_log import read_metrics
from permafrost.verbs.next_commands import _arguments_of_pass
from permafrost_exchange.target_reader import TargetError
from tests.support.exchange import run_ingest
from tests.support.runs import TRAINER, distill_config, evaluate_config
from tests.support.stores import Frozen, precompute_config
from tests.support.target_files import write_npz
from tests.support.verbs import distill, evaluate, precompute, share

LINES = (
    "gradcam",
    "gradcam sign=signed",
    "gradient",
    "input_x_gradient",
    "integrated_gradients steps=2",
    "smoothgrad samples=2",
)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tiny_teacher):
    """Store with a pass by each explainer, by the lines."""
    path = tmp_path_factory.mktemp("explained") / "store"
    for number, line in enumerate(LINES):
        options = PassOptions(batch_size=8, name=f"pass{number}")
        precompute.run(
            precompute_config(
                path, tiny_teacher, explainer=explainer_of_line(line), annotate=options
            )
        )
    store = Store(path)
    names = {
        teacher.explainer: teacher.name
        for teacher in store.open_passes([folder.name for folder in store.pass_folders()])
    }
    return Frozen(store, precompute_config(path, tiny_teacher)), names


def of_pass(stores, line):
    frozen, names = stores
    return StoreOptions(path=str(frozen.store.path), teacher=(names[line],))


@pytest.mark.parametrize("line", LINES)
def test_a_student_with_its_teachers_weights_has_its_maps(stores, line):
    frozen, _ = stores
    options = evaluate_config(frozen, "copy", splits=("test",))
    copy = {"model": "teacher", "teacher": frozen.config.teacher}

    result = evaluate.run(replace(options, store=of_pass(stores, line), **copy))

    assert result.splits["test"]["map_cosine"] == pytest.approx(1, abs=1e-4)
    assert result.splits["test"]["valid_map_fraction"] > 0.5
    assert result.maps == ""


@pytest.mark.parametrize("line", LINES[1:])
def test_stored_maps_with_their_scale_are_those_of_the_network(stores, line):
    frozen, names = stores
    store = frozen.store
    passes = store.open_passes([names[line]])
    dataset = StoreDataset(store, rows_of_split(store.index, "train"), passes, scaled_maps=True)
    batch = dataset.__getitems__(list(range(8)))
    teacher = freeze(build_model(frozen.config.teacher, 10))
    output = forward_to_explain(teacher, view_images(batch, store.size))
    expected = explainer_named(line)(teacher, output, batch.targets[0].target_class)

    (targets,) = view_targets(batch, TargetRequest(expected.shape[-2:], scaled=True))

    largest = expected.abs().amax(dim=(1, 2, 3, 4), keepdim=True)
    assert ((targets.maps - expected).abs() / largest).max() < 1e-3
    if line == "gradcam sign=signed":  # the bias is that of a linear head on the average
        logits = output.logits - teacher.head.linear.bias
        sums = targets.maps.sum(dim=(2, 3, 4))
        assert torch.allclose(sums, logits.gather(1, targets.target_class), atol=2e-2, rtol=1e-2)


def test_a_batch_says_the_scale_of_its_maps(stores):
    frozen, names = stores
    line = "integrated_gradients steps=2"
    batch = next(
        iter(
            RecordLoader(
                open_store(frozen.store.path).select("train"), batch_size=8, teacher=names[line]
            )
        )
    )
    teacher = freeze(build_model(frozen.config.teacher, 10))

    explained = explain_images(
        teacher,
        batch.images,
        target_class=batch.targets()[0].target_class,
        explainer=line,
    )

    assert batch.maps.abs().amax(dim=(2, 3, 4)).max() == 1
    maps = batch.maps * batch.map_scale[:, :, None, None, None]
    assert (maps - explained.maps).abs().max() < 1e-3 * explained.maps.abs().max()


@pytest.mark.parametrize(
    ("line", "distance"),
    [
        ("gradcam sign=signed", "cosine"),
        ("gradcam sign=signed", "absolute"),
        ("input_x_gradient", "cosine"),
    ],
)
def test_maps_alone_teach_a_student(stores, line, distance):
    """Neither logits nor labels: the map term falls, and reaches the last layer."""
    frozen, _ = stores
    method = E2KDConfig(lambda_kd=0, lambda_ce=0, map_distance=distance)
    run = f"{line.split()[0]}-{distance}"
    config = distill_config(
        frozen,
        store=of_pass(stores, line),
        method=method,
        run=run,
        trainer=replace(TRAINER, epochs=8),
    )

    distill.run(config)

    terms = [entry["map"] for entry in read_metrics(RUNS / run / "distill") if "map" in entry]
    assert np.mean(terms[-4:]) < 0.95 * np.mean(terms[:4])


def test_maps_that_only_the_teacher_can_make_need_a_named_explainer(stores):
    frozen, names = stores
    store = of_pass(stores, "gradient")
    method = E2KDConfig(explainer="gradcam")

    distill.run(distill_config(frozen, store=store, method=method, run="named"))
    result = evaluate.run(replace(evaluate_config(frozen, "named", splits=("test",)), store=store))

    described = json.loads((RUNS / "named" / "distill" / "model.json").read_text())
    assert described["explainer"] == "gradcam"
    assert result.maps == (
        f"map_cosine compares gradcam of the student with gradient ({names['gradient']})"
    )
    assert -1 <= result.splits["test"]["map_cosine"] <= 1
    network, _ = SavedNetwork(RUNS / "named" / "distill").load()
    assert network.explainer_of_training == "gradcam"


def test_peoples_maps_without_logits_train_a_student_that_is_explained_by_name(stores, tmp_path):
    store = stores[0].store
    keys = store.index.keys(range(store.index.num_rows))
    maps = np.random.default_rng(0).random((len(keys), 5, 5)).astype(np.float32)
    write_npz(tmp_path / "people.npz", keys, map=maps)
    done = run_ingest(
        store.path, f"path={tmp_path / 'people.npz'}", "format.frame=full", "format.explainer=other"
    )
    name = done.ingested_pass.partition(" ")[0]
    assert "method=e2kd method.lambda_kd=0 method.lambda_ce=1 method.explainer=gradcam" in done.next
    people = StoreOptions(path=str(store.path), teacher=(name,))
    method = E2KDConfig(lambda_kd=0, lambda_ce=1)

    with pytest.raises(ConfigError, match=r"only the teacher can make.*method\.explainer="):
        distill.run(distill_config(stores[0], store=people, method=method, run="unnamed"))
    named = replace(method, explainer="gradcam")
    distill.run(distill_config(stores[0], store=people, method=named, run="people"))
    result = evaluate.run(
        replace(evaluate_config(stores[0], "people", splits=("test",)), store=people)
    )

    assert result.maps == f"map_cosine compares gradcam of the student with other ({name})"
    assert result.splits["test"]["map_cosine"] > 0


@dataclass(frozen=True, kw_only=True)
class FaultyConfig(ExplainerConfig):
    """Explainer of a user with a fault."""

    implementation: ClassVar[str] = "tests.explainers.test_explainers_flow:faulty"
    reads: ClassVar[Literal["output", "images"]] = "images"

    kind: Literal["faulty"] = "faulty"
    fault: str = ""


def faulty(model, images, target_class, *, fault):
    maps = images.sum(dim=1)[:, None, None]
    faults = {"shape": maps[:, 0], "batch": maps - maps.mean(dim=0), "infinite": maps / 0}
    return faults.get(fault, maps)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "shape",
            r"explainer=faulty fault=shape gives maps \[\d+, 1, 16, 16\] of \[\d+, 1\] classes",
        ),
        ("batch", r"fault=batch gives \S+ another map among other records than alone"),
        ("infinite", "fault=infinite gives maps with values that are not finite"),
        ("", ""),
    ],
)
def test_faults_of_an_explainer_are_named(tmp_path, tiny_teacher, monkeypatch, fault, message):
    monkeypatch.setitem(EXPLAINERS, "faulty", FaultyConfig)
    config = precompute_config(
        tmp_path / "store", tiny_teacher, explainer=FaultyConfig(fault=fault)
    )
    with pytest.raises(ConfigError, match=message) if fault else nullcontext():
        precompute.run(config)


@pytest.mark.parametrize("shape", [(4, 4), (3, 16, 16)])
def test_maps_that_pixel_gradients_cannot_be_are_refused_without_a_network(stores, tmp_path, shape):
    store = stores[0].store
    keys = store.index.keys(range(store.index.num_rows))
    maps = np.random.default_rng(0).random((len(keys), *shape)).astype(np.float32)
    write_npz(
        tmp_path / "lie.npz",
        keys,
        map=maps,
        logits=np.random.default_rng(1).normal(size=(len(keys), 10)),
    )
    words = [f"path={tmp_path / 'lie.npz'}", "format.frame=full", "format.explainer=gradient"]
    with pytest.raises(TargetError, match="but gradient gives 1 channels, and a value for each"):
        run_ingest(store.path, *words)


def test_a_pass_by_an_explainer_with_options_is_shared_and_repeated(stores, tmp_path):
    frozen, names = stores
    made = frozen.store.open_pass(names["integrated_gradients steps=2"])
    words = [f"store.path={frozen.store.path}", f"pass={made.name}", f"to={tmp_path / 'shared'}"]
    words.append("licenses={images: MIT, targets: MIT, weights: MIT}")

    done = share.run(build_verb_config("share", compose("share", words)))

    assert done.records == made.shards.num_rows
    assert "plugins=" not in done.next
    repeated = _arguments_of_pass(made, tmp_path)
    assert repeated[-2:] == ["explainer=integrated_gradients", "explainer.steps=2"]


def test_a_live_teacher_explains_as_a_stored_one(stores):
    frozen, _ = stores
    config = distill_config(
        frozen,
        mode="live",
        teacher=frozen.config.teacher,
        explainer=explainer_of_line("integrated_gradients steps=2"),
        run="live",
        trainer=replace(TRAINER, epochs=1),
    )

    distill.run(config)

    lines = [entry for entry in read_metrics(RUNS / "live" / "distill") if "map" in entry]
    assert lines[-1]["valid_map_fraction"] > 0.5


def test_a_live_teacher_cannot_make_the_maps_of_others(stores):
    frozen, _ = stores
    config = distill_config(
        frozen, mode="live", teacher=frozen.config.teacher, explainer=OtherConfig(), run="refused"
    )
    with pytest.raises(ConfigError, match="only the teacher can make these maps"):
        distill.run(config)
