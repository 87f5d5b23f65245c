"""Bias-corrected distance correlation, and what of it is left when another is taken away (UniCAM, B.1).

Of features X [n, p], U-centering turns the distances a_ij = |x_i - x_j| into

    A~_ij = a_ij - a_i. / (n - 2) - a_.j / (n - 2) + a_.. / ((n - 1) (n - 2)),      A~_ii = 0
    <A~, B~> = 1 / (n (n - 3)) sum_(i != j) A~_ij B~_ij
    R*(A, B) = <A~, B~> / sqrt(<A~, A~> <B~, B~>),                       0 where either norm is 0

which estimates the squared distance correlation without bias, and may be negative. Taking B away leaves
A~ - <A~, B~> / <B~, B~> B~, whose correlation with a third matrix G needs no more than three R* (eq. B1):

    RS(A | B; G) = (R*_AG - R*_AB R*_BG) / sqrt(1 - R*_AB^2)

Everything is float64. Distances are condensed: [n (n - 1) / 2], the pairs i < j row by row.
Shape letters: n records, p values of a feature, m named distance matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MIN_RECORDS = 4
"""Below, the unbiased inner product does not exist."""
SAME = 1e-6
"""Of 1 - R*^2: what two computations of the same features may differ by. Below it nothing is left of either."""
DEGENERATE = 1e-20
"""Of the mean squared distance: what rounding leaves of U-centered distances that are all equal."""
_COLUMNS = 4096
_PERMUTATIONS_AT_ONCE = 64
_PAIRS_AT_ONCE = 2**25
"""Of records, which bound the memory of permutations: about 0.4 GB."""
_ROUNDING = 1e-14


# ---- distances -----------------------------------------------------------------------------------


def centered_gram(
    features: Tensor, lengths: Tensor | None = None, columns: int = _COLUMNS
) -> Tensor:
    """Inner products of records about their mean, f64 [n, n].

    Those of parts of the columns add up to it, so that each part may lie on another rank.

    features  [n, p], of any float dtype
    lengths   f64 [n, 1] that the records are divided by; None leaves them
    columns   that are widened to float64 at a time
    """
    gram = torch.zeros(len(features), len(features), dtype=torch.float64, device=features.device)
    for start in range(0, features.shape[1], columns):
        part = features[:, start : start + columns]
        wide = part.double() if lengths is None else part.double() / lengths
        wide = wide - wide.mean(dim=0)
        gram.addmm_(wide, wide.T)
    return gram


def distances_of_gram(gram: Tensor) -> Tensor:
    """Condensed Euclidean distances of the records whose inner products [n, n] these are."""
    rows, columns = _pairs(len(gram), gram.device)
    norms = gram.diagonal()
    scale = norms[rows] + norms[columns]
    squared = scale - 2 * gram[rows, columns]
    # What rounding leaves of two equal records would be 1e-8 of their length after the root.
    return torch.where(squared > _ROUNDING * scale, squared, 0.0).sqrt()


def feature_distances(features: Tensor, *, l2norm: bool = False) -> Tensor:
    """Condensed Euclidean distances of features [n, p].

    l2norm  divides each record's features by their length first
    """
    lengths = None
    if l2norm:
        lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=torch.float64)
        lengths = lengths.clamp(min=1e-300)
    return distances_of_gram(centered_gram(features, lengths))


def num_records(condensed: Tensor) -> int:
    """n of condensed distances."""
    return (1 + math.isqrt(1 + 8 * len(condensed))) // 2


def square(condensed: Tensor) -> Tensor:
    """Condensed values as a symmetric matrix [n, n] with a zero diagonal."""
    n = num_records(condensed)
    rows, columns = _pairs(n, condensed.device)
    matrix = condensed.new_zeros(n, n).index_put((rows, columns), condensed)
    return matrix + matrix.T


def _pairs(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(n, n, offset=1, device=device)
    return rows, columns


# ---- inner products ------------------------------------------------------------------------------


def u_centered(condensed: Tensor) -> Tensor:
    """A~ of condensed distances, condensed; differentiable. Zero where all distances are equal but for rounding:
    records that are all equally far apart, such as one of each class, say nothing.
    """
    n = num_records(condensed)
    if n < MIN_RECORDS:
        raise ValueError(f"distance correlation needs at least {MIN_RECORDS} records, got {n}")
    rows, columns = _pairs(n, condensed.device)
    sums = square(condensed).sum(dim=1)
    total = sums.sum() / ((n - 1) * (n - 2))
    centered = condensed - (sums[rows] + sums[columns]) / (n - 2) + total
    if centered.square().mean() <= DEGENERATE * condensed.square().mean():
        return 0 * centered
    return centered


def v_centered(condensed: Tensor) -> Tensor:
    """Both triangles and the diagonal of distances centered about their means, flat [n * n]: the biased form."""
    matrix = square(condensed)
    means = matrix.mean(dim=1)
    centered: Tensor = (matrix - means[:, None] - means + means.mean()).flatten()
    return centered


def inner(one: Tensor, other: Tensor) -> Tensor:
    """<A~, B~> of two condensed, U-centered matrices; of stacks of them [m, pairs] all against all, [m, m]."""
    n = num_records(one[0] if one.dim() == 2 else one)
    return 2 * (one @ other.T if one.dim() == 2 else one @ other) / (n * (n - 3))


def correlation(ab: Tensor, aa: Tensor, bb: Tensor) -> Tensor:
    """R* of the three inner products; 0 where either norm is 0."""
    if not (aa > 0 and bb > 0):
        return torch.zeros_like(ab)
    return ab / (aa * bb).sqrt()


def semi_partial(ag: Tensor, ab: Tensor, bg: Tensor) -> Tensor:
    """RS(A | B; G) of three R* (eq. B1); 0 where B leaves nothing of A."""
    left = 1 - ab**2
    if left < SAME:
        return torch.zeros_like(ag)
    return (ag - ab * bg) / left.sqrt()


@dataclass(frozen=True)
class InnerProducts:
    """The inner products of every pair of m named distance matrices, summed over blocks of records.

    For R* and RS the sums come first and the ratio once: a mean of the blocks' ratios would be biased.
    """

    names: tuple[str, ...]
    sums: Tensor
    """f64 [m, m]."""
    records: int
    freedom: int
    """Sum over blocks of n (n - 3) / 2."""
    blocks: int = 1
    permuted: Tensor | None = None
    """f64 [m, P]: inner products with the last matrix when its records are permuted within each block, P times;
    None where nobody asked for permutations."""
    without: Tensor | None = None
    """f64 [m, m, records]: the sums without each record, for the jackknife; None likewise."""

    @classmethod
    def from_distances(
        cls,
        distances: Mapping[str, Tensor],
        *,
        biased: bool = False,
        permutations: int = 0,
        seed: int = 0,
    ) -> InnerProducts:
        """Of one block's condensed distances by name.

        biased        the V-statistic in place of the unbiased inner product
        permutations  of the records of the last matrix, for p-values, drawn from `seed`
        """
        n = num_records(next(iter(distances.values())))
        center = v_centered if biased else u_centered
        stacked = torch.stack([center(condensed) for condensed in distances.values()])
        sums = stacked @ stacked.T / n**2 if biased else inner(stacked, stacked)
        freedom = n * (n - 3) // 2
        if not permutations:
            return cls(tuple(distances), sums, records=n, freedom=freedom)
        return cls(
            tuple(distances),
            sums,
            records=n,
            freedom=freedom,
            permuted=_permuted(stacked, n, permutations, seed),
            without=_without_each(stacked, sums, n),
        )

    def merge(self, other: InnerProducts) -> InnerProducts:
        """Both parts' blocks together."""
        if self.names != other.names:
            raise ValueError(f"inner products of {self.names} and of {other.names} do not add up")
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
        """R*(A, B), a 0-dimensional f64."""
        i, j = (self.names.index(name) for name in (a, b))
        return correlation(self.sums[i, j], self.sums[i, i], self.sums[j, j])

    def semi_partial(self, a: str, given: str, target: str) -> Tensor:
        """RS(A | given; target)."""
        return semi_partial(
            self.correlation(a, target),
            self.correlation(a, given),
            self.correlation(given, target),
        )

    def partial(self, a: str, given: str, target: str) -> Tensor:
        """The full partial distance correlation: `given` is taken away from the target, too."""
        left = 1 - self.correlation(given, target) ** 2
        semi = self.semi_partial(a, given, target)
        return torch.zeros_like(semi) if left < SAME else semi / left.sqrt()

    def residual_p(self, a: str, given: str) -> float:
        """p-value of RS(A | given; G) = 0 against RS > 0, with G the last matrix, the labels.

        The larger one of two. By permutations of G it is right where G has nothing to do with A and `given`, and too
        small where it has. There RS is a smooth function of means over records, and its jackknife error over records
        (Efron and Stein 1981) and Student's t are right, which without any dependence are too large.
        """
        permuted = self.permutation_p(a, given)
        assert self.without is not None
        i, j, g = self.names.index(a), self.names.index(given), len(self.names) - 1
        every = torch.cat([self.sums[..., None], self.without], dim=2)

        def r_star(x: int, y: int) -> Tensor:
            scale = (every[x, x] * every[y, y]).clamp(min=0).sqrt()
            return torch.where(scale > 0, every[x, y] / scale.clamp(min=1e-300), 0.0)

        ag, ab, bg = r_star(i, g), r_star(i, j), r_star(j, g)
        rs = (ag - ab * bg) / (1 - ab**2).clamp(min=SAME).sqrt()
        records = rs.shape[0] - 1
        error = ((records - 1) * rs[1:].var(correction=0)).sqrt()
        if not error > 0:
            return permuted
        from scipy.stats import t

        return max(permuted, float(t.sf(float(rs[0] / error), records - 1)))

    def permutation_p(self, a: str, given: str | None = None) -> float:
        """p-value of R*(A, G), or of RS(A | given; G), with G the last matrix, the labels: the share of permutations
        of its records with as high an inner product, the one that was seen counted among them.

        It holds for labels of few classes, too, where they have nothing to do with A, nor with `given`; for RS see
        `residual_p`. The smallest possible value is 1 / (P + 1).
        """
        if self.permuted is None:
            raise ValueError("these inner products were taken without permutations")
        i = self.names.index(a)
        seen, null, scale = self.sums[i, -1], self.permuted[i], self.sums[i, i]
        if given is not None:
            if 1 - self.correlation(a, given) ** 2 < SAME:
                return 1.0
            j = self.names.index(given)
            share = self.sums[i, j] / self.sums[j, j] if self.sums[j, j] > 0 else 0.0
            seen, null = seen - share * self.sums[j, -1], null - share * self.permuted[j]
        if not (scale > 0 and self.sums[-1, -1] > 0):
            return 1.0
        least = seen - 1e-12 * (scale * self.sums[-1, -1]).sqrt()  # ties are those of rounding
        return (int((null >= least).sum()) + 1) / (len(null) + 1)

    def p_value(self, r_star: Tensor) -> float:
        """Of an R* of these records under independence: T = sqrt(v - 1) R* / sqrt(1 - R*^2) is Student's t with
        v - 1 degrees of freedom, v = n (n - 3) / 2 (Szekely and Rizzo 2013); one-sided. For features of high
        dimension only: of labels of few classes it is too small (see `permutation_p`).
        """
        from scipy.stats import t

        value, freedom = float(r_star), self.freedom - 1
        if value >= 1:
            return 0.0
        if value <= -1:
            return 1.0
        return float(t.sf(math.sqrt(freedom) * value / math.sqrt(1 - value**2), freedom))


