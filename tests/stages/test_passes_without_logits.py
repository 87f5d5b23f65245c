"""Passes of features and embeddings alone: their contents, their students, and refusals of what needs logits."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from permafrost.annotation.precision import PrecisionError, describe_agreement
from permafrost.annotation.teacher_fields import pooled_fields
from permafrost.config.data import ImageTableDataConfig
from permafrost.config.methods import ATConfig, EmbeddingConfig, KDConfig
from permafrost.config.store import PassOptions
from permafrost.core.errors import ConfigError
from permafrost.models.classifier import Intermediates, WeightsError
from permafrost.models.network import Network
from permafrost.models.providers import build_model, freeze
from permafrost.runs.mirrors import RUNS
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost.training.metric_log import read_metrics
from permafrost_report.store_sheet import draw_store
from permafrost_timm.options import TimmModelConfig
from tests.support.batches import random_frames
from tests.support.runs import distill_config, evaluate_config
from tests.support.slow import slow
from tests.support.stores import Frozen, frozen_store, precompute_config
from tests.support.verbs import distill, evaluate, precompute

ALONE = PassOptions(batch_size=8, outputs=("pooled", "attention"))


def headless(teacher, path):
    """The teacher with a weights file that has no last layer."""
    state = {
        name: values
        for name, values in load_file(teacher.weights).items()
        if not name.startswith("linear")
    }
    save_file(state, path)
    return replace(teacher, weights=str(path), sha256=None)


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_teacher):
    """Store with one pass of a trunk without a last layer, which tests must not change."""
    folder = tmp_path_factory.mktemp("trunk")
    teacher = headless(tiny_teacher, folder / "trunk.safetensors")
    return frozen_store(folder / "store", teacher, annotate=ALONE)


def test_a_trunk_without_a_last_layer_gives_a_pass_without_logits(store, tiny_teacher):
    (teacher,) = store.store.open_passes()
    batch = next(iter(teacher.open_shard(s, ("pooled",)) for s in store.store.shards))

    model = freeze(build_model(tiny_teacher, 10))

    assert not teacher.manifest.has_logits
    assert [s.name for s in teacher.manifest.fields if not s.name.endswith("_scale")] == [
        *("pooled", "attention_1", "attention_2", "attention_3")
    ]
    assert (
        batch["pooled"].shape[-1]
        == model(random_frames(0) / 255, Intermediates(pooled=True)).pooled.shape[1]
    )
    assert list(verify_store(store.store.path)) == []


def test_a_student_of_embeddings_alone_is_trained_and_evaluated_without_its_last_layer(store):
    distill.run(distill_config(store, method=EmbeddingConfig()))
    results = evaluate.run(evaluate_config(store, splits=("test",))).splits["test"]
    names = ("knn", "linear_probe")
    probes = evaluate.run(
        replace(evaluate_config(store, splits=("test",)), evaluators=names)
    ).splits["test"]

    losses = [line["total"] for line in read_metrics(RUNS / "one" / "distill")]
    assert losses[-1] < losses[0]
    assert "accuracy" in results
    assert "agreement" not in results
    assert 0 <= probes["knn"]["accuracy"]["1"] <= 1


def test_the_probes_of_a_trunk_are_those_of_its_whole_network(store, tmp_path, tiny_teacher):
    """The teacher's accuracy needs a last layer, and its nearest neighbors do not."""
    copy = shutil.copytree(store.store.path, tmp_path / "store")
    config = replace(store.config, store=replace(store.config.store, path=str(copy)))
    store = Frozen(Store(copy), config)
    whole = replace(store.config, teacher=tiny_teacher)
    precompute.run(whole)
    results = []
    for run, teacher in (("trunk", store.config.teacher), ("whole", tiny_teacher)):
        config = replace(
            evaluate_config(store, run=run, splits=("test",)), model="teacher", teacher=teacher
        )
        results.append(evaluate.run(replace(config, evaluators=("knn",))).splits["test"]["knn"])

    assert results[0] == results[1]
    weights = tmp_path / "seven_classes.safetensors"
    head = {"linear.weight": torch.zeros(7, 16), "linear.bias": torch.zeros(7)}
    save_file(load_file(tiny_teacher.weights) | head, weights)
    other = replace(tiny_teacher, weights=str(weights), classes=7, sha256=None)
    precompute.run(replace(store.config, teacher=other))
    of_other_classes = replace(config, teacher=other, evaluators=("knn",), run="other")
    assert evaluate.run(of_other_classes).splits["test"]["knn"] == results[0]
    with pytest.raises(WeightsError, match="missing: linear"):
        evaluate.run(replace(config, run="acc", teacher=store.config.teacher))


def test_records_without_classes_teach_embeddings_and_refuse_logits(tmp_path, tiny_teacher):
    images = torch.cat([random_frames(seed) for seed in range(4)])
    names = []
    for number, image in enumerate(images):
        name = f"{number}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name)
        names.append(name)
    (tmp_path / "images.csv").write_text("\n".join(["path", *names]))
    data = ImageTableDataConfig(path=str(tmp_path / "images.csv"), label=None)
    path, teacher = tmp_path / "store", headless(tiny_teacher, tmp_path / "t.safetensors")

    frozen = frozen_store(path, teacher, data=data, annotate=ALONE)
    distill.run(distill_config(frozen, method=EmbeddingConfig()))

    assert Store(path).open_passes()[0].num_classes == 0
    losses = [line["total"] for line in read_metrics(RUNS / "one" / "distill")]
    assert losses[-1] < losses[0]
    with pytest.raises(ConfigError, match=r"have no classes; set teacher\.classes"):
        precompute.run(precompute_config(path, tiny_teacher, data=data))


