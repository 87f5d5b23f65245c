"""Caches of the results of an object's methods that end with the object, as do the files that they hold open."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar
from weakref import WeakMethod

T = TypeVar("T")


def cache_method(method: Callable[..., T], most: int) -> Callable[..., T]:
    """Return a method with a cache of its latest results, for an attribute of its object.

    A plain `lru_cache` of a bound method refers to the object that refers to it, so that both stay until the garbage
    collector finds them.

    Args:
        method: Bound method whose arguments are whole numbers.
        most: Maximum number of cached results.
    """
    reference = WeakMethod(method)

    @lru_cache(maxsize=most)
    def call(*words: int) -> T:
        bound = reference()
        assert bound is not None, "its object calls it"
        return bound(*words)

    return call