def _without_each(stacked: Tensor, sums: Tensor, n: int) -> Tensor:
    """[m, m, n]: inner products of U-centered matrices [m, pairs] without each of their n records.

    With rows that sum to zero, leaving out record k takes 2 c_k from the sum of products over pairs, c_k its own row's,
    and centering what is left anew takes 2 c_k / ((n - 3) (n - 4)) from the mean.
    """
    if n <= MIN_RECORDS:
        return sums[..., None].expand(-1, -1, n).clone()
    squares = torch.stack([square(values) for values in stacked])
    rows = torch.einsum("akj,bkj->abk", squares, squares)
    left = n - 1
    of_pairs = (n * (n - 3) * sums[..., None] - 2 * rows) / (left * (left - 3))
    return of_pairs - 2 * rows / (left * (left - 2) * (left - 3))


def _permuted(stacked: Tensor, n: int, permutations: int, seed: int) -> Tensor:
    """[m, P]: inner products of U-centered matrices [m, pairs] with the last one, its n records permuted P times."""
    generator = np.random.default_rng(seed)
    rows, columns = _pairs(n, stacked.device)
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


def merge_blocks(parts: Sequence[InnerProducts]) -> InnerProducts:
    """All blocks together."""
    first, *others = parts
    for part in others:
        first = first.merge(part)
    return first


# ---- labels --------------------------------------------------------------------------------------


def label_features(hot: Tensor, embeddings: Tensor | None = None) -> Tensor:
    """What the labels of records are compared by, f64 [n, K] or [n, e].

    hot         [n, K], 1 for each class of a record
    embeddings  [K, e]; a record of many classes has their mean. None: the classes themselves, one-hot
    """
    hot = hot.double()
    if embeddings is None:
        return hot
    return hot @ embeddings.double() / hot.sum(dim=1, keepdim=True).clamp(min=1)
