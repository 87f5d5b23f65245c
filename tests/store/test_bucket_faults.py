"""Whole flows against a bucket whose requests are disturbed by a seeded plan: the same bytes, or one line."""

from pathlib import Path

import pytest
from obstore.store import from_url

from permafrost.core.errors import UserError
from permafrost.functions import run_verb
from permafrost.storage import bucket_files, buckets, lock
from tests.support.buckets import (
    FAULTS,
    KEYS,
    PASSING,
    FaultPlan,
    contents,
    files_below,
    moto_server,
    proxy,
    put_raw,
    retry_quickly,
)
from tests.support.words import TINY_DATA, TINY_TEACHER

DATA = [
    *(*TINY_DATA, *TINY_TEACHER, "store.shard_size=32", "executor=serial"),
]
STUDENT = [
    "student=cifar",
    "student.name=resnet8",
    "student.width=4",
    "method=e2kd",
    "trainer.epochs=2",
    "trainer.batch_size=16",
    "trainer.num_threads=1",
]
RESULTS = ("model.safetensors", "metrics.json", "model.json")
"""Files of a run that are the same wherever it is trained."""


def run_flow(store: str, run: str) -> None:
    """Precompute, verify, distill, evaluate and report."""
    words = [f"store.path={store}", f"run={run}"]
    run_verb("precompute", *DATA, *words)
    run_verb("verify", words[0])
    run_verb("distill", *STUDENT, *words)
    run_verb("evaluate", "evaluate.splits=[test]", "evaluators=[accuracy]", *words)
    run_verb("report", *words)


def results(found: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of a run that can be compared."""
    return {name: data for name, data in found.items() if Path(name).name in RESULTS}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """An undisturbed flow in local folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("local"))
        run_flow("store", "run")
        return files_below(Path("store")), results(files_below(Path("runs/run")))


@pytest.fixture(scope="module")
def server():
    with moto_server() as address:
        yield address


@pytest.fixture
def connect(monkeypatch, tmp_path):
    """Function that connects this process to an endpoint, with a cache of its own."""

    def to(address: str, cache: str) -> None:
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("PERMAFROST_CACHE", str(tmp_path / cache))
        monkeypatch.setattr(buckets, "_clients", {})
        monkeypatch.setattr(bucket_files, "_versions", {})

    retry_quickly(monkeypatch)
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 0.2)  # of a lease that could not be removed
    return to


@pytest.mark.slow
def test_commands_pass_over_markers_of_folders_and_name_objects_that_are_not_of_a_store(
    server, connect
):
    connect(server, "markers")
    store, run = "s3://bucket/markers/store", "s3://bucket/markers/run"
    for name in ("store/", "store/images/", "store/zz/", "run/", "run/distill/", "run/zz/"):
        put_raw(server, f"markers/{name}")
    put_raw(server, f"markers/run/distill/{'n' * 900}", b"1")
    run_flow(store, run)
    for name in ("n" * 900, "a#b?c"):
        put_raw(server, f"markers/store/images/{name}", b"1")
    with pytest.raises(UserError) as error:
        run_verb("verify", f"store.path={store}")
    assert [line for line in str(error.value).splitlines() if "not in any manifest" in line] == [
        f"  {store}/images/{name} is not in any manifest" for name in ("a#b?c", "n" * 900)
    ]


@pytest.mark.slow  # faults of single requests, and ends at any request, are in make test
@pytest.mark.parametrize("seed", range(60))
def test_a_disturbed_flow_ends_with_the_same_bytes_or_one_line(
    server, connect, local, seed, count_trials
):
    is_passing = seed < 30
    plan = FaultPlan(seed, PASSING if is_passing else FAULTS, share=0.1, seconds=0.01)
    store, run = f"s3://bucket/{seed}/store", f"s3://bucket/{seed}/run"
    error = None
    with proxy(server, plan) as address:
        connect(address, "disturbed")
        try:
            run_flow(store, run)
        except UserError as raised:
            error = str(raised)
    assert sum(plan.counts.values()) > 0
    connect(server, "fresh")
    outcome = "the same bytes"
    if error is not None:
        assert not is_passing, error
        first, *problems = error.splitlines()
        # verify has a line for each object, and then advice.
        assert "s3://bucket" in first
        assert problems == [] or "problem(s)" in first
        assert all("s3://bucket" in problem for problem in problems[:-1])
        outcome = "one line, and the next command goes on"
        run_flow(store, run)
    client = from_url("s3://bucket", client_options={"allow_http": True})
    made = contents(client, f"{seed}/store")
    made.pop(".lock", None)  # of a lease whose end was disturbed
    assert made == local[0]
    assert results(contents(client, f"{seed}/run")) == local[1]
    kind = (
        "requests that may be repeated" if is_passing else "requests, also refused without a cause"
    )
    count_trials(f"flows with a tenth of their {kind} disturbed", {outcome: 1})
