"""Plug-ins: members of the user's own modules in every family and every option that takes them."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from permafrost import explain
from permafrost.config.compose import compose
from permafrost.config.data import SOURCES
from permafrost.config.evaluation import EVALUATORS
from permafrost.config.experiments import plugin_names
from permafrost.config.explainers import EXPLAINERS, explainer_of_line
from permafrost.config.help_text import describe_verb
from permafrost.config.methods import METHODS
from permafrost.config.models import MODELS, ModuleConfig
from permafrost.config.plugins import load_plugins, plugin_digests
from permafrost.config.store import OUTPUTS
from permafrost.config.verbs import build_verb_config
from permafrost.core.batches import MapTargets
from permafrost.core.errors import ConfigError
from permafrost.models.classifier import GapNormLinear
from permafrost.models.explanations import gradcam
from permafrost.models.module import ModuleClassifier
from permafrost.models.providers import build_model, published
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from permafrost.training.metric_log import read_metrics
from permafrost_timm.options import TimmModelConfig
from tests.support.gradcam import autograd_gradcam
from tests.support.pages import blocks_of
from tests.support.papers import needs_papers
from tests.support.paths import ROOT
from tests.support.processes import environment
from tests.support.stores import precompute_config
from tests.support.verbs import distill, evaluate, precompute, report, sweep, teach

STAGES = {
    "precompute": precompute,
    "teach": teach,
    "distill": distill,
    "evaluate": evaluate,
    "report": report,
}
FAMILIES_OF_USERS = (METHODS, MODELS, SOURCES, EVALUATORS, EXPLAINERS, OUTPUTS)
OPTIONS = {
    "method": "squared_error",
    "student": "three_layers",
    "teacher": "three_layers",
    "black_box": "three_layers",
    "data": "stripes",
    "explainer": "energy",
}
EPOCH = ["trainer.epochs=1", "trainer.batch_size=8"]
READERS = {"method": "distill", "student": "distill", "teacher": "precompute", "black_box": "teach"}
TIMM_NETWORK = """
import timm
from torch import nn


@timm.models.register_model
def permafrost_test_network(pretrained=False, **options):
    network = timm.create_model("test_resnet", **options)
    network.default_cfg = network.pretrained_cfg = {}
    return network
"""


def modules_of_the_page():
    """The modules of the page, by the name under which their options find them."""
    networks, losses, members, measures, occlusion = blocks_of(
        ROOT / "docs" / "howto" / "plug-ins.md", "python"
    )
    return {
        "my_networks": networks.code,
        "my_losses": losses.code,
        "my_members": members.code,
        "my_measures": measures.code,
        "my_occlusion": occlusion.code,
    }


@pytest.fixture(autouse=True)
def own_import_path(monkeypatch):
    """Forget the folders and plug-ins of a test after it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("permafrost.config.plugins._PLACES", {})


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Modules of the page in a folder of the import path, loaded; they are forgotten after the test."""
    modules = modules_of_the_page()
    for name, code in modules.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    before = [dict(members) for members in FAMILIES_OF_USERS]
    load_plugins([f"{name}.py" for name in modules])
    yield
    for members, own in zip(FAMILIES_OF_USERS, before, strict=True):
        for name in members.keys() - own.keys():
            del members[name]
    for name in modules:
        sys.modules.pop(name, None)


LOSS = """
from dataclasses import dataclass
from typing import ClassVar, Literal

from permafrost.config.methods import METHODS, KDConfig
from permafrost.losses.kd import KDLoss


@dataclass(frozen=True, kw_only=True)
class Config(KDConfig):
    implementation: ClassVar[str] = "IMPLEMENTATION"
    kind: Literal["KIND"] = "KIND"


class Loss(KDLoss):
    pass


