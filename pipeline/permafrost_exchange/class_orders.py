"""Order of the classes of a shared pass in another store, from the names of both and the labels of equal images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import shorten
from permafrost.core.records import TOP_CLASS, FieldSpec, are_numbers
from permafrost_exchange.target_reader import TargetError

logger = logging.getLogger("permafrost.attach")

_MOSTLY = 0.5
"""Fraction of the records whose labels must fit the order that names say."""
_SURE = 0.9
"""Fraction of the records of a class that must have one label for an order that its name does not say."""
_CLASSES_AS_VALUES = (TOP_CLASS, "explained_class")
"""Fields whose values are classes."""


def order_classes(
    shared_names: Sequence[str],
    store_names: Sequence[str],
    labels: tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]],
    where: str,
) -> NDArray[np.int64] | None:
    """Find the class here of each class of a share.

    Names decide where both stores have the same ones, and labels where they are numbers or differ. Labels that
    contradict the names decide if they do so for all classes in one way.

    Args:
        shared_names: Names of the classes of the share.
        store_names: Names of the classes of the store, as many.
        labels: Labels of the joined records there and here, [n] each, below 0 where unknown.
        where: The share, for messages.

    Returns:
        i64 [K]; None if they are the same.

    Raises:
        TargetError: If neither names nor labels say it, or labels contradict.
    """
    count = len(shared_names)
    usable = (np.minimum(*labels) >= 0) & (np.maximum(*labels) < count)
    pairs = np.stack([column[usable].astype(np.int64) for column in labels])
    frequent_labels, shares = _majority(pairs, count)
    order, reason = _order_of_names(shared_names, store_names), "their names"
    if order is None or _agreement(order, pairs) < _MOSTLY:
        same = list(shared_names) == list(store_names)
        if same and not pairs.size:
            logger.warning(
                "%s: its classes are numbers, and no joined record has a label in both stores, so nothing says whether "
                "they mean the same here",
                where,
            )
            return None
        order, reason = np.arange(count), "the labels of their records"
        if not same or _agreement(order, pairs) < _SURE:
            order = _order_of_labels(frequent_labels, shares)
    if order is None:
        raise TargetError(
            _refusal(shared_names, store_names, frequent_labels, shares, pairs, where)
        )
    differing = int((order[pairs[0]] != pairs[1]).sum())
    if differing:
        logger.warning(
            "%d of %d joined records have another label here than in the share",
            differing,
            pairs.shape[1],
        )
    moved = [
        f"class {number} ({shared_names[number]}) is class {order[number]} here ({store_names[order[number]]})"
        for number in range(count)
        if number != order[number] or shared_names[number] != store_names[order[number]]
    ]
    if moved:
        logger.warning("classes are matched by %s: %s", reason, shorten(moved, 3))
    return None if (order == np.arange(count)).all() else order


def _agreement(order: NDArray[np.int64], pairs: NDArray[np.int64]) -> float:
    """Return the fraction of records whose labels fit an order, 1 without labels."""
    return float((order[pairs[0]] == pairs[1]).mean()) if pairs.size else 1.0


def _order_of_names(
    shared_names: Sequence[str], store_names: Sequence[str]
) -> NDArray[np.int64] | None:
    """Return the class here of each name, None if names do not say it."""
    if (
        are_numbers(shared_names)
        or are_numbers(store_names)
        or len(set(shared_names)) < len(shared_names)
    ):
        return None
    places = {name: number for number, name in enumerate(store_names)}
    if places.keys() != set(shared_names):
        return None
    return np.array([places[name] for name in shared_names])


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


def _order_of_labels(
    frequent_labels: NDArray[np.int64], shares: NDArray[np.float64]
) -> NDArray[np.int64] | None:
    """Return the class here of each class there by its most frequent label, None if labels do not say it.

    Args:
        frequent_labels: Most frequent label of each class, -1 for none.
        shares: Fraction of the class's records with it.
    """
    classes = np.flatnonzero(frequent_labels >= 0)
    different = np.unique(frequent_labels[classes])
    if not len(classes) or len(different) < len(classes) or (shares[classes] < _SURE).any():
        return None
    order = frequent_labels.copy()
    if len(classes) == len(order) - 1:  # what is left
        order[order < 0] = np.setdiff1d(np.arange(len(order)), different)
    return order if (order >= 0).all() else None


def _refusal(
    shared_names: Sequence[str],
    store_names: Sequence[str],
    frequent_labels: NDArray[np.int64],
    shares: NDArray[np.float64],
    pairs: NDArray[np.int64],
    where: str,
) -> str:
    names = f"{where}: its classes are {shorten(shared_names, 5)}, and those of the store {shorten(store_names, 5)}"
    total = pairs.shape[1]
    if not total:
        return (
            f"{names}, and no joined record has a label in both, so a column of the targets may mean another class; "
            "pack the store with data.classes=FILE, which lists them in that order"
        )
    lacking = [shared_names[number] for number in np.flatnonzero(frequent_labels < 0).tolist()]
    if not lacking or (shares[frequent_labels >= 0] < _SURE).any():
        differing = int((pairs[0] != pairs[1]).sum())
        return (
            f"{names}; {differing:,} of {total:,} joined records have another label here, and no order of the classes "
            "explains it, so a column of the targets would mean another class; correct the labels, or the list of "
            "data.classes, of one of the two stores"
        )
    return (
        f"{names}; labels of the joined records match them, except {shorten(lacking, 5)}, which no joined record "
        "has; pack the store with data.classes=FILE, which lists them in the order of the share"
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
