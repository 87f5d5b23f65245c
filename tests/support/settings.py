"""Options of passes and trainings of every method and mode, of a tiny store and tiny networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from permafrost.config.augment import (
    AugmentOptions,
    MixConfig,
    OperationConfig,
    PixelOperationConfig,
    PolicyConfig,
    RandomViewsConfig,
)
from permafrost.config.distillation import DistillConfig
from permafrost.config.explainers import GradCamConfig
from permafrost.config.methods import (
    ATConfig,
    CatKDConfig,
    E2KDConfig,
    EmbeddingConfig,
    FeaturesConfig,
    KDConfig,
    LabelsConfig,
    SeveralConfig,
    TeacherTermOptions,
)
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import PassOptions, StoreOptions, SubsetOptions
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost_papers.e2kd.options import ReviewKDConfig
from permafrost_papers.interpretability.options import (
    CRDConfig,
    FTConfig,
    RotationsViewsConfig,
    SSKDConfig,
)
from permafrost_timm.options import TimmModelConfig
from tests.support.stores import precompute_config

TEACHER = CifarModelConfig(name="resnet8", width=4)
FROZEN = replace(TEACHER, weights="random")
OUTPUTS = ("logits", "maps", "attention", "class_maps", "features", "pooled")
MAPS = {"outputs": ("logits", "maps")}
NONE = AugmentOptions()
CROPS = AugmentOptions(
    operations=(
        OperationConfig(kind="pad_crop", padding=2),
        OperationConfig(kind="horizontal_flip"),
    )
)
AFFINE = AugmentOptions(
    operations=(
        OperationConfig(kind="affine", degrees=20, translate=(0.1, 0.1), scale=(0.9, 1.1)),
        OperationConfig(kind="rotation", degrees=30),
    )
)
STRONG = AugmentOptions(
    operations=(
        OperationConfig(kind="resized_crop"),
        OperationConfig(kind="horizontal_flip"),
        PolicyConfig(kind="randaugment"),
        PixelOperationConfig(kind="color_jitter"),
        PixelOperationConfig(kind="grayscale"),
        PixelOperationConfig(kind="gaussian_blur", sigma=(0.02, 0.05)),
        PixelOperationConfig(kind="random_erasing", maps="blank"),
        PixelOperationConfig(kind="equalize"),
    )
)
MIXES = replace(CROPS, mix=(MixConfig(kind="mixup", p=0.5), MixConfig(kind="cutmix", p=0.5)))
VIEWS = RandomViewsConfig(count=2)
MIXED_VIEWS = replace(VIEWS, mix=(MixConfig(kind="mixup"),))
E2KD = E2KDConfig(tau=4.0, lambda_ce=1.0, lambda_map=5.0)


def pass_config(name: str, explainer: Any = None, **options: Any) -> Any:
    """Options of a pass in batches of eight records, into the store of the current folder."""
    outer = {key: options.pop(key) for key in ("views", "augment") if key in options}
    return precompute_config(
        Path("store"),
        FROZEN,
        explainer=explainer or GradCamConfig(),
        annotate=PassOptions(name=name, **{"batch_size": 8, "outputs": OUTPUTS, **options}),
        **outer,
    )


PASSES: dict[str, dict[str, Any]] = {
    "frozen": {},
    "bfloat16": {"precision": "bfloat16"},
    "topk": {**MAPS, "logits": "topk", "k": 3},
    "several_classes": {**MAPS, "explainer": GradCamConfig(target_classes="topk", max_classes=2)},
    "margin": {"outputs": ("logits", "features"), "features_margin": 0.25, "features_channels": 4},
    "views": {"views": VIEWS, "augment": CROPS},
    "strong_views": {**MAPS, "views": VIEWS, "augment": STRONG},
    "mixed_views": {**MAPS, "views": MIXED_VIEWS, "augment": CROPS},
    "rotations": {"outputs": ("logits", "maps", "pooled"), "views": RotationsViewsConfig()},
}
"""Options of each pass."""


def training_config(
    name: str,
    method: Any,
    *,
    teacher: str | tuple[str, ...] = "frozen",
    trainer: dict[str, Any] | None = None,
    mode: str = "frozen",
    **options: Any,
) -> DistillConfig:
    """Options of a training of two epochs of five steps."""
    names = (teacher,) if isinstance(teacher, str) else teacher
    if mode == "live" or not method.needs_teacher or isinstance(method, SeveralConfig):
        names = ()
    if mode == "live":
        options["teacher"] = FROZEN
    settings = {"epochs": 2, "batch_size": 8, "log_every_steps": 100, **(trainer or {})}
    return DistillConfig(
        store=StoreOptions(path="store", teacher=names),
        student=options.pop("student", TEACHER),
        method=method,
        augment=options.pop("augment", CROPS),
        mode=mode,  # type: ignore[arg-type]
        optimizer=options.pop("optimizer", OptimizerOptions()),
        trainer=TrainerOptions(**settings),
        subset=SubsetOptions(),
        run=name,
        **options,
    )


METHODS: dict[str, Any] = {
    "labels": LabelsConfig(label_smoothing=0.1),
    "kd": KDConfig(tau=4.0, lambda_ce=1.0),
    "e2kd": E2KD,
    "e2kd_cat": E2KDConfig(lambda_cat=1.0),
    "at": ATConfig(),
    "cat_kd": CatKDConfig(),
    "review_kd": ReviewKDConfig(),
    "features": FeaturesConfig(lambda_ce=1.0),
    "embedding": EmbeddingConfig(lambda_ce=1.0, lambda_distance=25.0, lambda_angle=50.0),
    "ft": FTConfig(),
    "crd": CRDConfig(negatives=16),
}
_VIT = TimmModelConfig(name="vit_tiny_patch16_224", input_size=32)
_WITHOUT_LIVE = ("labels",)
_REPLAYED = ("kd", "e2kd", "at", "cat_kd", "review_kd", "features", "embedding")
_MIXED = ("labels", "kd", "e2kd", "at", "cat_kd", "review_kd", "features")
_SSKD = {"trainer": {"batch_size": 16}}
TRAININGS: dict[str, dict[str, Any]] = {
    **{name: {"method": method} for name, method in METHODS.items()},
    **{
        f"{name}.live": {"method": method, "mode": "live"}
        for name, method in METHODS.items()
        if name not in _WITHOUT_LIVE
    },
    **{
        f"{name}.replay": {
            "method": METHODS[name],
            "mode": "replay",
            "views": VIEWS,
            "teacher": "views",
            "augment": NONE,
        }
        for name in _REPLAYED
    },
    **{f"{name}.mixed": {"method": METHODS[name], "augment": MIXES} for name in _MIXED},
    "e2kd.strong": {"method": E2KD, "augment": STRONG},
    "e2kd.affine": {"method": E2KD, "augment": AFFINE},
    "e2kd.trivial": {
        "method": E2KD,
        "augment": AugmentOptions(operations=(PolicyConfig(kind="trivialaugment"),)),
    },
    "e2kd.live.strong": {"method": E2KD, "mode": "live", "augment": STRONG},
    "e2kd.replay.strong": {
        **{"method": E2KD, "mode": "replay", "views": VIEWS, "augment": NONE},
        "teacher": "strong_views",
    },
    "e2kd.replay.mixed": {
        **{"method": E2KD, "mode": "replay", "views": MIXED_VIEWS, "augment": NONE},
        "teacher": "mixed_views",
    },
    "e2kd.replay.per_step": {
        **{"method": E2KD, "mode": "replay", "views": replace(VIEWS, per_step=2)},
        **{"augment": NONE, "teacher": "views"},
    },
    "e2kd.topk": {"method": E2KD, "teacher": "topk"},
    "e2kd.several_classes": {"method": E2KD, "teacher": "several_classes"},
    "e2kd.two_teachers": {"method": E2KDConfig(tau=4.0), "teacher": ("frozen", "several_classes")},
    "several": {
        "method": SeveralConfig(
            terms=(
                TeacherTermOptions(teacher="frozen", method=FeaturesConfig(stages=(-1,))),
                TeacherTermOptions(teacher="several_classes", method=E2KDConfig(), weight=0.5),
            )
        )
    },
    "sskd.live": {"method": SSKDConfig(head_epochs=1), "mode": "live", **_SSKD},
    "sskd.replay": {
        **{"method": SSKDConfig(head_epochs=1), "mode": "replay", **_SSKD},
        **{"views": RotationsViewsConfig(per_step=4), "teacher": "rotations", "augment": NONE},
    },
    "e2kd.bfloat16": {"method": E2KD, "trainer": {"precision": "bfloat16"}},
    "e2kd.live.bfloat16": {"method": E2KD, "mode": "live", "trainer": {"precision": "bfloat16"}},
    "e2kd.free": {"method": E2KD, "trainer": {"deterministic": False}},
    "e2kd.float16": {"method": E2KD, "trainer": {"precision": "float16"}},
    "e2kd.channels_last": {"method": E2KD, "trainer": {"channels_last": True}},
    "e2kd.sgd": {"method": E2KD, "optimizer": OptimizerOptions(kind="sgd", lr=0.1)},
    "e2kd.agc": {"method": E2KD, "trainer": {"clip_norm": None, "agc": 0.01}},
    "e2kd.checkpoints": {"method": E2KD, "trainer": {"checkpoint_every_steps": 2}},
    "e2kd.select_epoch": {"method": E2KD, "select_epoch": "test.accuracy"},
    "vit": {"method": E2KD, "student": _VIT, "augment": replace(CROPS, size=32)},
    "vit.bfloat16": {
        **{"method": E2KD, "student": _VIT, "augment": replace(CROPS, size=32)},
        "trainer": {"precision": "bfloat16"},
    },
}
"""Options of each training."""
