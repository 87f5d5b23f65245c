"""Selection of the records and layers that are compared: reproducible, balanced and named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from permafrost.config.models import CifarModelConfig, TorchvisionModelConfig
from permafrost.core.errors import ConfigError
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.subset import rows_of_split
from permafrost.models.providers import build_model, freeze
from permafrost_papers.bcos.options import BcosModelConfig
from permafrost_papers.ked.options import AdditiveModelConfig
from permafrost_papers.probe_set import (
    activations,
    balanced_positions,
    check_layers,
    check_probes,
    layer_names,
    multi_hot_labels,
    pair_layers,
    probe_set,
)
from permafrost_papers.unicam.estimators import InnerProducts, feature_distances
from permafrost_timm.options import TimmModelConfig
from tests.support.synthetic import store_of_rows


def train_split(frozen, permutation=None):
    rows = rows_of_split(frozen.store.index, "train")
    return StoreDataset(
        frozen.store, rows if permutation is None else np.asarray(rows)[permutation]
    )


def keys_at(dataset, positions):
    return dataset.keys_at(positions)


def test_any_run_of_the_order_has_all_classes_alike(frozen):
    dataset = train_split(frozen)  # 40 records in 10 classes
    order = balanced_positions(dataset, 0, "probe")

    assert sorted(order.tolist()) == list(range(40))
    labels = dataset.label_numbers
    sizes = np.bincount(labels, minlength=10)
    for start in range(0, 10 * int(sizes.min()), 10):
        assert len(set(labels[order[start : start + 10]])) == 10


def test_the_records_depend_on_seed_and_keys_and_not_on_their_order(frozen):
    dataset = train_split(frozen)
    shuffled = train_split(frozen, np.random.default_rng(0).permutation(40))
    one, same, other = (
        keys_at(data, balanced_positions(data, seed, "probe"))
        for data, seed in ((dataset, 0), (shuffled, 0), (dataset, 1))
    )

    assert one == same
    assert one != other
    sets = [probe_set(data, 20, 512, 0, "probe") for data in (dataset, shuffled)]
    assert sets[0].keys_sha256 == sets[1].keys_sha256
    assert probe_set(dataset, 24, 512, 0, "probe").keys_sha256 != sets[0].keys_sha256


def test_blocks_are_near_equal_and_balanced(frozen):
    dataset = train_split(frozen)

    probes = probe_set(dataset, 20, 7, 0, "probe")

    assert [len(block) for block in probes.blocks] == [7, 7, 6]
    assert sum(map(len, probe_set(dataset, 1000, 512, 0, "probe").blocks)) == 40


def test_a_record_of_many_classes_comes_once_and_its_classes_take_turns(tmp_path):
    sets = [[0, 1], [1], [1], [2], []] + [[0]] * 35
    store = store_of_rows(
        tmp_path / "s", [(f"k{n:02d}", -1, labels) for n, labels in enumerate(sets)]
    )
    dataset = StoreDataset(store, rows_of_split(store.index, "train"))

    order = balanced_positions(dataset, 0, "probe")

    # Without the fifth, which has no label.
    assert sorted(order.tolist()) == [*range(4), *range(5, 40)]
    assert order[1] in (0, 1, 2)
    assert order[2] == 3  # the only record of its class
    assert multi_hot_labels(dataset, [0, 4])[:, :3].tolist() == [[1, 1, 0], [0, 0, 0]]


def test_records_without_labels_or_of_one_class_are_refused_with_the_split(frozen):
    dataset = train_split(frozen)
    dataset.label_numbers = np.zeros(40, np.int64)
    with pytest.raises(
        ConfigError, match=r"evaluators=x compares .* test has 40 labeled records in 1 class"
    ):
        check_probes("x", dataset, "test", 4)
    dataset.label_numbers = np.full(40, -1)
    with pytest.raises(ConfigError, match="test has 0 labeled records"):
        check_probes("x", dataset, "test", 4)


STAGES = ["layer1", "layer2", "layer3"]


@pytest.mark.parametrize(
    ("config", "side", "expected"),
    [
        (CifarModelConfig(name="resnet8", width=4), 16, [*STAGES, "pooled"]),
        (BcosModelConfig(name="resnet8", width=4), 16, [*STAGES, "pooled"]),
        (TorchvisionModelConfig(name="resnet18"), 32, [*STAGES, "layer4", "pooled"]),
        (TorchvisionModelConfig(name="squeezenet1_1"), 64, ["features", "pooled"]),
        (
            TimmModelConfig(name="vit_tiny_patch16_224", input_size=64),
            64,
            [*STAGES, "layer4", "pooled"],
        ),
        (BcosModelConfig(name="simple_vit_ti", width=64, depth=1, patch=8), 16, ["logits"]),
        (AdditiveModelConfig(name="mlp", superfeatures=2, input_size=16), 16, ["logits"]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_every_kind_of_network_shows_layers(config, side, expected):
    model = EvaluatedModel(network=freeze(build_model(config, 3)), input_size=(side, side))

    assert layer_names(model) == expected
    found = activations(model.network, torch.rand(2, 3, side, side))
    assert all(len(values) == 2 and not values.requires_grad for values in found.values())


def test_layers_are_paired_from_the_deepest():
    longer = [*STAGES, "layer4", "pooled"]

    assert pair_layers([*STAGES, "pooled"], longer) == {
        "layer1": "layer2", "layer2": "layer3", "layer3": "layer4", "pooled": "pooled",
    }  # fmt: skip
    assert pair_layers(longer, ["features", "pooled"]) == {"layer4": "features", "pooled": "pooled"}
    assert list(pair_layers(longer, longer)) == longer
    with pytest.raises(ConfigError, match="o names layer9, which the student does not have; its"):
        check_layers("o", {"layer9": "pooled"}, longer, longer)


def with_classes(frozen, labels):
    """Training split with the given labels, repeated as often as needed."""
    dataset = train_split(frozen)
    dataset.label_numbers = np.resize(np.asarray(labels), len(dataset)).astype(np.int64)
    return dataset


def test_a_block_without_room_for_all_classes_holds_four_records_of_some(frozen):
    dataset = with_classes(frozen, np.arange(10))

    probes = probe_set(dataset, 40, 16, 0, "probe")

    labels = [dataset.label_numbers[block] for block in probes.blocks]
    drawn = [set(of_block.tolist()) for of_block in labels]
    assert all(np.unique(of_block, return_counts=True)[1].min() >= 2 for of_block in labels)
    assert not drawn[0] & drawn[1]  # no class is in both blocks while unused classes remain
    every = np.concatenate(probes.blocks)
    assert len(set(every.tolist())) == len(every)  # no record is drawn twice
    assert probes.classes == len(set.union(*drawn))
    assert probe_set(dataset, 40, 512, 0, "probe").classes == 10


def test_a_few_classes_that_are_left_over_make_no_block_of_their_own(frozen):
    """A small block of two classes would weigh as much as a large block of many, but measure something else."""
    dataset = with_classes(frozen, np.arange(5))  # eight records each

    probes = probe_set(dataset, 40, 16, 0, "probe")

    sizes = [len(np.unique(dataset.label_numbers[block])) for block in probes.blocks]
    assert min(sizes) >= 3
    assert len(probes.blocks) == 3
    assert probes.classes == 5


def test_classes_that_differ_by_embeddings_need_no_second_record(frozen):
    dataset = with_classes(frozen, np.arange(40))

    probes = probe_set(dataset, 40, 16, 0, "probe", classes_differ=True)

    assert (sum(map(len, probes.blocks)), probes.classes) == (40, 40)
    # check_probes rejects this case before.
    assert sum(map(len, probe_set(dataset, 40, 16, 0, "probe").blocks)) == 40


def test_relevance_of_many_classes_is_seen_where_each_has_several_records(frozen):
    """Features that depend on the class alone. Blocks with one record per class would give a relevance of 0."""
    dataset = with_classes(frozen, np.arange(20))
    made = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)).double()
    probes = probe_set(dataset, 16, 512, 0, "probe")
    labels = dataset.label_numbers[np.concatenate(probes.blocks)]

    hot = torch.nn.functional.one_hot(torch.from_numpy(labels), 20).double()
    noise = 0.1 * torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(1))
    distances = {"x": feature_distances(hot @ made + noise), "labels": feature_distances(hot)}
    relevance = float(InnerProducts.from_distances(distances).correlation("x", "labels"))

    assert relevance > 0.5


def test_labels_that_never_repeat_are_refused_with_the_way_out(frozen):
    dataset = with_classes(frozen, np.arange(40))

    with pytest.raises(ConfigError, match=r"evaluate\.x\.embeddings"):
        check_probes("x", dataset, "train", 4, "evaluate.x.embeddings")
    check_probes("x", dataset, "train", 4)  # accepted when embeddings are given
