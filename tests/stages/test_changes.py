"""Changes that make a pass or a student new, said before it is computed, and `diff` of what exists."""

import json
import shutil
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from permafrost.annotation import teacher_pass
from permafrost.cli import describe_plan, run_typed_command
from permafrost.config.compose import compose
from permafrost.config.data import NoDataConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.verbs import build_verb_config
from permafrost.core.errors import ConfigError
from permafrost.models.providers import build_model
from permafrost.runs.folder import RunFolder
from permafrost.store.verification import verify_store
from permafrost.training.distill import plan_student
from permafrost.verbs.sweep import plan_sweep
from tests.support.growing import TEACHER, Pictures, growing_options
from tests.support.verbs import precompute
from tests.support.words import TINY_DATA, TINY_NETWORK

DATA = (*TINY_DATA, "store.shard_size=16")
CIFAR = (*TINY_NETWORK, "teacher.weights=a.safetensors")
OWN = (
    *("teacher=module", "teacher.factory=nets_that_change.py:MyNet", "teacher.weights=random"),
    *("annotate.outputs=[logits]", "teacher.mean=[0,0,0]", "teacher.std=[1,1,1]"),
)
STUDENT = (
    *("student=cifar", "student.name=resnet8", "student.width=4", "trainer.epochs=1"),
    *("trainer.batch_size=8", "augment=pad_crop", "store.teacher=[resnet8]"),
)
NET = (
    "from torch import nn\n\n\nclass MyNet(nn.Sequential):\n    def __init__(self, classes):\n"
    + ("        super().__init__(nn.Flatten(), nn.Linear(768, classes))\n")
)
SAME = "0 of 6 shards are missing"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a store, a pass of a network with a name and one of an own network, and a student that was begun."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("changes")
        patch.chdir(folder)
        for seed, name in enumerate("ab"):
            torch.manual_seed(seed)
            model = build_model(CifarModelConfig(name="resnet8", width=4), 10)
            save_file(model.network.state_dict(), f"{name}.safetensors")
        Path("nets_that_change.py").write_text(NET)
        run = partial(run_typed_command, "precompute")
        run(["store.path=store", *DATA, *CIFAR, "executor=serial"])
        run(["store.path=store", *OWN, "executor=serial"])
        run(["store.path=larger", *DATA, "data.train_digits=45", "teacher=none", "executor=serial"])
        begin_student("run=one")
    return folder


def configured(verb, *words):
    return build_verb_config(verb, compose(verb, ["store.path=store", *words]))


def begin_student(*words):
    with plan_student(configured("distill", *STUDENT, *words)).open_folder():
        pass


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def planned(verb, *words):
    return describe_plan(verb, ["store.path=store", *words])


CHANGES = {
    "annotate.precision=bfloat16": "annotate.precision float32 -> bfloat16",
    "annotate.map_dtype=int8": "annotate.map_dtype float16 -> int8",
    "annotate.logits_dtype=float32": "annotate.logits_dtype not set -> float32",
    "annotate.outputs=[logits]": "annotate.outputs [logits, maps] -> [logits]",
    "annotate.logits=topk annotate.k=3": "annotate.logits not set -> topk",
    "explainer.target_classes=all_gt": "explainer.target_classes top1 -> all_gt",
    "explainer.target_classes=sample_gt explainer.seed=1": "explainer.target_classes top1 -> sample_gt",
    "teacher.weights=b.safetensors": "teacher.weights (a.safetensors -> b.safetensors) sha256 ",
    "teacher.mean=[0,0,0] teacher.std=[1,1,1]": "teacher.mean [0.485, 0.456, 0.406] -> [0, 0, 0], teacher.std ",
    "teacher.frame=full": SAME,
    "teacher.input_size=32": "teacher.input_size null -> 32",
    "teacher.stem_stride=2": "teacher.stem_stride 1 -> 2",
    "store.backend=webdataset": "store.backend zarr -> webdataset",
    "annotate.batch_size=8": SAME,
    "annotate.min_fidelity=0.9": SAME,
    "cluster.actors=1": SAME,
    "executor=serial": SAME,
    "annotate.name=mine": SAME,
    "views=random views.count=2": "views.count 1 -> 2, views canonical -> random (",
}
"""Options of another call, and what its plan says of the pass."""


@pytest.mark.parametrize("words", CHANGES)
def test_a_plan_names_the_option_that_makes_a_pass_new(here, words, caplog):
    described = planned("precompute", *CIFAR, *words.split())
    *_, text = described.values()
    expected = CHANGES[words]
    assert text == expected if expected == SAME else text.startswith(f"new: {expected}")
    assert expected == SAME or "(nearest: resnet8-" in text
    assert ("exists as resnet8-" in caplog.text) == ("name=" in words)


