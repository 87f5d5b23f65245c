"""Order of the classes of a shared pass in another store, from the names of both and the labels of equal images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import shorten
from permafrost.core.records import TOP_CLASS, FieldSpec, are_numbers
from permafrost.exchange.target_reader import TargetError

logger = logging.getLogger("permafrost.attach")

_SURE = 0.9
"""Fraction of the records of a class that must have one label for an order that its name does not say."""
_CLASSES_AS_VALUES = (TOP_CLASS, "explained_class")
"""Fields whose values are classes."""


def order_classes(
    there: Sequence[str],
    here: Sequence[str],
    labels: tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]],
    where: str,
) -> NDArray[np.int64] | None:
    """Find the class here of each class of a share.

    Names decide where both stores have the same ones, and labels where they are numbers or differ. Labels that
    contradict the names decide if they do so for all classes in one way.

    Args:
        there: Names of the classes of the share.
        here: Names of the classes of the store, as many.
        labels: Labels of the joined records there and here, [n] each, below 0 where unknown.
        where: The share, for messages.

    Returns:
        i64 [K]; None if they are the same.

    Raises:
        TargetError: If neither names nor labels say it, or labels contradict.
    """
    count = len(there)
    usable = (np.minimum(*labels) >= 0) & (np.maximum(*labels) < count)
    pairs = np.stack([each[usable].astype(np.int64) for each in labels])
    by_label, shares = _majority(pairs, count)
    by_name = _by_name(there, here)
    has_label = by_label >= 0
    order, reason = by_name, "their names"
    if by_name is None or (by_label != by_name)[has_label].any():
        same = list(there) == list(here)
        if same and not has_label.any():
            logger.warning(
                "%s: its classes are numbers, and no joined record has a label in both stores, so nothing says whether "
                "they mean the same here",
                where,
            )
            return None
        order = _by_label(by_label, shares, same=same)
        reason = "the labels of their records"
    if order is None:
        raise TargetError(_refusal(there, here, by_label, shares, pairs, where))
    differing = int((order[pairs[0]] != pairs[1]).sum())
    if differing:
        logger.warning(
            "%d of %d joined records have another label here than in the share",
            differing,
            pairs.shape[1],
        )
    moved = [
        f"class {n} ({there[n]}) is class {order[n]} here ({here[order[n]]})"
        for n in range(count)
        if n != order[n] or there[n] != here[order[n]]
    ]
    if moved:
        logger.warning("classes are matched by %s: %s", reason, shorten(moved, 3))
    return None if (order == np.arange(count)).all() else order


def _by_name(there: Sequence[str], here: Sequence[str]) -> NDArray[np.int64] | None:
    """Return the class here of each name, None if names do not say it."""
    if are_numbers(there) or are_numbers(here) or len(set(there)) < len(there):
        return None
    places = {name: number for number, name in enumerate(here)}
    if places.keys() != set(there):
        return None
    return np.array([places[name] for name in there])


def _majority(
    pairs: NDArray[np.int64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the most frequent label here of each class there, -1 for none, and its share."""
    different, sizes = np.unique(pairs[0] * count + pairs[1], return_counts=True)
    classes = different // count
    totals = np.bincount(classes, sizes, count)
    order, shares = np.full(count, -1), np.zeros(count)
    by_size = np.argsort(sizes, kind="stable")  # the largest of a class last
    order[classes[by_size]] = (different % count)[by_size]
    shares[classes[by_size]] = sizes[by_size] / totals[classes[by_size]]
    return order, shares


def _by_label(
    by_label: NDArray[np.int64], shares: NDArray[np.float64], *, same: bool
) -> NDArray[np.int64] | None:
    """Return the class here of each class there by the most frequent labels, None if they do not say it.

    Args:
        by_label: Most frequent label of each class, -1 for none.
        shares: Fraction of the class's records with it.
        same: True if the lists of names are the same, so that classes without records may stay where they are.
    """
    count = len(by_label)
    classes = np.flatnonzero(by_label >= 0)
    different = np.unique(by_label[classes])
    if not len(classes) or len(different) < len(classes) or (shares[classes] < _SURE).any():
        return None
    if same and (by_label[classes] == classes).all():
        return np.arange(count)
    order = by_label.copy()
    if len(classes) == count - 1:
        order[order < 0] = np.setdiff1d(np.arange(count), different)
    return order if (order >= 0).all() else None


def _refusal(
    there: Sequence[str],
    here: Sequence[str],
    by_label: NDArray[np.int64],
    shares: NDArray[np.float64],
    pairs: NDArray[np.int64],
    where: str,
) -> str:
    names = (
        f"{where}: its classes are {shorten(there, 5)}, and those of the store {shorten(here, 5)}"
    )
    total = pairs.shape[1]
    if not total:
        return (
            f"{names}, and no joined record has a label in both, so a column of the targets may mean another class; "
            "pack the store with data.classes=FILE, which lists them in that order"
        )
    lacking = [there[n] for n in np.flatnonzero(by_label < 0).tolist()]
    if not lacking or (shares[by_label >= 0] < _SURE).any():
        differing = int((pairs[0] != pairs[1]).sum())
        return (
            f"{names}; {differing:,} of {total:,} joined records have another label here, and no order of the classes "
            "explains it, so a column of the targets would mean another class; correct the labels, or the list of "
            "data.classes, of one of the two stores"
        )
    return (
        f"{names}; labels of the joined records say which is which, except of {shorten(lacking, 5)}, which no joined "
        "record has; pack the store with data.classes=FILE, which lists them in the order of the share"
    )


def reorder_classes(
    values: dict[str, NDArray[Any]], fields: Sequence[FieldSpec], order: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """Return fields [n, V, *shape] whose classes have the numbers of another store.

    Args:
        values: Values of each field.
        fields: The fields.
        order: Class here of each class there, i64 [K].
    """
    moved = dict(values)
    for spec in fields:
        array = values[spec.name]
        if "class" in spec.axes and array.shape[2 + spec.axes.index("class")] == len(order):
            moved[spec.name] = np.take(array, np.argsort(order), axis=2 + spec.axes.index("class"))
        elif spec.name in _CLASSES_AS_VALUES:
            numbers = array.astype(np.int64)
            renumbered = np.where(numbers >= 0, order[np.maximum(numbers, 0)], numbers)
            moved[spec.name] = renumbered.astype(array.dtype)
    return moved
