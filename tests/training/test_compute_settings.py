"""Precision, compilation and memory format, which change the computation of a step but not its result."""

import contextlib
import os
import shutil
from dataclasses import replace

import pytest
import torch

from permafrost.config.explainers import GradCamConfig
from permafrost.config.methods import E2KDConfig, KDConfig
from permafrost.config.models import CifarModelConfig, TorchvisionModelConfig
from permafrost.config.training import OptimizerOptions
from permafrost.core.distributed import DistributedContext
from permafrost.core.errors import ConfigError
from permafrost.losses.base import build_loss
from permafrost.models.compute import ComputeSettings, deterministic_algorithms, float32_products
from permafrost.models.explanations import explainer_named, gradcam
from permafrost.models.providers import build_model, freeze
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.training.build import build_training
from permafrost.training.distill import StudentPlan
from permafrost.training.metric_log import StepLog
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import batch_loss, train_step
from permafrost.training.targets import LiveTeacher
from permafrost_papers.bcos.options import BcosModelConfig
from permafrost_timm.options import TimmModelConfig
from tests.support.batches import (
    FRAME,
    NUM_CLASSES,
    build_batch,
    random_batch,
    random_frames,
    random_targets,
    tiny_model,
)
from tests.support.mixtures import mixed, share_of
from tests.support.runs import TRAINER, assert_equal_states, distill_config, weights_of
from tests.support.slow import slow
from tests.support.trainings import HostReads
from tests.support.verbs import distill

METHOD = E2KDConfig(tau=4.0, lambda_ce=1.0, lambda_map=5.0)


def training_with(compute_settings, seed=0, **optimizer):
    model = tiny_model(seed)
    half = compute_settings.precision == torch.float16
    return Training(
        model=model,
        loss=build_loss(METHOD),
        optimizer=build_optimizer(
            OptimizerOptions(**optimizer), list(model.parameters()), fused=half
        ),
        compute_settings=compute_settings,
    )


def gradient(training, batch):
    training.model.eval()
    training.forward.eval()
    loss = batch_loss(training, batch, FRAME).total
    parts = torch.autograd.grad(loss, list(training.model.parameters()))
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize(
    ("compute_settings", "tolerance"),
    [
        (ComputeSettings(channels_last=True), 1e-5),
        (ComputeSettings(precision=torch.bfloat16), 0.1),
        (ComputeSettings(precision=torch.float16), 0.02),
    ],
    ids=["channels_last", "bfloat16", "float16"],
)
def test_other_numerics_have_the_same_gradient_up_to_their_rounding(compute_settings, tolerance):
    wanted = gradient(training_with(ComputeSettings()), random_batch(0))

    found = gradient(training_with(compute_settings), random_batch(0))

    assert found.dtype == torch.float32
    assert (found - wanted).norm() < tolerance * wanted.norm()
    assert not torch.equal(found, wanted)  # control: the computation differs


def test_mixed_precision_keeps_parameters_loss_and_maps_in_float32(monkeypatch):
    training = training_with(ComputeSettings(precision=torch.bfloat16))
    seen = []
    monkeypatch.setattr(
        type(training.loss), "forward", spy(type(training.loss).forward, seen), raising=True
    )
    features = []
    training.model.register_forward_hook(lambda m, i, output: features.append(output.features))

    terms = train_step(training, random_batch(0), FRAME, clip_norm=1.0)

    (student,) = seen
    assert features[0].dtype == torch.bfloat16
    assert student.logits.dtype == student.maps.dtype == terms.total.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in training.model.parameters())


def spy(forward, seen):
    def spied(self, student, targets, labels):
        seen.append(student)
        return forward(self, student, targets, labels)

    return spied


def test_float16_scales_its_loss_and_skips_a_step_of_infinite_gradients():
    training = training_with(ComputeSettings(precision=torch.float16), kind="sgd")
    assert training.scaler.get_scale() == 2**16
    broken = build_batch(random_frames(0), random_targets(0), None)
    broken.targets[0].logits[0, 0] = torch.inf
    before = [p.detach().clone() for p in training.model.parameters()]

    train_step(training, broken, FRAME, clip_norm=1.0)

    assert all(torch.equal(p, b) for p, b in zip(training.model.parameters(), before, strict=True))
    assert training.scaler.get_scale() == 2**15
    for seed in range(8):  # the scale decreases until the gradients are finite
        train_step(training, random_batch(seed), FRAME, clip_norm=1.0)
    assert not all(
        torch.equal(p, b) for p, b in zip(training.model.parameters(), before, strict=True)
    )


