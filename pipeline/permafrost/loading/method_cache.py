"""Caches of the results of an object's methods that end with the object, as do the files that they hold open."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Generic, TypeVar, cast
from weakref import ref

T = TypeVar("T")


class MethodCache(Generic[T]):
    """A method with a cache of its latest results, for an attribute of its object.

    A plain `lru_cache` of a bound method refers to the object that refers to it, so that both stay until the garbage
    collector finds them. A copy of the object, and one in another process, has an empty cache.
    """

    def __init__(self, method: Callable[..., T], most: int) -> None:
        """Make the cache.

        Args:
            method: Bound method whose arguments are whole numbers.
            most: Maximum number of cached results.
        """
        bound = cast("Any", method)
        self._owner, self._name, self._most = ref(bound.__self__), bound.__name__, most
        owner, function = self._owner, bound.__func__

        @lru_cache(maxsize=most)
        def call(*arguments: int) -> T:
            result: T = function(owner(), *arguments)
            return result

        self._call = call

    def __call__(self, *arguments: int) -> T:
        return self._call(*arguments)

    def cache_clear(self) -> None:
        """Forget all results."""
        self._call.cache_clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._owner(), self._name, self._most)


def _rebuild(owner: Any, name: str, most: int) -> MethodCache[Any]:
    return MethodCache(getattr(owner, name), most)
