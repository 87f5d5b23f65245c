"""Estimates next to the store that precompute then makes, and the price of freezing."""

import json
import math
import re
import tempfile
from dataclasses import fields, replace
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch

from permafrost.config.augment import (
    AugmentOptions,
    OperationConfig,
    PixelOperationConfig,
    PolicyConfig,
    RandomViewsConfig,
)
from permafrost.config.data import NoDataConfig
from permafrost.config.methods import E2KDConfig, KDConfig, LabelsConfig
from permafrost.config.models import NoModelConfig
from permafrost.config.sections import section_names
from permafrost.config.store import PassOptions
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.core.errors import ConfigError
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store
from permafrost_estimate import steps, turns
from permafrost_estimate.freezing import FreezingRow, propose
from permafrost_estimate.measurement import break_even_epochs, format_bytes, measure, printed_lines
from permafrost_estimate.options import EstimateConfig, EstimateOptions
from permafrost_estimate.sample import Spread, spread_of
from permafrost_estimate.turns import TimeBudget
from permafrost_evaluators.equivariance import SPREAD_BLOCK, probability_spread, recipes_of
from permafrost_papers.interpretability.options import CellsDataConfig
from permafrost_sources.options import DemoDataConfig
from tests.support.composition import config_of
from tests.support.growing import TEACHER, Pictures, growing_options
from tests.support.images import write_tar
from tests.support.items import for_each
from tests.support.runs import PAD_CROP
from tests.support.stores import precompute_config
from tests.support.tars import samples, tar_config
from tests.support.verbs import estimate, precompute

DATA = DemoDataConfig(
    image_size=16,
    min_digit_size=8,
    max_digit_size=12,
    test_digits=50,
    train_digits=300,
    teacher_digits=200,
    teacher_placements=1,
    test_placements=1,
)
"""Six hundred records in four splits, most of which end with a shard that is not full."""


def names(config):
    return [spec.name for spec in fields(config)]


def estimate_config(precompute, **options):
    """Options of an estimate with the options of a precompute."""
    own = {
        "estimate": EstimateOptions(shards=4, shard_records=40, rounds=2),
        "student": replace(precompute.teacher, weights=None)
        if not isinstance(precompute.teacher, NoModelConfig)
        else None,
        "method": E2KDConfig(),
        "optimizer": OptimizerOptions(),
        "trainer": TrainerOptions(epochs=2, batch_size=8, num_threads=1),
    }
    shared = {name: getattr(precompute, name) for name in names(precompute)}
    return EstimateConfig(**{**shared, "augment": PAD_CROP, **own, **options})


