"""Commands of the pages: each is composed, executed, or marked with what it needs."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import permafrost
from permafrost.config.models import TorchvisionModelConfig
from permafrost.config.sections import section_names, section_of
from permafrost.models.providers import build_model
from permafrost_papers.unicam.options import UnicamOptions
from permafrost_papers.unicam.residual_maps import load_class_embeddings
from tests.support.commands import UnknownCommandError, check, lines_of, verb_and_arguments
from tests.support.image_sets import write_images
from tests.support.items import for_each
from tests.support.pages import PAGES, blocks_of
from tests.support.paths import ROOT
from tests.support.runs import save_student

PLUG_INS = ("a module of your own", "a package of your own")
"""Marks of the blocks whose options exist with a plug-in only; tests/config/test_plugins.py and
tests/papers/test_package.py use these plug-ins, and tests/exchange/test_page.py that of a format."""
SHELL = [
    block
    for page in PAGES
    for block in blocks_of(page)
    if block.language in ("bash", "") and block.needs not in PLUG_INS
]


def is_of_a_recipe(block, command):
    """Return whether a recipe prints the command, or its page the experiment: tests/stages/test_recipes.py and
    test_own_images.py compose these.
    """
    return block.page.parent.name == "papers" and re.search(
        r" experiment=(\w+/|\w+\.yaml)", command
    )


COMMANDS = [
    (block, command)
    for block in SHELL
    for command in lines_of(block.code)
    if not is_of_a_recipe(block, command)
]
LANGUAGES = {"bash", "html", "python", "text", "toml", "yaml", "sh"}


def block_with(page, text):
    """Block of a page that contains a text."""
    (found,) = (block for block in blocks_of(ROOT / page, "bash") if text in block.code)
    return found


@for_each("block,command", COMMANDS)
def test_a_command_of_a_page_could_begin(block, command):
    try:
        check(command)
    except UnknownCommandError:
        if block.needs is None:
            raise


def test_every_block_states_its_language():
    unnamed = [
        str(block) for page in PAGES for block in blocks_of(page) if block.language not in LANGUAGES
    ]

    assert unnamed == []


def test_no_page_has_an_indented_block():
    """Such a block is not checked."""
    wrong = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in blocks_of(page):
            text = text.replace(block.code, "")
        lines = text.splitlines()
        wrong += [
            f"{page.name}: {line}"
            for before, line in pairwise(lines)
            if line.startswith("    ") and before == ""
        ]

    assert wrong == []


def test_every_python_block_is_executed():
    """Each is executed: here, in tests/sources, test_plugins, test_package, test_portable, test_object_storage,
    test_store_format, test_preview_page, test_store_dataset, test_detector, tests/exchange.
    """
    blocks = [block.page.name for page in PAGES for block in blocks_of(page, "python")]

    assert sorted(blocks) == [
        *(
            "README.md",
            "datasets.md",
            "datasets.md",
            "delete.md",
            *["detector.md"] * 3,
            "evaluate.md",
            "exchange.md",
            "object-storage.md",
            "own-data.md",
            *["own-loop.md"] * 13,
            *["package.md"] * 6,
            *["plug-ins.md"] * 5,
            "ray-data.md",
            *["store-format.md"] * 2,
        )
    ]


def test_students_that_no_sweep_lists_are_printed(tmp_path, capsys):
    (block,) = blocks_of(ROOT / "docs/howto/delete.md", "python")
    for name in ("listed", "left"):
        (tmp_path / "runs/demo/students" / name).mkdir(parents=True)
    table = {"runs": [{"run": "students/listed"}]}
    (tmp_path / "runs/demo/sweep.json").write_text(json.dumps(table))

    exec(block.code, {})

    assert capsys.readouterr().out.split() == ["runs/demo/students/left"]


OWN_LOOP = list(blocks_of(ROOT / "docs/howto/own-loop.md", "python"))


def test_the_five_lines_of_the_page_show_every_record_once(frozen, capsys):
    exec(OWN_LOOP[4].code, {"store": frozen.store.path})

    keys = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert len(keys) == len(frozen.store.manifest.classes) // 4
    assert set(keys) <= set(frozen.store.index.keys(range(frozen.store.num_records())))


def test_the_lines_of_the_readme_fill_a_store_and_compute_gradients_from_it(tmp_path, monkeypatch):
    (block,) = blocks_of(ROOT / "README.md", "python")
    names = {}

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(block.code, names)

    assert names["batch"].image.shape == (16, 3, 64, 64)
    assert names["batch"].maps.shape == (16, 1, 1, 2, 2)
    assert names["student"].fc.weight.grad.isfinite().all()
    assert names["student"].fc.weight.grad.abs().sum() > 0


def test_the_page_fills_a_store_reads_it_and_trains_on_it(frozen, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(frozen.store.path, "store")
    for block in OWN_LOOP[:3]:
        exec(block.code, {"store": "store"})

    printed = capsys.readouterr().out
    assert "40 torch.Size([3, 16, 16])" in printed
    assert "torch.Size([4, 3, 16, 16]) torch.Size([4, 1, 1, 4, 4])" in printed
    assert 0 <= float(printed.splitlines()[-1]) <= 1


def test_the_loop_of_the_page_learns_maps_and_logits(frozen):
    losses = []
    code = OWN_LOOP[5].code.replace(
        "optimizer.step()", "optimizer.step(); losses.append(loss.item())"
    )

    torch.manual_seed(0)
    exec(code, {"store": frozen.store.path, "losses": losses})

    assert len(losses) == 10
    assert np.isfinite(losses).all()
    assert np.mean(losses[5:]) < np.mean(losses[:5])


@pytest.mark.slow
def test_two_ranks_of_torchrun_train_one_student(frozen, tmp_path, monkeypatch):
    (tmp_path / "my_training.py").write_text(OWN_LOOP[6].code)
    words = [
        "--standalone",
        "--nproc-per-node=2",
        "my_training.py",
        str(frozen.store.path),
        "student.pt",
    ]

    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words], cwd=tmp_path, check=True
    )

    weights = torch.load(tmp_path / "student.pt", weights_only=True)
    assert weights["fc.weight"].shape == (10, 512)
    assert all(values.isfinite().all() for values in weights.values())
    assert weights["bn1.num_batches_tracked"] == 4  # two epochs of 40 records in batches of 2 x 8
    command = block_with("docs/howto/own-loop.md", "student.weights=student.pt").code
    (line,) = lines_of(command.replace("stores/demo", str(frozen.store.path)))
    monkeypatch.chdir(tmp_path)
    _, words = verb_and_arguments(line)
    result = permafrost.evaluate(*words, "evaluate.splits=[test]")
    assert 0 <= result.splits["test"]["accuracy"] <= 1


def test_the_script_for_accelerate_gives_a_loader_that_divides_the_records(frozen, monkeypatch):
    """One process, with a stand-in of Accelerate (make test-hub has the real one)."""

    class Accelerator:
        process_index, num_processes, device = 1, 2, "cpu"

        def prepare(self, *prepared):
            return prepared

        def backward(self, loss):
            loss.backward()

    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace(Accelerator=Accelerator))
    values = {}
    exec(OWN_LOOP[7].code.replace("stores/demo", str(frozen.store.path)), values)

    assert len(values["loader"]) == 40 // (2 * 8)
    assert values["sampler"].epoch == 1


@pytest.mark.slow
def test_the_ten_lines_of_the_page_end_in_an_evaluated_student(tmp_path, monkeypatch, capsys):
    """With smaller networks, on images drawn here."""
    import timm
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, *(f"photos/{name}/{i}.png" for name in "ab" for i in range(40)))
    network = timm.create_model("resnet10t", num_classes=2)
    save_file(network.state_dict(), "resnet50.safetensors")
    code = (
        OWN_LOOP[3]
        .code.replace("resnet50.a1_in1k", "resnet10t")
        .replace("tau=4", "tau=4, epochs=1, batch_size=8, augment__size=64")
    )
    code = code.replace("data=images", "data=images, image_size=64")

    values = {}
    exec(code, values)

    accuracies = capsys.readouterr().out.splitlines()
    assert 0 <= float(accuracies[-1]) <= 1
    assert values["network"](torch.rand(1, 3, 64, 64)).logits.shape == (1, 2)


def test_the_table_of_the_page_has_the_logits_of_each_record(frozen):
    values = {"store": frozen.store.path}

    exec(OWN_LOOP[8].code, values)

    assert np.array_equal(np.stack(values["frame"]["logits"]), values["logits"])
    assert values["logits"].shape == (40, 10)


def test_any_network_is_explained_as_the_page_says(capsys):
    exec(OWN_LOOP[9].code, {})

    assert "torch.Size([6, 10]) torch.Size([6, 1, 1, 3, 3])" in capsys.readouterr().out


def test_a_student_is_loaded_as_the_page_says(frozen):
    values = {"student": str(save_student(frozen, "student"))}

    exec(OWN_LOOP[10].code, values)

    assert values["predicted"].shape == (4,)


def test_class_embeddings_are_written_as_the_page_says(frozen, tmp_path, monkeypatch):
    """The text encoder, which is not installed, is replaced by one that embeds a name's length."""
    (block,) = blocks_of(ROOT / "docs/howto/evaluate.md", "python")

    def tokenizer(names, **_):
        return {"lengths": torch.tensor([[len(name), 1.0] for name in names])}

    class Encoder(torch.nn.Module):
        def forward(self, lengths):
            return SimpleNamespace(pooler_output=lengths)

    library = ModuleType("transformers")
    library.AutoTokenizer = SimpleNamespace(from_pretrained=lambda _: tokenizer)
    library.AutoModel = SimpleNamespace(from_pretrained=lambda _: Encoder())
    monkeypatch.setitem(sys.modules, "transformers", library)
    options = UnicamOptions(embeddings=str(tmp_path / "names.npy"))
    code = block.code.replace("stores/unicam_cifar10", str(frozen.store.path))

    exec(code.replace("data/cifar10_names.npy", options.embeddings), {})

    lengths = [len(name) for name in frozen.store.manifest.classes]
    context = SimpleNamespace(store=frozen.store)
    assert load_class_embeddings(context, options)[:, 0].tolist() == lengths