def changed_file(name, old, new):
    path = Path(name)
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("        super", "        # a comment\n        super", SAME),
        ("Flatten(), ", "Flatten(), nn.Identity(), ", "code of nets_that_change.py:MyNet sha256 "),
    ],
)
def test_code_of_an_own_network_counts_and_its_comments_do_not(here, old, new, expected):
    changed_file("nets_that_change.py", old, new)
    try:
        *_, text = planned("precompute", *OWN).values()
    finally:
        changed_file("nets_that_change.py", new, old)
    assert text == expected if expected == SAME else text.startswith(f"new: {expected}")


STUDENTS = {
    "method=labels": "method.kind kd -> labels",
    "method.tau=4": "method.tau 1 -> 4",
    "student.width=8": "student.width 4 -> 8",
    "optimizer.lr=0.5": "optimizer.lr 0.003 -> 0.5",
    "optimizer=sgd": "optimizer.kind adamw -> sgd",
    "seed=3": "seed 0 -> 3",
    "augment=none": "augment.operations.0.kind pad_crop -> not set, augment.operations not set -> [] (near",
    "trainer.batch_size=4": "trainer.batch_size 8 -> 4",
    "subset.shots=1": "subset.shots null -> 1",
    "store.teacher=[module]": "store.teacher [resnet8-",
    "cluster.actors=1": "no difference",
    "trainer.loader_processes=1": "no difference",
    "trainer.checkpoint_every_steps=7": "no difference",
}


@pytest.mark.parametrize("words", STUDENTS)
def test_a_plan_names_the_option_that_makes_a_student_new(here, words):
    described = planned("distill", "run=two", *STUDENT, *words.split())
    assert described["new"].startswith(STUDENTS[words])
    assert described["new"].endswith(" (nearest: one)")


def test_a_run_of_the_same_name_is_refused_with_the_same_words(here):
    Path("runs/one/distill/checkpoint.pt").touch()
    with pytest.raises(ConfigError, match=r"own -> those of this one\): method\.tau 1 -> 4; "):
        planned("distill", "run=one", *STUDENT, "method.tau=4")


def test_a_sweep_names_the_option_that_makes_its_students_new(here):
    words = ("run=sweep", "executor=serial", *STUDENT, "evaluate.splits=[test]")
    first = (*words, "seeds=[0]", "grid={method.tau: [1]}")
    assert planned("sweep", *first)["new"] == "1 of 1 students are new"
    (student,) = plan_sweep(configured("sweep", *first), ["store.path=store", *words]).students
    student.record_reads()
    (RunFolder(student.name).path / "distill/cost.json").touch()
    texts = {
        "seeds=[0] grid={method.tau: [1,4]}": "1 of 2 students are new: method.tau 1 -> 4 (nearest: student-seed0-",
        "seeds=[0,1] grid={method.tau: [1]}": "1 of 2 students are new: seed 0 -> 1 (nearest: student-seed0-",
        "seeds=[0] grid={method.tau: [1]}": "0 of 1 students are new",
    }
    for options, text in texts.items():
        seeds, grid = options.split(" ", 1)
        assert planned("sweep", *words, seeds, grid)["new"].startswith(text)


