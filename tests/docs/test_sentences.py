"""Sentences of the pages that a reader would misread: divergences without a direction, equality without a margin."""

import re
from collections import Counter

from docs.claims.e2kd import CLAIMS
from docs.claims.sections import CONTRADICTS, OPEN, SUPPORTS, verdicts_of
from docs.links import PAGES
from tests.support.items import for_each
from tests.support.paths import ROOT

DIRECTIONLESS = re.compile(
    r"\bKL (?:divergence )?(?:(?:of|from) [^|.]*? to |between |of logits)|^KL of the superfeatures"
)
EQUAL = re.compile(
    r"\b(?:is|are|was|were|be) level\b|\blevel with\b|\bas good as\b|\bwithin noise\b|\bon par\b"
    r"|\bequally (?:good|accurate)\b|\bas accurate as\b",
    re.IGNORECASE,
)


def sentences_of(text):
    """Sentences and table cells of a page, without blocks of code."""
    prose = re.sub(r"(?ms)^```.*?^```", "", text)
    for line in re.split(r"\n\s*\n|\n(?=[-|#])", prose):
        parts = line.split("|") if line.startswith("|") else re.split(r"(?<=[.:;])\s+", line)
        yield from (" ".join(part.split()) for part in parts)


def directionless(text):
    """Headings and sentences that have a divergence without saying of what from what."""
    for sentence in sentences_of(text):
        if DIRECTIONLESS.search(sentence) or re.match(r"KL(?![\w(])[^(]*(?:nats|logits)", sentence):
            yield sentence


def unproven_equality(text):
    """Sentences that call results equal without the margin within which they are."""
    return [s for s in sentences_of(text) if EQUAL.search(s) and "margin" not in s]


@for_each("page", PAGES)
def test_a_page_says_of_what_a_divergence_is_and_within_what_margin_results_are_equal(page):
    text = page.read_text()

    assert list(directionless(text)) == []
    assert unproven_equality(text) == []


@for_each(
    "sentence",
    [
        "| recipe | KL of stored to new logits, nats | top-1 |",
        "KL between the stored and the new answer is small.",
        "| mixture | KL of the rule to the answer, nats |",
        "| recipe | KL, nats |",
    ],
)
def test_a_divergence_without_a_direction_is_seen(sentence):
    assert list(directionless(f"# Page\n\n{sentence}\n"))


@for_each(
    "sentence",
    [
        "Stored mixtures are level with a live teacher's (-2.0 to +0.9).",
        "They are\nas good as stored views.",
        "| the same | `replay` | as good as a live teacher on mixtures (live -0.6) |",
        "Sixteen views are within noise of a live teacher.",
    ],
)
def test_equality_without_a_margin_is_seen(sentence):
    assert unproven_equality(f"Before.\n\n{sentence} After.\n")


def test_directions_margins_and_other_levels_are_left_alone():
    text = (
        "KL(new, stored) in nats. | KL(answer, rule), nats |\nThe chance level of `accuracy`.\n"
        "Both are level within a margin of 2 points (-1.2 to +1.4).\nA finding has a level.\n"
    )

    assert list(directionless(text)) == []
    assert unproven_equality(text) == []


def test_the_results_count_the_verdicts_of_the_page():
    counts = Counter(verdict for verdict, _ in verdicts_of(CLAIMS).values())
    text = " ".join((ROOT / "docs/results/index.md").read_text().split())
    found = re.search(
        r"Of (\d+) \[comparisons with the e2KD paper\]\S+, (\d+) agree, (\d+) disagree and (\d+) are open",
        text,
    )

    expected = (counts.total(), counts[SUPPORTS], counts[CONTRADICTS], counts[OPEN])
    assert tuple(map(int, found.groups())) == expected