def bytes_of(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def held(folder):
    """Files of a folder with their sizes and times."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


@pytest.fixture
def own_temporary_folder(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(scope="module", params=["zarr", pytest.param("webdataset", marks=pytest.mark.slow)])
def made(request, tmp_path_factory, tiny_teacher):
    """Config, estimate before the store was made, and the store."""
    folder = tmp_path_factory.mktemp(request.param)
    config = precompute_config(
        folder / "store",
        tiny_teacher,
        data=DATA,
        shard_size=64,
        backend=request.param,
        run=str(folder / "run"),
        annotate=PassOptions(batch_size=32),
    )
    whole_shards = EstimateOptions(shards=4, shard_records=None, rounds=2)
    before = estimate.run(estimate_config(config, estimate=whole_shards)).estimate
    assert not (folder / "store").exists()
    precompute.run(config)
    return config, before, Store(folder / "store")


def test_records_and_shards_are_those_of_the_store(made):
    _, found, store = made

    assert (found.records, found.shards) == (store.num_records(), len(store.manifest.shards))
    assert (found.records, found.is_finished, found.is_scaled) == (600, False, False)
    assert (found.sample_shards, found.sample_records) == (
        4,
        36 + 64 + 64 + 50,
    )  # without the first 8


def test_bytes_are_those_of_the_store_within_two_percent(made):
    _, found, store = made
    (teacher,) = store.open_passes()
    parts = {part.name: part.bytes for part in found.parts}
    images, whole_pass = bytes_of(store.path / "images"), bytes_of(Path(str(teacher.folder)))

    assert found.bytes == pytest.approx(bytes_of(store.path), rel=0.02)
    assert parts["images"] == pytest.approx(images, rel=0.02)
    assert parts["index"] == pytest.approx(bytes_of(store.path) - images - whole_pass, rel=0.04)
    fields = sum(size for name, size in parts.items() if name not in ("images", "index", "commits"))
    assert fields == pytest.approx(teacher.bytes_per_record * 600, rel=0.02)


def test_fields_have_their_bytes_on_disk_or_in_a_tar_those_of_their_values(made):
    _, found, store = made
    (teacher,) = store.open_passes()
    parts = {part.name: part for part in found.parts}

    for spec in teacher.manifest.fields:
        values = 600 * math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        on_disk = bytes_of(Path(str(teacher.folder)) / "fields.zarr" / spec.name / "c")
        assert parts[spec.name].bytes == (on_disk or values)
    assert parts["map"].form == "float16 [1, 1, 4, 4]"


def test_a_finished_store_is_measured_without_its_data(made, own_temporary_folder):
    config, before, store = made
    files = held(store.path)

    result = estimate.run(estimate_config(replace(config, data=NoDataConfig(), run="after")))
    found = result.estimate

    assert found.is_finished
    assert found.packing is None
    assert "is finished" in result.printed()["packing"]
    assert (found.records, found.shards) == (before.records, before.shards)
    parts = {part.name: part.bytes for part in found.parts}
    assert parts["images"] == bytes_of(store.path / "images")
    assert found.bytes == pytest.approx(bytes_of(store.path), rel=0.02)
    assert held(store.path) == files
    assert list(own_temporary_folder.iterdir()) == []


def test_work_is_divided_among_workers_and_never_among_more_than_shards(made):
    _, found, _ = made

    for work in (found.packing, found.annotation):
        assert work.seconds.median == pytest.approx(600 * work.seconds_per_record.median)
        assert work.seconds.lowest <= work.seconds.median <= work.seconds.highest
        assert work.hours[1] == pytest.approx(work.seconds.median / 3600)
        assert work.hours[4] == pytest.approx(work.hours[1] / 4)
        assert work.hours[16] == pytest.approx(work.hours[1] / found.shards)  # 12 shards


def test_the_break_even_follows_from_what_was_measured(made):
    _, found, store = made
    training = found.training

    assert (training.epochs, training.records) == (2, store.num_records("train"))
    assert training.break_even_students.median == training.break_even_epochs.median / 2
    times = training.steps
    assert min(times.stored.lowest, times.live.lowest, times.further.lowest) > 0
    assert training.students == 10
    live = found.freezing[-1]
    assert live.is_live
    assert live.hours * 3600 == pytest.approx(times.saved_shared.median * 2 * training.records)


def test_decoding_is_counted_in_cores_of_a_worker(made):
    config, found, _ = made
    times = found.teacher

    assert 0 < times.decoding.lowest <= times.decoding.median
    assert times.cores == times.decoding.median / times.teacher.median
    fast = replace(times, teacher=times.teacher.times(0.1))
    assert fast.cores == pytest.approx(10 * times.cores)
    line = printed_lines(replace(found, device="cpu"), estimate_config(config))["decoding"]
    assert f"{times.cores:.3g} cores decode for one worker" in line
    assert f"a GPU needs one for each {1 / times.decoding.median:,.0f} records/s" in line


def test_further_students_of_one_job_take_steps_of_their_own(frozen, monkeypatch):
    """A further student computes the same loss from views and targets that are there already."""
    config = estimate_config(frozen.config, method=E2KDConfig(lambda_map=5.0))
    live = steps._Steps(config, frozen.store, "live")
    live.take()
    calls, source = [], live.training.targets

    def counted(*arguments, **options):
        calls.append(arguments)
        return source(*arguments, **options)

    monkeypatch.setattr(live.training, "targets", counted)
    before = {name: value.clone() for name, value in live.training.model.state_dict().items()}

    live.take_further()

    assert len(calls) == 1  # of the step that is not counted
    assert live.training.targets is counted
    assert live.training.global_step == 3
    after = live.training.model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_only_the_estimate_is_left(tmp_path, tiny_teacher, own_temporary_folder):
    config = precompute_config(tmp_path / "store", tiny_teacher)
    result = estimate.run(estimate_config(config, estimate=EstimateOptions(shards=1, rounds=1)))

    assert not (tmp_path / "store").exists()
    assert list(own_temporary_folder.iterdir()) == []
    assert [path.name for path in Path("runs").rglob("*.*")] == ["estimate.json"]
    values = json.loads(Path(result.file).read_text())
    assert (values["records"], values["training"]["epochs"]) == (72, 2)


def test_new_records_are_a_share_of_all(tmp_path):
    pictures = Pictures(tmp_path / "pictures")
    pictures.add_all(range(5))
    config = growing_options(pictures, tmp_path / "store", teacher=TEACHER)
    precompute.run(config)
    pictures.add_all("ab", ("cat", "eel"))
    appending = replace(config, store=replace(config.store, append=True))
    options = EstimateOptions(shards=3, rounds=1)
    result = estimate.run(estimate_config(appending, estimate=options))

    assert (result.estimate.appended, result.estimate.records) == (4, 14)
    assert result.estimate.packing is not None
    assert result.printed()["append"].startswith("4 new records take ")
    finished = estimate.run(estimate_config(config, estimate=options)).printed()
    assert "append" not in finished
    precompute.run(appending)  # estimated below from its own generations
    grown = replace(config, data=NoDataConfig())
    result = estimate.run(estimate_config(grown, estimate=options)).estimate
    assert (result.appended, result.records) == (None, 14)
    assert result.annotation is not None


def test_without_a_teacher_only_packing_is_estimated(tmp_path):
    result = estimate.run(estimate_config(precompute_config(tmp_path / "store")))
    found, lines = result.estimate, result.printed()

    assert (found.annotation, found.training, found.no_training) == (None, None, "teacher=none")
    assert [part.name for part in found.parts] == ["images", "index"]
    assert lines["students"] == "not compared: teacher=none"
    assert "annotation" not in lines


@pytest.mark.slow
def test_tars_that_stay_where_they_are_take_no_bytes_in_the_store(tmp_path, tiny_teacher):
    tars = tmp_path / "tars"
    write_tar(tars / "train-000000.tar", samples(400))
    write_tar(tars / "test-000000.tar", samples(200, first=400))
    teacher = replace(tiny_teacher, weights="random")
    config = precompute_config(tmp_path / "store", teacher, data=tar_config(tars))

    found = estimate.run(estimate_config(config)).estimate
    precompute.run(config)
    store = Store(tmp_path / "store")

    assert found.in_place
    assert (found.records, found.shards) == (600, 2)
    assert found.parts[0].bytes == bytes_of(tars) == sum(s.bytes for s in store.manifest.shards)
    assert found.bytes == pytest.approx(bytes_of(store.path), rel=0.05)
    (map_part,) = (part for part in found.parts if part.name == "map")
    values = (
        2 * 400 * 2 * 3 * 2
    )  # both shards have the rows of the larger one, each a map of 2 by 3 in float16
    assert map_part.bytes == pytest.approx(values, rel=0.01)


def test_a_shard_is_measured_in_parts_if_there_are_too_few(tmp_path):
    config = precompute_config(
        tmp_path / "store", shard_size=512
    )  # one shard for each of four splits
    options = EstimateOptions(shards=6, shard_records=10)

    found = estimate.run(estimate_config(config, estimate=options)).estimate

    # train has 40 records, of which 8 are the warm-up; the test splits have 10 each and the teacher's 12
    assert (found.shards, found.sample_shards) == (4, 6)
    assert found.sample_records == 10 + 10 + 10 + 10 + 10 + 2


def test_records_that_are_not_here_are_scaled_from_the_sample(made):
    config, before, _ = made
    options = EstimateOptions(shards=4, shard_records=40, rounds=1, records=1_000_000)
    teacherless = replace(config, teacher=NoModelConfig(), store=replace(config.store, path="none"))
    found = estimate.run(estimate_config(teacherless, estimate=options)).estimate

    assert (found.records, found.shards, found.is_scaled) == (1_000_000, 15_625, True)
    images = [next(p for p in e.parts if p.name == "images") for e in (before, found)]
    assert images[1].bytes_per_record == pytest.approx(images[0].bytes_per_record, rel=0.05)
    assert images[1].bytes == pytest.approx(images[1].bytes_per_record * 1_000_000)


@pytest.mark.slow
def test_stored_views_cover_the_split_and_are_replayed(tmp_path, tiny_teacher):
    config = precompute_config(
        tmp_path / "store", tiny_teacher, views=RandomViewsConfig(count=2), augment=PAD_CROP
    )
    found = estimate.run(estimate_config(config, mode="replay")).estimate
    precompute.run(config)
    store = Store(tmp_path / "store")
    (views,) = store.open_passes(stored_views=True)
    parts = {part.name: part for part in found.parts}

    assert parts["views.logits"].form == "float16 [2, 10]"
    assert parts["views.logits"].bytes_per_record == pytest.approx(2 * 10 * 2, rel=0.1)
    assert found.training.records == store.num_records("train") == 40
    assert set(parts) >= {f"views.{spec.name}" for spec in views.manifest.fields}


def test_a_student_that_cannot_be_compared_leaves_the_rest(tmp_path, tiny_teacher):
    config = precompute_config(tmp_path / "store", tiny_teacher)
    one = EstimateOptions(shards=1, rounds=1)

    def reason(**options):
        found = estimate.run(estimate_config(config, estimate=one, **options)).estimate
        assert found.annotation is not None
        return found.no_training

    assert "method=labels uses no teacher" in reason(method=LabelsConfig())
    assert "mode=live reads no stored targets" in reason(mode="live")


def test_a_sample_smaller_than_a_batch_is_a_smaller_step(tmp_path, tiny_teacher):
    config = precompute_config(tmp_path / "store", tiny_teacher)
    one = EstimateOptions(shards=1, rounds=1)

    found = estimate.run(estimate_config(config, estimate=one, trainer=TrainerOptions())).estimate

    assert found.training.steps.batch_size == found.sample_records + 4  # those of the first shard


def test_without_data_a_store_must_be_finished(tmp_path, tiny_teacher):
    config = precompute_config(tmp_path / "store", tiny_teacher, data=NoDataConfig())

    with pytest.raises(ConfigError, match=r"holds no finished store; name the data .*data="):
        estimate.run(estimate_config(config))


def test_the_words_of_precompute_are_those_of_an_estimate():
    words = (
        *("data=webdataset", "data.path=tars", "store.format=jpeg95", "store.shard_size=1024"),
        *("teacher=torchvision", "teacher.name=resnet50", "teacher.weights=w.pth", "views=random"),
        *("annotate.map_dtype=int8", "cluster.actors=4", "executor=ray", "subset.shots=5"),
    )
    asked, made = (config_of(verb, *words) for verb in ("estimate", "precompute"))

    assert set(section_names("precompute")) <= set(section_names("estimate"))
    assert all(getattr(asked, name) == getattr(made, name) for name in names(made))


def test_a_finished_store_of_other_data_is_not_estimated_for_them(frozen):
    other = replace(frozen.config, data=CellsDataConfig())

    with pytest.raises(StoreMismatchError, match="finished store of demo, but data=cells; leave"):
        estimate.run(estimate_config(other))


@pytest.mark.parametrize("workers", ["[]", "[0]"])
def test_numbers_of_workers_are_checked(workers):
    with pytest.raises(ConfigError, match=r"estimate.workers=.* at least one number, each >= 1"):
        config_of("estimate", f"estimate.workers={workers}")


def test_a_budget_of_time_is_kept_with_fewer_records_and_said(tmp_path, tiny_teacher, caplog):
    config = precompute_config(tmp_path / "store", tiny_teacher)
    short = EstimateOptions(shards=2, rounds=50, seconds=1e-3)

    found = estimate.run(estimate_config(config, estimate=short)).estimate

    assert found.sample_records == 4  # two records of each shard
    assert "estimate.seconds=0.001 is the limit" in caplog.text
    assert found.training.steps.batch_size == 2  # with no time for more


def test_a_step_is_halved_until_it_fits_the_memory(frozen):
    config = estimate_config(frozen.config, trainer=TrainerOptions(batch_size=32))

    def measure(gigabytes):
        options = EstimateOptions(rounds=1, gigabytes=gigabytes)
        return steps.measure_steps(
            replace(config, estimate=options), frozen.store, TimeBudget(None)
        )

    whole = measure(1000.0)
    assert whole.batch_size == 32
    assert whole.batch_bytes > 32 * 16 * 16 * 3 * 4  # at least the images
    assert measure(whole.batch_bytes / 3e9).batch_size == 8
    assert measure(1e-9).batch_size == 2


def test_sides_take_turns_while_time_is_left(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(turns, "monotonic", lambda: now[0])
    budget = TimeBudget(10.0)

    def side(name, seconds):
        def measure():
            calls.append(name)
            now[0] += seconds
            return seconds

        return measure

    sides = {"a": side("a", 3.0), "b": side("b", 3.0)}
    seconds = budget.in_turn(sides, 5, "steps", share=0.5)

    assert calls == ["a", "b", "a", "b"]  # the second round would begin after half of the time
    assert seconds == {"a": [3.0], "b": [3.0]}
    assert TimeBudget(None).remaining() == float("inf")


def test_a_pass_that_is_finished_is_not_estimated(frozen):
    config = estimate_config(frozen.config)
    named = replace(config.store, teacher=("anything",))

    with pytest.raises(ConfigError, match=r"store\.teacher names a pass that is finished"):
        estimate.run(replace(config, store=named))


STRONG = AugmentOptions(
    operations=(
        OperationConfig(kind="horizontal_flip"),
        PolicyConfig(kind="randaugment"),
        PixelOperationConfig(kind="random_erasing", p=1.0),
    )
)


@pytest.fixture(scope="module")
def priced(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("price")
    precompute = precompute_config(folder / "store", tiny_teacher, data=DATA)
    options = EstimateOptions(shards=4, shard_records=40, rounds=1, views=(0, 1, 16))
    config = estimate_config(precompute, augment=STRONG, estimate=options)
    (folder / "work").mkdir()
    return config, measure(config, folder / "work")


def test_bytes_and_hours_grow_by_the_view(priced):
    config, found = priced
    frozen, one, many, live = found.freezing
    trained = one.bytes - frozen.bytes

    # Logits, a map with its scale and class, and 16 + 14 bytes of a view: its window, randaugment 3 values, erasing 4.
    per_view = 2 * 10 + 2 * 16 + 4 + 4 + 16 + 14
    records = trained / per_view
    assert records == int(records) == found.training.records
    assert many.bytes - frozen.bytes == 16 * trained
    assert many.hours - frozen.hours == pytest.approx(16 * (one.hours - frozen.hours))
    assert one.hours > frozen.hours > 0
    assert [row.views for row in found.freezing] == [0, 1, 16, 0]
    assert (live.is_live, live.bytes, live.distance) == (True, 0, 0.0)
    assert frozen.distances.keys() == {"logits", "maps"}
    assert frozen.distance > 100 * one.distance
    sizes = one.bytes_by_output
    assert list(sizes) == ["logits", "maps", "commits", "views"]
    assert sizes["views"] == records * 30
    assert sum(sizes.values()) == one.bytes
    lines = printed_lines(found, config)
    assert "each view 0.125 times in trainer.epochs=2" in lines["price.views.count=16"]
    assert "proposal" not in lines


@pytest.mark.slow
def test_a_pass_of_strong_views_has_the_estimated_bytes(tmp_path, tiny_teacher, priced):
    _, found = priced
    precompute = precompute_config(tmp_path / "store", tiny_teacher, data=DATA)
    views = RandomViewsConfig(count=16)
    config = estimate_config(precompute, augment=STRONG, views=views)
    (tmp_path / "work").mkdir()

    parts = measure(config, tmp_path / "work").parts

    stored = sum(part.bytes for part in parts if part.name.startswith("views."))
    stored -= next(part.bytes for part in parts if part.name == "views.commits")
    assert stored == pytest.approx(found.freezing[2].bytes - found.freezing[0].bytes, rel=0.01)


ROWS = (
    FreezingRow(views=0, bytes=100, hours=1, distances={"logits": 0.3, "maps": 0.1}),
    FreezingRow(views=1, bytes=300, hours=2, distances={"logits": 0.0, "maps": 1e-6}),
    FreezingRow(views=16, bytes=900, hours=9, distances={"logits": 0.0, "maps": 1e-6}),
    FreezingRow(views=0, bytes=0, hours=5, is_live=True),
)


@for_each(
    "options,wanted",
    [
        ({"max_distance": 0.3}, "mode=frozen"),
        ({"max_distance": 0.2}, "mode=replay views=random views.count=1"),
        ({"budget_bytes": 899}, "mode=replay views=random views.count=1"),
        ({"budget_bytes": 900}, "mode=replay views=random views.count=16"),
        ({"budget_bytes": 200}, "mode=frozen"),
        ({"budget_bytes": 200, "max_distance": 0.2}, "mode=live, as no stored targets"),
        ({"budget_bytes": 10}, "mode=live, as no stored targets"),
    ],
)
def test_the_cheapest_setting_within_the_limits_is_proposed(options, wanted):
    assert propose(ROWS, EstimateOptions(**options)).startswith(wanted)


def test_an_output_that_was_not_measured_is_not_within_a_distance(tmp_path, tiny_teacher):
    pooled = PassOptions(batch_size=8, outputs=("logits", "pooled"))
    precompute = precompute_config(tmp_path / "store", tiny_teacher, data=DATA, annotate=pooled)
    options = EstimateOptions(shards=2, shard_records=40, rounds=1, views=(0, 1))
    (tmp_path / "work").mkdir()
    config = estimate_config(precompute, augment=STRONG, estimate=options, method=KDConfig())

    found = measure(config, tmp_path / "work")

    frozen, one = found.freezing[:2]
    assert frozen.distances["pooled"] == math.inf
    assert frozen.distances["logits"] < 10
    assert one.distance < 1e-6
    line = printed_lines(found, config)["price.frozen"]
    assert re.search(r"pooled [\d.]+ kB \(distance not measured\)", line)
    largest = EstimateOptions(max_distance=100.0)
    assert propose((frozen, one), largest) == "mode=replay views=random views.count=1"


def test_without_a_live_teacher_there_may_be_no_setting():
    assert propose(ROWS[:3], EstimateOptions(budget_bytes=1)) == "no setting is within the limits"


def test_wrong_limits_are_one_line():
    with pytest.raises(ConfigError, match=r"estimate\.views=\[-1\] must list"):
        EstimateOptions(views=(-1,))
    with pytest.raises(ConfigError, match=r"estimate\.max_distance must be >= 0"):
        EstimateOptions(max_distance=-0.1)


def test_the_spread_of_the_mean_probability_by_hand():
    order = torch.from_numpy(np.random.default_rng(0).permutation(70))
    probabilities = torch.zeros(70, 2, dtype=torch.float64)
    first, second = order[:SPREAD_BLOCK], order[SPREAD_BLOCK : 2 * SPREAD_BLOCK]
    probabilities[first] = torch.tensor([0.8, 0.2]).double()
    probabilities[second] = torch.tensor([0.5, 0.5]).double()

    # Means 0.8 and 0.5, whose standard deviation is 0.3 / sqrt(2), for both classes.
    assert probability_spread(probabilities) == pytest.approx(0.3 / 2**0.5)
    assert probability_spread(probabilities[: 2 * SPREAD_BLOCK - 1]) is None


def test_each_operation_is_measured_as_if_always_drawn_and_the_recipe_as_it_is():
    twice = (*STRONG.operations, PolicyConfig(kind="randaugment", p=0.5))

    recipes = recipes_of(twice)

    assert list(recipes) == [
        *("none", "horizontal_flip", "randaugment", "random_erasing", "randaugment_#2", "recipe")
    ]
    assert recipes["horizontal_flip"] == (replace(twice[0], p=1.0),)
    assert recipes["randaugment_#2"] == (replace(twice[3], p=1.0),)
    assert recipes["recipe"] == twice
    assert list(recipes_of(twice[:1])) == ["none", "horizontal_flip"]


def test_the_break_even_is_the_cost_over_what_an_epoch_saves():
    """600 s to annotate, epochs of 1000 records: live 0.05 s per record, stored 0.02 s."""
    annotation = Spread(median=600.0, lowest=540.0, highest=660.0)
    saved = spread_of([0.03, 0.02, 0.04]).times(1000)  # 30 s, from 20 s to 40 s

    epochs = break_even_epochs(annotation, saved)

    assert epochs == Spread(median=20.0, lowest=13.5, highest=33.0)


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ([-3.0, -2.0, -1.0], (inf, inf, inf)),
        ([0.0, 0.0, 0.0], (inf, inf, inf)),
        ([-1.0, 2.0, 4.0], (5.0, 2.5, inf)),
        ([-2.0, -1.0, 5.0], (inf, 2.0, inf)),
    ],
)
def test_a_teacher_that_costs_nothing_is_never_dearer(saved, expected):
    epochs = break_even_epochs(spread_of([10.0]), spread_of(saved))

    assert (epochs.median, epochs.lowest, epochs.highest) == expected


@pytest.mark.parametrize(("device", "expected"), [("cpu", 1 / 4), ("cuda", 2 / 4)])
def test_on_a_gpu_the_first_step_is_not_counted_as_its_batch_was_ready(
    monkeypatch, device, expected
):
    """The first step takes 1 s for 4 records, the others take 2 s."""
    seconds, taken = [0.0], []
    monkeypatch.setattr(steps, "perf_counter", lambda: seconds[0])

    def step():
        seconds[0] += 2.0 if taken else 1.0
        taken.append(4)
        return 4

    found = steps.seconds_per_record(step, lambda: taken.append(0), device)

    assert found == expected
    assert taken == ([4, 0] if device == "cpu" else [4, 0, 4, 4, 4, 4, 0])


def test_two_passes_cost_their_sum():
    both = spread_of([1.0, 2.0, 4.0]).plus(spread_of([10.0, 30.0, 20.0]))

    assert both == Spread(median=22.0, lowest=11.0, highest=34.0)


@for_each(
    "count,text",
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1 kB"),
        (147_600_000_000, "148 GB"),
        (3.2e15, "3.2 PB"),
        (4e18, "4,000 PB"),
    ],
)
def test_bytes_have_a_decimal_unit(count, text):
    assert format_bytes(count) == text
