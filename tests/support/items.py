"""Tests of many items that name every item that fails."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def for_each(names: str, items: Iterable[Any]) -> Callable[[Callable[..., None]], Callable]:
    """Run a test once, in a loop over items, and list all items that fail.

    Use it in place of `pytest.mark.parametrize` where an item only composes or looks up something. A case costs some
    milliseconds in each process that collects it, and an item costs nothing. All items share the test's fixtures.

    Args:
        names: Parameters of the test, separated by commas, that take the item.
        items: Values of the parameter, or tuples of several. Without any, the test fails.
    """
    parameters, items = names.split(","), list(items)

    def decorate(test: Callable[..., None]) -> Callable:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            failures = []
            for item in items:
                values = item if len(parameters) > 1 else (item,)
                try:
                    test(**dict(zip(parameters, values, strict=True)), **fixtures)
                except (Exception, pytest.fail.Exception) as error:
                    name = ", ".join(map(str, values))
                    failures.append(f"{name}: {type(error).__name__}: {error}")
            if failures or not items:
                count = f"{len(failures)} of {len(items)} items fail"
                pytest.fail("\n".join([count, *failures]))

        signature = inspect.signature(test)
        kept = [value for name, value in signature.parameters.items() if name not in parameters]
        run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return run

    return decorate