def test_a_live_trunk_without_a_last_layer_teaches_what_needs_no_logits(store):
    live = {"mode": "live", "teacher": store.config.teacher}

    distill.run(distill_config(store, method=EmbeddingConfig(), **live))

    losses = [line["total"] for line in read_metrics(RUNS / "one" / "distill")]
    assert losses[-1] < losses[0]
    with pytest.raises(WeightsError, match="missing: linear"):
        distill.run(distill_config(store, run="kd", method=KDConfig(), **live))


@pytest.mark.parametrize(
    "method", [KDConfig(), EmbeddingConfig(lambda_kd=1.0), ATConfig(lambda_kd=1.0)]
)
def test_methods_that_need_logits_say_so(store, method):
    with pytest.raises(
        StoreMismatchError, match=rf"holds no logits, but method={method.kind} needs"
    ):
        distill.run(distill_config(store, method=method))


def test_attention_with_labels_needs_no_logits(store):
    distill.run(distill_config(store, method=ATConfig()))

    assert len(list(read_metrics(RUNS / "one" / "distill"))) > 0


def test_the_sheet_of_a_store_has_no_predictions(store, tmp_path):
    (teacher,) = store.store.open_passes()

    sheet = draw_store(store.store, teacher)

    sheet.figure.savefig(tmp_path / "sheet.png")
    titles = [axis.get_title(loc="left") for axis in sheet.figure.axes]
    assert not any(title.startswith("says") for title in titles)
    assert sum("(0 records)" in title for title in titles) == 2


def test_logits_of_a_trunk_without_a_last_layer_are_refused(tmp_path, tiny_teacher):
    teacher = headless(tiny_teacher, tmp_path / "trunk.safetensors")

    with pytest.raises(WeightsError, match=r"missing: linear\.bias, linear\.weight"):
        precompute.run(precompute_config(tmp_path / "store", teacher))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"outputs": ("maps",)},
            r"must contain logits in addition to maps; only attention, features, pooled",
        ),
        ({"outputs": ()}, r"annotate\.outputs=\[\] stores nothing"),
    ],
)
def test_outputs_that_read_the_last_layer_need_logits(options, message):
    with pytest.raises(ConfigError, match=message):
        PassOptions(**options)


def test_a_precision_is_compared_by_the_cosines_where_there_are_no_logits(
    tmp_path, tiny_teacher, monkeypatch
):
    lower = replace(ALONE, precision="bfloat16")
    config = precompute_config(tmp_path / "store", tiny_teacher, annotate=lower)
    precompute.run(config)
    (made,) = Store(tmp_path / "store").open_passes()
    agreement = made.manifest.agreement

    assert (agreement.precision, agreement.top1, agreement.kl_mean) == ("bfloat16", None, None)
    assert 0.995 < agreement.cosine_mean["pooled"] < 1
    assert describe_agreement(agreement).startswith("mean cosine of ")
    assert list(verify_store(tmp_path / "store")) == []
    monkeypatch.setattr("permafrost.annotation.precision.LOWEST_COSINE", 1.0)
    other = precompute_config(tmp_path / "other", tiny_teacher, annotate=lower)
    with pytest.raises(PrecisionError, match=r"the mean cosine of pooled is [01]\.\d+, not 1;"):
        precompute.run(other)


# ---- transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", slow("vit_base_patch16_siglip_224"), slow("deit_tiny_patch16_224")],
)
def test_the_embedding_of_a_transformer_is_the_input_of_its_last_layer(name):
    torch.manual_seed(0)
    model = freeze(build_model(TimmModelConfig(name=name, input_size=32), 5))
    images = random_frames(0).float() / 255
    images = torch.nn.functional.interpolate(images, (32, 32))

    output = model(images, Intermediates(pooled=True))

    expected = model.network.forward_head(
        model.network.forward_features(model.normalize(images)), pre_logits=True
    )
    torch.testing.assert_close(output.pooled, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits, model(images).logits, rtol=1e-5, atol=1e-6)
    assert pooled_fields(output)["pooled"].shape == (len(images), model.network.num_features)


@pytest.mark.parametrize(
    ("name", "outputs"),
    [("vit_tiny_patch16_224.augreg_in21k", 21843), slow("vit_small_patch16_224.dino", 0)],
)
def test_published_weights_of_other_classes_are_described_by_their_own_head(
    monkeypatch, name, outputs
):
    """The weights are not downloaded: the network is built with those of a seed."""
    from permafrost_timm import classifiers as provider

    build = provider._create

    def seeded(name, *, pretrained, **options):
        torch.manual_seed(3 if pretrained else 4)
        network = build(name, pretrained=False, **options)
        torch.manual_seed(
            torch.seed()
        )  # a head for other classes is drawn at any state of the generator
        return network

    monkeypatch.setattr(provider, "_create", seeded)
    config = TimmModelConfig(name=name, weights="pretrained", input_size=32)

    described = []
    for _ in range(2):
        monkeypatch.setattr("permafrost.models.network._BUILT", {})
        described.append(Network(config, 10).describe(reads_head=False))

    assert described[0] == described[1]
    assert described[0]["classes"] == 10
    assert freeze(build_model(config, 10))(torch.rand(1, 3, 32, 32)).logits.shape == (1, 10)
    with pytest.raises(
        ConfigError, match=rf"has {outputs} outputs, but 10 are needed.*outputs=\[pooled\]"
    ):
        Network(config, 10).describe()
