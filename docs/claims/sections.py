"""The claims of the papers, in their order, with the recipe of each and our result.

`python -m docs.tables` writes them into docs/papers/. Commands and reported numbers are those of the recipes' headers,
results are those that are committed next to the recipes.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from scipy.stats import ttest_1samp

from docs.cells import difference, paired_values
from docs.measured import ROOT, mean_of_arms, means_by_arm, path_of, runs_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from docs.cells import Run


@dataclass(frozen=True)
class Quantity:
    """A value of committed results, and how its differences are written."""

    name: str
    scale: float = 1
    digits: int = 3
    unit: str = ""


ACCURACY = Quantity("accuracy", 100, 1, " points")
AGREEMENT = Quantity("agreement", 100, 1, " points")


@dataclass(frozen=True)
class Difference:
    """A comparison of two arms of committed results."""

    what: str
    """What is compared, and at which size."""
    experiment: str
    candidate: str | tuple[str, ...]
    """Arm, as the results name it, or several, whose mean is compared seed by seed."""
    baseline: str | tuple[str, ...]
    of: Quantity = ACCURACY
    baseline_experiment: str = ""
    """Experiment of the baseline, empty if it is the same."""
    paper: Literal[-1, 0, 1] = 0
    """Sign of the difference according to the paper; 0 if the paper, as we know it, makes no such claim."""
    over_teachers: bool = False
    """True if each arm is of another teacher and counts as one value, the mean over its seeds. A sentence about
    teachers in general has the spread of teachers."""

    @property
    def experiments(self) -> tuple[str, str]:
        """Experiments of candidate and baseline."""
        return self.experiment, self.baseline_experiment or self.experiment

    @property
    def is_measured(self) -> bool:
        """True if the results of both experiments are committed."""
        return all(path_of(name).exists() for name in self.experiments)

    @cached_property
    def pair(self) -> tuple[list[Run], list[Run]]:
        """Runs of candidate and baseline."""
        combined = means_by_arm if self.over_teachers else mean_of_arms
        candidate, baseline = (
            runs_of(experiment, arms)
            if isinstance(arms, str)
            else combined(experiment, arms, self.of.name)
            for experiment, arms in zip(
                self.experiments, (self.candidate, self.baseline), strict=True
            )
        )
        return candidate, baseline

    @cached_property
    def values(self) -> list[float]:
        """Difference of each seed that both arms have, or of each teacher."""
        return paired_values(*self.pair, self.of.name, self.of.scale)

    @property
    def units(self) -> str:
        """Number of values, with what they are if they are not seeds."""
        count = str(len(self.values))
        return f"{count} teachers" if self.over_teachers else count

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the paired t-test."""
        return float(ttest_1samp(self.values, 0).pvalue)

    @property
    def text(self) -> str:
        """Mean difference with its interval and unit."""
        cell = difference(*self.pair, self.of.name, self.of.scale, self.of.digits)
        return f"{cell.text}{self.of.unit}"

    @property
    def source(self) -> str:
        """Links to the committed results."""
        return ", ".join(_link(name, "results.json") for name in dict.fromkeys(self.experiments))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A table, a figure or a statement of a paper."""

    title: str
    recipes: tuple[str, ...] = ()
    """Recipes that measure it at the paper's size or, if the paper's data cannot be had, at another one."""
    reported: str = ""
    """What the paper says, in addition to the headers of the recipes."""
    here: tuple[Difference | str, ...] = ()
    """Our result; empty if it was not run."""
    missing: str = ""
    """Reason why it was not run, or why it is not here."""
    small: tuple[str, ...] = field(default=())
    """Recipes that were run here, at a small size."""
    further: tuple[tuple[str, str], ...] = ()
    """Further commands, each with a sentence on what it does, empty if the last one is about it, too."""

    @property
    def measured(self) -> list[Difference]:
        """Comparisons whose results are committed."""
        return [one for one in self.here if isinstance(one, Difference) and one.is_measured]


# ---- verdicts ------------------------------------------------------------------------------------

SUPPORTS, CONTRADICTS, OPEN, NOT_TESTED = "supports", "contradicts", "open", "not tested"
LEVEL = 0.05


def tested_claims(claims: Sequence[Claim]) -> list[Difference]:
    """Measured comparisons of a page of which the paper states the sign."""
    return [one for claim in claims for one in claim.measured if one.paper]


def corrected_p_values(values: Sequence[float]) -> list[float]:
    """Correct p-values by Holm's method: the k-th smallest of n by n - k + 1, never below a smaller one's."""
    order = sorted(range(len(values)), key=lambda position: values[position])
    corrected, highest = [0.0] * len(values), 0.0
    for rank, position in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[position]))
        corrected[position] = highest
    return corrected


def verdicts_of(claims: Sequence[Claim]) -> dict[Difference, tuple[str, float]]:
    """Verdict and p-value of each comparison of a page of which the paper states the sign.

    A comparison supports the paper if its p-value is below LEVEL and its sign is the paper's, contradicts it if the
    sign is the other one, and is open otherwise. The p-values are corrected by Holm's method for the number of these
    comparisons.
    """
    tested = tested_claims(claims)
    p_values = corrected_p_values([one.p_value for one in tested])
    verdicts = {}
    for one, p_value in zip(tested, p_values, strict=True):
        agrees = fmean(one.values) * one.paper > 0
        decided = SUPPORTS if agrees else CONTRADICTS
        verdicts[one] = (decided if p_value < LEVEL else OPEN, p_value)
    return verdicts


def verdict_of(claim: Claim, verdicts: Mapping[Difference, tuple[str, float]]) -> str:
    """Verdict of a claim: that of its comparisons, with their numbers if they differ."""
    found = Counter(verdicts[one][0] for one in claim.measured if one.paper)
    if not found:
        return NOT_TESTED
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(
        f"{name} {found[name]}" for name in (SUPPORTS, CONTRADICTS, OPEN) if found[name]
    )


def verdict_rows(papers: Mapping[str, Sequence[Claim]], experiments: Sequence[str]) -> str:
    """Markdown table of the tested comparisons with these experiments, as the pages of the papers have them.

    papers  claims by the name of their page
    """
    rows = []
    for page, claims in papers.items():
        verdicts = verdicts_of(claims)
        for claim in claims:
            link = f"[{claim.title.partition(':')[0]}](../papers/{page}.md#{_anchor(claim.title)})"
            rows += [
                f"| {link}: {one.what} | {one.text} | {_shown_p(verdicts[one][1])} | {verdicts[one][0]} |"
                for one in claim.measured
                if one.paper and one.experiment in experiments
            ]
    header = (
        "| claim of the paper, and comparison | difference (95 % interval) | p (Holm) | verdict |"
        "\n|---|---|---|---|"
    )
    return "\n".join([header, *rows]) + "\n"


# ---- sections ------------------------------------------------------------------------------------


def claims_of(claims: Sequence[Claim]) -> str:
    """Markdown sections of a paper's claims, after a summary of their verdicts."""
    verdicts = verdicts_of(claims)
    rows = [
        f"| [{claim.title}](#{_anchor(claim.title)}) | {verdict_of(claim, verdicts)} |"
        for claim in claims
    ]
    summary = "\n".join(["| claim | our results |", "|---|---|", *rows])
    parts = [_rule(len(verdicts)), summary]
    return "\n\n".join([*parts, *(_section(claim, verdicts) for claim in claims)]) + "\n"


