"""Cause of the difference between stored targets and the outputs of the teacher that they are said to be of.

A cause is named only if it explains the targets: with it, rows agree as exactly as rounding lets them, or, where the
teacher's images were resized by another library, nine tenths of the difference are gone and the largest logits are the
same. What merely comes closer is not a cause. So one temperature is fitted to all records, one permutation of the
classes (an assignment, checked on records that it was not fitted to), one turn or reflection to all maps, and the
outputs of one record are compared with the targets of the others. What the teacher does when it is run in another way
is tried in target_comparison.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, minimize_scalar

from permafrost.annotation.precision import log_softmax
from permafrost.core.records import REST_LOGITS, TOP_CLASS, TOP_LOGITS
from permafrost.store.codecs import cosines
from permafrost.store.fields import Values
from permafrost_exchange.options import CauseKind

CLOSE_NATS = 1e-3
"""Mean divergence that rounding explains."""
_EXACT = 0.015
"""Error of a row of outputs, relative to their spread, that rounding to bfloat16 explains."""
_EXACT_COSINE = 0.99
"""Cosine of maps or embeddings that are the same up to rounding."""
_LEFT = 0.05
"""Fraction of a difference that a cause may leave unexplained."""
_ROUGHLY_LEFT = 0.1
"""The same for temperatures and orders of classes of which the largest logits agree."""
_SAME_TOP = 0.9
"""Fraction of the largest logits that must then agree."""
_CLEAR_FACTOR = 1.25
"""Smallest factor of a temperature that is then named."""
_CLEAR_GAIN = 0.3
"""Smallest gain of the correlation by which a class is then exchanged."""
_OWNER = 0.25
"""Maximum fraction of a row's error for another record's outputs to explain the row."""
_LOWEST_LOG = -12.0
"""Log-probability below which small probabilities were rounded, or cut."""
_MIN_ROWS = 16
"""Number of rows below which a permutation of classes could fit by chance."""
_MIN_CENTERED = 8
"""Number of rows below which their mean says nothing."""
_MAX_TEMPERATURE = 50.0
_SHOWN = 3


class Cause(NamedTuple):
    """Explanation of a difference."""

    kind: CauseKind
    text: str
    """Meaning of the targets, as in "they are at temperature 4"."""
    advice: str
    """Remedy, as an imperative."""
    left: float
    """Distance that is left, in nats or as 1 minus a cosine."""


def explains(before: float, after: float) -> bool:
    """Return whether a distance is so small compared to another that its meaning is the right one."""
    return after <= max(_LEFT * before, CLOSE_NATS)


# ---- outputs -------------------------------------------------------------------------------------


class StoredOutputs:
    """Softmax of the targets of n views, of all classes or of the largest ones and the rest."""

    def __init__(self, stored: Values, temperatures: Sequence[float]) -> None:
        """Read stored fields [n, 1, ...]: `logits`, or `top_logits` with `top_class` and `rest_logits`."""
        self.temperature = 1.0
        self.classes: NDArray[np.int64] | None = None
        """Listed classes of each view i64 [n, k], the largest first; None for all in their order."""
        self.has_rest = False
        if "logits" in stored:
            values = stored["logits"][:, 0].astype(np.float64)
        else:
            self.temperature = temperatures[0]
            self.classes = stored[TOP_CLASS][:, 0].astype(np.int64)
            values = stored[TOP_LOGITS][:, 0].astype(np.float64) / self.temperature
            rest = stored[REST_LOGITS][:, 0, :1].astype(np.float64)
            self.has_rest = bool(rest.any())  # 0 for all where every class is listed
            if self.has_rest:
                values = np.concatenate([values, rest], axis=1)
        self.log_shares = log_softmax(values)
        """Log-probabilities f64 [n, k], and that of the rest."""

    def select(self, rows: NDArray[Any]) -> StoredOutputs:
        """Return those of some views."""
        part = copy(self)
        part.log_shares = self.log_shares[rows]
        part.classes = None if self.classes is None else self.classes[rows]
        return part

    def teacher_shares(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """Return the teacher's log-probabilities of the same classes, f64 [n, k], and of the rest."""
        whole = log_softmax(logits.astype(np.float64) / self.temperature)
        if self.classes is None:
            return whole
        listed = np.take_along_axis(whole, self.classes, axis=1)
        if not self.has_rest:
            return log_softmax(listed)
        rest = np.maximum(1 - np.exp(listed).sum(axis=1, keepdims=True), 1e-12)
        return np.concatenate([listed, np.log(rest)], axis=1)

    def divergence(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """Compute KL(teacher || stored) of each view in nats."""
        shares = self.teacher_shares(logits)
        return np.asarray(np.maximum((np.exp(shares) * (shares - self.log_shares)).sum(axis=1), 0))

    def same_top(self, logits: NDArray[Any]) -> NDArray[np.bool_]:
        """Return the views whose largest logit is the same."""
        top = self.log_shares.argmax(axis=1) if self.classes is None else self.classes[:, 0]
        return np.asarray(logits.argmax(axis=1) == top)

    def errors(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """Compute the error of each view's log-probabilities, relative to their spread."""
        shares = np.maximum(self.teacher_shares(logits), _LOWEST_LOG)
        stored = np.maximum(self.log_shares, _LOWEST_LOG)
        counts = np.maximum(shares, stored) > _LOWEST_LOG
        total = np.maximum(counts.sum(axis=1), 1)
        difference = np.where(counts, shares - stored, 0.0)
        spread = np.where(counts, shares, 0.0)
        error, scale = (
            np.sqrt((deviation**2).sum(axis=1) / total) for deviation in (difference, spread)
        )
        return np.asarray(error / (1 + scale))

    def dense(self, num_classes: int) -> NDArray[np.float64]:
        """Return log-probabilities of all classes f64 [n, K], the rest spread evenly."""
        if self.classes is None:
            return self.log_shares
        count = self.classes.shape[1]
        rest = self.log_shares[:, -1:] - np.log(max(1, num_classes - count))
        if not self.has_rest:
            rest = np.full((len(self.classes), 1), _LOWEST_LOG)
        dense = np.repeat(rest, num_classes, axis=1)
        np.put_along_axis(dense, self.classes, self.log_shares[:, :count], axis=1)
        return dense


def find_cause_of_outputs(
    logits: NDArray[Any], stored: StoredOutputs, keys: Sequence[str], names: Sequence[str]
) -> tuple[Cause, NDArray[np.int64] | None] | None:
    """Explain outputs by rows of other records, one temperature, or one other order of the classes.

    Args:
        logits: Logits of the teacher, [n, K].
        stored: Targets of the same views.
        keys: Keys of the records of the views.
        names: Names of the K classes, or none.

    Returns:
        The cause, and the teacher's class of each stored one if their order is another, i64 [K]; None if none explains
        them.
    """
    errors = stored.errors(logits)
    exact = errors < _EXACT
    if exact.any() and not exact.all():
        cause = _other_rows(logits, stored, keys, exact, errors)
        if cause is not None:
            return cause, None
    before = float(stored.divergence(logits).mean())
    factor, left = fit_temperature(logits, stored)
    is_exact = explains(before, left) and np.median(stored.errors(logits / factor)) < _EXACT
    is_clear = abs(np.log(factor)) > np.log(_CLEAR_FACTOR)
    if is_exact or (is_clear and _fits(stored, logits, left, before)):
        return _temperature(factor * stored.temperature, stored, left), None
    order = match_classes(logits, stored, before)
    if order is not None:
        moved = logits[:, order]
        factor, left = fit_temperature(moved, stored)
        text = _describe_order(order, stored.dense(logits.shape[1]), names)
        if abs(np.log(factor)) > np.log(_CLEAR_FACTOR):
            text += f", at temperature {factor * stored.temperature:.3g}"
        return Cause("classes", text, "put the classes into the order of the data", left), order
    if exact.any():  # all rows are, or some are and the rest belongs to no other record
        return None
    cause = _other_rows(logits, stored, keys, exact, errors)
    return None if cause is None else (cause, None)


def _fits(stored: StoredOutputs, logits: NDArray[Any], left: float, before: float) -> bool:
    """Return whether logits explain targets of images that another library has resized."""
    return left <= _ROUGHLY_LEFT * before and stored.same_top(logits).mean() >= _SAME_TOP


def fit_temperature(logits: NDArray[Any], stored: StoredOutputs) -> tuple[float, float]:
    """Find the factor of the temperature at which the teacher is closest, and its mean divergence there."""

    def distance(logarithm: float) -> float:
        return float(stored.divergence(logits / np.exp(logarithm)).mean())

    end = np.log(_MAX_TEMPERATURE)
    grid = np.linspace(-end, end, 33)
    best = grid[int(np.argmin([distance(point) for point in grid]))]
    step = grid[1] - grid[0]
    result = minimize_scalar(
        distance, bounds=(best - step, best + step), method="bounded", options={"xatol": 1e-6}
    )
    return float(np.exp(result.x)), float(result.fun)


def _temperature(temperature: float, stored: StoredOutputs, left: float) -> Cause:
    shown = f"{temperature:.3g}"
    if stored.classes is None:
        advice = f"save the teacher's logits themselves; these must be multiplied by {shown}"
    else:
        advice = f"set format.temperature={shown}"
    return Cause(
        "temperature",
        f"they are at temperature {shown}, and not {stored.temperature:g}",
        advice,
        left,
    )


def match_classes(
    logits: NDArray[Any], stored: StoredOutputs, before: float
) -> NDArray[np.int64] | None:
    """Find the one order of the teacher's classes that explains the targets.

    Half of the views decide an order, which must explain the other half.

    Args:
        logits: Logits of the teacher, [n, K].
        stored: Targets of the same views.
        before: Mean divergence in the order of the classes as they are.

    Returns:
        The teacher's class of each stored one, i64 [K]; None if there is none, or if it is the stored order.
    """
    count = len(logits)
    shift = _shifted_order(logits, stored)
    if shift is not None and _fits(
        stored, logits[:, shift], fit_temperature(logits[:, shift], stored)[1], before
    ):
        return shift
    if count < _MIN_ROWS:
        return None
    halves = (np.arange(0, count, 2), np.arange(1, count, 2))
    for gain in (0.0, _CLEAR_GAIN):  # all that fits exactly, or what is clear
        left, is_right = 0.0, True
        for fitted, checked in (halves, halves[::-1]):
            order = _best_order(logits[fitted], stored.select(fitted), gain)
            moved, part = logits[checked][:, order], stored.select(checked)
            factor, distance = fit_temperature(moved, part)
            left += distance / 2
            is_exact = float(np.median(part.errors(moved / factor))) < _EXACT
            is_right &= is_exact or (gain > 0 and _fits(part, moved, distance, before))
        order = _best_order(logits, stored, gain)
        if is_right and (gain > 0 or explains(before, left)):
            return None if np.array_equal(order, np.arange(len(order))) else order
    return None


def _shifted_order(logits: NDArray[Any], stored: StoredOutputs) -> NDArray[np.int64] | None:
    """Return the order of classes that count from another number, by the most frequent distance of the largest."""
    num_classes = logits.shape[1]
    top = stored.log_shares.argmax(axis=1) if stored.classes is None else stored.classes[:, 0]
    distances = np.bincount((logits.argmax(axis=1) - top) % num_classes, minlength=num_classes)
    shift = int(distances.argmax())
    return (np.arange(num_classes) + shift) % num_classes if shift else None


def _best_order(logits: NDArray[Any], stored: StoredOutputs, gain: float) -> NDArray[np.int64]:
    """Assign a teacher's class to each stored one, by the correlation of their columns.

    Args:
        logits: Logits of the teacher, [n, K].
        stored: Targets of the same views.
        gain: Gain of the correlation below which a class stays where it is.
    """
    num_classes = logits.shape[1]
    columns = []
    for values in (log_softmax(logits), stored.dense(num_classes)):
        values = np.maximum(values, _LOWEST_LOG - 4)
        values = values - values.mean(axis=1, keepdims=True)
        values = values - values.mean(axis=0)
        columns.append(values / np.maximum(np.linalg.norm(values, axis=0), 1e-9))
    alike = columns[1].T @ columns[0] + 1e-6 * np.eye(num_classes)
    order = np.asarray(linear_sum_assignment(-alike)[1], np.int64)
    same = np.arange(num_classes)
    clear = np.where(alike[same, order] - alike.diagonal() >= gain, order, same)
    return clear if len(np.unique(clear)) == num_classes else same


def _describe_order(
    order: NDArray[np.int64], dense: NDArray[np.float64], names: Sequence[str]
) -> str:
    """Describe an order of the classes by those that are exchanged."""
    count = len(order)
    shifts = (order - np.arange(count)) % count
    if count > 2 and len(np.unique(shifts)) == 1:
        shift = int(shifts[0]) if 2 * shifts[0] <= count else int(shifts[0]) - count
        return f"their classes are shifted by {shift}: class 0 is the teacher's {int(order[0])}"
    moved = np.flatnonzero((shifts != 0) & (dense.std(axis=0) > 0))

    def name(number: int) -> str:
        return f"{number} ({names[number]})" if len(names) == count else str(number)

    pairs = [
        f"class {name(int(number))} is the teacher's {name(int(order[number]))}" for number in moved
    ]
    more = f", and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
    return f"they have another order of the classes: {', '.join(pairs[:_SHOWN])}{more}"


def _other_rows(
    logits: NDArray[Any],
    stored: StoredOutputs,
    keys: Sequence[str],
    exact: NDArray[np.bool_],
    errors: NDArray[np.float64],
) -> Cause | None:
    """Explain targets by rows that belong to other records."""
    odd = np.flatnonzero(~exact)
    owners = np.full(len(keys), -1)
    usual = 2 * float(np.median(errors))
    for row in odd:
        part = stored.select(np.full(len(logits), row))
        candidates = part.errors(logits)
        says_more = (part.log_shares[0] > _LOWEST_LOG).sum() > 1  # than its class
        best, second = np.partition(candidates, 1)[:2] if len(candidates) > 1 else (1.0, 0.0)
        is_owner = best < _EXACT or best < min(_OWNER * errors[row], usual)
        if says_more and is_owner and second > max(_EXACT, 2 * best):
            owners[row] = int(candidates.argmin())
    matched = np.flatnonzero(owners >= 0)
    share = len(matched) / len(odd)
    if len(np.unique(owners[matched])) < 0.5 * len(matched):  # all of them resemble a few
        return None
    clear = float((errors[odd] > 5 * _EXACT).mean()) >= 0.9
    # Without its owner in the sample, a row is that of another record only if it does not resemble its own.
    unlike = clear and exact.mean() >= 0.2 and _likeness(logits[odd], stored.select(odd)) < 0.5
    return _describe_rows(keys, odd, owners) if share >= 0.5 or unlike else None


def _likeness(logits: NDArray[Any], stored: StoredOutputs) -> float:
    """Return the mean correlation of the log-probabilities of each view."""
    pair = []
    for values in (stored.teacher_shares(logits), stored.log_shares):
        values = np.maximum(values, _LOWEST_LOG)
        pair.append(unit_rows(values - values.mean(axis=1, keepdims=True)))
    return float((pair[0] * pair[1]).sum(axis=1).mean())


def _describe_rows(keys: Sequence[str], odd: NDArray[np.int64], owners: NDArray[np.int64]) -> Cause:
    texts = [
        f"{keys[row]} has those of {keys[owners[row]]}" for row in odd[owners[odd] >= 0][:_SHOWN]
    ] or [str(keys[row]) for row in odd[:_SHOWN]]
    count = "all" if len(odd) == len(keys) else f"{len(odd)} of {len(keys)}"
    rest = "" if len(odd) == len(keys) else ", and the others are exact"
    return Cause(
        "rows",
        f"{count} rows are not those of their records ({', '.join(texts)}){rest}",
        "correct the names or the order of the rows",
        0.0,
    )


def find_noise(logits: NDArray[Any], stored: StoredOutputs) -> float | None:
    """Return the standard deviation of independent noise on each logit, None if the difference is something else.

    Noise has the same size for every view, and no correlation between classes or with the logits.
    """
    if stored.classes is not None or len(logits) < 2 * _MIN_ROWS or logits.shape[1] < 3:
        return None
    teacher = logits - logits.mean(axis=1, keepdims=True)
    values = stored.log_shares - stored.log_shares.mean(axis=1, keepdims=True)
    noise = values - teacher
    count, num_classes = noise.shape
    sizes = np.sqrt((noise**2).mean(axis=1))
    between = np.corrcoef(noise, rowvar=False)
    off_diagonal = between[~np.eye(num_classes, dtype=bool)]
    expected = -1 / (num_classes - 1)  # rows are centered
    spread = np.sqrt(np.mean((off_diagonal - expected) ** 2))
    with_logits = np.corrcoef(noise.ravel(), teacher.ravel())[0, 1]
    columns = noise.std(axis=0)
    is_noise = (
        sizes.std() / sizes.mean() < 1.5 / np.sqrt(2 * num_classes) + 0.05
        and spread < 1.5 / np.sqrt(count)
        and abs(with_logits) < 4 / np.sqrt(noise.size) + 0.01
        and columns.std() / columns.mean() < 3 / np.sqrt(2 * count)
    )
    size = float(noise.std() * np.sqrt(num_classes / (num_classes - 1)))
    return size if is_noise else None


# ---- maps and vectors ----------------------------------------------------------------------------


_PLACES: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "transposed": lambda maps: np.swapaxes(maps, -1, -2),
    "mirrored": lambda maps: maps[..., ::-1],
    "upside down": lambda maps: maps[..., ::-1, :],
    "turned by 180 degrees": lambda maps: maps[..., ::-1, ::-1],
    "turned by 90 degrees": lambda maps: np.rot90(maps, 1, (-2, -1)),
    "turned by 270 degrees": lambda maps: np.rot90(maps, 3, (-2, -1)),
    "transposed along the other diagonal": lambda maps: np.swapaxes(maps, -1, -2)[..., ::-1, ::-1],
    "negative": lambda maps: -maps,
}
"""Way in which maps of tools differ -> function of the teacher's maps [..., h, w] that does it."""


def unit_rows(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return each record's values with the norm 1, f64 [n, ...]; zeros stay zeros."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.asarray(np.divide(flat, norms, out=np.zeros_like(flat), where=norms > 0)).reshape(
        values.shape
    )


def center_of(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return the mean of the records' values of norm 1, [...]; zeros for few records."""
    if len(values) < _MIN_CENTERED:
        return np.zeros(values.shape[1:])
    return np.asarray(unit_rows(values).mean(axis=0))


def centered_cosines(
    teacher: NDArray[Any], stored: NDArray[Any], center: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Compute the cosine of each record's values after what all records have in common is taken away, f64 [n].

    Maps that are not negative resemble each other: the cosine of those of two records is often .8. Without the mean map
    it is near 0.
    """
    one, other = unit_rows(teacher) - center, unit_rows(stored) - center
    return cosines(one.astype(np.float32), other)


def find_cause_of_maps(
    name: str,
    teacher: NDArray[Any],
    stored: NDArray[Any],
    keys: Sequence[str],
) -> Cause | None:
    """Explain maps [n, ..., h, w] by another direction, or by those of other records.

    Args:
        name: Name of the field.
        teacher: Values of the teacher.
        stored: Targets of the same records.
        keys: Keys of the records.
    """
    if len(teacher) < 2:
        return None
    stated = 1 - float(centered_cosines(teacher, stored, center_of(teacher)).mean())
    left, text = min(
        (1 - float(centered_cosines(each, stored, center_of(each)).mean()), text)
        for text, each in ((way, function(teacher)) for way, function in _PLACES.items())
        if each.shape == stored.shape
    )
    if left < max(1 - _EXACT_COSINE, _OWNER * min(stated, 0.6)):
        advice = "save it as the teacher's explainer gives it"
        return Cause("maps", f"{name} is {text}", advice, left)
    cut = np.maximum(stored, 0)
    left = 1 - float(centered_cosines(teacher, cut, center_of(teacher)).mean())
    if stored.min() < 0 <= teacher.min() and left < 1 - _EXACT_COSINE:
        return Cause(
            "maps",
            f"{name} has the negative values that the teacher's explainer cuts",
            "cut them",
            left,
        )
    cause = find_other_rows(name, teacher, stored, keys)
    return None if cause is None else cause._replace(kind="maps")


def find_other_rows(
    name: str, teacher: NDArray[Any], stored: NDArray[Any], keys: Sequence[str]
) -> Cause | None:
    """Explain maps or vectors [n, ...] by those of other records."""
    center = center_of(teacher)
    one = (unit_rows(teacher) - center).reshape(len(teacher), -1)
    other = (unit_rows(stored) - center).reshape(len(stored), -1)
    one, other = (
        vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        for vectors in (one, other)
    )
    alike = one @ other.T
    exact = alike.diagonal() > _EXACT_COSINE
    odd = np.flatnonzero(~exact)
    owners = np.where(alike.max(axis=0) > _EXACT_COSINE, alike.argmax(axis=0), -1)
    owners[exact] = -1
    if not len(odd) or (owners[odd] >= 0).mean() < 0.5:
        return None
    cause = _describe_rows(keys, odd, owners)
    return cause._replace(text=f"{name}: {cause.text}")
