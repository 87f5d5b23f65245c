"""Every method with mixtures in every mode: trained, or refused by name."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from permafrost.config.augment import AugmentOptions, MixConfig, OperationConfig, RandomViewsConfig
from permafrost.config.families import FAMILIES
from permafrost.config.store import PassOptions
from permafrost.core.errors import ConfigError
from permafrost.store.reader import Store
from tests.support.composition import config_of
from tests.support.items import for_each
from tests.support.runs import TRAINER, distill_config, weights_of
from tests.support.slow import slow
from tests.support.stores import Frozen, precompute_config
from tests.support.verbs import distill, precompute

MIXES = {"mixup": (MixConfig(kind="mixup", alpha=0.4),), "cutmix": (MixConfig(kind="cutmix"),)}
CROP = (OperationConfig(kind="pad_crop", padding=3), OperationConfig(kind="horizontal_flip"))
LIVE = ["teacher=cifar", "teacher.name=resnet8", "teacher.weights=w.pt"]
REFUSED = {
    "frozen": {"crd", "dkd", "ft", "ked", "sskd"},
    "replay": {"crd", "dkd", "ft", "ked", "labels", "sskd"},
    "live": {"crd", "dkd", "labels", "several", "sskd"},
}
"""Methods that a mode refuses with mixtures. Labels and several methods have no replay or live mode at all."""
WORDS = {"several": ["method.terms=[{teacher: pass, method: kd}]"], "ked": ["student=additive"]}


@for_each("kind,mode,name", product(FAMILIES["method"], REFUSED, MIXES))
def test_a_method_takes_mixtures_in_a_mode_or_says_why_not(kind, mode, name):
    mix = f"augment.mix=[{{kind: {name}}}]"
    words = [f"method={kind}", f"mode={mode}", mix, *WORDS.get(kind, []), "trainer.batch_size=64"]
    if mode == "live":
        words += LIVE
    if mode == "replay" and kind == "sskd":
        words += ["views=rotations", "views.per_step=4"]

    if kind not in REFUSED[mode]:
        assert config_of("distill", *words).augment.mixes
        return
    with pytest.raises(ConfigError, match=kind):
        config_of("distill", *words)


@pytest.fixture(scope="module")
def full(tmp_path_factory, tiny_teacher):
    """Store with a canonical pass and one of two stored views, of every output that methods with rules read."""
    annotate = PassOptions(
        batch_size=8,
        outputs=("logits", "maps", "attention", "class_maps", "features", "pooled"),
        class_map_size=4,
    )
    path = tmp_path_factory.mktemp("full") / "store"
    config = precompute_config(
        path,
        tiny_teacher,
        annotate=annotate,
        views=RandomViewsConfig(count=2, seed=1),
        augment=AugmentOptions(operations=CROP),
    )
    precompute.run(config)
    return Frozen(Store(Path(path)), config)


USUAL = {
    *(("labels", "frozen"), ("kd", "frozen"), ("e2kd", "frozen"), ("review_kd", "frozen")),
    ("e2kd", "replay"),
}
TRAINED = [
    (kind, mode) if (kind, mode) in USUAL else slow(kind, mode)
    for mode in ("frozen", "replay")
    for kind, cls in FAMILIES["method"].items()
    if cls.has_mix_rule and kind not in REFUSED[mode]
]


@pytest.mark.parametrize(("kind", "mode"), TRAINED)
def test_a_student_of_stored_targets_is_trained_on_mixtures(full, kind, mode):
    method = FAMILIES["method"][kind]()
    trainer = replace(TRAINER, epochs=1, log_every_steps=1)

    for name, mix in {"none": (), **MIXES}.items():
        augment = AugmentOptions(operations=CROP, mix=mix)
        config = distill_config(full, mode=mode, method=method, trainer=trainer, run=name)
        assert distill.run(replace(config, augment=augment)).trained_epochs == 1

    states = {name: weights_of(name) for name in ("none", *MIXES)}
    for name, state in states.items():
        assert all(values.isfinite().all() for values in state.values())
        others = [each for other, each in states.items() if other != name]
        layer = next(iter(state))
        assert all(not torch.equal(state[layer], each[layer]) for each in others)