def _rule(count: int) -> str:
    """Sentences that say how verdicts are decided."""
    return "\n".join(
        textwrap.wrap(
            "A comparison *supports* or *contradicts* the paper by its sign if p < "
            f"{LEVEL} in a paired t-test over seeds, or over teachers, corrected for the {count} comparisons of this "
            "page (Holm), and is *open* otherwise. Rows without a verdict are "
            "comparisons of our own. The intervals are not corrected.",
            width=118,
        )
    )


def _anchor(title: str) -> str:
    """Anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _section(claim: Claim, verdicts: Mapping[Difference, tuple[str, float]]) -> str:
    """Markdown section of a claim: what the paper says, our results with their verdict, and the commands."""
    parts = [f"### {claim.title}"]
    tables = [f"```text\n{text}\n```" for text in _reported_tables(claim.recipes)]
    said = claim.reported or ("as follows." if tables else "numbers not seen by us.")
    parts += [f"**The paper:** {said}", *tables]
    parts.append(f"**Our results:** {verdict_of(claim, verdicts)}.")
    if claim.measured:
        rows = [_row(one, verdicts.get(one)) for one in claim.measured]
        header = "| comparison | difference (95 % interval) | seeds | p | verdict |\n|---|---|---|---|---|"
        parts.append("\n".join([header, *rows]))
        sources = dict.fromkeys(one.source for one in claim.measured)
        parts.append(f"Results: {', '.join(sources)}.")
    notes = [one for one in claim.here if isinstance(one, str)]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    if claim.recipes:
        parts.append("**Commands.**")
    parts += [_recipe(name) for name in claim.recipes]
    if claim.missing:
        parts.append(f"Not run here: {claim.missing}")
    if claim.small:
        parts.append(f"Smaller experiment{'s'[: len(claim.small) - 1]} that we ran:")
        parts += [_recipe(name) for name in claim.small]
    parts += [
        f"{sentence}\n\n```bash\n{wrapped(command)}\n```".lstrip()
        for sentence, command in claim.further
    ]
    return "\n\n".join(parts)


def _reported_tables(recipes: Sequence[str]) -> list[str]:
    """Return the numbers of the paper in headers of recipes, each once, below the recipes that have them."""
    named: dict[str, list[str]] = {}
    for recipe in recipes:
        if text := reported_in(recipe):
            named.setdefault(text, []).append(recipe)
    return [
        text if len(recipes) == 1 else f"{', '.join(names)}\n{text}"
        for text, names in named.items()
    ]


def _row(one: Difference, verdict: tuple[str, float] | None) -> str:
    decided, p_value = ("", "") if verdict is None else (verdict[0], _shown_p(verdict[1]))
    return f"| {one.what} | {one.text} | {one.units} | {p_value} | {decided} |"


def _shown_p(value: float) -> str:
    """Format a p-value with two digits."""
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


# ---- headers of recipes --------------------------------------------------------------------------


def header_of(recipe: str) -> str:
    """Comment at the top of a recipe, without the comment marks."""
    text = path_of(recipe, "yaml").read_text()
    lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def commands_of(recipe: str) -> list[str]:
    """Commands of a recipe's header, and the names of recipes whose commands come before, as comments."""
    joined = re.sub(r" \\\n +", " ", header_of(recipe))
    found = re.findall(r"^  (permafrost .*|make .*|the commands of .*)", joined, re.MULTILINE)
    typed = [re.sub(r" {2,}.*", "", line) for line in found]  # without a remark beside the command
    return [f"# {line}" if line.startswith("the ") else line for line in typed]


