"""One guard of classes: no network is loaded beside a store without a comparison of its classes with the store's."""

import ast
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from permafrost.config.models import TorchvisionModelConfig
from permafrost.config.store import StoreOptions
from permafrost.core.errors import ConfigError
from permafrost.models.classifier import WeightsError
from permafrost.models.network import Network
from permafrost.models.providers import build_model, published
from permafrost.models.trained_weights import describe_other_classes, require_classes
from permafrost.runs.mirrors import RUNS
from permafrost_export.options import ExportConfig, ExportOptions
from tests.stages.test_right_teacher import save_teacher
from tests.support.runs import distill_config, evaluate_config
from tests.support.stores import precompute_config
from tests.support.verbs import distill, evaluate, export, precompute

ROOT = Path(__file__).parents[2]
LOADERS = {"build_model": 1, "load": 0, "Network": 1, "TeacherAnnotator": 1}
"""Functions that load or identify weights, and the place of their argument with the classes."""
COUNT = re.compile(r"^\d+$|num_classes$|^len\(|^outputs$")
DIGITS = tuple(str(digit) for digit in range(10))
SWAPPED = (*DIGITS[:8], "9", "8")


def calls_of_loaders():
    """Iterate over the calls in the code: (place, function around it, name of the loader, call)."""
    for folder in ("pipeline", "stages"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            for function in ast.walk(tree):
                if not isinstance(function, ast.FunctionDef):
                    continue
                for call in ast.walk(function):
                    name = getattr(getattr(call, "func", None), "id", None)
                    loaded = getattr(getattr(call, "func", None), "value", None)
                    if getattr(getattr(loaded, "func", None), "id", None) == "SavedNetwork":
                        name = call.func.attr
                    if isinstance(call, ast.Call) and name in LOADERS:
                        yield f"{path.relative_to(ROOT)}:{call.lineno}", function, name, call


def has_store(function):
    """Return whether a function can reach a store, by the names that it uses."""
    names = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)}
    names |= {n.arg for n in ast.walk(function) if isinstance(n, ast.arg)}
    return bool(names & {"store", "_store", "Store", "dataset"})


def test_every_caller_that_loads_weights_beside_a_store_gives_its_classes():
    counts, without = Counter(), []
    for place, function, name, call in calls_of_loaders():
        counts[name] += 1
        argument = call.args[LOADERS[name]] if len(call.args) > LOADERS[name] else None
        text = "" if argument is None else ast.unparse(argument)
        if has_store(function) and (not text or COUNT.search(text)):
            without.append(f"{place}: {name}({text})")
    assert not without
    assert counts["build_model"] >= 8  # the search finds them
    assert counts["load"] >= 6
    assert counts["Network"] >= 7


def test_weights_are_read_by_the_guarded_functions_only():
    """Files of weights are read in models/, of which other modules call the functions above."""
    readers = {"load_weights", "read_state_dict", "choose_fit"}
    for folder in ("pipeline", "stages"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.parent.name != "models":
                names = {
                    n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)
                }
                assert not names & readers, path


# ---- the comparison ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "classes", "words"),
    [
        (("a", "b"), ("a", "b"), ""),
        (("a", "b"), ("b", "a"), "another order than the store has: output 0 is a, and class 0"),
        (("a", "b"), ("a", "c"), "other classes: the store also has 'c' and lacks 'b'"),
        ([*"abcdefg"], [*"abcdefgh"], "other classes: the store also has 'h'"),
        (("a", "b", "c"), ("c", "a"), "other classes: the store lacks 'b'"),
        (("a", "b", "c"), ("a", "c", "b"), "another order than the store has: output 1 is b"),
        ((), ("a", "b"), ""),  # not known
        (("a", "b"), 2, ""),
        (("a", "b"), (), ""),
    ],
)
def test_classes_are_compared_by_name_and_order(trained, classes, words):
    reason = describe_other_classes(trained, classes)

    assert words in reason if words else reason == ""


def test_numbers_fit_names_that_came_later_with_a_warning(caplog):
    """A network that was trained before the classes of its store had names."""
    require_classes(("0", "1"), ("cat", "dog"), "the network was")

    assert "classes without names, 0 to 1, which are taken as 'cat', 'dog'" in caplog.text
    for trained, classes in ((("0", "1"), ("cat", "dog", "eel")), (("cat", "dog"), ("0", "1"))):
        with pytest.raises(
            ConfigError,
            match=r"trained on other classes: the store also has 'cat|also has '0', '1' and lacks 'cat', 'dog'",
        ):
            require_classes(trained, classes, "the network was")


def test_of_published_names_the_order_of_equal_ones_is_compared():
    labels = ("tench", "goldfish", "crane", "hen", "crane")

    assert describe_other_classes(labels, ("n1", "n2", "n3", "n4", "n5"), are_published=True) == ""
    alike = ("tench", "goldfish", "crane_bird", "hen", "crane_machine")
    assert describe_other_classes(labels, alike, are_published=True) == ""
    in_order = tuple(sorted(alike))
    assert "output 0 is tench, and class 0 of the store is crane_bird" in describe_other_classes(
        labels, in_order, are_published=True
    )
    assert describe_other_classes(labels, in_order[:3], are_published=True) == ""


