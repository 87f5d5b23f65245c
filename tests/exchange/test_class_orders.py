"""Classes of a shared pass in another store: by their names, and by the labels of equal images."""

import shutil

import numpy as np
import pytest

from permafrost.store.reader import Store
from permafrost_exchange.class_orders import order_classes, reorder_classes
from permafrost_exchange.target_reader import TargetError
from tests.exchange.test_share import LICENSES, run_attach, run_share
from tests.support.exchange import make_photographs, run_precompute, values_by_key

WORDS = ("cat", "dog", "eel", "fox")
NUMBERS = ("0", "1", "2", "3")
OUTPUTS = "annotate.outputs=[logits,maps,class_maps]"


def labels(order, records=40, lost=(), wrong=0):
    """Labels of records there and here, where class n there is order[n] here."""
    random = np.random.default_rng(0)
    there = random.integers(0, len(order), records)
    there = there[~np.isin(there, lost)]
    here = np.array(order)[there]
    here[:wrong] = (here[:wrong] + 1) % len(order)
    return there.astype(np.int32), here.astype(np.int32)


NONE = (np.full(9, -1, np.int32), np.full(9, -1, np.int32))
SAME, REVERSED = [0, 1, 2, 3], [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("there", "here", "records", "order"),
    [
        (WORDS, WORDS, labels(SAME), None),
        (WORDS, WORDS, NONE, None),
        (WORDS, WORDS[::-1], NONE, REVERSED),
        (WORDS, WORDS[::-1], labels(REVERSED), REVERSED),
        (WORDS, WORDS, labels(REVERSED), REVERSED),  # folders whose names were exchanged
        (NUMBERS, NUMBERS, labels(REVERSED), REVERSED),
        (NUMBERS, NUMBERS, labels(SAME, lost=(1, 2)), None),
        (NUMBERS, WORDS, labels(SAME), None),
        (NUMBERS, WORDS, labels(REVERSED), REVERSED),
        (NUMBERS, WORDS, labels(REVERSED, lost=(2,)), REVERSED),  # the one that is left
        (
            WORDS,
            ("un", "deux", "trois", "quatre"),
            labels([1, 0, 2, 3], 400, wrong=9),
            [1, 0, 2, 3],
        ),
        (WORDS, WORDS, labels(SAME, 400, wrong=30), None),
        (WORDS, WORDS, (np.array([0, 1, 1, 2, 3, 3]), np.array([0, 1, 1, 3, 3, 3])), None),
    ],
)
def test_names_and_labels_say_which_class_is_which(there, here, records, order):
    found = order_classes(there, here, records, "share")

    assert (None if found is None else found.tolist()) == order


@pytest.mark.parametrize(
    ("there", "here", "records", "said"),
    [
        (WORDS, ("un", "deux", "trois", "quatre"), NONE, "0 joined records have a label in both"),
        (NUMBERS, WORDS, labels(REVERSED, lost=(1, 2)), "without any are '1', '2'"),
        (WORDS, WORDS, labels([0, 0, 1, 1]), "30 of these another one here"),
        (NUMBERS, WORDS, labels(SAME, 40, wrong=15), "15 of these another one here"),
        (WORDS, WORDS[::-1], labels([1, 1, 2, 2]), "neither names nor labels"),
    ],
)
def test_what_neither_says_is_refused(there, here, records, said):
    with pytest.raises(TargetError, match=said):
        order_classes(there, here, records, "share")


def test_numbers_without_labels_are_doubtful(caplog):
    assert order_classes(NUMBERS, NUMBERS, NONE, "share") is None
    assert "nothing says whether they mean the same" in caplog.text


def test_labels_of_a_hostile_share_are_ignored():
    there = np.array([2**31 - 1, -7, 4, 0], np.int32)

    assert order_classes(WORDS, WORDS, (there, np.zeros(4, np.int32)), "share") is None


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    made = make_photographs(tmp_path_factory.mktemp("orders"))
    words = ("teacher=cifar", "teacher.name=resnet8", "teacher.weights=random", OUTPUTS)
    run_precompute(made.store, "data=none", *words)
    return made


@pytest.fixture(scope="module")
def share(photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("share") / "share"
    run_share(photographs.store, folder, licenses=LICENSES)
    return folder


def attached(photographs, share, tmp_path, folders):
    """Attach to a store in which the images of class n are in the n-th of these folders; return values by image."""
    for path in photographs.paths:
        number = int(path.split("/")[1][1:])
        target = tmp_path / "images/train" / folders[number] / path.rpartition("/")[2]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photographs.folder / path, target)
    words = (f"data.path={tmp_path / 'images'}", "store.image_size=32", "teacher=none")
    run_precompute(tmp_path / "store", "data=image_folder", *words)
    result = run_attach(tmp_path / "store", share)
    return by_image(Store(tmp_path / "store"), result.attached_pass)


def by_image(store, name):
    values = values_by_key(store, name)
    return {
        field: {key.rpartition("%2F")[2]: row for key, row in rows.items()}
        for field, rows in values.items()
    }


@pytest.mark.parametrize(
    ("folders", "order"),
    [
        (("n0", "n1", "n2", "n3"), SAME),
        (("n3", "n2", "n1", "n0"), REVERSED),
        (("eel", "cat", "fox", "dog"), [2, 0, 3, 1]),
    ],
)
def test_targets_have_the_classes_of_the_store(photographs, share, tmp_path, folders, order):
    """Each column, map and target class is that of the same images, whatever their folders are called."""
    name = next(iter(photographs.open().pass_folders())).name
    there, here = (
        by_image(photographs.open(), name),
        attached(photographs, share, tmp_path, folders),
    )

    for key, logits in there["logits"].items():
        for field in ("logits", "class_maps", "class_maps_scale"):
            assert np.array_equal(here[field][key][:, order], there[field][key]), field
        explained = there["target_class"][key]
        assert np.array_equal(here["target_class"][key], np.array(order)[explained])
        assert np.array_equal(here["map"][key], there["map"][key])
        assert here["logits"][key].argmax() == order[logits.argmax()]


def test_two_classes_in_one_folder_are_refused(photographs, share, tmp_path):
    with pytest.raises(
        TargetError, match=r"are others: the store also has 'a', 'b', 'c' and lacks 'n0'"
    ):
        attached(photographs, share, tmp_path, ("a", "a", "b", "c"))


def test_classes_without_an_axis_keep_their_values():
    values = {"pooled": np.arange(8.0).reshape(1, 1, 8)}

    assert reorder_classes(values, (), np.array(REVERSED)) == values
