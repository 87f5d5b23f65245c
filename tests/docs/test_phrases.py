"""Phrases that a native reader stumbles over, and what to write in their place: each file may only lose them.

phrases.json has the number of each phrase that a file still contains.
"""

import json
import re

import pytest

from docs.links import PAGES
from tests.support.paths import ROOT

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
FILES = [*sorted((ROOT / "pipeline").rglob("*.py")), *PAGES]
KNOWN = json.loads((ROOT / "tests/docs/phrases.json").read_text())


def phrases_of(text):
    """Number of each phrase in a text whose lines may be wrapped."""
    joined = re.sub(r'\s*"?\s*\n\s*(?:f?"|#|>)?\s*', " ", text)
    counts = {name: len(re.findall(pattern, joined)) for name, (pattern, _) in PHRASES.items()}
    return {name: count for name, count in counts.items() if count}


def test_no_file_gains_a_phrase_and_the_list_of_those_left_is_exact():
    counts = {path.relative_to(ROOT).as_posix(): phrases_of(path.read_text()) for path in FILES}
    left = {name: phrases for name, phrases in counts.items() if phrases}

    gained = [
        f"{name}: {phrase!r} {count} times, {KNOWN.get(name, {}).get(phrase, 0)} known; write {PHRASES[phrase][1]!r}"
        for name, phrases in left.items()
        for phrase, count in phrases.items()
        if count > KNOWN.get(name, {}).get(phrase, 0)
    ]
    assert gained == []
    assert left == KNOWN, "phrases went: lower their numbers in tests/docs/phrases.json"


@pytest.mark.parametrize(
    ("sentence", "phrase"),
    [
        ("The file is no tar.", "is no X"),
        ("The maps\n    are none.", "is no X"),
        ('"the way "\n    "out is"', "way out"),
        ("It has 12 epochs in all.", "in all"),
        ("_MOST_BYTES = 3", "_MOST_"),
    ],
)
def test_a_phrase_is_counted_across_lines(sentence, phrase):
    assert phrases_of(sentence) == {phrase: 1}


@pytest.mark.parametrize(
    "sentence",
    ["None if there is no such file.", "It is no longer read.", "besides logits", "in all files"],
)
def test_plain_english_is_not_counted(sentence):
    assert phrases_of(sentence) == {}
