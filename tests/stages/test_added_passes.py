"""Passes that are added to a finished store: what exists stays, what was begun is finished, names and classes fit."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from permafrost.config.augment import RandomViewsConfig
from permafrost.config.data import NoDataConfig
from permafrost.config.methods import KDConfig, LabelsConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import PassOptions
from permafrost.core.errors import ConfigError
from permafrost.models.cost import sha256_tensors
from permafrost.models.providers import build_model
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost.training import loop
from permafrost_report.student_results import load_results
from tests.support.kills import killed_at
from tests.support.runs import (
    PAD_CROP,
    assert_equal_states,
    distill_config,
    evaluate_config,
    weights_of,
)
from tests.support.stores import precompute_config
from tests.support.sweeps import read_sweep, run_sweep, sweep_arguments
from tests.support.verbs import distill, evaluate, precompute

FIRST = CifarModelConfig(name="resnet14", width=4, weights="random")
SECOND = CifarModelConfig(name="resnet8", width=4, weights="random")
THREE_VARIANTS = "variants={labels: ['method=labels'], kd: ['method=kd'], e2kd: ['method=e2kd']}"


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Store with three passes: of the first teacher, of another of the same name, and one that precedes both."""
    path = tmp_path_factory.mktemp("grown") / "store"
    precompute.run(precompute_config(path, FIRST))
    for name, width in (("another", 4), ("resnet14", 6)):
        teacher = replace(SECOND, width=width)
        precompute.run(precompute_config(path, teacher, annotate=PassOptions(name=name)))
    store = Store(path)
    (first,) = (made for made in map(store.open_pass, names_in(store)) if is_first(made))
    return SimpleNamespace(path=path, first=first.name)


@pytest.fixture
def one_pass(tmp_path, grown):
    """Store of the test's own, with the pass of the first teacher, and a function that adds the two others."""
    path = tmp_path / "store"

    def copy(ignored):
        shutil.copytree(
            grown.path, path, ignore=lambda _, names: ignored(names), dirs_exist_ok=True
        )

    def add_passes():
        copy(lambda names: [])
        assert len(store.pass_folders()) == 3

    copy(lambda names: [n for n in names if n[:-9] in ("another", "resnet14") and n != grown.first])
    store = Store(path)
    assert names_in(store) == [grown.first]
    config = precompute_config(path, FIRST)
    return SimpleNamespace(store=store, config=config, first=grown.first, add_passes=add_passes)


def names_in(store):
    return [folder.name for folder in store.pass_folders()]


def is_first(made):
    return made.manifest.teacher["architecture"]["name"] == FIRST.name


def with_teacher(config, *names):
    return replace(config, store=replace(config.store, teacher=names))


# ---- one student ---------------------------------------------------------------------------------


def test_a_finished_student_and_its_evaluation_stay_as_they_are(one_pass):
    config, evaluation = distill_config(one_pass), evaluate_config(one_pass)
    distill.run(config)
    metrics = evaluate.run(evaluation).splits
    one_pass.add_passes()

    assert distill.run(config).trained_epochs == 0
    assert evaluate.run(evaluation).splits == metrics


def test_an_interrupted_student_goes_on_with_the_pass_that_it_began_with(one_pass):
    first = one_pass.first
    distill.run(distill_config(one_pass, run="undisturbed"))
    with killed_at(loop, "train_step", 8):
        distill.run(distill_config(one_pass))
    one_pass.add_passes()

    assert distill.run(distill_config(one_pass)).trained_epochs > 0
    assert_equal_states(weights_of("one"), weights_of("undisturbed"))
    assert SavedNetwork(RUNS / "one" / "distill").describe().teachers == (first,)


def test_a_student_of_labels_is_compared_with_the_same_pass(one_pass):
    config, evaluation = distill_config(one_pass, method=LabelsConfig()), evaluate_config(one_pass)
    distill.run(config)
    one_pass.add_passes()
    compared = evaluate.run(evaluation).splits["test"]

    assert "agreement" in compared
    assert evaluate.run(evaluation).splits["test"] == compared
    assert distill.run(config).trained_epochs == 0


