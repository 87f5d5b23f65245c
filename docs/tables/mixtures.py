"""Tables of mixtures: students of stored targets, and how far the rules are from the teacher's answers."""

from __future__ import annotations

from docs.cells import Rows, by_seed, single, table
from docs.measured import results_of, runs_of

SCREEN = "cifar10_mixtures_screen"
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
    header = ("mixture, and share of the record", "KL of the rule to the answer, nats")
    return table((*header, "same first class, %", "cosine of the record's map"), rows)


TABLES = (mixture_screen, mixture_rules)