@for_each(
    "command", ["permafrost distil", "make everything", "rm -rf stores", "python -m docs.nothing"]
)
def test_a_command_that_nobody_knows_is_an_error(command):
    with pytest.raises(UnknownCommandError):
        check(command)


def test_a_loop_is_written_out_and_comments_are_left_out():
    code = "for v in 1 4; do permafrost a views.count=$v; done  # twice\n# nothing\nmake \\\n  b\n"

    assert list(lines_of(code)) == [
        "permafrost a views.count=1",
        "permafrost a views.count=4",
        "make b",
    ]


# ---- executed ------------------------------------------------------------------------------------


@pytest.fixture
def run_block(monkeypatch, capsys):
    """Function that executes the stages of a block, with further options that make them small."""

    def run(block, *small):
        for command in lines_of(block.code):
            verb, words = verb_and_arguments(command)
            names = section_names(verb)
            words += [word for word in small if section_of(word) in names and _is_read(verb, word)]
            monkeypatch.setattr("sys.argv", [verb, *words])
            code = 0
            try:
                runpy.run_path(str(ROOT / "stages" / f"{verb}.py"), run_name="__main__")
            except SystemExit as end:
                code = end.code
            assert not code, f"{command}\n{capsys.readouterr().err}"

    return run


def _is_read(verb, word):
    """Return whether a stage reads the option: a student's teacher is its pass, and its network is that of its run."""
    evaluates = verb == "evaluate"
    unread = {"teacher": verb != "precompute", "augment": evaluates, "student": evaluates}
    return not unread.get(section_of(word), False)


