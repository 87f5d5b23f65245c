"""Teachers of folds: who has seen what, and whose targets a record gets."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.config.explainers import GradCamConfig
from permafrost.config.methods import EmbeddingConfig
from permafrost.config.store import PassOptions, StoreOptions
from permafrost.core.errors import ConfigError
from permafrost.core.records import NO_GROUP, NO_LABEL
from permafrost.loading.subset import rows_of_split
from permafrost.models.fold_networks import FoldsClassifier, digests_of_keys
from permafrost.models.providers import build_model, freeze
from permafrost.store.reader import Store, StoreMismatchError
from permafrost.training import loop
from permafrost.training.teacher_training import draw_folds
from tests.support.composition import config_of
from tests.support.kills import killed_at
from tests.support.networks import save_tiny_teacher
from tests.support.processes import descendants, environment
from tests.support.runs import distill_config
from tests.support.settings import FROZEN
from tests.support.stores import TINY_DATA, Frozen, frame_batches, keys_of_shard, precompute_config
from tests.support.verbs import distill, evaluate, precompute, teach

FOLDS = 3
LONG = ("teaching.trainer.epochs=150",)


class Rows:
    """Index of records with labels and groups, whose digests are drawn."""

    has_many_labels = False

    def __init__(self, labels, groups=None):
        drawn = np.random.default_rng(1).integers(256, size=(len(labels), 32), dtype=np.uint8)
        self.columns = {"label": np.asarray(labels), "group": np.full(len(labels), NO_GROUP)}
        self.columns["image_sha256"] = drawn
        if groups is not None:
            self.columns["group"] = np.asarray(groups)

    def key_digests(self, rows, seed):
        every = np.random.default_rng(seed).integers(2**64, size=10_000, dtype=np.uint64)
        return every[rows]

    def values(self, name, rows):
        return self.columns[name][rows]


@pytest.fixture
def draw(monkeypatch):
    def drawn(rows, folds=FOLDS, seed=0):
        number = len(rows.columns["label"])
        monkeypatch.setattr(
            "permafrost.training.teacher_training.rows_of_split", lambda *_: range(number)
        )
        return draw_folds(rows, "train", folds, seed)

    return drawn


def test_each_fold_has_an_equal_share_of_each_class(draw):
    sizes = (1200, 120, 13, 3, 1)
    labels = np.repeat([0, 1, 2, 3, NO_LABEL], sizes)

    for folds in (2, 3, 5):
        drawn = draw(Rows(labels), folds)
        counts = np.stack([np.bincount(drawn[labels == c], minlength=folds) for c in range(4)])
        assert abs(counts[0] - sizes[0] / folds).max() <= 4 * np.sqrt(sizes[0] / folds)
        for row, size in zip(counts[1:], sizes[1:], strict=False):
            assert abs(row - size / folds).max() <= 1
        assert abs(np.bincount(drawn) - sum(sizes) / folds).max() <= 4 * np.sqrt(sizes[0] / folds)
    assert (draw(Rows(labels)) != draw(Rows(labels), seed=1)).any()


def test_many_groups_stay_whole_and_few_do_not(draw):
    groups = np.repeat(np.arange(60), np.arange(60) % 4 + 1)
    labels = groups % 2

    drawn = draw(Rows(labels, groups))
    attributes = draw(Rows(labels, groups % 4))

    assert [len(set(drawn[groups == group])) for group in range(60)] == [1] * 60
    assert abs(np.bincount(drawn) - len(groups) / FOLDS).max() <= 8
    assert {len(set(attributes[groups % 4 == each])) for each in range(4)} == {FOLDS}


def test_copies_of_an_image_are_in_one_fold_and_no_fold_is_empty(draw):
    rows = Rows(np.repeat(np.arange(3), 40))
    rows.columns["image_sha256"][1::2] = rows.columns["image_sha256"][::2]

    drawn = draw(rows)

    assert (drawn[1::2] == drawn[::2]).all()
    assert np.bincount(drawn[::2]).tolist() == [20, 20, 20]
    with pytest.raises(ConfigError, match="split train has 60 different records; lower it"):
        draw(rows, 61)


def folds_of(networks, keys, folds):
    joined = FoldsClassifier(networks, len(keys))
    joined.set_folds(digests_of_keys(keys), np.asarray(folds))
    return joined


def test_other_records_get_the_digest_of_their_key_modulo_the_number_of_networks():
    networks = [freeze(build_model(FROZEN, 10)) for _ in range(FOLDS)]
    joined = folds_of(networks, ["b", "a", "c"], [2, 0, 1])
    new = [f"new-{number}" for number in range(30)]

    expected = [
        int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
        % FOLDS
        for key in new
    ]

    assert joined.folds_of(["a", "b", "c"]).tolist() == [0, 2, 1]
    assert joined.folds_of(new).tolist() == expected
    assert set(expected) == set(range(FOLDS))
    with pytest.raises(ConfigError, match="run in precompute only"):
        joined(torch.zeros(1, 3, 16, 16))


def test_a_record_is_annotated_by_the_network_of_its_fold(frozen, monkeypatch, tmp_path):
    teachers = [save_tiny_teacher(tmp_path / str(seed), seed=seed) for seed in range(FOLDS)]
    classes, size = frozen.store.manifest.classes, frozen.store.size
    options = PassOptions(outputs=("logits", "maps", "pooled"), batch_size=5)
    arguments = classes, GradCamConfig(), options, size
    shard = frozen.store.shards[0]
    keys, folds = keys_of_shard(frozen.store, shard), np.arange(shard.records) * 7 % FOLDS
    expected = [
        TeacherAnnotator(each, *arguments).annotate(frame_batches(frozen.store, shard, 5), keys)[0]
        for each in teachers
    ]
    networks = [freeze(build_model(each, classes)) for each in teachers]
    monkeypatch.setattr(
        "permafrost.annotation.annotator.build_model",
        lambda *_, **__: folds_of(networks, keys, folds),
    )

    annotator = TeacherAnnotator(teachers[0], *arguments)
    values, _ = annotator.annotate(frame_batches(frozen.store, shard, 5), keys)

    assert values.pop("fold")[:, 0, 0].tolist() == folds.tolist()
    for name, each in values.items():
        own = np.stack([expected[fold][name][row] for row, fold in enumerate(folds)])
        np.testing.assert_allclose(each.astype(float), own.astype(float), rtol=2e-3, atol=1e-5)
    assert abs(expected[0]["logits"] - expected[1]["logits"]).max() > 0.1


def words_of_folds(store, run, *words):
    network = ("teacher=cifar", "teacher.name=resnet8", "teacher.width=4", f"store.path={store}")
    length = "teaching.trainer.epochs=2", f"teaching.folds={FOLDS}", "executor=serial"
    return *network, *length, f"run={run}", *words


def teach_folds(store, run="folds", *words):
    return config_of("teach", *words_of_folds(store, run, *words))


def pass_of_folds(store, outputs):
    words = "teacher=folds", "teacher.weights=runs/folds/teach", f"store.path={store}"
    return config_of("precompute", *words, f"annotate.outputs=[{outputs}]", "executor=serial")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds") / "store"
    precompute.run(precompute_config(folder))
    return folder


def test_folds_resume_where_they_were_killed_and_become_one_teacher(packed, tmp_path):
    whole = teach.run(teach_folds(packed, "whole"))
    for _ in range(2):  # in the second epoch of fold 0, then in the first one of fold 1
        with killed_at(loop, "train_step", 2):
            teach.run(teach_folds(packed))
    with pytest.raises(ConfigError, match=r"teaching\.optimizer\.lr"):
        teach.run(teach_folds(packed, "folds", "teaching.optimizer.lr=0.1"))
    first = tmp_path / "runs/folds/teach/fold-0/model.safetensors"
    written = first.stat().st_mtime_ns

    result = teach.run(teach_folds(packed))

    assert first.stat().st_mtime_ns == written
    assert result.accuracy == whole.accuracy
    paths = (tmp_path / f"runs/{run}/teach/model.safetensors" for run in ("whole", "folds"))
    assert len({path.read_bytes() for path in paths}) == 1


def test_no_network_has_been_trained_on_the_records_that_it_answers(packed, monkeypatch, caplog):
    rows = {}
    original = loop.train_to_end

    def watched(spec, tracked, *others):
        rows[tracked.folder.name] = set(np.asarray(spec.dataset.rows).tolist())
        return original(spec, tracked, *others)

    monkeypatch.setattr(loop, "train_to_end", watched)
    teach.run(teach_folds(packed))
    result = precompute.run(pass_of_folds(packed, "logits,maps,pooled"))

    store = Store(packed)
    made = store.open_pass(result.passes[0])
    folds = np.concatenate([made.read_shard(shard)["fold"].ravel() for shard in store.shards])
    split = np.asarray(rows_of_split(store.index, "train")).tolist()
    assert {folds[row] for row in split} == set(range(FOLDS))
    for fold in range(FOLDS):
        assert rows[f"fold-{fold}"] == {row for row in split if folds[row] != fold}
    assert result.facts["targets"]["trained on"].value.endswith("without the record's fold")

    data = replace(TINY_DATA, train_digits=30)
    precompute.run(precompute_config(packed.parent / "other", data=data))
    with caplog.at_level("WARNING"):
        precompute.run(pass_of_folds(packed.parent / "other", "logits"))
    assert f"the folds are of {len(split)} records" in caplog.text

    options = {"store": StoreOptions(path=str(packed)), "run": "student"}
    frozen = Frozen(store, precompute_config(packed, FROZEN))
    assert distill.run(distill_config(frozen, **options)).trained_epochs == 3
    with pytest.raises(StoreMismatchError, match="networks of several folds"):
        distill.run(distill_config(frozen, method=EmbeddingConfig(), **(options | {"run": "no"})))
    words = "model=teacher", "run=x", "teacher=folds", "teacher.weights=runs/folds/teach"
    with pytest.raises(ConfigError, match="run in precompute only"):
        evaluate.run(config_of("evaluate", f"store.path={packed}", *words))


def test_options_of_folds_that_make_no_sense_are_refused(packed):
    for words, message in (
        (("teaching.folds=1",), "set folds to 0 or to 2 or more"),
        (("teaching.fold=3",), "number below folds"),
    ):
        with pytest.raises(ConfigError, match=message):
            teach_folds(packed, "refused", *words)
    teach.run(teach_folds(packed, "one", "teaching.folds=0"))
    with pytest.raises(ConfigError, match="set teacher=saved"):
        config_of(
            "precompute", "teacher=folds", "teacher.weights=runs/one/teach", f"store.path={packed}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "executor", ["serial", "array", pytest.param("ray", marks=pytest.mark.ray)]
)
def test_folds_are_the_same_whoever_is_killed(packed, tmp_path, executor):
    words = words_of_folds(packed, "disturbed", f"executor={executor}", *LONG)
    teach.run(teach_folds(packed, "whole", *LONG))
    folder = tmp_path / "runs/disturbed/teach"
    random, kills = Random(0), 0

    def start():
        program = [sys.executable, "-m", "permafrost", "teach", *words]
        return [
            subprocess.Popen(
                program,
                env=environment(),
                start_new_session=True,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(1 + (executor == "array"))
        ]

    while not (folder / "fold-1/model.json").exists():
        drivers = start()
        with suppress(subprocess.TimeoutExpired):
            drivers[-1].wait(random.uniform(4, 12) + 2 * kills)  # more on a busy machine
        for driver in drivers:
            victims = [driver.pid, *descendants(driver.pid)]
            for victim in victims:
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            driver.communicate()
        kills += 1
    for driver in start():
        _, errors = driver.communicate()
        assert driver.returncode == 0, errors

    assert kills > 0
    for name in ("model.safetensors", "fold-0/model.safetensors", "fold-2/metrics.json"):
        assert (folder / name).read_bytes() == (tmp_path / "runs/whole/teach" / name).read_bytes()
