"""Verdicts on the claims of the papers, whose intervals are computed again from the committed files."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import t as student

from docs.claims import e2kd, interpretability, ked, unicam
from docs.claims.sections import claims_of, verdicts_of
from docs.measured import path_of
from docs.prose.places import place, read
from docs.tables.pages import PAPERS, TABLES, VERDICTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from docs.claims.sections import Difference

MODULES = (e2kd, ked, unicam, interpretability)


def seed_values(
    experiment: str, variants: str | tuple[str, ...], metric: str, over_teachers: bool
) -> list[float]:
    """Return the metric of each seed, averaged over variants, or of each teacher's variant, without docs.measured."""
    runs = json.loads(path_of(experiment).read_text())["runs"]
    variants = (variants,) if isinstance(variants, str) else variants
    if over_teachers:
        return [
            np.mean([run[metric] for run in runs if run["method"] == variant])
            for variant in variants
        ]
    values: dict[Any, list[float]] = {}
    for run in runs:
        if run["method"] in variants:
            values.setdefault(run["seed"], []).append(run[metric])
    return [np.mean(of) for of in values.values() if len(of) == len(variants)]


def interval_of(one: Difference) -> tuple[float, float, float, float]:
    """Return the mean, the bounds of the 95 % interval and the p-value, by Welch's formula or of pairs of teachers."""
    first, second = (
        one.of.scale * np.array(seed_values(experiment, variants, one.of.name, one.over_teachers))
        for experiment, variants in zip(one.experiments, (one.candidate, one.baseline), strict=True)
    )
    if one.over_teachers:
        error, degrees = (first - second).std(ddof=1) / math.sqrt(len(first)), len(first) - 1
    else:
        a, b = (of.var(ddof=1) / len(of) for of in (first, second))
        error = math.sqrt(a + b)
        degrees = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    mean = first.mean() - second.mean()
    half = student.ppf(0.975, degrees) * error
    return mean, mean - half, mean + half, 2 * student.sf(abs(mean) / error, degrees)


def wrong_intervals(one: Difference) -> Iterator[str]:
    """Iterate over what a written difference has that its committed results do not."""
    *bounds, p_value = interval_of(one)
    written = [float(number) for number in re.findall(r"[+-][\d.]+", one.text)]
    if not np.allclose(written, bounds, rtol=0, atol=0.51 * 10**-one.of.digits):
        yield f"the interval is {bounds}, not {one.text}"
    if not math.isclose(one.mean_and_p_value[1], p_value, rel_tol=1e-6):
        yield f"p is {p_value}, not {one.mean_and_p_value[1]}"
    if not one.search:
        yield "say which options were searched"


def wrong_variants(one: Difference) -> Iterator[str]:
    """Iterate over the options in which the variants of a tested comparison differ without its naming them."""
    if set(one.differing) != set(one.differs):
        yield f"the variants differ in {sorted(one.differing)}: name these in `differs`"
    for options in (*one.variants[0], *one.variants[1]):
        if options["method.kind"] == "e2kd" and not (
            options["method.lambda_kd"] > 0 and options["method.lambda_map"] > 0
        ):
            yield "the paper's e2KD has a term on logits: compare variants with both terms"


def problems() -> Iterator[str]:
    """Iterate over wrong intervals and variants, and over verdicts that a page does not have."""
    for module in MODULES:
        claims = f"docs/claims/{module.__name__.rpartition('.')[2]}.py"
        text = claims_of(module.CLAIMS)
        for one in (one for claim in module.CLAIMS for one in claim.measured):
            row = f"| {one.what} | {one.compared} | {one.terms} | "
            wrong = [*wrong_intervals(one), *([] if row in text else [f"no row {row!r}"])]
            yield from (f"{place(claims)} {one.what}: {words}" for words in wrong)
        for one in verdicts_of(module.CLAIMS):
            yield from (f"{place(claims)} {one.what}: {words}" for words in wrong_variants(one))
    written = "".join(TABLES[f"verdicts_{name}"]() for name in VERDICTS).splitlines()
    for page, claims_of_paper in PAPERS.items():
        path = f"docs/papers/{page}.md"
        paper = read(path)
        for one, (verdict, _) in verdicts_of(claims_of_paper).items():
            if f"| {one.what} | {one.compared} |" not in paper:
                yield f"{place(path)} write the comparison {one.what} (python -m docs.tables)"
            if any(one.experiment in experiments for experiments in VERDICTS.values()):
                rows = [line for line in written if f": {one.what} | " in line]
                if not rows or not rows[0].endswith(f"| {verdict} |"):
                    yield f"{place(path)} {one.what}: its verdict in the results is not {verdict}"