def test_part_of_a_name_means_the_pass_that_it_meant_when_it_was_the_only_one(one_pass):
    config = with_teacher(distill_config(one_pass), "resnet14")
    distill.run(config)
    one_pass.add_passes()  # among them another pass named resnet14

    assert distill.run(config).trained_epochs == 0
    with pytest.raises(StoreMismatchError, match="several teacher pass"):
        distill.run(replace(config, run="another"))


def test_the_words_that_name_a_pass_are_not_part_of_a_run(one_pass):
    first = one_pass.first
    distill.run(distill_config(one_pass))

    for name in (first, "resnet14", first.rpartition("-")[2]):
        assert distill.run(with_teacher(distill_config(one_pass), name)).trained_epochs == 0


def test_a_run_that_named_its_pass_finds_it_without_the_name(one_pass):
    first = one_pass.first
    one_pass.add_passes()
    distill.run(with_teacher(distill_config(one_pass), first))

    assert distill.run(distill_config(one_pass)).trained_epochs == 0
    assert "agreement" in evaluate.run(evaluate_config(one_pass)).splits["test"]


def test_a_new_run_has_to_choose_among_several_passes(one_pass):
    one_pass.add_passes()

    with pytest.raises(StoreMismatchError, match=r"several teacher passes; set store\.teacher"):
        distill.run(distill_config(one_pass))


def test_a_missing_manifest_of_one_of_several_passes_is_named(one_pass):
    distill.run(distill_config(one_pass))
    one_pass.add_passes()
    for name in (one_pass.first, one_pass.first.rpartition("-")[2]):
        (one_pass.store.path / "teachers" / one_pass.first / "manifest.json").unlink(
            missing_ok=True
        )
        missing = rf"teachers/{one_pass.first}/manifest\.json missing: that pass is unfinished\); "
        with pytest.raises(
            StoreMismatchError, match=rf"has no teacher pass '{name}' \(.*{missing}"
        ):
            distill.run(replace(with_teacher(distill_config(one_pass), name), run="another"))
    with pytest.raises(StoreMismatchError, match=rf"no longer has \(.*{missing}"):
        distill.run(distill_config(one_pass))


def test_another_pass_makes_another_run(one_pass):
    distill.run(distill_config(one_pass))
    one_pass.add_passes()
    another = names_in(one_pass.store)[0]

    with pytest.raises(
        ConfigError,
        match=r"contains a run with other options .*store\.teacher \[resnet14-\w+\] -> \[another-",
    ):
        distill.run(with_teacher(distill_config(one_pass), another))


def test_the_order_of_several_teachers_is_part_of_a_run(one_pass):
    one_pass.add_passes()
    names = names_in(one_pass.store)[1:]
    method = KDConfig()
    distill.run(with_teacher(distill_config(one_pass, method=method), *names))

    with pytest.raises(
        ConfigError, match=r"other options .*: store\.teacher \[\S+, \S+\] -> \[\S+, \S+\];"
    ):
        distill.run(with_teacher(distill_config(one_pass, method=method), *reversed(names)))


def test_a_recorded_pass_that_is_gone_is_named(one_pass):
    first = one_pass.first
    distill.run(distill_config(one_pass))
    one_pass.add_passes()
    shutil.rmtree(one_pass.store.path / "teachers" / first)

    with pytest.raises(StoreMismatchError, match=rf"this run reads {first}, which"):
        distill.run(distill_config(one_pass))


def test_a_student_of_stored_views_goes_on_with_its_own(one_pass):
    def add_views(seed):
        views = RandomViewsConfig(count=2, seed=seed)
        path = one_pass.store.path
        precompute.run(precompute_config(path, FIRST, views=views, augment=PAD_CROP))

    config = distill_config(one_pass, mode="replay", views=RandomViewsConfig(count=2))
    add_views(0)
    with killed_at(loop, "train_step", 8):
        distill.run(config)
    add_views(1)
    one_pass.add_passes()

    assert distill.run(config).trained_epochs > 0
    with pytest.raises(StoreMismatchError, match=r"contains 2 passes with views\.count=2"):
        distill.run(replace(config, run="another"))


