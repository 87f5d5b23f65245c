"""Tables of mixtures: how far the rules for stored targets are from the teacher's answers."""

from __future__ import annotations

from docs.cells import Rows, single, table
from docs.measured import results_of

SCREEN = "cifar10_mixtures_screen"
_KINDS = {"mixup": "MixUp", "cutmix": "CutMix"}


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


TABLES = (mixture_rules,)
