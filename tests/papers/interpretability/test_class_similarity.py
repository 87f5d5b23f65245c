"""Class means of hand-computed logits, and their rank correlation."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from permafrost.core.errors import ConfigError
from permafrost.core.records import NO_LABEL
from permafrost_papers.interpretability.class_similarity import (
    COARSE,
    coarse_similarity,
    mean_predictions,
    off_diagonal_spearman,
    read_similarity,
    spearman_interval,
)
from permafrost_papers.interpretability.options import ClassSimilarityOptions

K = 4


@pytest.fixture
def answers():
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(40, K, generator=generator, dtype=torch.float64)
    return logits, torch.arange(40) % K


def test_entropy_of_equal_logits_is_log_k_and_of_a_sure_network_zero():
    labels = torch.zeros(5, dtype=torch.int64)
    sure = torch.zeros(5, K, dtype=torch.float64)
    sure[:, 2] = 2000.0

    assert mean_predictions(torch.ones(5, K), labels, 1.0)[0] == pytest.approx(
        math.log(K), abs=1e-12
    )
    assert mean_predictions(sure, labels, 1.0)[0] == 0
    two = torch.tensor([[math.log(3.0), 0.0]]).double()  # 3/4 and 1/4
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert mean_predictions(two, labels[:1], 1.0)[0] == pytest.approx(expected, abs=1e-7)


def test_an_interval_has_the_correlation_inside_and_narrows_with_the_records():
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(120) % 8
    logits = (
        torch.randn(120, 8, generator=generator) + torch.randn(8, 8, generator=generator)[labels]
    )
    other = logits + 3 * torch.randn(120, 8, generator=generator)
    means = [mean_predictions(values, labels, 1.0)[1] for values in (logits, other)]
    value = off_diagonal_spearman(*means)
    ends = [
        spearman_interval(
            logits.repeat(n, 1), labels.repeat(n), 1.0, other.repeat(n, 1), is_similarity=False
        )
        for n in (1, 25)
    ]
    assert ends[0][0] < ends[1][0] < value < ends[1][1]
    assert np.ptp(ends[1]) < 0.4 * np.ptp(ends[0])
    assert spearman_interval(logits, labels, 1.0, logits, is_similarity=False) == (1.0, 1.0)
    low, high = spearman_interval(logits, labels, 1.0, means[1], is_similarity=True)
    assert low < value < high


def test_a_temperature_divides_the_logits(answers):
    logits, labels = answers

    cold, warm = mean_predictions(logits / 4, labels, 1.0), mean_predictions(logits, labels, 4.0)

    assert torch.allclose(cold[1], warm[1], rtol=0, atol=1e-15)
    assert warm[0] > mean_predictions(logits, labels, 1.0)[0]


def test_class_means_are_those_of_the_labeled_records_of_a_class(answers):
    logits, labels = answers
    labels = labels.clone()
    labels[:4] = NO_LABEL

    entropy, means = mean_predictions(logits, labels, 1.0)

    expected = torch.stack([logits[labels == c].softmax(dim=1).mean(dim=0) for c in range(K)])
    assert torch.allclose(means, expected, rtol=0, atol=1e-15)
    assert entropy == pytest.approx(mean_predictions(logits[4:], labels[4:], 1.0)[0], abs=1e-15)


def test_spearman_is_scipys_off_the_diagonal_with_ties(answers):
    _, matrix = mean_predictions(*answers, 1.0)
    similar = read_from_groups(["a", "a", "b", "b"])
    off = ~np.eye(K, dtype=bool)

    ours = off_diagonal_spearman(matrix, similar)

    assert ours == pytest.approx(spearmanr(matrix.numpy()[off], similar.numpy()[off])[0], abs=1e-12)
    changed = matrix + torch.diag(torch.rand(K).double())
    assert off_diagonal_spearman(changed, matrix) == pytest.approx(1, abs=1e-12)
    assert off_diagonal_spearman(matrix, matrix**3) == pytest.approx(1, abs=1e-12)
    assert off_diagonal_spearman(matrix, -matrix) == pytest.approx(-1, abs=1e-12)


def read_from_groups(groups):
    return torch.tensor([[float(a == b) for b in groups] for a in groups], dtype=torch.float64)


def test_a_class_without_records_is_left_out_and_what_does_not_vary_has_no_rank(answers):
    logits, labels = answers
    there = labels != 1
    _, matrix = mean_predictions(logits[there], labels[there], 1.0)

    assert matrix[1].isnan().all()
    assert off_diagonal_spearman(matrix, matrix) == pytest.approx(1, abs=1e-12)
    assert off_diagonal_spearman(matrix, torch.ones(K, K).double()) is None


def test_similarities_are_read_from_a_matrix_or_from_superclasses(tmp_path):
    values = np.arange(16, dtype=np.float32).reshape(K, K)
    np.save(tmp_path / "similar.npy", values)
    (tmp_path / "coarse.txt").write_text("fish\nfish\ntree\nfish\n")

    assert read_similarity(tmp_path / "similar.npy", K).tolist() == values.tolist()
    assert torch.equal(
        read_similarity(tmp_path / "coarse.txt", K), read_from_groups(["f", "f", "t", "f"])
    )


def test_what_is_no_similarity_is_refused_by_name(tmp_path):
    np.save(tmp_path / "small.npy", np.ones((2, 2)))
    np.save(tmp_path / "words.npy", np.full((K, K), "a"))
    np.save(tmp_path / "nan.npy", np.full((K, K), np.nan))
    (tmp_path / "short.txt").write_text("a\nb\n")
    (tmp_path / "broken.npy").write_bytes(b"not an array")
    (tmp_path / "picture.txt").write_bytes(b"\xff\xd8\xff")
    with (tmp_path / "several.npy").open("wb") as file:
        np.savez(file, a=np.eye(K))
    for name, reason in {
        "gone.npy": "does not exist",
        "small.npy": r"of shape \(4, 4\): its shape is \(2, 2\)",
        "words.npy": "of type <U1",
        "nan.npy": "not finite",
        "short.txt": "2 lines .*4 classes need one superclass",
        "broken.npy": "not an npy file",
        "picture.txt": "save it as UTF-8",
        "several.npy": "several arrays",
    }.items():
        with pytest.raises(ConfigError, match=rf"class_similarity\.similarity=.*{name}.*{reason}"):
            read_similarity(tmp_path / name, K)


# ---- CIFAR-100 -----------------------------------------------------------------------------------

FINE = [fine for names in COARSE.values() for fine in names.split()]
COARSE_NUMBERS = [
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3,
    15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0,
    17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19,
    2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
]  # fmt: skip
"""`coarse_labels` of the published files, by fine label, which numbers the fine classes in alphabetical order."""


def test_the_coarse_classes_are_those_of_the_published_files():
    found = coarse_similarity(sorted(FINE), "reference=cifar100_coarse")
    published = torch.tensor(COARSE_NUMBERS)

    assert torch.equal(found, (published[:, None] == published).double())
    assert found.sum(dim=1).unique().tolist() == [5]


def test_classes_are_found_by_name_in_any_order_and_spelling():
    found = coarse_similarity(["Maple tree", "tank", "oak_tree"], "reference=cifar100_coarse")

    assert found.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_classes_of_other_data_and_classes_that_are_all_alike_are_refused():
    with pytest.raises(
        ConfigError, match=r"2 of the store's 3 are others: 'cat', 'airplane'.*file"
    ):
        coarse_similarity(["cat", "apple", "airplane"], "reference=cifar100_coarse")
    for classes in (["apple", "tank"], ["apple", "pear", "orange"]):
        with pytest.raises(ConfigError, match=r"equally similar; set it to null"):
            coarse_similarity(classes, "reference=cifar100_coarse")
    with pytest.raises(ConfigError, match=r"each give a class similarity; set one of them to null"):
        ClassSimilarityOptions(reference="cifar100_coarse", similarity="coarse.npy")