def test_another_name_of_a_pass_that_exists_is_said_not_to_be_used(one_pass, caplog):
    path, second = one_pass.store.path, PassOptions(name="second")
    caplog.set_level("WARNING", "permafrost.precompute")
    precompute.run(precompute_config(path, FIRST, annotate=second))
    said = f"this one exists as {one_pass.first}, so annotate.name=second is not used"
    assert said in caplog.text
    assert names_in(one_pass.store) == [one_pass.first]

    caplog.clear()
    views = {"views": RandomViewsConfig(count=2), "augment": PAD_CROP}
    precompute.run(precompute_config(path, FIRST, annotate=second, **views))  # names the new one
    precompute.run(precompute_config(path, FIRST))
    assert "is not used" not in caplog.text


def test_a_student_of_a_named_pass_of_stored_views_is_compared_with_its_teacher(one_pass):
    path, views = one_pass.store.path, RandomViewsConfig(count=2)
    named = PassOptions(name="turned")
    precompute.run(precompute_config(path, FIRST, views=views, augment=PAD_CROP, annotate=named))
    assert names_in(one_pass.store) == [one_pass.first]
    one_pass.add_passes()

    distill.run(with_teacher(distill_config(one_pass, mode="replay", views=views), "turned"))
    compared = evaluate.run(with_teacher(evaluate_config(one_pass), "turned")).splits["test"]

    assert (
        compared
        == evaluate.run(with_teacher(evaluate_config(one_pass), one_pass.first)).splits["test"]
    )
    assert "agreement" in compared


def test_a_teacher_is_compared_with_its_first_pass(one_pass):
    evaluation = replace(evaluate_config(one_pass), model="teacher", teacher=FIRST)
    evaluate.run(evaluation)
    again = PassOptions(name="again", batch_size=4)  # before the first in alphabetical order
    precompute.run(precompute_config(one_pass.store.path, FIRST, annotate=again))

    evaluate.run(evaluation)


# ---- a sweep -------------------------------------------------------------------------------------


def names_of(sweep):
    return {row["variant"]: row["run"] for row in sweep["runs"]}


@pytest.mark.slow
def test_a_finished_sweep_trains_nothing_again(one_pass):
    first = one_pass.first
    words = sweep_arguments(one_pass, THREE_VARIANTS)
    run_sweep(words)
    before = names_of(read_sweep())
    one_pass.add_passes()

    for more in ([], [f"store.teacher={first}"], [f"store.teacher={first.rpartition('-')[2]}"]):
        assert run_sweep([*words, *more]).finished_now == 0
        assert names_of(read_sweep()) == before


@pytest.mark.slow
def test_an_interrupted_sweep_is_finished_with_the_pass_that_it_began_with(one_pass):
    first = one_pass.first
    words = sweep_arguments(one_pass, THREE_VARIANTS)
    run_sweep(sweep_arguments(one_pass, THREE_VARIANTS, run="undisturbed"))
    with killed_at(loop, "train_step", 2):  # in the first student, of labels
        run_sweep(words)
    one_pass.add_passes()

    assert run_sweep(words).finished_now == 3
    for variant, run in names_of(read_sweep()).items():
        other = names_of(read_sweep("undisturbed"))[variant]
        assert_equal_states(weights_of(run), weights_of(other))
        metrics = [
            json.loads((RUNS / r / "evaluate/metrics.json").read_text()) for r in (run, other)
        ]
        assert metrics[0] == metrics[1]
        assert "agreement" in metrics[0]["splits"]["test"]
        if variant != "labels":
            assert SavedNetwork(RUNS / run / "distill").describe().teachers == (first,)


def test_a_sweep_over_passes_trains_a_student_for_each(one_pass):
    one_pass.add_passes()
    names = names_in(one_pass.store)
    run_sweep(
        sweep_arguments(
            one_pass, "variants={kd: ['method=kd']}", f"grid={{store.teacher: {names}}}"
        )
    )

    runs = [row["run"] for row in read_sweep()["runs"]]
    teachers = [SavedNetwork(RUNS / run / "distill").describe().teachers for run in runs]
    assert teachers == [(name,) for name in names]


