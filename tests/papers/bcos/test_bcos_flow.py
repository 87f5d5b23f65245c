"""B-cos networks from teacher to evaluated student on a tiny set, with six-channel maps in every stage."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from permafrost.config.augment import AugmentOptions, OperationConfig
from permafrost.config.distillation import DistillConfig
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.methods import E2KDConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import PrecomputeConfig, StoreOptions
from permafrost.config.teaching import LabelTeachingConfig, TeachConfig
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.errors import ConfigError
from permafrost.evaluation.forward import EvaluatedModel, attribution_of, maps_of
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import decode_maps, view_images
from permafrost.loading.subset import rows_of_split
from permafrost.models.providers import build_model, freeze
from permafrost.store.reader import Store
from permafrost_papers.bcos.options import BcosModelConfig, BcosWeightsConfig
from permafrost_report.options import ReportConfig, ReportOptions
from tests.support.run_files import write_table
from tests.support.runs import distill_config
from tests.support.stores import precompute_config
from tests.support.verbs import distill, evaluate, precompute, report, teach

BCOS = BcosModelConfig(name="resnet8", width=4)
RECIPE = TrainerOptions(epochs=2, batch_size=8, num_threads=1, clip_norm=None, agc=0.01)
ADAM = OptimizerOptions(kind="adam", lr=1e-3, weight_decay=0.0)
VIEWS = AugmentOptions(operations=(OperationConfig(kind="pad_crop", padding=2),))


class BcosStore(NamedTuple):
    """Store with a pass of a B-cos teacher that was trained on it."""

    config: PrecomputeConfig
    evaluated: dict[str, float]
    """Metrics of the teacher on the test split, as teach reports them."""

    @property
    def store(self) -> StoreOptions:
        return StoreOptions(path=self.config.store.path)


@pytest.fixture(scope="module")
def bcos_store(tmp_path_factory) -> BcosStore:
    """Store with a teacher that is trained on labels with the B-cos recipe and frozen with its weights as maps."""
    folder = tmp_path_factory.mktemp("bcos")
    packed = precompute_config(folder / "store")
    precompute.run(packed)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = teach.run(
            TeachConfig(
                store=StoreOptions(path=packed.store.path),
                teacher=BCOS,
                teaching=LabelTeachingConfig(
                    loss="bce_offlabel", trainer=RECIPE, optimizer=ADAM, augment=VIEWS
                ),
                evaluate=EvaluateOptions(splits=("test",)),
                run="teacher",
            )
        )
    weights = str(folder / result.weights)
    config = replace(packed, teacher=replace(BCOS, weights=weights), explainer=BcosWeightsConfig())
    precompute.run(config)
    metrics = json.loads((Path(weights).parent / "metrics.json").read_text())
    return BcosStore(config, metrics["splits"]["test"])


def bcos_config(bcos_store: BcosStore, **options) -> DistillConfig:
    recipe = {"augment": VIEWS, "optimizer": ADAM, "trainer": RECIPE, "run": "student"}
    options = {"store": bcos_store.store, "student": BCOS, "method": E2KDConfig(tau=2.0), **options}
    return distill_config(bcos_store, **(recipe | options))


def test_a_taught_network_is_evaluated_by_its_own_explanation(bcos_store):
    assert 0 < bcos_store.evaluated["epg"] < 1
    assert 0 < bcos_store.evaluated["iou"] <= 1


def test_a_pass_holds_six_signed_channels_at_the_frames_resolution(bcos_store):
    (teacher,) = Store(Path(bcos_store.store.path)).open_passes()
    store = Store(Path(bcos_store.store.path))
    dataset = StoreDataset(store, rows_of_split(store.index, "train"), [teacher])

    maps = decode_maps(dataset.__getitems__([0, 1, 2, 3]).targets[0])

    assert teacher.explainer == "bcos_weights"
    assert maps.shape[1:] == (1, 6, 16, 16)
    assert (maps < 0).any()
    assert torch.allclose(maps.abs().amax(dim=(2, 3, 4)), torch.ones(4, 1), atol=1e-3)


def test_a_b_cos_student_learns_from_the_store_and_is_evaluated(bcos_store):
    distill.run(bcos_config(bcos_store), on_epoch=lambda epoch, line: None)

    evaluated = evaluate.run(
        EvaluateConfig(
            store=bcos_store.store,
            evaluate=EvaluateOptions(splits=("test",), num_pictures=2),
            run="student",
        )
    ).splits["test"]

    assert -1 <= evaluated["map_cosine"] <= 1
    assert evaluated["valid_map_fraction"] == 1
    assert 0 < evaluated["epg"] < 1
    assert 0 < evaluated["teacher_epg"] < 1


@pytest.mark.parametrize("same", [True, False])
def test_only_a_network_of_the_pass_s_explainer_is_compared_with_it(
    bcos_store, tiny_teacher, caplog, same
):
    evaluated = evaluate.run(
        EvaluateConfig(
            store=bcos_store.store,
            evaluate=EvaluateOptions(splits=("test",)),
            model="network",
            student=bcos_store.config.teacher if same else tiny_teacher,
            run="given",
        )
    ).splits["test"]

    assert evaluated.get("map_cosine") == (pytest.approx(1, abs=1e-4) if same else None)
    assert {"epg", "teacher_epg"} <= evaluated.keys()
    refused = "explainer=bcos_weights, by which CifarResNet cannot be explained."
    remedy = "to compare maps, name a pass of explainer=gradcam with evaluate.against="
    assert [refused in caplog.text, remedy in caplog.text] == [not same] * 2


def test_a_live_b_cos_teacher_has_the_frozen_ones_first_map_loss(bcos_store):
    lines = {}
    for mode in ("frozen", "live"):
        config = bcos_config(
            bcos_store,
            mode=mode,
            augment=AugmentOptions(operations=()),
            teacher=bcos_store.config.teacher,
            explainer=BcosWeightsConfig(),
            run=mode,
            trainer=replace(RECIPE, epochs=1),
        )
        distill.run(config, on_epoch=lambda epoch, line, mode=mode: lines.update({mode: line}))

    assert lines["frozen"].split()[:2] == lines["live"].split()[:2]


def test_evidence_is_the_weights_times_what_they_weigh(bcos_store):
    store = Store(Path(bcos_store.store.path))
    dataset = StoreDataset(store, rows_of_split(store.index, "test"), [], with_regions=True)
    network = freeze(build_model(bcos_store.config.teacher, 10))
    batch = dataset.__getitems__([0, 1, 2])
    model = EvaluatedModel(network=network, input_size=(16, 16))
    with torch.no_grad():
        output = network(view_images(batch, (16, 16)))

        shown = attribution_of(maps_of(model, output, batch.labels), batch)

    # The attributions sum to the label's logit without its bias.
    logits = output.logits.gather(1, batch.labels[:, None])[:, 0]
    assert torch.allclose(
        shown.sum(dim=(1, 2)), logits - network.network.logit_layer.bias, atol=1e-4
    )
    one_channel = torch.rand(3, 1, 1, 4, 4)
    assert torch.equal(attribution_of(one_channel, batch), one_channel[:, 0, 0])


@pytest.mark.slow
def test_the_report_shows_contributions_and_colors(bcos_store):
    distilled = replace(bcos_config(bcos_store), run="study/student")
    distill.run(distilled, on_epoch=lambda epoch, line: None)
    options = EvaluateOptions(splits=("test",), num_pictures=2)
    evaluate.run(EvaluateConfig(store=bcos_store.store, evaluate=options, run="study/student"))
    pictures = load_file("runs/study/student/evaluate/pictures.safetensors")
    shutil.copytree("runs/study/student", "runs/study/kd")
    named = {"kd": "kd", "e2kd": "student"}
    runs = [{"variant": name, "point": {}, "seed": 0, "run": run} for name, run in named.items()]
    write_table(Path("runs/study"), runs)

    result = report.run(
        ReportConfig(
            store=bcos_store.store,
            augment=VIEWS,
            report=ReportOptions(contact_records=2, case_shift=3),
            run="study",
        )
    )

    for whose in ("", "teacher_"):
        assert (pictures[f"{whose}maps"] < 0).any()
        assert pictures[f"{whose}colors"].shape == (2, 16, 16, 4)
        assert pictures[f"{whose}colors"].float().std() > 0
    html = Path(result.html).read_text()
    assert "red for positive and blue for negative contributions" in html
    # Maps, cases of one kind, cases under shifts, contact sheet.
    figures = re.findall(r'class="scroll tiles" role="region" aria-label="([^"]*)"', html)
    assert figures[0] == "Explanation maps"
    assert [name.partition(":")[0] for name in figures[1:-1]] == ["Split test"] * 2
    assert figures[-1].startswith("Images and maps, as stored")
    stored = json.loads(Path(result.json).read_text())["passes"]
    assert [entry["map"] for entry in stored] == ["6x16x16 float16"]
    assert stored[0]["fidelity"] > 0.99999


def test_the_wrong_explainer_is_refused_by_name(bcos_store):
    gradcam = replace(
        precompute_config(Path(bcos_store.store.path)), teacher=bcos_store.config.teacher
    )
    with pytest.raises(ConfigError, match="set explainer=bcos_weights"):
        precompute.run(gradcam)

    plain = bcos_config(bcos_store, student=CifarModelConfig(name="resnet8", width=4), run="plain")
    with pytest.raises(ConfigError, match=r"explains B-cos networks.*not CifarResNet"):
        distill.run(plain, on_epoch=lambda epoch, line: None)