METHODS["KIND"] = Config
"""


@pytest.mark.parametrize("named", ["first_loss", "json"])
def test_a_copied_plugin_that_still_names_another_module_is_refused(tmp_path, named):
    for name, module in (("first_loss", "first_loss"), ("copied_loss", named)):
        code = LOSS.replace("IMPLEMENTATION", f"{module}:Loss").replace("KIND", name)
        (tmp_path / f"{name}.py").write_text(code)
    message = rf"copied_loss\.py: copied_loss has implementation='{named}:Loss', but {named} is not a file"
    try:
        for _ in range(2):  # the second time, too
            with pytest.raises(ConfigError, match=message):
                load_plugins(["copied_loss.py"])
        if named == "json":
            with pytest.raises(ConfigError, match=message):
                load_plugins(["copied_loss.py", "first_loss.py"])
        else:
            load_plugins(["copied_loss.py", "first_loss.py"])
    finally:
        for name in ("first_loss", "copied_loss"):
            METHODS.pop(name, None)
            sys.modules.pop(name, None)


TWICE = (
    LOSS.replace("KIND", "mine")
    + """
class Other(Config):
    pass

METHODS["mine"] = Other
"""
)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise KeyError('no such thing')", "KeyError: 'no such thing'"),
        ("raise SystemExit", "SystemExit"),  # with status 0, which would be a success
        ("import sys; sys.exit('not here')", "SystemExit: not here"),
        ("class Odd(BaseException): pass\nraise Odd('odd')", "Odd: odd"),
        ("def f(:", "SyntaxError"),
        ("from permafrost.config.methods import METHODS\nMETHODS['mine'] = 5", "a dataclass, and not 5"),
        (TWICE, "mine is the name of both Config and Other"),
        (LOSS.replace("KIND", "kd"), "kd is a name of two packages"),
    ],
)  # fmt: skip
def test_a_plugin_that_fails_while_it_is_imported_is_one_line(tmp_path, code, message):
    (tmp_path / "my_failure.py").write_text(code)
    try:
        with pytest.raises(ConfigError, match="^the plug-in my_failure of .*" + message) as caught:
            load_plugins(["my_failure.py"])
        assert "\n" not in str(caught.value)
    finally:
        METHODS.pop("mine", None)


def test_a_plugin_that_prints_and_goes_elsewhere_changes_neither_results_nor_paths(
    tmp_path, capsys
):
    (tmp_path / "my_talk.py").write_text("import os; os.chdir('/'); print('hello')")
    try:
        load_plugins(["my_talk.py"])
    finally:
        sys.modules.pop("my_talk", None)
    assert Path.cwd() == tmp_path
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "hello\n")


def test_an_output_that_another_module_implements_is_refused(tmp_path):
    (tmp_path / "my_output.py").write_text(
        "from permafrost.config.store import OUTPUTS, OutputInfo\n"
        "OUTPUTS['mine'] = OutputInfo('json:JSONDecoder', False)\n"
    )
    message = r"OUTPUTS\['mine'\] has implementation='json:JSONDecoder', but json is not a file of"
    try:
        with pytest.raises(ConfigError, match=message):
            load_plugins(["my_output.py"])
    finally:
        OUTPUTS.pop("mine", None)
        sys.modules.pop("my_output", None)


def run_stage(verb, *words):
    return STAGES[verb].run(build_verb_config(verb, compose(verb, words)))


@pytest.mark.parametrize(("option", "kind"), OPTIONS.items())
def test_every_option_knows_the_members_of_plugins(plugin, option, kind):
    verb = READERS.get(option, "precompute")

    shown = describe_verb(verb, compose(verb, [f"{option}={kind}"]))

    assert f"{option}.kind={kind}" in shown
    with pytest.raises(ConfigError, match=rf"{option}=no_such does not exist; .*{kind}"):
        compose(verb, [f"{option}=no_such"])


@pytest.mark.slow
def test_members_of_plugins_go_through_all_stages(plugin):
    words = ["store.path=store", "run=plugged"]
    teacher = ["teacher=three_layers", "teacher.width=4"]
    weights = "runs/plugged/teach/model.safetensors"
    taught = [f"teaching.{word}" for word in EPOCH]
    variants = "variants={mine: [method=squared_error, method.scale=0.5], e2kd: [method=e2kd]}"
    sweep_arguments = [
        *(*words, *EPOCH, "student=three_layers", "student.width=4", "seeds=[0]", variants),
        *("evaluate.splits=[test]", "evaluate.num_pictures=2", "executor=serial"),
    ]

    packed = run_stage("precompute", *words, "data=stripes", "teacher=none", "executor=serial")
    run_stage("teach", *words, *teacher, *taught, "evaluate.splits=[test]")
    measured = ["explainer=energy", "annotate.outputs=[logits,maps,margin]"]
    taught_pass = [*words, *teacher, f"teacher.weights={weights}", *measured]
    run_stage("precompute", *taught_pass, "executor=serial")
    swept = sweep.run(
        build_verb_config("sweep", compose("sweep", sweep_arguments)), sweep_arguments
    )
    judged = run_stage(
        *("evaluate", *words, *teacher, f"teacher.weights={weights}", "model=teacher"),
        *("evaluate.splits=[test]", "evaluators=[accuracy,localization,confidence]"),
        "evaluate.confidence.threshold=0",
    )
    run_stage("report", *words)

    assert packed.packed_records == 96
    assert swept.finished_now == 2
    assert 0 <= judged.splits["test"]["accuracy"] <= 1
    assert judged.splits["test"]["confidence"] == {"confident": 1}
    for row in json.loads((RUNS / "plugged" / "sweep.json").read_text())["runs"]:
        assert (
            SavedNetwork(RUNS / "plugged" / row["run"] / "distill").describe().config.kind
            == "three_layers"
        )
    (teacher_pass,) = Store(Path("store")).open_passes()
    assert "margin" in [field.name for field in teacher_pass.manifest.fields]
    page = (RUNS / "plugged" / "report.html").read_text()
    assert "three_layers" in page
    assert "squared_error" in page


def test_an_explainer_of_images_makes_maps_of_teacher_and_student(plugin, tiny_teacher):
    options = explainer_of_line("occlusion patch=4")
    precompute.run(precompute_config(Path("store"), tiny_teacher, explainer=options))
    words = ["store.path=store", "run=covered", "method=e2kd", "student=cifar"]
    run_stage("distill", *words, "student.name=resnet8", "student.width=4", *EPOCH)

    (teacher,) = Store(Path("store")).open_passes()
    images, classes = torch.rand(2, 3, 16, 16), torch.tensor([[1, 2], [3, 4]])
    network = build_model(tiny_teacher, 10).eval()
    explained = explain(network, images, target_class=classes, explainer="occlusion patch=4")
    covered = images.clone()
    covered[:, :, 4:8, 8:12] = 0
    fall = network(images).logits - network(covered).logits

    assert teacher.explainer == "occlusion patch=4"
    assert teacher.map_cells == "4x4"
    terms = [line["map"] for line in read_metrics(RUNS / "covered" / "distill") if "map" in line]
    assert 0 < terms[-1] < 2
    assert torch.allclose(explained.maps[:, :, 0, 1, 2], fall.gather(1, classes), atol=1e-5)


@pytest.mark.slow
@needs_papers
def test_superfeatures_are_found_in_a_network_of_a_plugin(plugin):
    words = ["store.path=store", "run=grouped", "evaluate.splits=[test]"]
    epoch = ["teaching.trainer.epochs=1", "teaching.trainer.batch_size=8"]
    run_stage("precompute", *words[:2], "data=stripes", "teacher=none", "executor=serial")
    black_box = ["black_box=three_layers", "black_box.width=4", "black_box.weights=random"]
    additive = ["teacher=additive", "teacher.name=mlp", "teacher.superfeatures=2"]
    search = ["teaching=ked", "teaching.levels=2", "teaching.records=32", "teaching.max_records=32"]

    run_stage("teach", *words, *epoch, *black_box, *additive, "teacher.input_size=16", *search)

    assert SavedNetwork(RUNS / "grouped" / "teach").describe().config.kind == "additive"


def test_a_network_whose_plugin_is_not_named_is_an_error_that_says_so(plugin, frozen):
    words = [f"store.path={frozen.store.path}", "run=plugged", "method=labels"]
    run_stage("distill", *words, "student=three_layers", *EPOCH)
    del MODELS["three_layers"]

    with pytest.raises(ConfigError, match=r"kind three_layers.*plugins="):
        SavedNetwork(RUNS / "plugged" / "distill").describe()


def test_a_network_registered_with_timm_needs_no_published_weights(tmp_path, monkeypatch):
    (tmp_path / "my_timm_networks.py").write_text(TIMM_NETWORK)
    monkeypatch.chdir(tmp_path)
    load_plugins(["my_timm_networks"])
    config = TimmModelConfig(name="permafrost_test_network", mean=(0.5,) * 3, std=(0.5,) * 3)

    model = build_model(config, 10)

    assert published(config) is None
    assert model(torch.rand(2, 3, 32, 32)).logits.shape == (2, 10)
    with pytest.raises(ConfigError, match="has no default mean and std"):
        build_model(replace(config, mean=None, std=None), 10)
    with pytest.raises(ConfigError, match="timm has no weights of permafrost_test_network"):
        build_model(replace(config, weights="pretrained"), 10)


@pytest.mark.slow
@pytest.mark.ray
def test_members_of_plugins_run_on_ray_from_a_folder_outside(tmp_path):
    modules = modules_of_the_page()
    for name, code in modules.items():
        (tmp_path / f"{name}.py").write_text(code)
    named = ", ".join(f"{name}.py" for name in modules)
    words = ["store.path=store", "run=plugged", f"plugins=[{named}]"]
    teacher = ["teacher=three_layers", "teacher.weights=random"]
    epoch = ["trainer.epochs=1", "trainer.batch_size=8", "seeds=[0,1]"]
    variants = "variants={mine: [method=squared_error], e2kd: [method=e2kd]}"

    def command(verb, *more):
        subprocess.run(
            [sys.executable, "-m", f"stages.{verb}", *words, *more],
            cwd=tmp_path,
            env=environment(),
            check=True,
            timeout=240,
        )

    command("precompute", "data=stripes", *teacher, "executor=ray")
    command(
        "sweep", "student=three_layers", *epoch, "evaluate.splits=[test]", variants, "executor=ray"
    )
    command("report")

    assert len(json.loads((tmp_path / "runs/plugged/sweep.json").read_text())["runs"]) == 4
    assert (tmp_path / "runs/plugged/report.html").is_file()


# ---- names and code ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("no_such_module", r"plug-in no_such_module of plugins=no_such_module cannot be imported"),
        ("no_such_file.py", r"plugins=no_such_file\.py: there is no such file"),
        ("broken.py", r"plug-in broken .*ZeroDivisionError"),
        ("json.py", r"plugins=json\.py: another module is called json .*rename"),
        ("not a name.py", r"is not a module name"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named(named, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "json.py").write_text("")
    (tmp_path / "not a name.py").write_text("")

    with pytest.raises(ConfigError, match=message):
        load_plugins([named])


def test_plugins_are_named_in_words_and_in_experiments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("plugins: [a.py, b.c]\nbases: [demo]\n")

    assert plugin_names(["experiment=own.yaml"]) == ["a.py", "b.c"]
    assert plugin_names(["experiment=own.yaml", "plugins=[d.py]"]) == ["d.py"]
    assert plugin_names(["experiment=demo", "run=x"]) == []
    with pytest.raises(ConfigError, match="must be a list"):
        plugin_names(["plugins=a.py"])


def test_changed_code_is_another_run_and_is_said(plugin, frozen, tmp_path, monkeypatch):
    words = [f"store.path={frozen.store.path}", "run=mine", "method=squared_error", *EPOCH]
    run_stage("distill", *words, "student.name=resnet8", "student.width=4")
    config = (RUNS / "mine/distill/config.yaml").read_text()
    with (tmp_path / "my_losses.py").open("a") as file:
        file.write("# a comment\n")
        file.flush()
        run_stage("distill", *words, "student.name=resnet8", "student.width=4")
        file.write("CHANGED = True\n")

    with pytest.raises(ConfigError, match=r"code of my_losses"):
        run_stage("distill", *words, "student.name=resnet8", "student.width=4")

    assert "plug-in my_losses: " in config
    assert "my_members" not in config  # named, but not used


HELPER = """
from torch import nn


