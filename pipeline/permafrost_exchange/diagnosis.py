"""Causes of a difference between stored targets and a teacher's outputs that the values themselves show.

A cause is named only if it explains the targets: a tenth of the difference is left at most, and the largest logits are
the same. What merely comes closer is not a cause. One temperature is fitted to all views, one order of the classes (an
assignment, checked on views that it was not fitted to), one turn or reflection to all maps, and the outputs of one
record are compared with the targets of the others. Other inputs of the teacher are tried in other_inputs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, minimize_scalar

from permafrost.annotation.precision import log_softmax
from permafrost.core.records import IMPOSSIBLE_LOGIT, REST_LOGITS, TOP_CLASS, TOP_LOGITS
from permafrost.store.codecs import cosines
from permafrost.store.fields import Values
from permafrost_exchange.options import CauseKind
from permafrost_exchange.target_reader import MIN_PROBABILITY

CLOSE_NATS = 1e-3
"""Mean divergence that rounding explains."""
_EXACT = 0.015
"""Error of a row of outputs, relative to their spread, that rounding to bfloat16 explains."""
_EXACT_COSINE = 0.99
"""Cosine of maps or embeddings that are the same up to rounding."""
_LEFT = 0.1
"""Fraction of a difference that a cause may leave unexplained."""
_SAME_TOP = 0.9
"""Fraction of the largest logits that a cause must explain."""
_CLEAR_FACTOR = 1.05
"""Smallest factor of a temperature that is named."""
_OWNER = 0.25
"""Fraction of a row's error, or of a field's distance, that an explanation may leave."""
_LOWEST_LOG = -12.0
"""Log-probability below which small probabilities were rounded, or cut."""
_MIN_ROWS = 16
"""Number of rows below which a permutation of classes could fit by chance."""
_MIN_CENTERED = 8
"""Number of rows below which their mean says nothing."""
_SHOWN = 3


class Cause(NamedTuple):
    """Explanation of a difference."""

    kind: CauseKind | Literal["explainer"]
    """Kind of the difference; maps that the named explainer cannot have made are not accepted by any option."""
    text: str
    """Meaning of the targets, as in "they are at temperature 4"."""
    advice: str
    """Remedy, as an imperative."""
    left: float
    """Distance that is left, in nats or as 1 minus a cosine."""


# ---- outputs -------------------------------------------------------------------------------------


class StoredOutputs(NamedTuple):
    """Softmax of the targets of n views, of all classes or of the largest ones and the rest."""

    temperature: float
    classes: NDArray[np.int64]
    """Listed classes of each view, i64 [n, k]."""
    log_shares: NDArray[np.float64]
    """Log-probabilities f64 [n, k] of the listed classes, or [n, k + 1] with that of the rest."""

    @classmethod
    def of(cls, stored: Values, temperatures: Sequence[float]) -> StoredOutputs:
        """Read stored fields [n, 1, ...]: `logits`, or `top_logits` with `top_class` and `rest_logits`."""
        if "logits" in stored:
            logits = _possible(stored["logits"][:, 0])
            return cls(
                1.0, np.tile(np.arange(logits.shape[1]), (len(logits), 1)), log_softmax(logits)
            )
        values = _possible(stored[TOP_LOGITS][:, 0].astype(np.float64)) / temperatures[0]
        rest = stored[REST_LOGITS][:, 0, :1].astype(np.float64)
        if rest.any():  # 0 for all where every class is listed
            values = np.concatenate([values, rest], axis=1)
        return cls(temperatures[0], stored[TOP_CLASS][:, 0].astype(np.int64), log_softmax(values))

    def select(self, rows: NDArray[Any]) -> StoredOutputs:
        """Return those of some views."""
        return StoredOutputs(self.temperature, self.classes[rows], self.log_shares[rows])

    @property
    def has_rest(self) -> bool:
        """True if classes that are not listed have a probability."""
        return bool(self.log_shares.shape[1] > self.classes.shape[1])

    @property
    def top(self) -> NDArray[np.int64]:
        """Most probable class of each view, i64 [n]."""
        place = self.log_shares[:, : self.classes.shape[1]].argmax(axis=1)
        return np.asarray(self.classes[np.arange(len(place)), place])

    def teacher_shares(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """Return the teacher's log-probabilities of the same classes and of the rest, of the shape of `log_shares`."""
        listed = np.take_along_axis(log_softmax(logits / self.temperature), self.classes, axis=1)
        if not self.has_rest:
            return log_softmax(listed)
        rest = np.maximum(1 - np.exp(listed).sum(axis=1, keepdims=True), 1e-12)
        return np.concatenate([listed, np.log(rest)], axis=1)

    def divergence(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """Compute KL(teacher || stored) of each view in nats."""
        shares = self.teacher_shares(logits)
        return np.asarray(np.maximum((np.exp(shares) * (shares - self.log_shares)).sum(axis=1), 0))

    def errors(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """Compute the error of each view's log-probabilities, relative to their spread."""
        shares = np.maximum(self.teacher_shares(logits), _LOWEST_LOG)
        stored = np.maximum(self.log_shares, _LOWEST_LOG)
        counted = np.maximum(shares, stored) > _LOWEST_LOG
        spread = np.linalg.norm(shares * counted, axis=1)
        return np.asarray(
            np.linalg.norm(shares - stored, axis=1) / (np.sqrt(counted.sum(axis=1)) + spread)
        )

    def dense(self, num_classes: int) -> NDArray[np.float64]:
        """Return log-probabilities of all classes f64 [n, K], the rest spread evenly."""
        count = self.classes.shape[1]
        dense = np.full((len(self.classes), num_classes), _LOWEST_LOG)
        if self.has_rest:
            dense[:] = self.log_shares[:, -1:] - np.log(max(1, num_classes - count))
        np.put_along_axis(dense, self.classes, self.log_shares[:, :count], axis=1)
        return dense


def _possible(logits: NDArray[Any]) -> NDArray[Any]:
    """Return logits with those of a small probability for 0, which may be the rounding of one."""
    return np.where(logits <= IMPOSSIBLE_LOGIT, np.log(MIN_PROBABILITY), logits)


def find_cause_of_outputs(
    logits: NDArray[Any], stored: StoredOutputs, keys: Sequence[str], names: Sequence[str]
) -> Cause | None:
    """Explain outputs by one temperature, one other order of the classes, or the rows of other records.

    Args:
        logits: Logits of the teacher, [n, K].
        stored: Targets of the same views.
        keys: Keys of the records of the views.
        names: Names of the K classes, or none.
    """
    factor, left = fit_temperature(logits, stored)
    temperature = f"{factor * stored.temperature:.3g}"
    if _is_clear(factor) and _explains(logits, logits, stored):
        advice = (
            f"save the teacher's logits themselves; these must be multiplied by {temperature}"
            if stored.temperature == 1
            else f"set format.temperature={temperature}"
        )
        text = f"they are at temperature {temperature}, and not {stored.temperature:g}"
        return Cause("temperature", text, advice, left)
    if (order := _match_classes(logits, stored)) is not None:
        factor, left = fit_temperature(logits[:, order], stored)
        is_seen = stored.dense(len(order)).std(axis=0) > 0
        moved = np.flatnonzero((order != np.arange(len(order))) & is_seen)
        shown = [f"{number} ({names[number]})" if names else number for number in range(len(order))]
        pairs = [f"class {shown[here]} is the teacher's {shown[order[here]]}" for here in moved]
        text = f"they have another order of the classes: {_list_first(pairs)}"
        if _is_clear(factor):
            text += f", at temperature {factor * stored.temperature:.3g}"
        return Cause("classes", text, "put the classes into the order of the data", left)
    return _other_rows(logits, stored, keys)


def fit_temperature(logits: NDArray[Any], stored: StoredOutputs) -> tuple[float, float]:
    """Find the factor of the temperature at which the teacher is closest, and its mean divergence there."""
    end = np.log(50.0)
    result = minimize_scalar(
        lambda logarithm: stored.divergence(logits / np.exp(logarithm)).mean(),
        bounds=(-end, end),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(result.x)), float(result.fun)


def _is_clear(factor: float) -> bool:
    return bool(abs(np.log(factor)) > np.log(_CLEAR_FACTOR))


def _explains(logits: NDArray[Any], stated: NDArray[Any], stored: StoredOutputs) -> bool:
    """Return whether logits explain targets at some temperature, compared with the logits as they are stated."""
    before = stored.divergence(stated).mean()
    left = fit_temperature(logits, stored)[1]
    same_top = (logits.argmax(axis=1) == stored.top).mean()
    return bool(left <= max(_LEFT * before, CLOSE_NATS) and same_top >= _SAME_TOP)


def _list_first(texts: Sequence[str]) -> str:
    more = f", and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return f"{', '.join(texts[:_SHOWN])}{more}"


def _match_classes(logits: NDArray[Any], stored: StoredOutputs) -> NDArray[np.int64] | None:
    """Find the one order of the teacher's classes that explains the targets.

    Half of the views decide an order, which must explain the other half. A shift of all classes needs no such fit.

    Args:
        logits: Logits of the teacher, [n, K].
        stored: Targets of the same views.

    Returns:
        The teacher's class of each stored one, i64 [K]; None if there is none but the stored order.
    """
    rows, same = np.arange(len(logits)), np.arange(logits.shape[1])
    shifts = (logits.argmax(axis=1) - stored.top) % len(same)
    candidates = [((same + np.bincount(shifts).argmax()) % len(same), rows)]
    if len(rows) >= _MIN_ROWS:
        order = _best_order(logits[::2], stored.select(rows[::2]))
        candidates.append((order, rows[1::2]))
    for order, checked in candidates:
        part = logits[checked]
        if (order != same).any() and _explains(part[:, order], part, stored.select(checked)):
            return order if len(checked) == len(rows) else _best_order(logits, stored)
    return None


def _best_order(logits: NDArray[Any], stored: StoredOutputs) -> NDArray[np.int64]:
    """Assign a teacher's class to each stored one, by the correlation of their columns."""
    num_classes = logits.shape[1]
    columns = []
    for values in (log_softmax(logits), stored.dense(num_classes)):
        values = np.maximum(values, _LOWEST_LOG - 4)
        values = values - values.mean(axis=1, keepdims=True)
        columns.append(unit_rows((values - values.mean(axis=0)).T))
    alike = columns[1] @ columns[0].T + 1e-6 * np.eye(num_classes)  # equal ones stay
    return np.asarray(linear_sum_assignment(-alike)[1], np.int64)


def _other_rows(logits: NDArray[Any], stored: StoredOutputs, keys: Sequence[str]) -> Cause | None:
    """Explain targets by rows that belong to other records."""
    errors = stored.errors(logits)
    odd = np.flatnonzero(errors >= _EXACT)
    if not len(odd):
        return None
    owners = np.full(len(errors), -1)
    for row in odd if len(errors) > 1 else ():
        candidates = stored.select(np.full(len(errors), row)).errors(logits)
        best, second = np.partition(candidates, 1)[:2]
        if best < max(_EXACT, _OWNER * errors[row]) and second > max(_EXACT, 2 * best):
            owners[row] = candidates.argmin()
    # Without its owner in the sample, a row is that of another record only if it does not resemble its own.
    is_unlike = (
        len(odd) <= 0.8 * len(errors) and (logits.argmax(axis=1) == stored.top)[odd].mean() < 0.5
    )
    return _describe_rows(keys, odd, owners, is_clear=is_unlike)


def _describe_rows(
    keys: Sequence[str],
    odd: NDArray[np.int64],
    owners: NDArray[np.int64],
    *,
    is_clear: bool = False,
) -> Cause | None:
    """Return the cause that rows belong to other records, None if the owners of most are unknown and it is not clear.

    Args:
        keys: Keys of the records.
        odd: Rows that are not their records'.
        owners: Record that each row belongs to, -1 if unknown.
        is_clear: True if the rows are not their records', whoever owns them.
    """
    owned = odd[owners[odd] >= 0]
    resembles_few = len(np.unique(owners[owned])) < 0.5 * len(owned)
    if not len(odd) or resembles_few or not (is_clear or len(owned) >= 0.5 * len(odd)):
        return None
    texts = [f"{keys[row]} has those of {keys[owners[row]]}" for row in owned]
    return Cause(
        "rows",
        f"{len(odd)} of {len(owners)} rows are not those of their records "
        f"({_list_first(texts or [keys[row] for row in odd])})",
        "correct the names or the order of the rows",
        0.0,
    )


# ---- maps and vectors ----------------------------------------------------------------------------


_TEACHERS_MAPS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "transposed": lambda maps: np.swapaxes(maps, -1, -2),
    "mirrored": lambda maps: maps[..., ::-1],
    "upside down": lambda maps: maps[..., ::-1, :],
    "turned by 180 degrees": lambda maps: maps[..., ::-1, ::-1],
    "turned by 90 degrees": lambda maps: np.rot90(maps, 3, (-2, -1)),
    "turned by 270 degrees": lambda maps: np.rot90(maps, 1, (-2, -1)),
    "transposed along the other diagonal": lambda maps: np.swapaxes(maps, -1, -2)[..., ::-1, ::-1],
    "negative": lambda maps: -maps,
    "not cut: it has negative values": lambda maps: np.maximum(maps, 0),
}
"""Way in which maps of tools differ -> function of stored maps [..., h, w] that makes them the teacher's."""


def unit_rows(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return each record's values with the norm 1, f64 [n, d]; zeros stay zeros."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.asarray(np.divide(flat, norms, out=np.zeros_like(flat), where=norms > 0))


def centered(teacher: NDArray[Any], stored: NDArray[Any]) -> list[NDArray[np.float64]]:
    """Return each record's values, without what the teacher's have in common, f64 [n, d] each.

    Maps that are not negative resemble each other: the cosine of those of two records is often .8. Without the mean map
    it is near 0.
    """
    vectors = [unit_rows(values) for values in (teacher, stored)]
    center = vectors[0].mean(axis=0) if len(teacher) >= _MIN_CENTERED else 0.0
    return [each - center for each in vectors]


def centered_cosines(teacher: NDArray[Any], stored: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the cosine of each record's values to the teacher's, after both are centered, f64 [n]."""
    one, other = centered(teacher, stored)
    return cosines(one.astype(np.float32), other)


def find_cause_of_field(
    name: str, teacher: NDArray[Any], stored: NDArray[Any], keys: Sequence[str], *, is_map: bool
) -> Cause | None:
    """Explain maps or vectors by another direction or sign, or by those of other records.

    Args:
        name: Name of the field.
        teacher: Values of the teacher, [n, ..., h, w] or [n, d].
        stored: Targets of the same records.
        keys: Keys of the records.
        is_map: True for maps.
    """
    stated = 1 - centered_cosines(teacher, stored).mean()
    for text, turn in _TEACHERS_MAPS.items() if is_map else ():
        turned = turn(stored)
        left = (
            1.0 if turned.shape != teacher.shape else 1 - centered_cosines(teacher, turned).mean()
        )
        if left < max(1 - _EXACT_COSINE, _OWNER * min(stated, 0.6)):
            advice = "save it as the teacher's explainer gives it"
            return Cause("maps", f"{name} is {text}", advice, float(left))
    one, other = map(unit_rows, centered(teacher, stored))
    alike = one @ other.T
    owners = np.where(alike.max(axis=0) > _EXACT_COSINE, alike.argmax(axis=0), -1)
    cause = _describe_rows(keys, np.flatnonzero(alike.diagonal() <= _EXACT_COSINE), owners)
    if cause is None:
        return None
    return cause._replace(kind="maps" if is_map else "rows", text=f"{name}: {cause.text}")
