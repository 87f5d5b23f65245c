"""Cost of a student's step with frozen explanations, against labels alone and against a live teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from permafrost.config.augment import AugmentOptions, MixConfig, OperationConfig
from permafrost.config.explainers import ExplainerConfig, GradCamConfig
from permafrost.config.methods import E2KDConfig, KDConfig, LabelsConfig, MethodConfig
from permafrost.config.models import CifarModelConfig, ModelConfig, TorchvisionModelConfig
from permafrost.config.training import OptimizerOptions
from permafrost.core.batches import Batch, Targets
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_images
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.recipes import PixelAugmentSchedule
from permafrost.loading.subset import rows_of_split
from permafrost.losses.base import StudentOutput, build_loss
from permafrost.models.compute import ComputeSettings
from permafrost.models.explanations import DEFAULT_EXPLAINER, explainer_named, gradcam, map_grid
from permafrost.models.providers import build_model, freeze
from permafrost.store.reader import Store, TeacherPass
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import train_step
from permafrost.training.targets import LiveTeacher, TargetSource
from permafrost_papers.e2kd.options import ReviewKDConfig
from tests.benchmarks.figures import Figure, figure, in_turn
from tests.benchmarks.inputs import CLASSES, TINY, precompute_config, write_tars
from tests.support.verbs import precompute

SIZE = (32, 32)
BATCH = 32
RECORDS = 40 * BATCH
FEATURES_BATCH = 16
ROUNDS = 60
STUDENT = CifarModelConfig(name="resnet20")
TEACHER = CifarModelConfig(name="resnet56", classes=CLASSES, weights="random")
VIEWS = AugmentOptions(
    operations=(OperationConfig(kind="pad_crop"), OperationConfig(kind="horizontal_flip"))
)


def step_figures(folder: Path) -> list[Figure]:
    """Measure frozen e2KD against labels only, and against the same e2KD with its ResNet-56 in the loop."""
    batches = read_batches(folder, TINY, GradCamConfig())
    teacher = build_live_teacher()
    frozen = Steps(E2KDConfig(lambda_map=5.0), batches)
    live = Steps(E2KDConfig(lambda_map=5.0), batches, teacher)
    labels = Steps(LabelsConfig(), batches)

    def ask() -> None:
        with torch.no_grad():
            teacher.model(batches[0].inputs.float() / 255)

    milliseconds = {"unit": "ms/step", "scale": 1e3}
    teacher_cost = median(a / b for a, b in in_turn(ask, frozen, ROUNDS // 3))
    return [
        figure(
            "frozen_e2kd_step_vs_labels",
            in_turn(frozen, labels, ROUNDS, warm_up=3),
            faster=False,
            aim="<= 1.05",
            **milliseconds,
        ),
        figure(
            "frozen_vs_live_e2kd_step",
            in_turn(frozen, live, ROUNDS, warm_up=3),
            faster=True,
            aim=f">= {0.9 * (1 + teacher_cost):.2f}",
            **milliseconds,
        ),
    ]


MIXED_STEPS = (
    "mixed_kd_step_vs_kd",
    "mixed_e2kd_step_vs_e2kd",
    "mixed_e2kd_step_of_own_maps_vs_e2kd",
)


def mixed_step_figures(folder: Path) -> list[Figure]:
    """Measure what mixtures cost a step on stored targets: half MixUp, half CutMix, against the same step without them.

    e2KD explains the classes of both records, or those of the record itself (method.second_maps=false).
    """
    batches = read_batches(folder, TINY, GradCamConfig())
    mix = (MixConfig(kind="mixup"), MixConfig(kind="cutmix", p=0.5))
    schedule = PixelAugmentSchedule(AugmentOptions(mix=mix), seed=0)
    mixed = [
        replace(batch, pixel_augment=schedule.draw(0, number * BATCH, BATCH))
        for number, batch in enumerate(batches)
    ]
    pairs = (
        (KDConfig(), KDConfig()),
        (E2KDConfig(lambda_map=5.0), E2KDConfig(lambda_map=5.0)),
        (E2KDConfig(lambda_map=5.0, second_maps=False), E2KDConfig(lambda_map=5.0)),
    )
    return [
        figure(
            name,
            in_turn(Steps(method, mixed), Steps(plain, batches), ROUNDS, warm_up=3),
            faster=False,
            unit="ms/step",
            scale=1e3,
            aim="",
        )
        for name, (method, plain) in zip(MIXED_STEPS, pairs, strict=True)
    ]


EXPLAINED = {
    "gradcam": "gradcam",
    "gradient": "gradient",
    "input_x_gradient": "input_x_gradient",
    "integrated_gradients": "integrated_gradients steps=4",
    "smoothgrad": "smoothgrad samples=4",
}
"""Explainers of the student by the last word of their figures' names."""
EXPLAINED_STEPS = tuple(
    f"explained_{what}_vs_kd_{name}" for what in ("step", "graph") for name in EXPLAINED
)


