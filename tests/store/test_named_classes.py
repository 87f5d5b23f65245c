"""Names for the classes of a finished store that were numbers, by the command that packed it."""

import pytest

from permafrost.config.compose import compose
from permafrost.config.verbs import build_verb_config
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from tests.support.images import write_tar
from tests.support.tars import samples
from tests.support.trees import tree_bytes
from tests.support.verbs import precompute

TEACHER = ("teacher=cifar", "teacher.name=resnet8", "teacher.weights=random")


@pytest.fixture
def tars(tmp_path):
    """Tars of twelve images whose labels are numbers from 0 to 2."""
    return write_tar(tmp_path / "tars/train-000000.tar", samples(12)).parent


def run(tars, *words):
    options = ["data=webdataset", f"data.path={tars}", f"store.path={tars.parent / 'store'}"]
    words = [*options, "executor=serial", "store.image_size=16", *words]
    return precompute.run(build_verb_config("precompute", compose("precompute", words)))


def list_of(tars, *names):
    path = tars.parent / "classes.txt"
    path.write_text("".join(f"{name}\n" for name in names))
    return f"data.classes={path}"


def test_names_come_later_and_nothing_else_changes(tars):
    run(tars, *TEACHER)
    store = Store(tars.parent / "store")
    assert store.manifest.classes == ("0", "1", "2")
    before = tree_bytes(store.path)

    run(tars, *TEACHER, list_of(tars, "cat", "dog", "eel"))

    after = tree_bytes(store.path)
    assert {name for name in after if after[name] != before.get(name)} == {"manifest.json"}
    named = Store(store.path)
    assert named.manifest.classes == ("cat", "dog", "eel")
    assert named.manifest.fingerprint == store.manifest.fingerprint
    assert list(verify_store(named.path)) == []
    assert len(named.pass_folders()) == 1  # the teacher has not run again

    run(tars, *TEACHER)  # without the list: the names stay
    assert Store(store.path).manifest.classes == ("cat", "dog", "eel")


@pytest.mark.parametrize("names", [("cat", "dog"), ("cat", "dog", "eel", "fox")])
def test_another_number_of_names_is_refused(tars, names):
    run(tars, "teacher=none")

    with pytest.raises((StoreMismatchError, ValueError)):
        run(tars, "teacher=none", list_of(tars, *names))
    assert Store(tars.parent / "store").manifest.classes == ("0", "1", "2")


def test_names_are_not_exchanged_for_others(tars):
    run(tars, "teacher=none", list_of(tars, "cat", "dog", "eel"))

    with pytest.raises(StoreMismatchError, match="contains 3 classes"):
        run(tars, "teacher=none", list_of(tars, "eel", "dog", "cat"))