def test_a_student_of_labels_is_compared_with_another_pass_without_a_training(one_pass):
    words = sweep_arguments(
        one_pass, "variants={labels: ['method=labels']}", "evaluate.splits=[test]"
    )
    run_sweep(words)
    one_pass.add_passes()
    (other,) = (name for name in names_in(one_pass.store) if name.startswith("another"))

    results = [run_sweep([*words, f"store.teacher={other}"]) for _ in range(2)]
    (compared,) = load_results("grid")
    back = run_sweep([*words, f"store.teacher={one_pass.first}"])

    assert [(r.trained_now, r.finished_now) for r in (*results, back)] == [(0, 1), (0, 0), (0, 0)]
    assert compared.evaluation_name == f"evaluate-against-{other}"
    assert compared.find(f"test.kl_to_teacher@{one_pass.first}") != compared.find(
        "test.kl_to_teacher"
    )
    (first,) = load_results("grid")
    assert first.evaluation_name == "evaluate"


# ---- passes that are equal, or removed -----------------------------------------------------------


def test_equal_weights_in_another_file_are_said_to_be_equal(one_pass, tmp_path, caplog):
    network = build_model(FIRST, 10).network
    for parameter in network.parameters():
        parameter.data.mul_(2)
    for name, content in (
        ("plain", network.state_dict()),
        ("nested", {"model": network.state_dict()}),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
    config = precompute_config(one_pass.store.path, FIRST)

    for name in ("plain", "nested"):
        assert "equal" not in caplog.text
        teacher = replace(FIRST, weights=str(tmp_path / f"{name}.pth"))
        precompute.run(replace(config, teacher=teacher))

    assert "are equal, tensor for tensor, to those of resnet14-" in caplog.text
    assert "(plain.pth)" in caplog.text


def test_a_state_of_any_type_has_a_digest_of_its_own():
    class Counted(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    networks = [Counted(2, 3).to(dtype) for dtype in (torch.bfloat16, torch.float32)]
    networks.append(nn.Linear(2, 3))
    networks[2].load_state_dict(networks[1].state_dict(), strict=False)
    mixed = nn.BatchNorm2d(2)  # with a counter of whole numbers that has no axis

    digests = [sha256_tensors(network) for network in (*networks, mixed)]

    assert digests[1] == digests[2]
    assert len(set(digests)) == 3


def test_a_removed_pass_leaves_a_sound_store(one_pass):
    one_pass.add_passes()
    removed = one_pass.first
    shutil.rmtree(one_pass.store.path / "teachers" / removed)

    assert list(verify_store(one_pass.store.path)) == []
    store = Store(one_pass.store.path)
    left = names_in(store)
    assert removed not in left
    distill.run(with_teacher(distill_config(one_pass), left[0]))
    with pytest.raises(StoreMismatchError, match=re.escape(left[0])):
        store.open_passes((removed,))


def test_a_finished_store_takes_a_named_pass_without_its_data(tmp_path, tiny_teacher):
    store = tmp_path / "store"
    precompute.run(precompute_config(store))
    weights = shutil.copy(tiny_teacher.weights, tmp_path / "w.safetensors")
    config = precompute_config(
        store, replace(tiny_teacher, weights=str(weights)), data=NoDataConfig()
    )
    named = replace(config, annotate=replace(config.annotate, name="guided"))

    assert precompute.run(named).teacher_records == 72
    again = precompute.run(config)  # without the name, which is no part of the identity

    assert again.teacher_records == 0
    assert Store(str(store)).open_pass("guided").manifest.made_with["weights"] == "w.safetensors"


def test_without_data_a_store_must_be_finished(tmp_path, tiny_teacher):
    config = precompute_config(tmp_path / "store", tiny_teacher, data=NoDataConfig())

    with pytest.raises(ConfigError, match=r"holds no finished store; name the data .*data="):
        precompute.run(config)
    assert not (tmp_path / "store").exists()