def reported_in(recipe: str) -> str:
    """Paragraph of a recipe's header with the paper's numbers, empty if it has none."""
    found = re.search(r"^(Reported.*?)(?=^\S|\Z)", header_of(recipe), re.MULTILINE | re.DOTALL)
    return "" if found is None else found[1].rstrip()


def summary_of(recipe: str) -> str:
    """First paragraph of a recipe's header, up to its commands and its data, without the name of its results."""
    opening = " ".join(re.split(r"\n(?=  |Data )", header_of(recipe))[0].split())
    opening = re.sub(r" [^.]*:$", "", opening)  # a caption of the commands
    return re.sub(
        r" The measured [a-z]+ (is|are)( in)? [^.]*\.results\.json[^.]*(\.results\.json[^.]*)?\.",
        "",
        opening,
    )


def _recipe(name: str) -> str:
    commands = "\n".join(map(wrapped, commands_of(name)))
    parts = [f"{_link(name)}: {summary_of(name)}", f"```bash\n{commands}\n```"]
    return "\n\n".join(parts)


def wrapped(command: str) -> str:
    """Break a long command between its words, never within quotation marks."""
    lines = [""]
    for word in re.findall(r"""(?:"[^"]*"|'[^']*'|[^\s"'])+""", command):
        if lines[-1] and len(lines[-1]) + len(word) > 106:
            lines.append("   ")
        lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return " \\\n".join(lines)


def _link(experiment: str, ending: str = "yaml") -> str:
    return f"[{experiment}](../../{path_of(experiment, ending).relative_to(ROOT).as_posix()})"