def write_photos(folder):
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for number in range(12):
            path = folder / name / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (72, 80, 3), dtype=np.uint8)).save(path)


SMALL = (
    *(
        "executor=serial",
        "store.image_size=64",
        "teacher.input_size=64",
        "augment.size=64",
        "annotate.batch_size=8",
        "student.weights=null",  # in place of a download
    ),
    *("trainer.epochs=1", "trainer.batch_size=4", "trainer.num_threads=1", "report.cases=2"),
)


@pytest.mark.slow
def test_the_four_commands_for_own_data_fit_together(tmp_path, run_block):
    write_photos(tmp_path / "photos")
    torch.manual_seed(0)
    torch.save(
        build_model(TorchvisionModelConfig(name="resnet50"), 2).network.state_dict(), "resnet50.pth"
    )
    block = block_with("README.md", "permafrost report run=photos")

    run_block(block, *SMALL)

    assert "kind: kd" in (tmp_path / "runs/photos/distill/config.yaml").read_text()
    assert (tmp_path / "runs/photos/evaluate/metrics.json").exists()
    assert (tmp_path / "runs/photos/report.html").exists()


@pytest.mark.slow
def test_the_two_commands_for_weights_of_other_classes_fit_the_others(tmp_path, run_block):
    write_photos(tmp_path / "photos")
    torch.manual_seed(0)
    imagenet = build_model(TorchvisionModelConfig(name="resnet18"), 1000).network.state_dict()
    torch.save({"epoch": 90, "model": imagenet}, "imagenet.pth")
    block = block_with("README.md", "permafrost report run=photos")
    _, *rest = lines_of(block.code)
    small = (*SMALL, "teaching.augment.size=64", "teaching.trainer.epochs=1")
    small += ("teaching.trainer.batch_size=4", "teaching.trainer.num_threads=1")
    steps = block_with("docs/getting-started.md", "teaching.start=imagenet.pth")
    packing, *teaching = lines_of(steps.code)

    run_block(replace(steps, code=packing), "executor=serial", "store.image_size=64")
    code = "\n".join(teaching).replace("resnet50", "resnet18")
    run_block(replace(steps, code=code), *small)
    run_block(replace(block, code="\n".join(rest[:2])), *small)

    trained = load_file("runs/photos/teach/model.safetensors")
    assert trained["fc.weight"].shape == (2, 512)
    assert (
        F.cosine_similarity(
            trained["conv1.weight"].flatten(), imagenet["conv1.weight"].flatten(), dim=0
        )
        > 0.9
    )
    assert (tmp_path / "runs/photos/evaluate/metrics.json").exists()


