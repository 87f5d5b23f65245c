"""Checks of `make lint` on pages: each notices what it is for."""

from dataclasses import replace

import pytest

from docs.claims.e2kd import CLAIMS
from docs.claims.sections import verdicts_of
from docs.prose import intervals, phrases, readme_numbers, verdicts
from docs.prose.sentences import misread
from tests.support.items import for_each
from tests.support.paths import ROOT


@for_each(
    "text,found",
    [
        ("The file is no tar.", ("is no X", 1)),
        ("One.\nThe maps\n    are none.", ("is no X", 3)),
        ('"the way "\n    "out is"', ("way out", 1)),
        ("It has 12 epochs in all.", ("in all", 1)),
        ("\n_MOST_BYTES = 3", ("_MOST_", 2)),
        ("None if there is no such file. It is no longer read, besides logits, in all files", None),
    ],
)
def test_a_phrase_is_found_across_lines_and_plain_english_is_not(text, found):
    assert list(phrases.phrases_of(text)) == ([found] if found else [])


def test_a_phrase_more_than_known_is_printed_with_what_to_write(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\nThe file is no tar.\n")
    known = tmp_path / "phrases.json"
    known.write_text('{"page.md": {"way out": 1}, "gone.md": {"doubt": 1}}')
    (tmp_path / "pipeline").mkdir()
    monkeypatch.setattr(phrases, "ROOT", tmp_path)
    monkeypatch.setattr(phrases, "PAGES", [page])
    monkeypatch.setattr(phrases, "KNOWN", known)

    assert list(phrases.problems()) == [
        "page.md:3: 'is no X': write 'is not a X'",
        "page.md: lost 'way out': lower its number to 0 in docs/prose/phrases.json",
        "gone.md: is gone: remove it from docs/prose/phrases.json",
    ]


@for_each(
    "sentence,what",
    [
        ("| recipe | KL of stored to new logits, nats | top-1 |", "divergence"),
        ("KL between the stored and the new answer is small.", "divergence"),
        ("| mixture | KL of the rule to the answer, nats |", "divergence"),
        ("| recipe | KL, nats |", "divergence"),
        ("Stored mixtures are level with a live teacher's (-2.0 to +0.9).", "equal"),
        ("They are\nas good as stored views.", "equal"),
        ("| `replay` | as good as a live teacher on mixtures (live -0.6) |", "equal"),
        ("Sixteen views are within noise of a live teacher.", "equal"),
        (
            "KL(new, stored) in nats. | KL(answer, rule), nats |\nThe chance level of `accuracy`.",
            None,
        ),
        (
            "Both are level within a margin of 2 points (-1.2 to +1.4).\nA finding has a level.",
            None,
        ),
    ],
)
def test_a_sentence_that_is_misread_is_found_with_its_line(sentence, what):
    found = list(misread(f"# Page\n\n```text\nKL, nats\n```\n\n{sentence} After.\n"))

    assert [line for line, _ in found] == ([] if what is None else [7])
    assert all(what in words for _, words in found)


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("e2KD is 4.8 points above KD (2.4 to 7.3)", False),
        ("e2KD is 4.8 points above KD (1.7 to 8.1)", True),
        ("e2KD is 4.9 points above KD (2.4 to 7.3)", True),
    ],
)
def test_an_interval_of_no_two_variants_is_found(text, is_found):
    page = "docs/results/frozen-vs-replay-vs-live.md"

    assert [line for line, _ in intervals.stray_intervals(page, f"\n{text}")] == [2] * is_found


@pytest.mark.parametrize(
    ("number", "other"),
    [
        ("1.57", "1.58"),
        ("69 %", "70 %"),
        ("adds 1.4 points", "adds 1.5 points"),
        ("142 GB", "140 GB"),
    ],
)
def test_another_number_in_the_readme_is_found(number, other):
    text = readme_numbers.prose_of((ROOT / "README.md").read_text())

    assert readme_numbers.unexplained_numbers(text) == []
    assert readme_numbers.unexplained_numbers(text.replace(number, other)) != []


def test_another_interval_and_an_unnamed_option_of_a_comparison_are_found(monkeypatch):
    one = next(iter(verdicts_of(CLAIMS)))

    assert list(verdicts.wrong_intervals(one)) == list(verdicts.wrong_variants(one)) == []
    assert "name these" in next(verdicts.wrong_variants(replace(one, differs=("trainer.epochs",))))

    monkeypatch.setattr(verdicts, "interval_of", lambda one: (90.0, 89.0, 91.0, 0.5))
    assert [words[:4] for words in verdicts.wrong_intervals(one)] == ["the ", "p is"]
