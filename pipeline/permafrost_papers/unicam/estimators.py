"""Bias-corrected distance correlation, and its semi-partial form given another network's features (UniCAM, B.1).

U-centering transforms the distances a_ij = |x_i - x_j| of features X [n, p] into

    A~_ij = a_ij - a_i. / (n - 2) - a_.j / (n - 2) + a_.. / ((n - 1) (n - 2)),      A~_ii = 0
    <A~, B~> = 1 / (n (n - 3)) sum_(i != j) A~_ij B~_ij
    R*(A, B) = <A~, B~> / sqrt(<A~, A~> <B~, B~>),                       0 where either norm is 0

R* is based on an unbiased estimate of the squared distance correlation, and may be negative. Removing B leaves the
residual A~ - <A~, B~> / <B~, B~> B~, whose correlation with a third matrix G depends only on three R* (eq. B1):

    RS(A | B; G) = (R*_AG - R*_AB R*_BG) / sqrt(1 - R*_AB^2)

All computations are in float64. Distances are condensed: [n (n - 1) / 2], the pairs i < j row by row.
Shape letters: n records, p values of a feature, m named distance matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from permafrost.core.errors import require

MIN_RECORDS = 4
"""Minimum number of records for which the unbiased inner product is defined."""
SAME = 1e-6
"""Minimum of 1 - R*^2. Two computations of the same features may differ by less, so below it the residual is 0."""
DEGENERATE = 1e-20
"""Fraction of the mean squared distance below which U-centered distances are rounding errors of equal distances."""
_COLUMNS = 4096
_PERMUTATIONS_AT_ONCE = 64
_PAIRS_AT_ONCE = 2**25
"""Number of pairs of records processed at once, which limits the memory of permutations to about 0.4 GB."""
_ROUNDING = 1e-14


# ---- distances -----------------------------------------------------------------------------------


def centered_gram(
    features: Tensor, lengths: Tensor | None = None, columns: int = _COLUMNS
) -> Tensor:
    """Compute the inner products of centered records, f64 [n, n].

    The results for parts of the columns add up to the whole, so each part may be on a different rank.

    Args:
        features: [n, p], of any float dtype.
        lengths: f64 [n, 1], by which the records are divided, None to leave them as they are.
        columns: Number of columns converted to float64 at a time.
    """
    gram = torch.zeros(len(features), len(features), dtype=torch.float64, device=features.device)
    for start in range(0, features.shape[1], columns):
        part = features[:, start : start + columns]
        wide = part.double() if lengths is None else part.double() / lengths
        wide = wide - wide.mean(dim=0)
        gram.addmm_(wide, wide.T)
    return gram


def distances_of_gram(gram: Tensor) -> Tensor:
    """Compute condensed Euclidean distances of records from their inner products [n, n]."""
    rows, columns = torch.triu_indices(len(gram), len(gram), offset=1, device=gram.device)
    norms = gram.diagonal()
    scale = norms[rows] + norms[columns]
    squared = scale - 2 * gram[rows, columns]
    # For two equal records, the rounding error would be 1e-8 of their norm after the square root.
    return torch.where(squared > _ROUNDING * scale, squared, 0.0).sqrt()


def feature_distances(features: Tensor, *, l2norm: bool = False) -> Tensor:
    """Compute condensed Euclidean distances of features, f64 [n (n - 1) / 2].

    Args:
        features: [n, p], of any float dtype.
        l2norm: Divide the features of each record by their norm first.
    """
    if not l2norm:
        return distances_of_gram(centered_gram(features))
    lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=torch.float64)
    return distances_of_gram(centered_gram(features, lengths.clamp(min=1e-300)))


def num_records(condensed: Tensor) -> int:
    """Return the number n of records of condensed distances."""
    return (1 + math.isqrt(1 + 8 * len(condensed))) // 2


def square(condensed: Tensor) -> Tensor:
    """Expand condensed values to a symmetric matrix [n, n] with a zero diagonal."""
    n = num_records(condensed)
    rows, columns = torch.triu_indices(n, n, offset=1, device=condensed.device)
    matrix = condensed.new_zeros(n, n).index_put((rows, columns), condensed)
    return matrix + matrix.T


# ---- inner products ------------------------------------------------------------------------------


def u_centered(condensed: Tensor) -> Tensor:
    """U-center condensed distances to condensed A~, differentiably.

    The result is zero if all distances are equal up to rounding, because records that are all equally far apart, such
    as one of each class, carry no information.

    Raises:
        ValueError: If there are fewer than MIN_RECORDS records.
    """
    require(
        (n := num_records(condensed)) >= MIN_RECORDS,
        f"distance correlation needs at least {MIN_RECORDS} records, got {n}",
        ValueError,
    )
    rows, columns = torch.triu_indices(n, n, offset=1, device=condensed.device)
    sums = square(condensed).sum(dim=1)
    total = sums.sum() / ((n - 1) * (n - 2))
    centered = condensed - (sums[rows] + sums[columns]) / (n - 2) + total
    is_degenerate = centered.square().mean() <= DEGENERATE * condensed.square().mean()
    return 0 * centered if is_degenerate else centered


def v_centered(condensed: Tensor) -> Tensor:
    """Double-center distances by their means, flattened [n * n] with both triangles and the diagonal (biased form)."""
    matrix = square(condensed)
    means = matrix.mean(dim=1)
    return (matrix - means[:, None] - means + means.mean()).flatten()


def inner(one: Tensor, other: Tensor) -> Tensor:
    """Compute <A~, B~> of two condensed, U-centered matrices.

    Args:
        one: [pairs], or a stack [m, pairs].
        other: [pairs], or a stack [m, pairs].

    Returns:
        A scalar, or [m, m] for all pairs of two stacks.
    """
    n = num_records(one[0] if one.dim() == 2 else one)
    return 2 * (one @ other.T if one.dim() == 2 else one @ other) / (n * (n - 3))


def correlation(ab: Tensor, aa: Tensor, bb: Tensor) -> Tensor:
    """Compute R* from three inner products, 0 if either norm is 0.

    Args:
        ab: <A~, B~>.
        aa: <A~, A~>.
        bb: <B~, B~>.
    """
    return ab / (aa * bb).sqrt() if aa > 0 and bb > 0 else torch.zeros_like(ab)


def semi_partial(ag: Tensor, ab: Tensor, bg: Tensor) -> Tensor:
    """Compute RS(A | B; G) from three R* (eq. B1), 0 if the residual of A given B is 0.

    Args:
        ag: R* of A and G.
        ab: R* of A and B.
        bg: R* of B and G.
    """
    left = 1 - ab**2
    return torch.zeros_like(ag) if left < SAME else (ag - ab * bg) / left.sqrt()


@dataclass(frozen=True)
class InnerProducts:
    """Inner products of every pair of m named distance matrices, summed over blocks of records.

    R* and RS are ratios of these sums, because a mean of the blocks' ratios would be biased.
    """

    names: tuple[str, ...]
    sums: Tensor
    """Sums of the inner products, f64 [m, m]."""
    records: int
    freedom: int
    """Sum over blocks of n (n - 3) / 2."""
    blocks: int = 1
    permuted: Tensor | None = None
    """Inner products f64 [m, P] with the last matrix after each of P permutations of its records within each block,
    None without permutations."""
    without: Tensor | None = None
    """Sums f64 [m, m, records] without each record, for the jackknife, None without permutations."""

    @classmethod
    def from_distances(
        cls,
        distances: Mapping[str, Tensor],
        *,
        biased: bool = False,
        permutations: int = 0,
        seed: int = 0,
    ) -> InnerProducts:
        """Compute the inner products of one block from its condensed distances by name.

        Args:
            distances: Condensed distances f64 of each matrix, that of the labels last.
            biased: Use the V-statistic instead of the unbiased inner product.
            permutations: Number of permutations of the last matrix's records, for p-values, drawn from `seed`.
            seed: Seed of the permutations.
        """
        n = num_records(next(iter(distances.values())))
        center = v_centered if biased else u_centered
        stacked = torch.stack([center(condensed) for condensed in distances.values()])
        sums = stacked @ stacked.T / n**2 if biased else inner(stacked, stacked)
        return cls(
            tuple(distances),
            sums,
            records=n,
            freedom=n * (n - 3) // 2,
            permuted=_permuted(stacked, n, permutations, seed) if permutations else None,
            without=_without_each(stacked, sums, n) if permutations else None,
        )

    def merge(self, other: InnerProducts) -> InnerProducts:
        """Merge the blocks of both parts.

        Raises:
            ValueError: If the parts have other names.
        """
        require(
            self.names == other.names,
            f"inner products of {self.names} and {other.names} cannot be merged",
            ValueError,
        )
        return InnerProducts(
            self.names,
            self.sums + other.sums,
            records=self.records + other.records,
            freedom=self.freedom + other.freedom,
            blocks=self.blocks + other.blocks,
            permuted=None
            if self.permuted is None or other.permuted is None
            else self.permuted + other.permuted,
            without=None
            if self.without is None or other.without is None
            else torch.cat(
                [self.without + other.sums[..., None], other.without + self.sums[..., None]], dim=2
            ),
        )

    def correlation(self, a: str, b: str) -> Tensor:
        """Compute R*(A, B), a 0-dimensional f64."""
        i, j = (self.names.index(name) for name in (a, b))
        return correlation(self.sums[i, j], self.sums[i, i], self.sums[j, j])

    def semi_partial(self, a: str, given: str, target: str) -> Tensor:
        """Compute RS(A | given; target), a 0-dimensional f64."""
        return semi_partial(
            self.correlation(a, target),
            self.correlation(a, given),
            self.correlation(given, target),
        )

    def partial(self, a: str, given: str, target: str) -> Tensor:
        """Compute the partial distance correlation, in which `given` is also removed from the target."""
        left = 1 - self.correlation(given, target) ** 2
        semi = self.semi_partial(a, given, target)
        return torch.zeros_like(semi) if left < SAME else semi / left.sqrt()

    def residual_p(self, a: str, given: str) -> float:
        """Compute the p-value of RS(A | given; G) = 0 against RS > 0, with G the last matrix, the labels.

        It is the larger of two p-values. The one by permutations of G is correct if G is independent of A and `given`,
        and too small otherwise. If they are dependent, RS is a smooth function of means over records, so the jackknife
        error over records (Efron and Stein 1981) with Student's t is correct. Without dependence it is too large.

        Args:
            a: Name of A.
            given: Name of the matrix that is removed from A.

        Raises:
            ValueError: If there are no permutations.
        """
        permuted = self.permutation_p(a, given)
        value, error = self._jackknife(a, self.names[-1], given)
        if not error > 0:
            return permuted
        from scipy.special import stdtr

        return max(permuted, float(stdtr(self.records - 1, -value / error)))

    def interval(self, a: str, target: str, given: str | None = None) -> tuple[float, float]:
        """Compute the 95 % interval over records of R*(A, target), or of RS(A | given; target).

        It is the value plus and minus the jackknife error times the quantile of Student's t, cut at -1 and 1.
        """
        from scipy.special import stdtrit

        value, error = self._jackknife(a, target, given)
        half = error * float(stdtrit(self.records - 1, 0.975))
        return max(value - half, -1.0), min(value + half, 1.0)

    def _jackknife(self, a: str, target: str, given: str | None) -> tuple[float, float]:
        """Compute R*(A, target), or RS(A | given; target), and its jackknife error over records."""
        assert self.without is not None
        every = torch.cat([self.sums[..., None], self.without], dim=2)

        def r_star(first: str, second: str) -> Tensor:
            x, y = self.names.index(first), self.names.index(second)
            scale = (every[x, x] * every[y, y]).clamp(min=0).sqrt()
            return torch.where(scale > 0, every[x, y] / scale.clamp(min=1e-300), 0.0)

        values = r_star(a, target)
        if given is not None:
            ab, bg = r_star(a, given), r_star(given, target)
            values = (values - ab * bg) / (1 - ab**2).clamp(min=SAME).sqrt()
        error = ((self.records - 1) * values[1:].var(correction=0)).sqrt()
        return float(values[0]), float(error)

    def permutation_p(self, a: str, given: str | None = None) -> float:
        """Compute the p-value of R*(A, G), or of RS(A | given; G), with G the last matrix, the labels.

        It is the fraction of permutations of G's records with at least the observed inner product, including the
        observed one. It is also valid for labels of few classes, if they are independent of A and of `given`. For RS
        see `residual_p`. The smallest possible value is 1 / (P + 1).

        Args:
            a: Name of A.
            given: Name of the matrix that is removed from A, None for R*(A, G).

        Raises:
            ValueError: If there are no permutations.
        """
        if self.permuted is None:
            raise ValueError("these inner products were computed without permutations")
        i = self.names.index(a)
        observed, null, scale = self.sums[i, -1], self.permuted[i], self.sums[i, i]
        if given is not None:
            if 1 - self.correlation(a, given) ** 2 < SAME:
                return 1.0
            j = self.names.index(given)
            share = self.sums[i, j] / self.sums[j, j] if self.sums[j, j] > 0 else 0.0
            observed, null = observed - share * self.sums[j, -1], null - share * self.permuted[j]
        if not (scale > 0 and self.sums[-1, -1] > 0):
            return 1.0
        least = (
            observed - 1e-12 * (scale * self.sums[-1, -1]).sqrt()
        )  # treats rounding differences as ties
        return (int((null >= least).sum()) + 1) / (len(null) + 1)

    def p_value(self, r_star: Tensor) -> float:
        """Compute the one-sided p-value of an R* of these records under independence.

        T = sqrt(v - 1) R* / sqrt(1 - R*^2) follows Student's t with v - 1 degrees of freedom, v = n (n - 3) / 2
        (Szekely and Rizzo 2013), so (1 - R*) / 2 has the beta distribution of parameters (v - 1) / 2. This is valid for
        high-dimensional features only. For labels of few classes the value is too small (see `permutation_p`).
        """
        from scipy.special import betainc

        half = (self.freedom - 1) / 2
        return float(betainc(half, half, float(((1 - r_star) / 2).clamp(0, 1))))


def _without_each(stacked: Tensor, sums: Tensor, n: int) -> Tensor:
    """Inner products [m, m, n] of U-centered matrices [m, pairs] without each of their n records.

    The rows sum to zero. Leaving out record k therefore subtracts 2 c_k from the sum of products over pairs, where c_k
    is the sum of products in row k, and centering the rest again subtracts 2 c_k / ((n - 3) (n - 4)) from the mean.
    """
    if n <= MIN_RECORDS:
        return sums[..., None].expand(-1, -1, n).clone()
    squares = torch.stack([square(values) for values in stacked])
    rows = torch.einsum("akj,bkj->abk", squares, squares)
    left = n - 1
    of_pairs = (n * (n - 3) * sums[..., None] - 2 * rows) / (left * (left - 3))
    return of_pairs - 2 * rows / (left * (left - 2) * (left - 3))


def _permuted(stacked: Tensor, n: int, permutations: int, seed: int) -> Tensor:
    """Inner products [m, P] of U-centered matrices [m, pairs] with the last one, its n records permuted P times."""
    generator = np.random.default_rng(seed)
    rows, columns = torch.triu_indices(n, n, offset=1, device=stacked.device)
    last = square(stacked[-1])
    parts = []
    at_once = max(1, min(_PERMUTATIONS_AT_ONCE, _PAIRS_AT_ONCE // len(last) ** 2))
    for start in range(0, permutations, at_once):
        count = min(at_once, permutations - start)
        orders = torch.from_numpy(np.stack([generator.permutation(n) for _ in range(count)]))
        orders = orders.to(stacked.device)
        shuffled = last[orders[:, rows], orders[:, columns]]
        parts.append(2 * (stacked @ shuffled.T) / (n * (n - 3)))
    return torch.cat(parts, dim=1)


# ---- labels --------------------------------------------------------------------------------------


def label_features(hot: Tensor, embeddings: Tensor | None = None) -> Tensor:
    """Compute features of the records' labels, f64 [n, K] or [n, e].

    Args:
        hot: [n, K], 1 for each class of a record.
        embeddings: [K, e], averaged for a record with many classes, or None to use `hot` itself.
    """
    hot = hot.double()
    if embeddings is None:
        return hot
    return hot @ embeddings.double() / hot.sum(dim=1, keepdim=True).clamp(min=1)
