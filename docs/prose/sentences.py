"""Sentences of the pages that a reader would misread: divergences without a direction, equality without a margin."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from docs.claims.e2kd import CLAIMS
from docs.claims.sections import CONTRADICTS, OPEN, SUPPORTS, verdicts_of
from docs.links import PAGES, ROOT
from docs.prose.places import place, read, without_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

_DIRECTIONLESS = re.compile(
    r"\bKL (?:divergence )?(?:(?:of|from) [^|.]*? to |between |of logits)|^KL of the superfeatures"
    r"|^KL(?![\w(])[^(]*(?:nats|logits)"
)
_EQUAL = re.compile(
    r"\b(?:is|are|was|were|be) level\b|\blevel with\b|\bas good as\b|\bwithin noise\b|\bon par\b"
    r"|\bequally (?:good|accurate)\b|\bas accurate as\b",
    re.IGNORECASE,
)
_CODE = re.compile(r"(?ms)^```.*?^```")
RESULTS = "docs/results/index.md"


def sentences_of(text: str) -> Iterator[tuple[int, str]]:
    """Iterate over the lines, sentences and table cells of a page, without blocks of code."""
    prose, line, end = without_blocks(text, _CODE), 1, 0
    for found in re.finditer(r"\n\s*\n|\n(?=[-|#])|\Z", prose):
        paragraph = prose[end : found.start()]
        cells = paragraph.lstrip().startswith("|")
        for part in paragraph.split("|") if cells else re.split(r"(?<=[.:;])\s+", paragraph):
            yield line, " ".join(part.split())
        line += prose.count("\n", end, found.end())
        end = found.end()


def misread(text: str) -> Iterator[tuple[int, str]]:
    """Iterate over the lines and words of the sentences of a page that a reader would misread."""
    for line, sentence in sentences_of(text):
        if _DIRECTIONLESS.search(sentence):
            yield line, f"{sentence!r} has a divergence: write KL(p, q), or of what from what"
        if _EQUAL.search(sentence) and "margin" not in sentence:
            yield line, f"{sentence!r} calls results equal: write within what margin"


def problems() -> Iterator[str]:
    """Iterate over misread sentences of all pages, and over wrong counts of the verdicts."""
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        yield from (f"{place(name, line)} {words}" for line, words in misread(page.read_text()))
    counts = Counter(verdict for verdict, _ in verdicts_of(CLAIMS).values())
    expected = (
        f"Of {counts.total()} [comparisons with the e2KD paper]",
        f"{counts[SUPPORTS]} agree, {counts[CONTRADICTS]} disagree and {counts[OPEN]} are open",
    )
    text = " ".join(read(RESULTS).split())
    yield from (f"{place(RESULTS)} write {words!r}" for words in expected if words not in text)