def test_a_begun_pass_is_compared_with_and_its_description_goes_when_it_is_finished(
    here, tmp_path, monkeypatch, caplog
):
    shutil.copytree(here, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    words = ["store.path=store", *CIFAR, "annotate.outputs=[logits]", "executor=serial"]
    with monkeypatch.context() as patch:
        patch.setattr(teacher_pass, "run_shards", stop)
        with pytest.raises(InterruptedError):
            run_typed_command("precompute", words)
    (folder,) = {path.parent for path in Path("store/teachers").glob("*/.description*")}
    *_, text = planned("precompute", *words[1:], "annotate.logits_dtype=float32").values()
    assert f"annotate.logits_dtype not set -> float32 (nearest: {folder.name}); images and" in text
    with caplog.at_level("INFO"):
        run_typed_command("precompute", words)
    new = "new: annotate.outputs [logits, maps] -> [logits] (nearest: resnet8-"
    assert f"pass {folder.name}: {new}" in caplog.text
    assert not [*folder.glob(".description*")]
    assert list(verify_store(Path("store"))) == []


def stop(*arguments):
    raise InterruptedError


def test_a_plan_of_a_pass_over_appended_records_names_the_one_that_it_follows(tmp_path):
    pictures = Pictures(tmp_path / "pictures")
    pictures.add_all("abcd")
    store = tmp_path / "store"
    precompute.run(growing_options(pictures, store, teacher=TEACHER))
    pictures.add_all("ef")
    precompute.run(growing_options(pictures, store, append=True))
    options = replace(growing_options(pictures, store, teacher=TEACHER), data=NoDataConfig())
    with closing(precompute.plan_precompute(options)) as plan:
        *_, text = plan.describe_work().values()
    assert text.startswith("appended records, with the options of resnet8-")
    assert text.endswith("shards are missing, about 1 min at the rate of run=frozen")


# ---- diff ----------------------------------------------------------------------------------------


def test_diff_lists_records_options_and_why_results_may_not_be_compared(here, capsys):
    result = run_typed_command("diff", ["store", "larger", "output=x.json"])
    assert result.compared == "two stores"
    assert result.options["data.train_digits"] == (40, 45)
    assert result.data["added"]["records"] == 5
    assert result.data["added"]["splits"] == ["train"]
    assert json.loads(Path("x.json").read_text())["data"] == result.data
    assert result.printed()["results may be compared"] == "yes"


def test_diff_compares_passes_by_folder_name_and_digits(here):
    first, second = sorted(path.name for path in Path("store/teachers").iterdir())
    for old, new in (
        (f"store/teachers/{first}", "store/resnet8"),
        ("store/module", f"store/{second[-8:]}"),
    ):
        result = run_typed_command("diff", [old, new])
        assert result.compared == "two passes"
        assert result.options["teacher.kind"] == ("module", "cifar")
        assert result.options["annotate.outputs"] == (["logits"], ["logits", "maps"])
        assert any(
            name.startswith("teacher.weights (random -> a.safetensors)") for name in result.options
        )


def test_diff_finds_records_of_other_bytes_labels_and_splits(tmp_path, monkeypatch):
    """Row of old and new: name, label, split and seed of the pixels."""
    monkeypatch.chdir(tmp_path)
    rows = {
        "old": "a.png,cat,train,1 b.png,cat,test,2 c.png,dog,train,3 d.png,dog,test,4 e.png,dog,test,5",
        "new": "a.png,cat,train,9 b.png,dog,test,2 c.png,dog,test,3 d.png,dog,test,4 f.png,dog,test,6",
    }
    for name, text in rows.items():
        Path(name).mkdir()
        for line in text.split():
            key, _, _, seed = line.split(",")
            pixels = np.random.default_rng(int(seed)).integers(0, 255, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(f"{name}/{key}")
        Path(f"{name}/table.csv").write_text("\n".join(["file,label,split,seed", *text.split()]))
        words = (
            *("data=image_table", f"data.path={name}/table.csv", "data.image=file"),
            *("data.split=split", "data.accept=[classes_of_one_split]", "teacher=none"),
        )
        run_typed_command("precompute", [f"store.path=s-{name}", *words, "executor=serial"])

    result = run_typed_command("diff", ["s-old", "s-new"])

    found = {kind: (each["records"], each["splits"]) for kind, each in result.data.items()}
    assert found == {
        "added": (1, ["test"]),
        "removed": (1, ["test"]),
        "with other bytes": (1, ["train"]),
        "with other labels": (1, ["test"]),
        "with other split": (1, ["test", "train"]),
    }
    assert "test has records with other labels" in result.incomparable


def test_diff_of_runs_reads_their_evaluations(here):
    for run, frame, words in (("one", "full", ()), ("other", "center_crop", ("method.tau=4",))):
        begin_student(f"run={run}", *words)
        config = configured("evaluate", f"run={run}", f"evaluate.frame={frame}")
        with RunFolder(run).open("evaluate", config.shared, {}):
            pass
    result = run_typed_command("diff", ["one", "runs/other"])
    assert result.options["method.tau"] == (1, 4)
    assert result.incomparable == ["evaluation.frame full -> center_crop"]
    Path("runs/one/evaluate/config.yaml").unlink()
    assert run_typed_command("diff", ["one", "other"]).incomparable == []
    shutil.rmtree("runs/other")


def test_diff_refuses_what_is_no_pair(here):
    refused = {
        ("store", "one"): "store is a store and one is a distill run; name two",
        ("store", "store/resnet8"): "store is a store and store/resnet8 is a pass; name two",
        ("store", "nowhere"): "nowhere is not a store, a pass or a run; name",
        ("store/zzz", "store"): "store has no passes zzz; name one of: module-",
        ("store",): "diff compares two; type both",
        ("store", "larger", "third"): "cannot read 'third'",
    }
    for words, text in refused.items():
        with pytest.raises(ConfigError, match=text):
            run_typed_command("diff", list(words))