def test_the_scale_of_float16_goes_into_the_checkpoint():
    training = training_with(ComputeSettings(precision=torch.float16))
    train_step(training, random_batch(0), FRAME, clip_norm=1.0)
    training.scaler.update(2.0**7)
    resumed = training_with(ComputeSettings(precision=torch.float16), seed=1)

    resumed.load_state(training.state())

    assert resumed.scaler.get_scale() == 2**7


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_reads_nothing_back_from_the_device(precision, kind):
    training = training_with(ComputeSettings(precision=precision), kind=kind)
    log = StepLog(write=lambda line: None, every_steps=1000)
    # The first step creates caches and moments.
    train_step(training, random_batch(0), FRAME, clip_norm=1.0)

    with HostReads(training.optimizer) as reads:
        terms = train_step(training, random_batch(1), FRAME, clip_norm=1.0)
        log.add(training, terms, records=4)

    assert reads.found == []
    with HostReads(training.optimizer) as reads:
        log.flush(training)
        terms.total.item()
    assert len(reads.found) >= 1  # control: reads are detected


def terms_without_reads(training, batches):
    """Take two steps, the second without reading from the device, and return the names of its terms."""
    train_step(training, batches[0], FRAME, clip_norm=1.0)
    with HostReads(training.optimizer) as reads:
        terms = train_step(training, batches[1], FRAME, clip_norm=1.0)
    assert reads.found == []
    return set(terms.terms)


@pytest.mark.parametrize("choice", ["top1", "topk", "all_gt", "sample_gt"])
def test_a_live_step_of_many_labels_reads_nothing_back_either(choice):
    count = 2 if choice in ("topk", "all_gt") else None
    explainer = GradCamConfig(target_classes=choice, max_classes=count)
    training = training_with(ComputeSettings())
    training.loss = build_loss(replace(METHOD, logits="mld", normalize_by="valid"))
    training.targets = LiveTeacher(
        "live", freeze(tiny_model(1)), gradcam, FRAME, explainer=explainer
    )
    labels = (torch.arange(4)[:, None] + torch.arange(NUM_CLASSES)) % 2
    batches = [replace(random_batch(seed), labels=labels.float()) for seed in range(2)]

    assert terms_without_reads(training, batches) == {"kd", "bce", "map"}


