"""Choice of the classes that a teacher explains: by hand for every option, and independent of the batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import get_args, get_type_hints

import pytest
import torch

from permafrost.annotation.pass_identity import describe_explainer
from permafrost.config.explainers import ExplainerConfig, GradCamConfig
from permafrost.core.errors import ConfigError
from permafrost.loading.geometry import neighbor_maps
from permafrost.models.explanations import CLASS_CHOICES, resolve_explainer, target_classes
from permafrost_papers.bcos.options import BcosWeightsConfig

LOGITS = torch.tensor([[0.0, 3.0, 2.0, 1.0], [5.0, -1.0, -2.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
MANY = torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
ONE = torch.tensor([3, 0, -1])
KEYS = ("a", "b", "c")


def chosen_classes(choice, labels=MANY, **options):
    config = GradCamConfig(target_classes=choice, **options)
    return target_classes(config, LOGITS, labels, KEYS).tolist()


def test_every_choice_of_the_config_is_there():
    hint = get_type_hints(ExplainerConfig)["target_classes"]

    assert set(get_args(hint)) == set(CLASS_CHOICES)


def test_choices_match_what_one_reads_off_the_logits():
    assert chosen_classes("top1") == [[1], [0], [3]]
    assert chosen_classes("topk", max_classes=2) == [[1, 2], [0, 3], [3, 2]]
    assert chosen_classes("all_gt", max_classes=3) == [[2, 3, 0], [2, -1, -1], [-1, -1, -1]]
    assert chosen_classes("all_gt", max_classes=2) == [[2, 3], [2, -1], [-1, -1]]
    assert (
        chosen_classes("all_gt", ONE, max_classes=1)
        == chosen_classes("sample_gt", ONE)
        == [[3], [0], [-1]]
    )


def test_the_sampled_class_is_one_of_the_record_s_own_and_hangs_on_its_key_alone():
    count = 300
    keys = [f"record-{number}" for number in range(count)]
    labels = MANY[:1].repeat(count, 1)
    logits = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    config = GradCamConfig(target_classes="sample_gt")

    drawn = target_classes(config, logits, labels, keys)

    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    alone = [target_classes(config, logits[[i]], labels[[i]], [keys[i]]) for i in order]
    assert torch.equal(torch.cat(alone), drawn[order])
    counts = Counter(drawn.flatten().tolist())
    assert set(counts) == {0, 2, 3}
    assert min(counts.values()) > 70
    other = GradCamConfig(target_classes="sample_gt", seed=1)
    assert not torch.equal(target_classes(other, logits, labels, keys), drawn)


def test_a_pass_s_fingerprint_covers_an_option_only_where_it_is_read():
    described = [
        describe_explainer(GradCamConfig(seed=5)),
        describe_explainer(BcosWeightsConfig(target_classes="topk", max_classes=2, seed=5)),
        describe_explainer(GradCamConfig(target_classes="sample_gt", seed=5)),
    ]

    assert described == [
        {"kind": "gradcam", "target_classes": "top1"},
        {"kind": "bcos_weights", "target_classes": "topk", "max_classes": 2},
        {"kind": "gradcam", "target_classes": "sample_gt", "seed": 5},
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_classes": "topk"}, r"needs their number; set explainer\.max_classes"),
        ({"max_classes": 2}, r"max_classes=2 with target_classes=top1: set a number >= 1 with"),
        ({"target_classes": "sample_gt", "max_classes": 1}, "null otherwise"),
        ({"target_classes": "all_gt", "max_classes": 0}, "set a number >= 1"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GradCamConfig(**options)


def test_the_options_are_fitted_to_a_store_and_its_teacher(frozen):
    ten_classes = frozen.store
    fitted = resolve_explainer(GradCamConfig(target_classes="all_gt"), ten_classes, 10)

    assert fitted.max_classes == 1  # one label per record
    unchanged = GradCamConfig(target_classes="topk", max_classes=10)
    assert asdict(resolve_explainer(unchanged, ten_classes, 10)) == asdict(unchanged)
    with pytest.raises(ConfigError, match=r"max_classes=10 must be <= 7"):
        resolve_explainer(unchanged, ten_classes, 7)
    for choice in ("all_gt", "sample_gt"):
        with pytest.raises(ConfigError, match=r"7 classes are not the 10 of the data; set"):
            resolve_explainer(GradCamConfig(target_classes=choice), ten_classes, 7)


def test_a_neighbor_with_fewer_classes_lends_its_maps_in_turn():
    maps = torch.arange(1.0, 10.0).view(3, 3, 1, 1, 1)
    target_class = torch.tensor([[0, 1, 2], [5, -1, -1], [-1, -1, -1]])

    lent = neighbor_maps(maps, target_class)

    # Maps of the previous record: the last one (which explains no class), the first, and the second's only map.
    assert lent.flatten(1).tolist() == [[7, 7, 7], [1, 2, 3], [4, 4, 4]]