def make(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
"""
IMPORTS = {
    "a module beside it": ("own_a", "from own_helper_a import make", "own_helper_a.py"),
    "a submodule of its package": (
        "own_b.nets",
        "from .inner import parts",
        "own_b/inner/parts.py",
    ),
    "a folder of PYTHONPATH": ("own_c", "import own_lib_c.parts", "../lib/own_lib_c/parts.py"),
    "a module of a module": ("own_d", "import own_middle_d", "own_helper_d.py"),
    "inside of a function": ("own_e", "def late():\n    import own_helper_e", "own_helper_e.py"),
}


@pytest.fixture(params=IMPORTS, ids=str)
def with_helper(request, tmp_path, monkeypatch):
    """A factory in a folder of its own, the options that name it, and a file that it imports."""
    factory, line, helper = IMPORTS[request.param]
    folder = tmp_path / "code"
    for path in (folder / f"{factory.replace('.', '/')}.py", folder / helper):
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in path.relative_to(tmp_path / "code").parents[:-1]:
            if parent.name not in ("lib", ".."):
                (folder / parent / "__init__.py").touch()
    (folder / f"{factory.replace('.', '/')}.py").write_text(
        f"from torch import nn\n{line}\n{HELPER}\nbuild = make\n"
    )
    (folder / helper).write_text(HELPER)
    (folder / "own_middle_d.py").write_text("import json\nimport own_helper_d\n")
    sys.path.append(str(tmp_path / "lib"))
    monkeypatch.chdir(folder)
    yield f"{factory}:build", folder / helper
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def test_code_that_a_factory_imports_is_part_of_its_identity(with_helper):
    factory, helper = with_helper
    config = ModuleConfig(factory=factory)
    (name, before), *others = plugin_digests(config).items()

    helper.write_text(HELPER.replace("def", "# a comment\ndef"))
    commented = plugin_digests(config)
    helper.write_text(HELPER.replace("3, 4, 3", "3, 5, 3"))

    assert not others
    assert commented == {name: before}
    assert plugin_digests(config).keys() == {name}
    assert plugin_digests(config)[name] != before


@pytest.mark.parametrize("with_helper", ["a module beside it"], indirect=True)
def test_a_correction_in_an_imported_module_is_another_pass(with_helper, frozen, tmp_path):
    factory, helper = with_helper
    store = shutil.copytree(frozen.store.path, tmp_path / "store")
    words = [f"store.path={store}", f"teacher.factory={factory}", "annotate.outputs=[logits]"]

    def annotated():
        run_stage("precompute", *words, "teacher=module", "teacher.weights=random")
        return len(Store(store).pass_folders())

    before = annotated()
    helper.write_text(HELPER + "# a comment\n")
    assert annotated() == before
    helper.write_text(HELPER.replace("3, 4, 3", "3, 5, 3"))
    assert annotated() == before + 1


def test_the_loss_of_maps_on_the_page_is_their_distance(plugin, frozen):
    words = [f"store.path={frozen.store.path}", "run=maps", "method=map_distance", *EPOCH]
    run_stage("distill", *words, "student.name=resnet8", "student.width=4")
    loss = sys.modules["my_losses"].MapDistance(METHODS["map_distance"]())
    maps = torch.rand(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[True, True, False], [True, False, False]])
    classes = torch.zeros(2, 3, dtype=torch.long)
    targets = MapTargets(teacher="t", logits=None, target_class=classes, maps=maps, map_valid=valid)
    corner = torch.zeros(2, 3, 1, 4, 4)
    corner[..., 0, 0] = 1

    lines = [line for line in read_metrics(RUNS / "maps/distill") if "loss" in line]
    assert np.isfinite([line["loss"] for line in lines]).all()
    assert loss.distance(7 * maps, targets) == pytest.approx(0, abs=1e-6)
    # Of a corner (mean 1: 16 in one cell) and a uniform map: (15 + 15 * 1) / 16 in each of 3 valid places of 6.
    uniform = replace(targets, maps=torch.ones_like(maps))
    assert loss.distance(corner, uniform) == pytest.approx(30 / 16 * 3 / 6)


# ---- a network without a base class ----------------------------------------------------------------


def own_network(option):
    own = {"factory": "my_networks.py:build", "layer": "features", "arguments": "{width: 8}"}
    return [f"{option}=module", *(f"{option}.{name}={value}" for name, value in own.items())]


def test_any_network_is_teacher_and_student(plugin):
    """The network of the page: packed, taught, annotated, distilled with maps, evaluated and loaded."""
    words = ["store.path=store", "run=own"]
    run_stage("precompute", *words, "data=stripes", "teacher=none", "executor=serial")
    taught = run_stage(
        *("teach", *words, *own_network("teacher"), "evaluate.splits=[test]"),
        *(f"teaching.{word}" for word in EPOCH),
    )
    made = run_stage(
        "precompute",
        *words,
        *own_network("teacher"),
        f"teacher.weights={taught.weights}",
        "executor=serial",
    )
    by_its_run = run_stage("precompute", *shlex.split(taught.next)[2:], *words, "executor=serial")
    run_stage("distill", *words, *own_network("student"), *EPOCH, "method=e2kd")
    judged = run_stage("evaluate", *words, "evaluate.splits=[test]")
    model, described = SavedNetwork(RUNS / "own/distill").load()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    output = model(images)
    classes = torch.tensor([[0, 1], [1, 0]])

    assert made.passes[0].startswith("module-")
    # One network has one identity, by its own options and by those that its run has recorded.
    assert (by_its_run.passes, by_its_run.teacher_records) == (made.passes, 0)
    assert 0 <= judged.splits["test"]["agreement"] <= 1
    assert described.config.factory == "my_networks.py:build"
    assert SavedNetwork(RUNS / "own/teach").describe().split == "train"
    assert isinstance(model.head, GapNormLinear)
    torch.testing.assert_close(
        gradcam(model, output, classes), definition_of_gradcam(model, images, classes)
    )


def definition_of_gradcam(model, images, classes):
    """relu(sum_k alpha_k A_k), alpha_k = mean_ij dz_c / dA_k, by autograd from the images."""
    features, context = model.forward_trunk(images)
    features = features.detach().requires_grad_()
    return autograd_gradcam(features, model.forward_head(features, context), classes).detach()


class Flattened(torch.nn.Module):
    """Network whose head is not linear on the average of its features."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Conv2d(3, 4, 3, 2), torch.nn.Conv2d(4, 4, 3)])
        self.head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(5), torch.nn.Tanh())

    def forward(self, images):
        for layer in self.layers:
            images = torch.tanh(layer(images))
        return self.head(images)


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_without_a_closed_form_is_differentiated(trained):
    """In the graph of a step (trained), and by a second pass with the features in the layer's place (frozen)."""
    network = Flattened().double()
    model = ModuleClassifier(network, "layers.1")
    images = torch.rand(3, 3, 11, 11, dtype=torch.float64)
    model(images)
    classes = torch.tensor([[1], [4], [0]])
    with torch.set_grad_enabled(trained):
        output = model(images)
        maps = gradcam(model, output, classes)

    assert model.head is None
    assert maps.requires_grad == trained
    torch.testing.assert_close(maps.detach(), definition_of_gradcam(model, images, classes))
    if trained:
        maps.sum().backward()
        assert all(p.grad is not None for p in network.layers.parameters())


def test_a_layer_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"no layer 'no'; its modules are layers, layers\.0"):
        ModuleClassifier(Flattened(), "no")


def test_a_network_on_disk_does_not_choose_the_code_that_builds_it(plugin, monkeypatch):
    """model.json of a stranger names a function; it is not imported unless the user names its module."""
    words = ["store.path=store", "run=own", "method=labels"]
    run_stage("precompute", *words[:2], "data=stripes", "teacher=none", "executor=serial")
    run_stage("distill", *words, *own_network("student"), *EPOCH)
    monkeypatch.setattr("permafrost.config.plugins._PLACES", {})

    with pytest.raises(ConfigError, match=r"name its file or module, plugins=\[my_networks\.py\]"):
        SavedNetwork(RUNS / "own/distill").load()
