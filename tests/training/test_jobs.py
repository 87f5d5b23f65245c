"""Training jobs: what a command opens once, and what it sends to other processes."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.paths import with_absolute_paths
from permafrost.config.teaching import LabelTeachingConfig, TeachConfig
from permafrost.store import reader
from permafrost.training.distill import StudentPlan
from permafrost.training.teacher_training import TeacherPlan
from tests.support.runs import TRAINER, distill_config
from tests.support.verbs import distill, precompute, teach


@pytest.fixture
def opened(monkeypatch):
    """Names of what was opened, in order: store, or the folder of a pass."""
    names = []
    read_store, read_pass = reader.read_store_manifest, reader.TeacherPass.__init__

    def store_read(folder):
        names.append("store")
        return read_store(folder)

    def pass_read(self, store, folder):
        names.append(folder.name)
        read_pass(self, store, folder)

    monkeypatch.setattr(reader, "read_store_manifest", store_read)
    monkeypatch.setattr(reader.TeacherPass, "__init__", pass_read)
    return names


def teach_config(frozen):
    return TeachConfig(
        store=frozen.config.store,
        teacher=replace(frozen.config.teacher, weights=None),
        teaching=LabelTeachingConfig(split="train", trainer=replace(TRAINER, epochs=1)),
        evaluate=EvaluateOptions(splits=("test",)),
        run="one-teacher",
    )


def test_a_student_is_trained_from_a_store_and_passes_that_are_opened_once(frozen, opened):
    (teacher,) = [folder.name for folder in frozen.store.pass_folders()]
    config = distill_config(frozen, trainer=replace(TRAINER, epochs=1))

    distill.run(config)

    # Once to find out the name of the only pass.
    assert opened == ["store", teacher, teacher]


def test_a_teacher_is_trained_from_a_store_that_is_opened_once(frozen, opened):
    teach.run(teach_config(frozen))

    assert opened == ["store"]


def test_a_finished_store_is_opened_once_to_find_its_passes_finished(own, opened):
    precompute.run(own.config)

    assert opened.count("store") == 1


@pytest.mark.parametrize("kind", [StudentPlan, TeacherPlan])
def test_another_process_opens_the_inputs_of_a_job_itself(frozen, kind):
    options = distill_config(frozen) if kind is StudentPlan else teach_config(frozen)
    job = kind(options, Path("one"), frozen.store)

    sent = pickle.loads(pickle.dumps(job))  # noqa: S301

    assert job.moved_to(Path("two")).store is job.store is frozen.store
    assert sent.store is not job.store
    assert sent.options == with_absolute_paths(options)
    assert sent.folder == Path("one").absolute()
