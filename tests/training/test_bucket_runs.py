"""Runs in a bucket: worked on in a folder of the machine, resumed on another one from the last checkpoint."""

from contextlib import contextmanager
from pathlib import Path

import obstore
import pytest

from permafrost.core.errors import UserError
from permafrost.functions import run_verb
from permafrost.runs import mirrors
from permafrost.runs.folder import RunFolder
from permafrost.storage import buckets, lock
from permafrost.storage.lock import LockedError
from permafrost.training import loop
from tests.support.buckets import contents, memory_buckets

RUN = "s3://bucket/runs/one"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 0.0)
    with memory_buckets(tmp_path / "first machine"):
        yield buckets._client("s3://bucket")


@pytest.fixture
def move(tmp_path, monkeypatch):
    """Function that goes on at another machine, which has no files of the run."""

    def to(name: str) -> None:
        monkeypatch.setenv("PERMAFROST_CACHE", str(tmp_path / name))

    return to


def words(frozen, run: str) -> list[str]:
    return [
        f"store.path={frozen.store.path}",
        f"run={run}",
        "student=cifar",
        "student.name=resnet8",
        "student.width=4",
        "method=e2kd",
        "trainer.epochs=4",
        "trainer.batch_size=16",
        "trainer.checkpoint_every_epochs=1",
        "trainer.num_threads=1",
    ]


class Ended(BaseException):
    """Simulated end of the machine."""


@contextmanager
def fetched(run, verb):
    """Fetch the folder of a verb, which is not uploaded afterwards."""
    run.fetch(verb, exactly=True)
    yield


def test_another_machine_resumes_from_the_last_checkpoint_to_the_same_student(
    bucket, move, frozen, monkeypatch
):
    run_verb("distill", *words(frozen, "uninterrupted"))
    saves, save = [], loop.save_checkpoint

    def end_in_the_third(training, folder):
        saves.append(folder)
        if len(saves) == 3:
            raise Ended
        save(training, folder)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", end_in_the_third)
        patch.setattr(mirrors.RunFiles, "opened", fetched)  # nothing is uploaded after the end
        with pytest.raises(Ended):
            run_verb("distill", *words(frozen, RUN))
    assert "distill/checkpoint.pt" in contents(bucket, "runs/one")
    assert "distill/model.json" not in contents(bucket, "runs/one")
    move("second machine")
    with (
        monkeypatch.context() as patch
    ):  # the first rank, which may be elsewhere, uploads the network itself
        patch.setattr(mirrors.RunFiles, "opened", fetched)
        result = run_verb("distill", *words(frozen, RUN))
    assert result.trained_epochs == 2
    assert "distill/model.json" in contents(bucket, "runs/one")
    assert "distill/checkpoint.pt" not in contents(bucket, "runs/one")
    run_verb("distill", *words(frozen, RUN))
    made = contents(bucket, "runs/one")
    for name in ("model.safetensors", "metrics.jsonl"):
        own = Path("runs/uninterrupted/distill") / name
        if name == "model.safetensors":
            assert made[f"distill/{name}"] == own.read_bytes()
        else:
            assert len(made[f"distill/{name}"].splitlines()) == len(own.read_text().splitlines())
    move("third machine")
    assert run_verb("distill", *words(frozen, RUN)).trained_epochs == 0
    evaluated = run_verb("evaluate", *words(frozen, RUN)[:2], "evaluate.splits=[test]")
    assert evaluated.splits["test"]["records"] > 0
    assert "evaluate/metrics.json" in contents(bucket, "runs/one")
    move("fourth machine")
    run_verb("report", *words(frozen, RUN)[:2])
    assert {"report.html", "report.json"} <= contents(bucket, "runs/one").keys()


def test_what_marks_work_as_done_is_uploaded_last(bucket, monkeypatch):
    mirror = RunFolder(RUN).path / "distill"
    mirror.mkdir(parents=True)
    for name in ("model.json", "checkpoint.pt", "a", "z", "metrics.json", ".lock", ".x.partial"):
        (mirror / name).write_text(name)
    uploaded, put = [], buckets.put_object
    monkeypatch.setattr(
        buckets,
        "put_object",
        lambda address, *rest: uploaded.append(address.rpartition("/")[2]) or put(address, *rest),
    )
    mirrors.upload_folder(f"{RUN}/distill")
    assert uploaded == ["a", "z", "checkpoint.pt", "metrics.json", "model.json"]
    uploaded.clear()
    (mirror / "a").write_text("changed")
    mirrors.upload_mirror(mirror)
    assert uploaded == ["a"]
    mirrors.upload_mirror(Path("runs/local"))  # a run of this machine
    assert uploaded == ["a"]


def test_a_folder_is_fetched_as_it_is_in_the_bucket_and_work_in_progress_stays(bucket, move):
    for name in ("one", "deep/two"):
        obstore.put(bucket, f"runs/one/{name}", name.encode())
    mirrors.fetch_folder(RUN)
    mirror = RunFolder(RUN).path
    assert (mirror / "deep/two").read_text() == "deep/two"
    (mirror / "one").write_text("changed here")
    (mirror / "new").write_text("made here")
    obstore.put(bucket, "runs/one/deep/two", b"changed there")
    mirrors.fetch_folder(RUN)
    assert (mirror / "one").read_text() == "changed here"
    assert (mirror / "new").exists()
    assert (mirror / "deep/two").read_text() == "changed there"
    mirrors.fetch_folder(RUN, exactly=True)
    assert (mirror / "one").read_text() == "one"
    assert not (mirror / "new").exists()


def test_a_run_that_is_worked_on_elsewhere_is_refused(bucket, frozen, monkeypatch):
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 5.0)
    monkeypatch.setattr(lock, "RENEWAL_SECONDS", 0.05)
    config = frozen.config
    with RunFolder(RUN).open("teach", config, {}) as folder:
        assert folder == RunFolder(RUN).path / "teach"
        (folder / "result").write_text("1")
        with (
            pytest.raises((LockedError, UserError), match="writing to"),
            RunFolder(RUN).open("teach", config, {}),
        ):
            pass
    assert contents(bucket, "runs/one")["teach/result"] == b"1"


def test_a_run_of_this_machine_needs_no_cache(frozen, tmp_path, monkeypatch):
    """A user of a container may have no folder that can be written to besides the run's."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("PERMAFROST_CACHE", str(tmp_path / "file/cache"))
    run_verb("distill", *words(frozen, "here"))
    run_verb("evaluate", f"store.path={frozen.store.path}", "run=here", "evaluate.splits=[test]")
    assert (RunFolder("here").path / "evaluate/metrics.json").exists()