def explained_step_figures(folder: Path) -> list[Figure]:
    """Measure what a student's own maps cost: the time of an e2KD step, and the tensors kept for its backward pass."""
    batches = read_batches(folder, TINY, GradCamConfig())
    kd = Steps(KDConfig(), batches)
    explained = [Steps(E2KDConfig(), batches, explainer=line) for line in EXPLAINED.values()]
    times = ((in_turn(steps, kd, ROUNDS // 3, warm_up=2), "ms/step", 1e3) for steps in explained)
    sizes = (([(_kept_bytes(steps), _kept_bytes(kd))], "MB", 1e-6) for steps in explained)
    return [
        figure(name, pairs, faster=False, unit=unit, scale=scale, aim="")
        for name, (pairs, unit, scale) in zip(EXPLAINED_STEPS, chain(times, sizes), strict=True)
    ]


def _kept_bytes(step: Steps) -> float:
    """Return the bytes of the tensors that a step keeps for its backward pass, each once."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return float(sum(kept.values()))


FEATURES_STEPS = (
    "features_kd_step_224px_vs_kd",
    "frozen_review_kd_step_vs_kd",
    "frozen_vs_live_review_kd_step",
)


def features_step_figures(folder: Path) -> list[Figure]:
    """Measure what reading and moving features costs beside KD, and frozen ReviewKD beside KD and live ReviewKD."""
    torch.set_num_threads(1)
    return [_photograph_step(folder / "photographs"), *_review_steps(folder / "review")]


def _photograph_step(folder: Path) -> Figure:
    """Measure a step of KD of a ResNet-18 at 224 pixels that also reads and moves a ResNet-50's last stage.

    Each step reads its own batch. The features are those of the image and of the flipped image in int8, which the
    student's loss does not compare, so that only what storing them costs is measured.
    """
    tars, path = write_tars(folder / "tars", 4 * FEATURES_BATCH, 224), folder / "store"
    teacher = TorchvisionModelConfig(name="resnet50", classes=CLASSES, weights="random")
    config = precompute_config(tars, path, teacher=teacher, outputs=("logits", "features"))
    precompute.run(replace(config, annotate=replace(config.annotate, features_stages=(-1,))))
    store = Store(path)
    student = TorchvisionModelConfig(name="resnet18")
    with_features, without = (
        _stepping(Steps(KDConfig(), [], student=student), store, output_name, FEATURES_BATCH)
        for output_name in ("features", None)
    )
    return figure(
        FEATURES_STEPS[0],
        in_turn(with_features, without, ROUNDS // 6, warm_up=2),
        faster=False,
        unit="ms/record",
        scale=1e3 / FEATURES_BATCH,
        aim="<= 1.3",
    )


def _review_steps(folder: Path) -> list[Figure]:
    """Measure a step of ReviewKD of a ResNet-20, with all stages of a ResNet-56, their flipped images, too, in int8."""
    tars, path = write_tars(folder / "tars", 8 * BATCH, 32), folder / "store"
    network = _normalized_network(TEACHER, folder / "weights.safetensors")
    precompute.run(precompute_config(tars, path, teacher=network, outputs=("logits", "features")))
    store = Store(path)
    method = ReviewKDConfig(lambda_review=5.0, lambda_kd=1.0)
    needs = build_loss(method).needs
    teacher = LiveTeacher("live", freeze(build_model(network, CLASSES)), gradcam, SIZE, needs=needs)
    frozen = _stepping(Steps(method, []), store, "features", BATCH)
    live = _stepping(Steps(method, [], teacher), store, None, BATCH)
    kd = _stepping(Steps(KDConfig(), []), store, None, BATCH)
    milliseconds = {"unit": "ms/step", "scale": 1e3, "aim": ""}
    return [
        figure(
            FEATURES_STEPS[1],
            in_turn(frozen, kd, ROUNDS // 2, warm_up=3),
            faster=False,
            **milliseconds,
        ),
        figure(
            FEATURES_STEPS[2],
            in_turn(frozen, live, ROUNDS // 2, warm_up=3),
            faster=True,
            **milliseconds,
        ),
    ]


def _normalized_network(network: CifarModelConfig, path: Path) -> CifarModelConfig:
    """Save a random network whose batch norms know its activations, which otherwise exceed float16 in deep networks."""
    model = build_model(network, CLASSES).train()
    with torch.no_grad():
        for _ in range(50):
            model(torch.rand(BATCH, 3, *SIZE))
    save_file(model.state_dict(), path)
    return replace(network, weights=str(path))


def _stepping(steps: Steps, store: Store, output_name: str | None, size: int) -> Callable[[], None]:
    """Return a function that reads the next batch of `size` records, with that output, and takes a step."""
    rows = rows_of_split(store.index, "train")
    dataset = StoreDataset(store, rows, store.open_passes(), output=output_name)
    views = ViewSchedule(VIEWS, store.size, seed=0)
    loader = TrainLoader(dataset, views, batch_size=size, seed=0)
    batches = chain.from_iterable(loader.epoch(number) for number in count())
    steps.build_loss_parameters(next(batches))

    def step() -> None:
        batch = next(batches)
        assert bool(batch.targets[0].intermediates) == (output_name is not None)
        steps.take(batch)

    return step


def read_batches(
    folder: Path,
    teacher: ModelConfig,
    explainer: ExplainerConfig,
    *,
    side: int = 32,
    records: int | None = None,
    batch: int = BATCH,
) -> list[Batch]:
    """Annotate records of side x side pixels, and read them with random views."""
    torch.set_num_threads(1)
    tars, path = write_tars(folder / "tars", records or RECORDS, side), folder / "store"
    precompute.run(precompute_config(tars, path, teacher=teacher, explainer=explainer))
    store = Store(path)
    return list(open_stream(store, store.open_passes(), batch).epoch(0))


def open_stream(store: Store, passes: Sequence[TeacherPass], batch: int = BATCH) -> TrainLoader:
    """Open the stream of a training with random views."""
    dataset = StoreDataset(store, rows_of_split(store.index, "train"), passes)
    return TrainLoader(dataset, ViewSchedule(VIEWS, store.size, seed=0), batch_size=batch, seed=0)


def build_live_teacher(teacher: ModelConfig = TEACHER) -> LiveTeacher:
    """Build the teacher of the live steps."""
    return LiveTeacher(teacher.name, freeze(build_model(teacher, CLASSES)), gradcam, SIZE)


class Steps:
    """Callable that takes a student's next step on the next batch."""

    def __init__(
        self,
        method: MethodConfig,
        batches: Sequence[Batch],
        teacher: TargetSource | None = None,
        *,
        student: ModelConfig = STUDENT,
        explainer: str = DEFAULT_EXPLAINER,
        settings: ComputeSettings = ComputeSettings(),  # noqa: B008, frozen
    ) -> None:
        torch.manual_seed(0)
        model = build_model(student, CLASSES)
        self.training = Training(
            model=model,
            loss=build_loss(method),
            optimizer=build_optimizer(OptimizerOptions(), list(model.parameters())),
            explain=explainer_named(explainer),
            map_grid=None
            if explainer == DEFAULT_EXPLAINER
            else map_grid(model, SIZE, explainer_named(explainer)),
            compute_settings=settings,
        )
        if teacher is not None:
            self.training.targets = teacher
        self.batches = batches
        self.taken = 0

    @torch.no_grad()
    def build_loss_parameters(self, batch: Batch) -> None:
        """Create the parameters of the loss, whose shapes depend on both networks, and train them, too."""
        training = self.training
        size = (batch.inputs.shape[-2], batch.inputs.shape[-1])
        output = training.model.eval()(view_images(batch, size), training.loss.needs.intermediates)
        grid = (output.features.shape[-2], output.features.shape[-1])
        (targets,) = training.targets(batch, TargetRequest(grid, with_maps=False))
        assert isinstance(targets, Targets)
        training.loss.build(StudentOutput(output=output), targets)
        parameters = [*training.model.parameters(), *training.loss.parameters()]
        training.optimizer = build_optimizer(OptimizerOptions(), parameters)
        training.model.train()

    def __call__(self) -> None:
        self.take(self.batches[self.taken % len(self.batches)])
        self.taken += 1

    def take(self, batch: Batch) -> None:
        """Take a step on this batch."""
        size = (batch.inputs.shape[-2], batch.inputs.shape[-1])
        train_step(self.training, batch, size, clip_norm=1.0)
