"""Every verb with every kind of run and store: it ends, can be repeated, and leaves its files where they belong."""

import json
from contextlib import nullcontext

import pytest
from obstore.store import from_url

from permafrost.functions import run_verb
from permafrost.runs.folder import RunFolder
from permafrost.storage import buckets
from tests.support.buckets import KEYS, contents, files_below, memory_buckets, moto_server
from tests.support.process_state import unchanged_process
from tests.support.slow import slow
from tests.support.words import TINY_DATA, TINY_NETWORK, TINY_TEACHER

STUDENT = [
    *("student=cifar", "student.name=resnet8", "student.width=4", "method=kd"),
    *("trainer.epochs=1", "trainer.batch_size=16", "trainer.num_threads=1"),
]
EVALUATED = ["evaluate.splits=[test]", "evaluate.num_pictures=0"]
PLACES = ["store.path={top}stores/a", "run={top}one"]
COMMANDS = {
    "preview": [*TINY_DATA, "executor={executor}"],
    "precompute": [
        *(*PLACES, *TINY_DATA, *TINY_TEACHER, "annotate.outputs=[logits,maps]"),
        *("store.shard_size=16", "executor={executor}"),
    ],
    "verify": PLACES[:1],
    "teach": [*PLACES, *TINY_NETWORK, "teaching.trainer.epochs=1", "teaching.trainer.batch_size=8"],
    "distill": [*PLACES, *STUDENT],
    "evaluate": [*PLACES, *EVALUATED],
    "export": [*PLACES, "export.formats=[onnx]"],
    "show": [*PLACES[:1], "show.records=2"],
    "sweep": [
        *(*PLACES, *STUDENT, *EVALUATED, "seeds=[0]", "executor={executor}"),
        "grid={{method.tau: [1, 4]}}",
    ],
    "report": [*PLACES, "report.contact_records=0", "report.cases=0", "augment=pad_crop"],
}
"""Verbs in the order of a user."""


@pytest.fixture(params=["relative", slow("absolute"), "bucket"])
def kind(request):
    return request.param


@pytest.fixture
def top(kind, tmp_path, executor):
    """Beginning of the paths of a kind, and a function that reads a run's files where other machines see them."""
    if kind != "bucket":
        text = "" if kind == "relative" else f"{tmp_path}/shared/"
        yield text, lambda run: files_below(RunFolder(run).path)
    elif executor == "serial":
        with memory_buckets(tmp_path / "cache"):
            yield "s3://bucket/", lambda run: _objects(buckets._client("s3://bucket"), run)
    else:
        with moto_server() as address, pytest.MonkeyPatch.context() as patch:
            for name, value in (KEYS | {"AWS_ENDPOINT_URL": address}).items():
                patch.setenv(name, value)
            patch.setenv("PERMAFROST_CACHE", str(tmp_path / "cache"))
            bucket = from_url("s3://bucket", client_options={"allow_http": True})
            yield "s3://bucket/", lambda run: _objects(bucket, run)


def _objects(bucket, run):
    return contents(bucket, run.removeprefix("s3://bucket/"))


def _own(files):
    return {name: data for name, data in files.items() if not name.endswith((".lock", ".partial"))}


@pytest.fixture(
    params=["serial", pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.ray])],
    scope="module",
)
def executor(request):
    return request.param


def test_every_verb_ends_and_can_be_repeated(top, executor, kind, two_threads):
    """On Ray those with an executor, as the others do not know it. Others leave the process as they found it."""
    beginning, read = top
    run, results = f"{beginning}one", {}
    for verb, words in COMMANDS.items():
        if executor == "ray" and "executor={executor}" not in words:
            continue
        for _ in range(2):
            arguments = [word.format(top=beginning, executor=executor) for word in words]
            with nullcontext() if executor == "ray" else unchanged_process():
                results[verb] = run_verb(verb, *arguments)
        assert _own(read(run)) == _own(files_below(RunFolder(run).path)), verb

    assert results["sweep"].trained_now == 0
    assert {"sweep.json", "precompute.yaml"} <= {*read(run)}
    assert RunFolder(run).path.is_absolute() == (kind != "relative")
    if executor == "serial":
        page = json.loads(read(run)["report.json"])
        assert {row["method"] for row in page["runs"]} == {"student tau=1", "student tau=4"}
        assert "distill/export/student.onnx" in read(run)


def test_a_sweep_of_a_job_and_one_below_another_folder_keep_their_names(tmp_path, monkeypatch):
    """The driver of a job runs in a temporary copy, so every path of its students must be absolute."""
    store, run = f"store.path={tmp_path}/store", f"run={tmp_path}/runs of mine/sw"
    run_verb(
        "precompute",
        store,
        *TINY_DATA,
        *TINY_TEACHER,
        "annotate.outputs=[logits]",
        "executor=serial",
    )
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    words = [store, run, *STUDENT, *EVALUATED, "seeds=[0]", "executor=serial"]

    swept = run_verb("sweep", *words, "variants={kd: [], labels: ['method=labels']}")

    assert swept.trained_now == 2
    (tmp_path / "runs of mine").rename(tmp_path / "elsewhere")
    words[1] = f"run={tmp_path}/elsewhere/sw"
    assert (
        run_verb("sweep", *words, "variants={kd: [], labels: ['method=labels']}").trained_now == 0
    )
    run_verb("report", *words[:2], "report.contact_records=0")
    assert (tmp_path / "elsewhere/sw/report.html").exists()
