"""A store, a run and a teacher have no defaults; evaluate, export and report take the store of the run."""

import shutil
from pathlib import Path

import pytest

from permafrost.runs.mirrors import RUNS
from tests.support.items import for_each
from tests.support.stores import TINY_DATA, precompute_config
from tests.support.verbs import precompute

STUDENT = ["student.name=resnet8", "student.width=4", "augment.operations=[]"]
QUICK = ["trainer.epochs=1", "trainer.batch_size=8", "trainer.num_threads=1"]
_CIFAR = ["teacher=cifar", "teacher.name=resnet8", "teacher.width=4", "teacher.weights=random"]


@for_each(
    "words,message",
    [
        (
            "precompute teacher=none data=digits",
            "needs store.path=, as in store.path=stores/photos",
        ),
        ("precompute store.path=s data=digits", "needs a teacher; name it, as in teacher=torch"),
        ("precompute store.path=s teacher.name=resnet8", "an option of teacher=cifar and"),
        ("estimate store.path=s data=digits", "or teacher=none for a store without a pass"),
        ("teach store.path=s run=a", "needs a teacher; name it"),
        ("teach teacher=cifar", "needs store.path= and run=, as in store.path=stores/photos run="),
        ("distill store.path=s", "distill needs run=, as in run=photos"),
        ("distill run=a", "distill needs store.path=, as in store.path=stores/photos"),
        ("distill store.path=s run=a mode=live", "mode=live needs the teacher network"),
        ("sweep store.path=s grid={lr:\\ [1]}", "sweep needs run="),
        ("evaluate", "evaluate needs run=, as in run=photos"),
        ("export store.path=s", "export needs run="),
        ("report", "report needs run="),
        ("evaluate run=none", "runs/none has no network that was trained from a store"),
        ("verify", "verify needs store.path="),
        ("show", "show needs store.path="),
    ],
)
def test_what_a_command_needs_is_asked_for_in_one_line(permafrost, words, message):
    verb, *options = words.replace("\\ ", "\0").split()

    code, _, errors = permafrost(verb, *(option.replace("\0", " ") for option in options))

    assert code == 2, errors
    assert message in errors
    assert errors.count("\n") == 1
    assert not Path("runs").exists()


@pytest.fixture
def trained(permafrost, frozen):
    """Store of a finished student of the run `one`, which was trained with a relative path."""
    store = shutil.copytree(frozen.store.path, "stores/own")
    code, _, errors = permafrost("distill", "store.path=stores/own", "run=one", *STUDENT, *QUICK)
    assert code == 0, errors
    return Path(store)


def test_the_store_of_a_run_is_read_unless_another_is_typed(permafrost, trained, caplog):
    caplog.set_level("INFO")
    code, printed, errors = permafrost("evaluate", "run=one", "evaluate.splits=[test]")
    assert code == 0, errors
    assert "store.path=stores/own, from which run=one was trained" in caplog.text
    assert "next: permafrost report store.path=stores/own run=one" in printed
    assert "network: student of run one" in permafrost("evaluate", "run=one", "--plan")[1]
    code, _, errors = permafrost("report", "run=one", "report.contact_records=0")
    assert code == 0, errors
    code, _, errors = permafrost("export", "run=one", "export.formats=[torch]")
    assert code == 0, errors

    trained.rename("elsewhere")
    for verb in ("evaluate", "export", "report"):
        code, _, errors = permafrost(verb, "run=one")
        assert code == 2, errors
        assert "trained from the store stores/own, where there is none now" in errors
        assert "store.path=" in errors
    caplog.clear()
    typed = ["store.path=elsewhere", "run=one", "evaluate.splits=[test]"]
    code, _, errors = permafrost("evaluate", *typed)
    assert code == 0, errors
    assert "from which run" not in caplog.text


def test_another_store_in_the_place_of_the_old_one_is_refused(permafrost, trained):
    shutil.rmtree(trained)
    precompute.run(precompute_config(trained, data=TINY_DATA, image_size=24))

    code, _, errors = permafrost("evaluate", "run=one")

    assert code == 2
    assert "trained from the store stores/own, but another store is there now" in errors
    assert "type store.path=stores/own to read the new one" in errors


def test_students_of_several_stores_are_refused_and_a_teacher_names_its_own(permafrost, trained):
    students = RUNS / "many" / "students"
    shutil.copytree(RUNS / "one" / "distill", students / "a" / "distill")
    code, _, errors = permafrost("distill", "store.path=./stores/own", "run=two", *STUDENT, *QUICK)
    assert code == 0, errors
    shutil.copytree(RUNS / "two" / "distill", students / "b" / "distill")

    code, _, errors = permafrost("report", "run=many")

    assert code == 2
    assert "from several stores (stores/own, ./stores/own); name one with store.path=" in errors


def test_a_pass_without_a_run_records_nothing_below_runs(permafrost, tmp_path):
    precompute.run(precompute_config(tmp_path / "store", run=""))

    code, printed, errors = permafrost("precompute", "store.path=store", *_CIFAR, "executor=serial")

    assert code == 0, errors
    assert " run=my-student " in printed
    assert not Path("runs").exists()
