"""Groups, such as the pictures of a patient, that are kept together in a drawn split and in a holdout."""

from dataclasses import replace

import numpy as np
import pytest

from permafrost.config.data import ImageTableDataConfig
from permafrost.config.store import SubsetOptions
from permafrost.core.errors import ConfigError
from permafrost.core.records import NO_GROUP
from permafrost.loading.subset import rows_of_split, select_holdout_rows, select_training_rows
from permafrost.sources.source import build_source
from permafrost.store.reader import Store
from tests.support.image_sets import by_key, write_images
from tests.support.stores import precompute_config
from tests.support.verbs import precompute

PATIENTS = 20
IMAGES = 4
"""Images of a patient."""


def write_table(root, patients=PATIENTS):
    """A picture without a patient, and four of each patient, of two classes."""
    names = [f"{patient}-{image}.jpg" for patient in range(patients) for image in range(IMAGES)]
    write_images(root, "alone.jpg", *names)
    rows = ["path,label,patient", "alone.jpg,well,"]
    rows += [
        f"{name},{'ill' if i % IMAGES else 'well'},P{name.split('-')[0]}"
        for i, name in enumerate(names)
    ]
    (root / "t.csv").write_text("\n".join(rows) + "\n")
    return ImageTableDataConfig(
        path=str(root / "t.csv"), group=("patient",), test_fraction=0.3, keep_groups=True
    )


def test_a_drawn_split_has_whole_groups_and_others_stay_when_some_are_added(tmp_path):
    few = by_key(build_source(write_table(tmp_path / "few")))
    many = by_key(build_source(write_table(tmp_path / "many", patients=3 * PATIENTS)))

    splits = {}
    for name, record in many.items():
        splits.setdefault(name.split("-")[0], set()).add(record.split)
    assert all(len(names) == 1 for names in splits.values())
    assert {name for names in splits.values() for name in names} == {"train", "test"}
    assert all(many[name].split == record.split for name, record in few.items())


def test_without_the_option_groups_are_divided(tmp_path):
    records = by_key(build_source(replace(write_table(tmp_path), keep_groups=False)))

    splits = {}
    for name, record in records.items():
        splits.setdefault(name.split("-")[0], set()).add(record.split)
    assert any(len(names) == 2 for names in splits.values())


@pytest.mark.parametrize("wrong", [{"group": ()}, {"test_fraction": 0.0}])
def test_the_option_without_groups_or_a_fraction_is_refused(tmp_path, wrong):
    config = write_table(tmp_path)

    with pytest.raises(ConfigError, match=r"data\.keep_groups=true.*data\.group=\[patient\]"):
        replace(config, **wrong)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = tmp_path_factory.mktemp("groups")
    data = replace(write_table(root / "set"), test_fraction=0.0, keep_groups=False)
    precompute.run(precompute_config(root / "store", data=data))
    return Store(root / "store").index


@pytest.mark.parametrize("rule", ["permutation", "by_key"])
@pytest.mark.parametrize("shots", [None, 2])
def test_a_holdout_takes_whole_groups(index, rule, shots):
    subset = SubsetOptions(holdout=3, keep_groups=True, rule=rule, shots=shots)
    single = select_holdout_rows(index, "train", replace(subset, keep_groups=False))

    held_out = select_holdout_rows(index, "train", subset)
    trained = select_training_rows(index, "train", subset)

    groups = index.values("group", np.asarray(rows_of_split(index, "train")))
    of_held_out, of_trained = (index.values("group", rows) for rows in (held_out, trained))
    assert set(single.tolist()) < set(held_out.tolist())
    assert not (set(of_held_out) & set(of_trained)) - {NO_GROUP}
    for group in set(of_held_out) - {NO_GROUP}:
        assert (of_held_out == group).sum() == (groups == group).sum()
    assert (of_held_out == NO_GROUP).sum() == (index.values("group", single) == NO_GROUP).sum()
    assert np.array_equal(held_out, np.unique(held_out))


def test_groups_that_leave_nothing_to_train_on_are_refused(index):
    with pytest.raises(
        ConfigError,
        match=r"holdout=20 holds out all 60 .*whole groups.* set subset\.holdout=17 or less",
    ):
        select_training_rows(index, "train", SubsetOptions(holdout=20, keep_groups=True))


def test_a_holdout_of_groups_needs_groups(tmp_path):
    data = replace(write_table(tmp_path / "set"), group=(), test_fraction=0.0, keep_groups=False)
    precompute.run(precompute_config(tmp_path / "store", data=data))

    with pytest.raises(
        ConfigError, match=r"split 'train' has none; pack the data with data\.group"
    ):
        select_holdout_rows(
            Store(tmp_path / "store").index, "train", SubsetOptions(holdout=1, keep_groups=True)
        )
