"""Trainings that end at a given call, as if their process were killed there."""

from __future__ import annotations

from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


class Killed(BaseException):
    """The end of a process."""


@contextmanager
def killed_at(module: ModuleType, name: str, call: int) -> Iterator[None]:
    """End the block at the given call, counted from 1, of a function of a module. The block must get there."""
    original, calls = getattr(module, name), 0

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, dying)
        with pytest.raises(Killed):
            yield
