"""Labels in both forms, one label per record and many: the same functions give the same results."""

import numpy as np
import torch

from permafrost.core.label_forms import (
    classes_of,
    has_many,
    known_mask,
    multi_hot,
    multi_hot_of_lists,
    predict_labels,
)
from permafrost.core.records import NO_LABEL

ONE = torch.tensor([2, NO_LABEL, 0])
MANY = torch.tensor([[1.0, 0, 1], [torch.nan] * 3, [0, 1, 0]])


def test_both_forms_say_whose_labels_are_known_and_which_they_are():
    assert [has_many(labels) for labels in (ONE, MANY)] == [False, True]
    assert [known_mask(labels).tolist() for labels in (ONE, MANY)] == [[True, False, True]] * 2
    assert multi_hot(ONE, 3).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert multi_hot(MANY, 3).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert classes_of(ONE).tolist() == [[2], [-1], [0]]
    assert classes_of(MANY).tolist() == [[0, 2], [-1, -1], [1, -1]]


def test_the_index_s_lists_become_rows_of_ones():
    hot = multi_hot_of_lists(np.array([2, 0, 1]), np.array([2, 0, 1]), 3)

    assert hot.dtype == torch.float32
    assert torch.allclose(hot, MANY, rtol=0, atol=0, equal_nan=True)
    assert classes_of(torch.zeros(2, 3)).tolist() == [[-1], [-1]]  # at least one column


def test_a_record_with_none_of_many_labels_is_known():
    hot = multi_hot_of_lists(np.array([-1, 2, 0]), np.array([1, 2, 0]), 3)

    assert hot[:2].tolist() == [[0, 0, 0], [1, 0, 1]]
    assert known_mask(hot).tolist() == [True, True, False]
    assert classes_of(hot).tolist() == [[-1, -1], [0, 2], [-1, -1]]


def test_logits_decide_for_the_highest_class_or_for_every_class_from_zero_upwards():
    logits = torch.tensor([[-1.0, 0.0, -1e-6], [3.0, 2.0, 4.0]])

    assert predict_labels(logits, many=False).tolist() == [1, 2]
    assert predict_labels(logits, many=True).tolist() == [[0, 1, 0], [1, 1, 1]]
