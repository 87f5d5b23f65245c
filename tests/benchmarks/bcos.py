"""B-cos networks, whose explanations are gradients of the whole network: a student's step and a teacher's pass."""

from __future__ import annotations

from pathlib import Path

from permafrost.config.methods import E2KDConfig, LabelsConfig
from permafrost_papers.bcos.options import BcosModelConfig, BcosWeightsConfig
from tests.benchmarks.figures import Figure, figure, in_turn
from tests.benchmarks.inputs import CLASSES, pack, write_tars
from tests.benchmarks.precomputing import annotator, bare_loop
from tests.benchmarks.steps import Steps, read_batches

TEACHER = BcosModelConfig(name="resnet20", classes=CLASSES, weights="random")
STUDENT = BcosModelConfig(name="resnet8")
STEP_ROUNDS = 30
PASS_RECORDS = 9000
PASS_ROUNDS = 3
EXPLAINER = BcosWeightsConfig()


def bcos_step_figure(folder: Path) -> list[Figure]:
    """Measure frozen e2KD, whose map term needs a second derivative of the student, against labels only."""
    batches = read_batches(folder, TEACHER, EXPLAINER)
    frozen = Steps(E2KDConfig(), batches, student=STUDENT, explainer="bcos_weights")
    labels = Steps(LabelsConfig(loss="bce_offlabel"), batches, student=STUDENT)
    pairs = in_turn(frozen, labels, STEP_ROUNDS, warm_up=3)
    name = "bcos_frozen_e2kd_step_vs_labels"
    return [figure(name, pairs, faster=False, unit="ms/step", scale=1e3, aim="")]


def bcos_precompute_figure(folder: Path) -> list[Figure]:
    """Measure a pass against a bare loop that also computes the explanations."""
    tars, store = write_tars(folder / "tars", PASS_RECORDS, 32), folder / "store"
    pack(tars, store)
    whole = annotator(tars, store, PASS_RECORDS, teacher=TEACHER, explainer=EXPLAINER)
    pairs = in_turn(whole, lambda: bare_loop(tars, PASS_RECORDS, TEACHER), PASS_ROUNDS)
    return [
        figure(
            "bcos_precompute_vs_bare_loop",
            pairs,
            faster=True,
            unit="ms/record",
            scale=1e3 / PASS_RECORDS,
            aim=">= 0.95",
        )
    ]
