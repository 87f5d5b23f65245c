"""Phrases that a native reader stumbles over, and what to write in their place: each file may only lose them.

phrases.json has the number of each phrase that a file still contains.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from docs.links import PAGES, ROOT
from docs.prose.places import JoinedText, place

if TYPE_CHECKING:
    from collections.abc import Iterator

PHRASES = {
    "is no X": (
        r"(?<![Tt]here )\b(?:is|are|was|were|be) (?:no|none)\b(?! longer| nearer)",
        "is not a X",
    ),
    "beside": (r"\bbeside\b", "next to"),
    "way out": (r"\bways? out\b|way_out", "fix"),
    "nobody": (r"\bnobody\b", "unknown, or who does not"),
    "in all": (r"\bin all\b(?= *[.,;:)])", "in total"),
    "says so": (r"\bsays? so\b", "what it says"),
    "without a word": (r"\bwithout a word\b", "silently"),
    "in vain": (r"\bin vain\b", "without success"),
    "goes on with": (r"\bgo(?:es)? on with\b", "continues with"),
    "asked again": (r"\basked (?:for )?again\b", "retried"),
    "of no importance": (r"\bof no (?:importance|meaning)\b", "does not matter"),
    "doubt": (r"(?i)\bdoubts?\b", "warning"),
    "a number of them": (r"\bso many\b(?![^.]*\bthat\b)", "that many"),
    "_MOST_": (r"\b_?(?:MOST|FEWEST|LONGEST|MANY)_[A-Z]", "MAX_ or MIN_"),
}
"""By name: the pattern, and what to write instead."""
KNOWN = Path(__file__).with_name("phrases.json")
_BREAKS = r'\s*"?\s*\n\s*(?:f?"|#|>)?\s*'


def phrases_of(text: str) -> Iterator[tuple[str, int]]:
    """Iterate over the names and lines of the phrases in a text whose lines may be wrapped."""
    joined = JoinedText(text, _BREAKS)
    for name, (pattern, _) in PHRASES.items():
        for found in re.finditer(pattern, joined.text):
            yield name, joined.line_of(found.start())


def problems() -> Iterator[str]:
    """Iterate over phrases that a file has more often than phrases.json knows, and over those that went."""
    known = json.loads(KNOWN.read_text())
    for path in [*sorted((ROOT / "pipeline").rglob("*.py")), *PAGES]:
        name = path.relative_to(ROOT).as_posix()
        found = list(phrases_of(path.read_text()))
        counts, before = Counter(phrase for phrase, _ in found), Counter(known.pop(name, {}))
        for phrase, line in found:
            if counts[phrase] > before[phrase]:
                yield f"{place(name, line)} {phrase!r}: write {PHRASES[phrase][1]!r}"
        for phrase in before - counts:
            yield f"{place(name)} lost {phrase!r}: lower its number to {counts[phrase]} in docs/prose/phrases.json"
    for name in known:
        yield f"{place(name)} is gone: remove it from docs/prose/phrases.json"
