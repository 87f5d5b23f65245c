"""Tables of mixtures: students of stored targets, and how far the rules are from the teacher's answers."""

from __future__ import annotations

from docs.cells import Cell, Rows, Run, by_seed, difference, single, spread, table
from docs.measured import results_of, runs_of

SCREEN, TEST = "cifar10_mixtures_screen", "cifar10_mixtures"
_KINDS = {"mixup": "MixUp", "cutmix": "CutMix"}
_METHODS = {"kd": "KD", "e2kd": "e2KD, one map", "e2kd_all": "e2KD, maps of all classes"}


def mixture_screen() -> str:
    """Held-out accuracy of students by method and mixture of stored targets."""
    endings = ("", "_mixup", "_cutmix", "_both")
    rows: Rows = [
        (label, [by_seed(runs_of(SCREEN, f"{method}{e}"), "accuracy") for e in endings])
        for method, label in _METHODS.items()
    ]
    header = ("held-out accuracy, % (by seed)", "no mixtures", "MixUp", "CutMix", "half of each")
    return table(header, rows)


def mixture_rules() -> str:
    """Rules for stored targets beside the teacher's answers to mixtures, by the share of the record."""
    rows: Rows = []
    for row in results_of(SCREEN)["rules"]:
        share = "any" if row["share"] == "any" else f"{row['share'].replace('-', ' to ')} %"
        cells = [
            single(row["mix_kl"]),
            single(row["mix_agreement"], 100, 1),
            single(row["mix_cosine"]),
        ]
        rows.append((f"{_KINDS[row['mix']]}, {share}", cells))
    header = ("mixture, and share of the record", "KL(answer, rule), nats")
    return table((*header, "same first class, %", "cosine of the record's map"), rows)


_TARGETS = {
    "": "no mixtures, frozen targets",
    "_mixup": "MixUp of frozen targets, by rule",
    "_plain_v16": "no mixtures, 16 stored views",
    "_stored": "MixUp in 16 stored views, the teacher's answers",
    "_live": "MixUp, the live teacher's answers",
    "_long": "no mixtures, frozen targets, 360 epochs",
    "_mixup_long": "MixUp of frozen targets, by rule, 360 epochs",
}


def _runs(method: str, ending: str) -> list[Run]:
    """Students of a variant on test, of which those without mixtures are of other experiments; empty if not
    measured."""
    if not ending:
        return runs_of("cifar10_50shots", method)
    if ending == "_plain_v16":
        return runs_of("cifar10_strong_views", f"{method}{ending}")
    measured = {run["method"] for run in results_of(TEST)["runs"]}
    variant = f"{method}{ending}"
    return runs_of(TEST, variant) if variant in measured else []


def mixture_test() -> str:
    """Test accuracy of students of mixtures over five seeds, and its difference from the rule of as many epochs."""
    rows: Rows = []
    for method, label in (("kd", "KD"), ("e2kd", "e2KD")):
        for ending, targets in _TARGETS.items():
            runs = _runs(method, ending)
            if len(runs) < 2:
                continue
            plain, rule = ("_long", "_mixup_long") if "long" in ending else ("", "_mixup")
            cells = [by_seed(runs, "accuracy"), spread(runs, "accuracy")]
            for other in (plain, rule):
                compared = _runs(method, other)
                shown = other != ending and len(compared) > 1
                cells.append(difference(runs, compared, "accuracy") if shown else Cell(""))
            rows.append((f"{label}: {targets}", cells))
    header = ("test accuracy, %", "by seed", "mean", "minus no mixtures", "minus the rule")
    return table(header, rows)


def mixture_answers() -> str:
    """Stored mixtures over stored views beside the rule over frozen targets, and the difference of both by seed."""
    rows: Rows = []
    for method, label in (("kd", "KD"), ("e2kd", "e2KD")):
        stored, views = _runs(method, "_stored"), _runs(method, "_plain_v16")
        rule, frozen = _runs(method, "_mixup"), _runs(method, "")
        gains = [_gain(stored, views), _gain(rule, frozen)]
        cells = [
            difference(stored, views, "accuracy"),
            difference(rule, frozen, "accuracy"),
            difference(*gains, "accuracy"),
        ]
        rows.append((label, cells))
    header = (
        "points of test accuracy",
        "stored mixtures minus stored views",
        "rule minus frozen targets",
    )
    return table((*header, "difference of both"), rows)


def _gain(runs: list[Run], baseline: list[Run]) -> list[Run]:
    """Accuracy of each seed minus that of the baseline."""
    before = {run["seed"]: run["accuracy"] for run in baseline}
    return [
        {"seed": run["seed"], "accuracy": run["accuracy"] - before[run["seed"]]}
        for run in runs
        if run["seed"] in before
    ]


TABLES = (mixture_screen, mixture_test, mixture_answers, mixture_rules)