def test_the_readme_and_the_first_steps_have_the_same_commands():
    for page in ("README.md", "docs/getting-started.md"):
        assert "data.test_fraction" in block_with(page, "permafrost report run=photos").code
    readme, steps = (
        list(lines_of(block_with(page, "permafrost report run=photos").code))
        for page in ("README.md", "docs/getting-started.md")
    )

    assert readme == steps


@pytest.mark.slow
def test_the_stages_of_a_table_run_as_they_are_printed(tmp_path, run_block):
    run_block(block_with("docs/howto/datasets.md", "data.name=breast_cancer"), "executor=serial")

    assert (tmp_path / "runs/breast-cancer/variants/report.html").exists()


TINY_DEMO = (
    *("executor=serial", "trainer.epochs=1", "teaching.trainer.epochs=1", "seeds=[0]"),
    *("data.image_size=16", "data.min_digit_size=8", "data.max_digit_size=12"),
    *("data.test_digits=30", "data.train_digits=200", "data.teacher_digits=40"),
    *("trainer.num_threads=1", "teaching.trainer.num_threads=1", "report.cases=2"),
)


@pytest.mark.slow
def test_the_steps_of_the_demo_and_what_builds_on_it_run(tmp_path, run_block):
    page = "docs/getting-started.md"

    run_block(block_with(page, "permafrost verify experiment=demo"), *TINY_DEMO)
    run_block(block_with(page, "run=my-student"), *TINY_DEMO)
    run_block(block_with("docs/concepts/frozen-replay-live.md", "mode=replay"), *TINY_DEMO)
    run_block(block_with("docs/concepts/frozen-replay-live.md", "mode=live"), *TINY_DEMO)
    run_block(
        block_with("docs/howto/evaluate.md", "evaluators=[accuracy,localization,shift]"), *TINY_DEMO
    )
    run_block(block_with("docs/howto/evaluate.md", "report.baseline=t1"), *TINY_DEMO)

    assert (tmp_path / "runs/demo/report.html").exists()
    assert (tmp_path / "runs/replayed/distill/model.safetensors").exists()
