"""Guided teachers: localization losses by hand, choice of the guided class, and epochs that are kept."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from permafrost.config.augment import AugmentOptions
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import StoreOptions
from permafrost.config.teaching import TeachConfig
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.core.errors import ConfigError
from permafrost.core.records import NO_CLASS
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.decode_threads import resolve_decode_threads
from permafrost.loading.regions import regions_of
from permafrost.models.providers import build_model
from permafrost.storage.files import file_at
from permafrost.store.reader import Store
from permafrost_papers.bcos.options import BcosModelConfig
from permafrost_papers.e2kd.guided import LOCALIZATIONS, Guidance, GuidedLoss, _draw
from permafrost_papers.e2kd.options import GuidedTeachingConfig
from permafrost_papers.e2kd.pareto_front import ParetoFront, pareto_front
from tests.support.outputs import student_output
from tests.support.run_files import read_signed
from tests.support.stores import precompute_config
from tests.support.verbs import teach

INSIDE = torch.tensor([[[True, False], [False, False]]])


@pytest.mark.parametrize(
    ("name", "attributions", "expected"),
    [
        ("energy", [[3.0, 1.0], [-5.0, 0.0]], 0.25),
        ("energy", [[-1.0, 0.0], [0.0, 0.0]], 1.0),  # without positive energy
        # Negative values are set to 0 before the division by the scale, which is 2.
        ("l1", [[2.0, 1.0], [-4.0, 0.0]], 0.5 / 4),
        ("rrr", [[2.0, 1.0], [-4.0, 0.0]], 0.25**2 + 1.0),
        ("ppce", [[1.0, 2.0], [-4.0, 0.0]], -math.log(0.5)),
    ],
)
def test_a_localization_loss_by_hand(name, attributions, expected):
    loss = LOCALIZATIONS[name](torch.tensor([attributions], dtype=torch.float64), INSIDE)

    assert loss.tolist() == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize("name", LOCALIZATIONS)
def test_all_on_the_object_is_no_loss_and_any_map_has_a_finite_gradient(name):
    perfect = INSIDE.double()
    assert LOCALIZATIONS[name](perfect, INSIDE).item() == pytest.approx(0, abs=1e-9)

    for values in (torch.zeros(1, 2, 2), torch.rand(1, 2, 2) - 0.5):
        values.requires_grad_()
        LOCALIZATIONS[name](values, INSIDE).sum().backward()
        assert values.grad.isfinite().all()


def guided(**options):
    return GuidedLoss(GuidedTeachingConfig(**{"lambda_localization": 0.5, **options}))


def test_the_localization_is_a_sum_over_records_that_have_a_region():
    maps = torch.zeros(3, 1, 1, 2, 2)
    maps[..., 0, 0] = torch.tensor([1.0, 3.0, 1.0])[:, None, None]
    maps[..., 1, 1] = torch.tensor([1.0, 1.0, 1.0])[:, None, None]
    regions = INSIDE.expand(3, 2, 2).clone()
    regions[2] = False
    student = student_output(logits=torch.zeros(3, 2), maps=maps, input_size=(2, 2))
    guidance = Guidance(target_class=torch.zeros(3, 1).long(), regions=regions)

    terms = guided()(student, guidance, torch.tensor([0, 0, 1]))

    assert terms.terms["localization"].item() == pytest.approx(0.5 + 0.25)
    assert terms.total.item() == pytest.approx(math.log(2) + 0.5 * 0.75)
    assert terms.statistics["guided_fraction"].item() == pytest.approx(2 / 3)


def test_without_weight_it_is_the_labels_loss():
    loss = guided(lambda_localization=0)
    student = student_output(logits=torch.randn(3, 2))

    assert not loss.needs.maps_in(0)
    assert loss(student, None, torch.tensor([0, 1, 1])).terms.keys() == {"ce"}


def test_the_class_is_drawn_uniformly_among_a_records_own():
    hot = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0], [0.0] * 4])
    torch.manual_seed(0)

    drawn = torch.stack([_draw(hot) for _ in range(2000)])

    assert set(drawn[:, 0].tolist()) == {1, 3}
    assert (drawn[:, 0] == 1).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (drawn[:, 1] == 2).all()
    assert (drawn[:, 2] == NO_CLASS).all()


def test_the_front_has_no_point_that_another_one_beats():
    points = [(0.8, 0.3), (0.7, 0.5), (0.7, 0.4), (0.9, 0.1), (0.802, 0.301)]

    assert pareto_front(points) == [0, 1, 3]  # the last equals the first when rounded to 0.005
    assert pareto_front([*points, (0.95, 0.6)]) == [5]


def test_weights_are_kept_while_their_epoch_is_on_the_front(tmp_path):
    evaluated = iter([{"f1": 0.5, "epg": 0.5}, {"f1": 0.4, "epg": 0.4}, {"f1": 0.6, "epg": 0.6}])
    front = ParetoFront(tmp_path, lambda model: next(evaluated))
    model = build_model(CifarModelConfig(name="resnet8", width=2), 3)

    for epoch in (1, 2):
        front(model, epoch)
    assert [c["epoch"] for c in front.members()] == [1]
    front(model, 3)

    assert [p.name for p in (tmp_path / "pareto").glob("*.safetensors")] == [
        "epoch-0003.safetensors"
    ]
    digest = file_at(tmp_path / "pareto" / "epoch-0003.safetensors").sha256()
    front = read_signed(tmp_path / "pareto" / "front.json")["front"]
    assert front == [{"epoch": 3, "f1": 0.6, "epg": 0.6, "sha256": digest}]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    from tests.support.verbs import precompute

    config = precompute_config(tmp_path_factory.mktemp("guided") / "store")
    precompute.run(config)
    return config


def teach_guided(packed, network, run="teacher", **options):
    trainer = TrainerOptions(epochs=6, batch_size=8, num_threads=1)
    config = TeachConfig(
        store=StoreOptions(path=packed.store.path),
        teacher=network,
        teaching=GuidedTeachingConfig(
            **{"trainer": trainer, "optimizer": OptimizerOptions(lr=0.01), **options}
        ),
        evaluate=EvaluateOptions(splits=("train",)),
        run=run,
    )
    result = teach.run(config)
    folder = Path(result.weights).parent
    return folder, json.loads((folder / "metrics.json").read_text())["splits"]["train"]


@pytest.mark.parametrize(
    "network",
    [
        CifarModelConfig(name="resnet8", width=4),
        pytest.param(BcosModelConfig(name="resnet8", width=4), marks=pytest.mark.slow),
    ],
    ids=lambda network: network.kind,
)
def test_guidance_moves_explanations_onto_the_object(packed, network):
    _, plain = teach_guided(packed, network, run="plain", lambda_localization=0.0)
    folder, by_boxes = teach_guided(
        packed, network, run="guided", lambda_localization=1.0, pareto_split="test"
    )

    assert by_boxes["epg"] > plain["epg"] + 0.05
    kept = read_signed(folder / "pareto" / "front.json")["front"]
    assert kept
    assert {"epoch", "accuracy", "epg", "iou"} <= set(kept[0])
    started, _ = teach_guided(
        packed,
        network,
        run="again",
        start=str(folder / "pareto" / f"epoch-{kept[0]['epoch']:04d}.safetensors"),
        trainer=TrainerOptions(epochs=1, batch_size=8, num_threads=1),
    )
    assert started.is_dir()


def test_training_and_its_evaluations_decode_in_threads(packed, monkeypatch):
    found = []
    build = StoreDataset.__init__
    monkeypatch.setattr(
        StoreDataset,
        "__init__",
        lambda *a, **o: found.append(o["decode_threads"]) or build(*a, **o),
    )
    trainer = TrainerOptions(epochs=1, batch_size=8, num_threads=1, decode_threads=3)
    network = CifarModelConfig(name="resnet8", width=2)

    teach_guided(packed, network, trainer=trainer, pareto_split="test")

    assert found[:2] == [3, 3]  # the training, and the evaluation after each epoch
    assert found[2:] == [resolve_decode_threads(None)]  # that of the finished teacher


@pytest.mark.slow
def test_masks_guide_as_boxes_do(packed):
    network = CifarModelConfig(name="resnet8", width=4)
    _, by_masks = teach_guided(
        packed, network, run="masks", region="masks", lambda_localization=1.0
    )
    _, plain = teach_guided(packed, replace(network), run="none", lambda_localization=0.0)

    assert by_masks["epg"] > plain["epg"] + 0.05


def test_a_start_that_is_not_there_is_refused_by_name(packed):
    with pytest.raises(ConfigError, match=r"teaching\.start=nowhere\.safetensors does not exist"):
        teach_guided(packed, CifarModelConfig(name="resnet8", width=4), start="nowhere.safetensors")


def test_regions_without_a_view_are_the_boxes_at_the_networks_size(packed):
    store = Store(Path(packed.store.path))
    batch = StoreDataset(store, np.arange(8), with_regions=True).__getitems__(list(range(8)))

    whole = regions_of(batch, batch.labels, "boxes", (16, 16))
    half = regions_of(batch, batch.labels, "boxes", (8, 8))

    # Corners are rounded down to whole pixels, so up to this rounding a cell is inside if any of its pixels is.
    any_pixel = whole.unfold(1, 2, 2).unfold(2, 2, 2).any(dim=4).any(dim=3)
    assert half.shape == (8, 8, 8)
    assert (half <= any_pixel).all()
    assert float(half.float().mean()) == pytest.approx(float(whole.float().mean()), abs=0.08)


def test_a_teacher_that_sees_whole_frames_at_another_size_is_guided(packed):
    network = CifarModelConfig(name="resnet8", width=4)
    trainer = TrainerOptions(epochs=1, batch_size=8, num_threads=1)

    _, evaluated = teach_guided(
        packed, network, run="size", augment=AugmentOptions(size=24), trainer=trainer
    )

    assert 0 <= evaluated["epg"] <= 1