def test_imagenet_folders_with_readable_names_are_not_in_torchvisions_order():
    config = TorchvisionModelConfig(name="resnet18", weights="pretrained")
    labels = published(config).labels
    assert len(labels) == 1000
    unique = [f"{name} {n}" if labels.count(name) > 1 else name for n, name in enumerate(labels)]

    with pytest.raises(ConfigError, match="trained on the same classes in another order"):
        Network(config, sorted(unique)).describe()


# ---- the doors -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """Options of a network that was trained on the store's classes in another order."""
    return save_teacher(tmp_path_factory.mktemp("swapped") / "teach", classes=SWAPPED)


DOORS = {
    "precompute": lambda frozen, weights, store: precompute.run(precompute_config(store, weights)),
    "distill mode=live": lambda frozen, weights, store: distill.run(
        replace(distill_config(frozen), mode="live", teacher=weights)
    ),
    "evaluate model=teacher": lambda frozen, weights, store: evaluate.run(
        replace(evaluate_config(frozen), model="teacher", teacher=weights)
    ),
    "evaluate model=network": lambda frozen, weights, store: evaluate.run(
        replace(evaluate_config(frozen), model="network", student=weights)
    ),
    "evaluate model=network, its teacher": lambda frozen, weights, store: evaluate.run(
        replace(
            evaluate_config(frozen), model="network", student=frozen.config.teacher, teacher=weights
        )
    ),
    "evaluate a student": lambda frozen, weights, store: evaluate.run(
        evaluate_config(frozen, run=student_of(weights))
    ),
    "export a student": lambda frozen, weights, store: export.run(
        ExportConfig(
            store=StoreOptions(path=str(frozen.store.path)),
            export=ExportOptions(),
            run=student_of(weights),
        )
    ),
}


def student_of(weights):
    """Make a run whose student has these weights and this description, and return its name."""
    folder = RUNS / "swapped" / "distill"
    shutil.copytree(Path(weights.weights).parent, folder)
    return "swapped"


@pytest.mark.parametrize("door", DOORS)
def test_a_network_of_classes_in_another_order_is_refused(tmp_path, frozen, swapped, door):
    with pytest.raises(ConfigError, match="the same classes in another order than the store has"):
        DOORS[door](frozen, swapped, tmp_path / "store")


def test_a_training_that_starts_from_other_classes_says_so(tmp_path, frozen, swapped, caplog):
    config = distill_config(frozen)

    distill.run(replace(config, student=swapped))

    assert "trained on the same classes in another order" in caplog.text
    assert "the training begins with a last layer for them" in caplog.text


def test_a_last_layer_keeps_the_rows_of_known_classes(tmp_path, caplog):
    config = save_teacher(tmp_path / "old", classes=("cat", "dog"), num_classes=2)
    old = load_file(tmp_path / "old/model.safetensors")
    network = build_model(config, ("dog", "eel", "cat"), may_replace_head=True).network
    new = network.state_dict()

    for name in ("linear.weight", "linear.bias"):
        assert torch.equal(new[name][[2, 0]], old[name])
        assert not torch.isin(new[name][1], old[name]).any()
    assert "the store also has 'eel'; the training begins with a last layer" in caplog.text
    assert "with the rows of 2 known classes and 1 new ones" in caplog.text


@pytest.mark.parametrize(
    "described",
    [
        {"label_names": list(SWAPPED)},  # of timm
        {"id2label": {str(n): name for n, name in enumerate(SWAPPED)}},  # of transformers
    ],
)
def test_names_that_other_libraries_write_beside_weights_are_compared(tmp_path, swapped, described):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(swapped.weights, folder)
    (folder / "config.json").write_text(json.dumps(described))
    weights = str(folder / "model.safetensors")
    config = precompute_config(tmp_path / "store", replace(swapped, weights=weights))

    with pytest.raises(ConfigError, match="the same classes in another order"):
        precompute.run(config)
    (folder / "config.json").write_text("[")
    assert precompute.run(config).teacher_records


def test_a_link_to_the_weights_of_a_run_is_the_run(tmp_path, swapped):
    (tmp_path / "link.safetensors").symlink_to(swapped.weights)
    linked = replace(swapped, weights=str(tmp_path / "link.safetensors"))

    with pytest.raises(ConfigError, match="the same classes in another order"):
        precompute.run(precompute_config(tmp_path / "store", linked))


def test_a_digest_that_is_named_is_compared_though_the_pass_exists(tmp_path, frozen):
    config = replace(
        frozen.config, store=replace(frozen.config.store, path=str(tmp_path / "store"))
    )
    precompute.run(config)

    with pytest.raises(WeightsError, match="the option sha256 is 0000"):
        precompute.run(replace(config, teacher=replace(config.teacher, sha256="0" * 64)))


def test_a_number_of_classes_does_not_hide_other_names_of_as_many(tmp_path, swapped):
    config = precompute_config(tmp_path / "store", replace(swapped, classes=10))

    with pytest.raises(ConfigError, match="the same classes in another order"):
        precompute.run(config)


def test_published_names_that_are_none_of_the_classes_are_said(caplog):
    require_classes(("thing", "other"), ("cat", "dog"), "weights are", are_published=True)
    require_classes((), (), "weights are", are_published=True)
    assert caplog.messages == [
        "weights are trained on 'thing', 'other', none of which is a class of the data by name; they are taken as "
        "'cat', 'dog' in this order"
    ]
