"""The claims of the papers, in their order, with the recipe of each and our result.

`python -m docs.tables` writes them into docs/papers/. Commands and reported numbers are those of the recipes' headers,
results are those that are committed next to the recipes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from docs.cells import difference, paired_interval
from docs.measured import EXPERIMENTS, mean_of_arms, path_of, runs_of
from permafrost.report.comparison import excludes_zero


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

    @property
    def experiments(self) -> tuple[str, str]:
        """Experiments of candidate and baseline."""
        return self.experiment, self.baseline_experiment or self.experiment

    @property
    def is_measured(self) -> bool:
        """True if the results of both experiments are committed."""
        return all(path_of(name).exists() for name in self.experiments)

    def text(self) -> str:
        """Sentence with the mean difference and its interval."""
        sides = zip(self.experiments, (self.candidate, self.baseline), strict=True)
        pair = [
            runs_of(experiment, arms)
            if isinstance(arms, str)
            else mean_of_arms(experiment, arms, self.of.name)
            for experiment, arms in sides
        ]
        cell = difference(*pair, self.of.name, self.of.scale, self.of.digits)
        mean, _, interval = cell.text.rstrip(")").partition(" (")
        _, low, high = paired_interval(*pair, self.of.name, self.of.scale)
        verdict = "" if excludes_zero((low, high)) else ", not conclusive"
        seeds = len({run["seed"] for run in pair[0]} & {run["seed"] for run in pair[1]})
        source = ", ".join(_link(name, "results.json") for name in dict.fromkeys(self.experiments))
        return f"{self.what}: {mean}{self.of.unit} (95 % interval {interval}, {seeds} seeds{verdict}; {source})"


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


def section(claim: Claim) -> str:
    """Markdown section of a claim."""
    parts = [f"### {claim.title}"]
    if claim.reported:
        parts.append(f"The paper: {claim.reported}")
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
    found = [
        one if isinstance(one, str) else one.text()
        for one in claim.here
        if isinstance(one, str) or one.is_measured
    ]
    if found:
        parts.append("Our result:\n\n" + "\n".join(f"- {text}" for text in found))
    return "\n\n".join(parts)


def claims_of(claims: Sequence[Claim]) -> str:
    """Markdown sections of a paper's claims."""
    return "\n\n".join(section(claim) for claim in claims) + "\n"


# ---- headers of recipes --------------------------------------------------------------------------


def header_of(recipe: str) -> str:
    """Comment at the top of a recipe, without the comment marks."""
    text = (EXPERIMENTS / f"{recipe}.yaml").read_text()
    lines = text[: text.index("defaults:")].splitlines()[1:]
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
    if reported := reported_in(name):
        parts.append(f"```text\n{reported}\n```")
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
    return f"[{experiment}](../../conf/experiment/{experiment}.{ending})"