def test_a_live_step_on_mixtures_reads_nothing_back_either():
    training = training_with(ComputeSettings())
    training.targets = LiveTeacher("live", freeze(tiny_model(1)), gradcam, FRAME)
    batches = [mixed(random_batch(seed), share_of(0.3)) for seed in range(2)]

    assert terms_without_reads(training, batches) == {"kd", "ce", "map"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_on_a_gpu_never_waits(precision):
    from permafrost.loading.transfer import move_batch

    device = torch.device("cuda")
    model = tiny_model(0).to(device)
    training = Training(
        model=model,
        loss=build_loss(METHOD).to(device),
        optimizer=build_optimizer(
            OptimizerOptions(), list(model.parameters()), fused=precision == torch.float16
        ),
        compute_settings=ComputeSettings(precision=precision),
    )
    train_step(training, move_batch(random_batch(0), device), FRAME, clip_norm=1.0)

    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(training, move_batch(random_batch(1), device), FRAME, clip_norm=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_a_student_whose_explanation_is_differentiated_twice_is_not_compiled():
    vit = TimmModelConfig(name="vit_tiny_patch16_224", input_size=32)
    model = build_model(vit, NUM_CLASSES)
    parts = {
        "model": model,
        "optimizer": build_optimizer(OptimizerOptions(), list(model.parameters())),
        "compute_settings": ComputeSettings(compile=True),
    }

    with pytest.raises(ConfigError, match=r"trainer\.compile=true.*differentiated twice"):
        Training(loss=build_loss(METHOD), **parts)
    Training(loss=build_loss(KDConfig()), **parts)  # without maps, no second derivative is needed


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_a_compiled_student_takes_the_same_step():
    plain, compiled = (
        training_with(ComputeSettings()),
        training_with(ComputeSettings(compile=True)),
    )

    for seed in range(3):
        terms = [
            train_step(training, random_batch(seed), FRAME, clip_norm=1.0)
            for training in (plain, compiled)
        ]
        assert terms[1].total.item() == pytest.approx(terms[0].total.item(), rel=1e-4)

    assert compiled.forward is not compiled.model
    # Checkpoints and exports do not depend on compilation.
    assert compiled.state()["model"].keys() == plain.state()["model"].keys()


@pytest.mark.parametrize("kind", ["gradcam", "bcos_weights"])
def test_explanations_of_the_half_precision_graph_are_close_to_those_of_float32(kind):
    """GradCAM of a linear head uses float32 weights on half-precision features. W is a gradient of that graph."""
    config = (
        BcosModelConfig(name="resnet18")
        if kind == "bcos_weights"
        else CifarModelConfig(name="resnet8", width=8)
    )
    torch.manual_seed(0)
    model = build_model(config, NUM_CLASSES).eval()
    images = torch.rand(4, 3, 64, 64)
    classes = torch.arange(4)[:, None] % NUM_CLASSES

    def explain(precision):
        mixed = precision != torch.float32
        with torch.autocast("cpu", dtype=precision, enabled=mixed):
            output = model(images)
        output = output._replace(logits=output.logits.float())
        return explainer_named(kind)(model, output, classes).flatten(2)

    wanted, found = explain(torch.float32), explain(torch.bfloat16)

    cosine = torch.nn.functional.cosine_similarity(wanted, found, dim=2)
    assert found.dtype == torch.float32
    assert not torch.equal(wanted, found)
    assert cosine.min() > 0.99


def _kinds_of_products():
    return [
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.cudnn.rnn.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
    ]


@pytest.mark.parametrize("user", ["default", "older", "newer", "global"])
@pytest.mark.parametrize("tf32", [False, True])
def test_products_of_float32_are_settled_in_the_block_and_the_users_after_it(user, tf32):
    with contextlib.ExitStack() as stack:
        backends = torch.backends
        for kind in (backends, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul):
            stack.callback(setattr, kind, "fp32_precision", kind.fp32_precision)
        stack.callback(setattr, backends.cudnn, "allow_tf32", backends.cudnn.allow_tf32)
        if user == "older":
            backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = not tf32
        elif user == "newer":
            backends.cudnn.conv.fp32_precision = backends.cudnn.rnn.fp32_precision = "tf32"
            backends.cuda.matmul.fp32_precision = "tf32"
        elif user == "global":
            backends.fp32_precision = "tf32"
        before = _kinds_of_products()
        with float32_products(tf32=tf32):
            inside = _kinds_of_products()
        assert set(inside) <= ({"tf32"} if tf32 else {"ieee", "none"})
        assert _kinds_of_products() == before
        if user in ("default", "older"):  # which the newer settings would make an error
            assert isinstance(backends.cudnn.allow_tf32, bool)
            with backends.cudnn.flags(enabled=True):
                pass


@pytest.mark.parametrize("fastest", ["bfloat16", slow("float32")])
def test_auto_is_the_fastest_precision_of_the_device_and_stays_that_of_the_checkpoint(
    frozen, monkeypatch, fastest
):
    choices = [fastest]
    monkeypatch.setattr(
        "permafrost.training.build.fastest_precision", lambda device: choices.pop(0)
    )
    auto = replace(TRAINER, precision="auto", keep_checkpoint=True)
    explicit = replace(TRAINER, precision=fastest)

    distill.run(distill_config(frozen, trainer=auto, run="auto"))
    distill.run(distill_config(frozen, trainer=explicit, run="explicit"))

    assert choices == []
    assert_equal_states(weights_of("auto"), weights_of("explicit"))
    assert SavedNetwork(RUNS / "auto" / "distill").load()[1].precision == fastest
    # Another device, on which the other precision is faster, exports the network again and goes on.
    (RUNS / "auto" / "distill" / "model.json").unlink()
    choices.append({"bfloat16": "float32", "float32": "bfloat16"}[fastest])
    distill.run(distill_config(frozen, trainer=auto, run="auto"))
    assert choices == []
    assert SavedNetwork(RUNS / "auto" / "distill").load()[1].precision == fastest


def test_the_memory_format_of_null_is_that_of_the_kind_of_network(frozen):
    for kind, value, wanted in [
        (TorchvisionModelConfig(name="resnet18"), None, True),
        (TorchvisionModelConfig(name="resnet18"), False, False),
        (CifarModelConfig(name="resnet8"), None, False),
        (CifarModelConfig(name="resnet8"), True, True),
    ]:
        trainer = replace(TRAINER, channels_last=value)
        config = distill_config(frozen, trainer=trainer, method=KDConfig())
        config = replace(config, student=kind)
        spec = StudentPlan(config, RUNS / "one" / "distill").spec()

        training = build_training(spec, DistributedContext())

        assert training.compute_settings.channels_last == wanted
        weights = [p for p in training.model.parameters() if p.dim() == 4 and min(p.shape) > 1]
        formats = {p.is_contiguous(memory_format=torch.channels_last) for p in weights}
        assert formats == {wanted}


# ---- fixed orders of sums -------------------------------------------------------------------------


def test_fixed_orders_of_sums_are_asked_for_on_a_gpu_alone_and_put_back(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    for device, enabled, expected in (
        ("cpu", True, False),
        ("cuda", False, False),
        ("cuda", True, True),
    ):
        with deterministic_algorithms(torch.device(device), enabled=enabled):
            assert torch.are_deterministic_algorithms_enabled() == expected
        assert torch.are_deterministic_algorithms_enabled() == before
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic_algorithms(torch.device("cuda")):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_fixed_orders_that_a_program_insists_on_stay_errors():
    torch.use_deterministic_algorithms(True)
    try:
        with deterministic_algorithms(torch.device("cuda")):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
