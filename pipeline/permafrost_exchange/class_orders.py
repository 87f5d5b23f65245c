"""Order of the classes of a shared pass in another store, from the names of both and the labels of equal images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array

from permafrost.core.errors import shorten
from permafrost.core.records import TOP_CLASS, FieldSpec, are_numbers, describe_other_names
from permafrost_exchange.target_reader import TargetError

logger = logging.getLogger("permafrost.attach")

_MOSTLY = 0.5
"""Fraction of the records whose labels must fit the order that names say."""
_SURE = 0.9
"""Fraction of the records of a class that must have one label for an order that its name does not say."""
_CLASSES_AS_VALUES = (TOP_CLASS, "target_class")
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
    there, here = (column[usable].astype(np.int64) for column in labels)
    numbers = np.arange(count)
    named = _order_of_names(shared_names, store_names)
    candidates = (
        (named, _MOSTLY, "their names"),
        (numbers if list(shared_names) == list(store_names) else None, _SURE, "their numbers"),
        (_order_of_labels(there, here, count), _SURE, "the labels of their records"),
    )
    chosen = next(
        (
            (order, reason)
            for order, enough, reason in candidates
            if order is not None and (not len(there) or (order[there] == here).mean() >= enough)
        ),
        None,
    )
    differing = int((there != here).sum())
    if chosen is None:
        lacking = [shared_names[number] for number in np.setdiff1d(numbers, there)]
        raise TargetError(
            f"{where}: its classes are others: {describe_other_names(shared_names, store_names)}; neither names nor "
            f"labels say which is which: {len(there):,} joined records have a label in both stores, {differing:,} of "
            f"these another one here, and classes without any are {shorten(lacking, 5) or 'none'}; "
            "pack the store with data.classes=FILE, which lists the classes in the order of the share, or correct the "
            "labels of one of the two stores"
        )
    order, reason = chosen
    if named is None and not len(there):
        logger.warning(
            "%s: its classes are numbers, and no joined record has a label in both stores, so nothing says whether "
            "they mean the same here",
            where,
        )
    if (order[there] != here).any():
        logger.warning(
            "%d of %d joined records have another label here than in the share",
            (order[there] != here).sum(),
            len(there),
        )
    if moved := [
        f"class {number} ({shared_names[number]}) is class {order[number]} here ({store_names[order[number]]})"
        for number in range(count)
        if number != order[number] or shared_names[number] != store_names[order[number]]
    ]:
        logger.warning("classes are matched by %s: %s", reason, shorten(moved, 3))
    return None if (order == numbers).all() else order


def _order_of_names(
    shared_names: Sequence[str], store_names: Sequence[str]
) -> NDArray[np.int64] | None:
    """Return the class here of each name, None if names do not say it."""
    if are_numbers(shared_names) or sorted(set(shared_names)) != sorted(store_names):
        return None
    places = {name: number for number, name in enumerate(store_names)}
    return np.array([places[name] for name in shared_names])


def _order_of_labels(
    shared_labels: NDArray[np.int64], labels: NDArray[np.int64], count: int
) -> NDArray[np.int64] | None:
    """Return the class here of each class there by its most frequent label, None if labels do not say it."""
    records = coo_array(
        (np.ones(len(shared_labels)), (shared_labels, labels)), shape=(count, count)
    ).tocsr()
    totals = records.sum(axis=1)
    is_known = totals > 0
    order = np.asarray(records.argmax(axis=1)).ravel()
    different = np.unique(order[is_known])
    is_clear = (records.max(axis=1).toarray().ravel() >= _SURE * totals).all()
    if not is_clear or not is_known.any() or not len(different) == is_known.sum() >= count - 1:
        return None
    order[~is_known] = np.setdiff1d(np.arange(count), different)  # the one that is left
    return order


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
        axis = 2 + spec.axes.index("class") if "class" in spec.axes else 0
        if axis and array.shape[axis] == len(order):
            moved[spec.name] = np.take(array, np.argsort(order), axis=axis)
        elif spec.name in _CLASSES_AS_VALUES:
            renumbered = np.where(array >= 0, order[np.maximum(array, 0).astype(np.int64)], array)
            moved[spec.name] = renumbered.astype(array.dtype)
    return moved
