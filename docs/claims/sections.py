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

from scipy.stats import ttest_1samp, ttest_ind

from docs.cells import difference, numbers_of
from docs.claims.variants import differing_options, losses_in_words, options_of
from docs.measured import ROOT, mean_of_variants, means_by_variant, path_of, results_of, runs_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from docs.cells import Run
    from docs.claims.variants import Options


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
    """A comparison of two variants of committed results."""

    what: str
    """What is compared, and at which size."""
    experiment: str
    candidate: str | tuple[str, ...]
    """Variant, as the results name it, or several, whose mean over the variants is taken for each seed."""
    baseline: str | tuple[str, ...]
    of: Quantity = ACCURACY
    baseline_experiment: str = ""
    """Experiment of the baseline, empty if it is the same."""
    paper: Literal[-1, 0, 1] = 0
    """Sign of the difference according to the paper; 0 if the paper, as we know it, makes no such claim."""
    over_teachers: bool = False
    """True if each variant is of another teacher and counts as one value, the mean over its seeds. A sentence about
    teachers in general has the spread of teachers, and the two values of a teacher are a pair."""
    differs: tuple[str, ...] = ("method.kind",)
    """Options in which the variants may differ. Another difference leaves the comparison open."""
    searched: str = ""
    """Options that were searched, empty if the results say in `chosen_on` that nothing was, or that it is unknown."""
    converged: str = "not tested"
    """Whether both variants have converged, as far as a longer training shows it."""

    @property
    def experiments(self) -> tuple[str, str]:
        """Experiments of candidate and baseline."""
        return self.experiment, self.baseline_experiment or self.experiment

    @property
    def is_measured(self) -> bool:
        """True if the results of both experiments are committed."""
        return all(path_of(name).exists() for name in self.experiments)

    @cached_property
    def variants(self) -> tuple[list[Options], list[Options]]:
        """Composed options of the variants of candidate and baseline."""
        candidate, baseline = (
            [
                options_of(experiment, variant)
                for variant in ((variants,) if isinstance(variants, str) else variants)
            ]
            for experiment, variants in zip(
                self.experiments, (self.candidate, self.baseline), strict=True
            )
        )
        return candidate, baseline

    @cached_property
    def differing(self) -> list[str]:
        """Options in which the variants differ."""
        candidate, baseline = self.variants
        others = baseline * len(candidate) if len(baseline) == 1 else baseline
        pairs = zip(candidate, others, strict=True)
        return sorted(set().union(*(differing_options(*pair) for pair in pairs)))

    @property
    def terms(self) -> str:
        """Losses of candidate and baseline, and their epochs, as two cells."""
        losses, epochs = (
            [
                " or ".join(dict.fromkeys(describe(options) for options in variants))
                for variants in self.variants
            ]
            for describe in (losses_in_words, lambda options: str(options["trainer.epochs"]))
        )
        return f"{'; '.join(losses)} | {' and '.join(dict.fromkeys(epochs))}"

    @property
    def compared(self) -> str:
        """Variants as the results name them."""
        texts = (
            f"`{experiment}`: {', '.join(f'`{one}`' for one in ([of] if isinstance(of, str) else of))}"
            for experiment, of in zip(
                self.experiments, (self.candidate, self.baseline), strict=True
            )
        )
        first, second = texts
        if self.experiments[0] == self.experiments[1]:
            second = second.partition(": ")[2]
        return f"{first} &minus; {second}"

    @property
    def search(self) -> str:
        """Options that were searched."""
        if self.searched:
            return self.searched
        chosen_on = {results_of(name)["chosen_on"].partition(" ")[0] for name in self.experiments}
        (known,) = chosen_on & {"nothing:", "how"}
        return "none" if known == "nothing:" else "not recorded"

    @cached_property
    def pair(self) -> tuple[list[Run], list[Run]]:
        """Runs of candidate and baseline."""
        combined = means_by_variant if self.over_teachers else mean_of_variants
        candidate, baseline = (
            runs_of(experiment, variants)
            if isinstance(variants, str)
            else combined(experiment, variants, self.of.name)
            for experiment, variants in zip(
                self.experiments, (self.candidate, self.baseline), strict=True
            )
        )
        return candidate, baseline

    @property
    def units(self) -> str:
        """Number of seeds of each variant, once if they are equal, or of teachers."""
        count = " and ".join(dict.fromkeys(str(len(runs)) for runs in self.pair))
        return f"{count} teachers" if self.over_teachers else count

    @cached_property
    def mean_and_p_value(self) -> tuple[float, float]:
        """Mean difference and its two-sided p-value, by Welch's t, or by the paired t over teachers."""
        first, second = (list(map(float, numbers_of(runs, self.of.name))) for runs in self.pair)
        if self.over_teachers:
            test = ttest_1samp([a - b for a, b in zip(first, second, strict=True)], 0)
        else:
            test = ttest_ind(first, second, equal_var=False)
        return fmean(first) - fmean(second), float(test.pvalue)

    @property
    def text(self) -> str:
        """Mean difference with its interval and unit."""
        of, paired = self.of, self.over_teachers
        return (
            f"{difference(*self.pair, of.name, of.scale, of.digits, paired=paired).text}{of.unit}"
        )

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
    sign is the other one, and is open otherwise, or if its variants differ in an option that it does not name. The
    p-values are corrected by Holm's method for the number of these comparisons.
    """
    tested = tested_claims(claims)
    p_values = corrected_p_values([one.mean_and_p_value[1] for one in tested])
    verdicts = {}
    for one, p_value in zip(tested, p_values, strict=True):
        agrees = one.mean_and_p_value[0] * one.paper > 0
        decided = SUPPORTS if agrees else CONTRADICTS
        is_decided = p_value < LEVEL and set(one.differing) <= set(one.differs)
        verdicts[one] = (decided if is_decided else OPEN, p_value)
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
        "| table or claim of the paper, and comparison | difference (95 % interval) | p (Holm) | verdict |"
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
    summary = "\n".join(["| table or claim | our results |", "|---|---|", *rows])
    parts = [_rule(verdicts), summary]
    return "\n\n".join([*parts, *(_section(claim, verdicts) for claim in claims)]) + "\n"


def _rule(verdicts: Mapping[Difference, tuple[str, float]]) -> str:
    """Sentences that count the verdicts and say how they are decided."""
    counts = Counter(verdict for verdict, _ in verdicts.values())
    early = sum(
        verdict == SUPPORTS and one.converged != Difference.converged
        for one, (verdict, _) in verdicts.items()
    )
    return "\n".join(
        textwrap.wrap(
            f"Of the {len(verdicts)} comparisons with a verdict, {counts[SUPPORTS]} support the paper"
            f"{f' ({early} of them before both variants have converged)' if early else ''}, {counts[CONTRADICTS]} "
            f"contradict it and {counts[OPEN]} are open. A comparison *supports* or *contradicts* the paper by its "
            f"sign if p < {LEVEL} in Welch's t-test over seeds, or in a paired t-test over teachers, corrected for the "
            f"{len(verdicts)} comparisons of this page (Holm), and if its variants differ in nothing but the options "
            "that it is about. It is *open* otherwise. Rows without a verdict are comparisons of our own. The "
            "intervals are not corrected. A loss has its terms with their weights, where they are not 1.",
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
        header = (
            "| comparison | variants | losses | epochs | both converged | options searched | difference "
            "(95 % interval) | seeds | p | verdict |\n|---|---|---|---|---|---|---|---|---|---|"
        )
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
    if verdict is not None and (others := sorted(set(one.differing) - set(one.differs))):
        decided += f", the variants differ in {', '.join(others)}"
    return (
        f"| {one.what} | {one.compared} | {one.terms} | {one.converged} | {one.search} | {one.text} | {one.units} "
        f"| {p_value} | {decided} |"
    )


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
