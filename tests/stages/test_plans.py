"""--plan: what a command would read, compute and write. The command then does that, and a plan writes nothing."""

from pathlib import Path

import pytest

from permafrost.cli import describe_plan, run_typed_command
from permafrost.core.errors import ConfigError, UserError
from permafrost.store.entries import ManifestError, StoreMismatchError
from tests.support.words import TINY_DATA, TINY_TEACHER

DATA = (*TINY_DATA, "store.shard_size=16")
STUDENT = ("student=cifar", "student.name=resnet8", "student.width=4", "trainer.epochs=1")


def files():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def plan(verb, *words):
    """Describe a plan, after a check that it has written nothing."""
    before = files()
    described = describe_plan(verb, [f"store.path={Path('store')}", *words])
    assert files() == before
    return described


def run(verb, *words):
    return run_typed_command(verb, ["store.path=store", *words])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_plan_of_precompute_names_the_shards_and_the_passes_that_are_then_made(here):
    unpacked = plan("precompute", *DATA, *TINY_TEACHER)
    assert unpacked["packs"] == "6 shards"
    assert "72 records" in unpacked["records"]
    run("precompute", *DATA, "teacher=none", "executor=serial")

    (name,) = [each for each in plan("precompute", *TINY_TEACHER) if each.startswith("pass ")]
    assert plan("precompute", *TINY_TEACHER)[name] == "6 of 6 shards are missing"
    result = run("precompute", *TINY_TEACHER, "executor=serial")

    assert name == f"pass {result.passes[0]}"
    assert plan("precompute", *TINY_TEACHER)[name] == "0 of 6 shards are missing"


def test_plans_of_a_student_and_its_evaluation_are_what_is_done(here):
    run("precompute", *DATA, *TINY_TEACHER, "executor=serial")
    words = ("run=one", "method=kd", "trainer.batch_size=8", *STUDENT)
    described = plan("distill", *words)
    assert described["folder"] == "runs/one/distill"
    assert "40 records of split train" in described["records"]
    with pytest.raises(ConfigError, match="holds no finished model"):
        plan("evaluate", "run=one")
    run("distill", *words)

    before = plan("evaluate", "run=one")
    run("evaluate", "run=one")

    assert before["evaluators"] == "runs accuracy, localization"
    assert plan("evaluate", "run=one")["evaluators"] == "nothing to run"


def test_a_plan_refuses_what_the_command_would_refuse(here):
    with pytest.raises(ConfigError, match="holds no finished store"):
        plan("precompute", *TINY_TEACHER)
    run("precompute", *DATA, "teacher=none", "executor=serial")
    with pytest.raises(StoreMismatchError, match="has no teacher pass"):
        plan("distill", "method=kd", "run=one", *STUDENT)
    with pytest.raises(ConfigError, match="verify has no plan"):
        plan("verify")


def test_a_plan_of_a_student_refuses_what_its_store_cannot_give(here):
    run("precompute", *DATA, *TINY_TEACHER, "executor=serial", "annotate.logits=topk")
    words = ("run=one", "trainer.batch_size=8", *STUDENT)
    refused = {
        "needs the logits of all classes": ["method=dkd"],
        "holds no output attention": ["method=at"],
        "the store has no split 'tset'": ["method=kd", "curve.splits=[tset]"],
        "has no split 'other'": ["method=kd", "select_epoch=other.accuracy"],
    }
    for message, options in refused.items():
        with pytest.raises(UserError, match=message) as raised:
            plan("distill", *words, *options)
        assert "dkd" not in str(raised.value).partition("it can serve")[2]
    plan("distill", *words, "method=kd")
    run("distill", *words, "method=kd")
    assert plan("distill", *words, "method=kd")["folder"] == "runs/one/distill, finished"


def test_a_plan_of_a_sweep_counts_its_students_and_those_that_are_not_finished(here):
    run("precompute", *DATA, *TINY_TEACHER, "executor=serial")
    words = (
        *("run=two", "executor=serial", "seeds=[0]", "trainer.batch_size=8", *STUDENT),
        "variants={labels: [method=labels], kd: [method=kd]}",
    )
    described = plan("sweep", *words)
    assert described["students"] == "2 (variants: 2, seeds: 1) from store"
    assert described["executor"] == "serial"
    by_ray = plan("sweep", *words, "executor=ray")["executor"]
    assert by_ray == "ray; this starts or joins Ray, set executor=serial to stay in this process"
    assert (described["unfinished"], described["folder"]) == ("2", "runs/two/students")
    run("sweep", *words)
    assert plan("sweep", *words)["unfinished"] == "0"


def test_a_plan_of_a_sweep_counts_students_before_their_store_exists(here):
    shots, baselines = (
        describe_plan("sweep", [f"experiment=cifar10_{name}", "seeds=[0,1]", "executor=ray"])
        for name in ("50shots", "baselines")
    )
    assert shots["students"] == "10 (variants: 5, seeds: 2)"
    assert baselines["students"] == "6 (variants: 3, seeds: 2)"
    assert shots["store"].endswith("with: permafrost precompute experiment=cifar10_50shots")
    assert "executor=serial to stay in this process" in shots["executor"]
    grid = ("run=x", "seeds=[0]", "variants={kd: [method=kd]}", "grid={method.tau: [1, 2, 4]}")
    assert plan("sweep", *grid)["students"] == "3 (variants: 1, seeds: 1)"
    with pytest.raises(ManifestError, match="does not exist; run permafrost precompute"):
        run("sweep", *grid)


def test_a_damaged_store_is_no_store_to_make(here):
    Path("store").mkdir()
    Path("store/manifest.json").write_text("{}")
    with pytest.raises(ManifestError, match="is damaged"):
        plan("sweep", "run=x", "seeds=[0]", "variants={kd: [method=kd]}")
