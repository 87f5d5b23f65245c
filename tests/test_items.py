"""Tests in a loop over items: each failure is listed, and none hides another."""

import pytest

from tests.support.items import for_each


def test_every_item_that_fails_is_listed_and_the_others_are_tried():
    tried = []

    @for_each("number", [1, 2, 3, 4])
    def check(number):
        tried.append(number)
        assert number % 2, "even"
        if number == 3:
            pytest.fail("three")

    with pytest.raises(pytest.fail.Exception) as error:
        check()

    first, *others = str(error.value).splitlines()
    assert tried == [1, 2, 3, 4]
    assert first == "3 of 4 items fail"
    assert [line[:2] for line in others if line[1:2] == ":"] == ["2:", "3:", "4:"]


def test_a_loop_over_nothing_fails():
    with pytest.raises(pytest.fail.Exception, match="0 of 0 items"):
        for_each("item", [])(lambda item: None)()


@for_each("number,text", [(1, "1"), (2, "2")])
def test_an_item_has_several_values_beside_fixtures(number, text, tmp_path):
    assert str(number) == text
    assert tmp_path.is_dir()
