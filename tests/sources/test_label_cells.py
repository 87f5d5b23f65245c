"""Cells of several labels: separators that are found, lists that were written as text."""

import pytest

from permafrost.sources.label_cells import find_separator, is_list_text, parse_list, separate
from tests.support.items import for_each


@for_each(
    "cells,separator",
    [
        ({"cat|dog", "cat", "dog"}, "|"),
        ({"cat;dog", "dog;eel", "eel"}, ";"),
        ({"cat, dog", "cat", "dog"}, ","),
        ({"cat dog", "cat", "dog"}, " "),
        ({"dog cat", "dog dog"}, " "),
        ({"No Finding", "Effusion|Mass", "Mass", "Effusion"}, "|"),
        ({"Pleural Effusion;No Finding", "No Finding", "Pleural Effusion"}, ";"),
        ({"No Finding", "Effusion"}, ""),
        ({"cat|dog", "eel|fox"}, ""),
        ({"tern, arctic", "tern, common", "eel"}, ""),
        ({"cat", "dog"}, ""),
        (set(), ""),
    ],
)
def test_a_separator_is_one_whose_pieces_occur_in_other_cells(cells, separator):
    assert find_separator(cells) == separator


def test_known_class_names_decide_where_pieces_occur_once():
    assert find_separator({"cat person"}, {"cat", "person"}) == " "
    assert find_separator({"cat person"}, {"cat person", "cat", "person"}) == ""


@pytest.mark.parametrize(
    ("text", "separator", "pieces"),
    [
        ("cat| dog |", "|", ["cat", "dog"]),
        ("No Finding", "|", ["No Finding"]),
        ("cat \t dog", " ", ["cat", "dog"]),
        ("cat|dog", "", ["cat|dog"]),
        ("a--b", "--", ["a", "b"]),
    ],
)
def test_pieces_have_no_blanks_around_them(text, separator, pieces):
    assert separate(text, separator) == pieces


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('["cat", "dog"]', ["cat", "dog"]),
        ("['cat', 'dog']", ["cat", "dog"]),
        ("('cat', 'dog')", ["cat", "dog"]),
        ("('cat',)", ["cat"]),
        ("{'dog', 'cat'}", ["cat", "dog"]),
        ("[1, 2]", [1, 2]),
        ("[]", []),
        ('["it\'s", "a \\"b\\""]', ["it's", 'a "b"']),
    ],
)
def test_a_list_may_be_json_or_pythons(text, values):
    assert is_list_text(text)
    assert parse_list(text) == values


@pytest.mark.parametrize(
    "text",
    ["['cat' 'dog']", "[cat, dog]", "{'a': 1}", "[[1]]", "[open('x')]", "[" * 5000 + "]", "(1)"],
)
def test_what_is_no_list_of_names_is_refused(text):
    with pytest.raises(ValueError, match=r"list|comma"):
        parse_list(text)
