"""Distribution of the tests over the processes of pytest-xdist."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

from xdist.scheduler import LoadFileScheduling

from tests.durations import durations

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

ON_RAY = "on Ray or a server"
_SIGNS = ("pytest.mark.ray", "tests.support.ranks", "tests.support.disturbances", "fork_server")


@cache
def group_of(root: Path, path: str) -> str:
    """Return the group of a test module: the module itself, or one that modules on Ray or a fork server share.

    Several Rays at once starve each other on a small machine, and each fork server imports torch.
    """
    text = (root / path).read_text()
    return ON_RAY if any(sign in text for sign in _SIGNS) else path


class ModuleScheduling(LoadFileScheduling):
    """Scheduling of whole modules. One process runs a group from its first test to its last."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(self.config.rootpath, nodeid.partition("::")[0])


def sort_by_durations(root: Path, items: list[pytest.Item]) -> None:
    """Sort tests so that the groups that take longest come first, and processes end at about the same time."""
    seconds: Counter[str] = Counter()
    for path, duration in durations().items():
        if (root / path).exists():
            seconds[group_of(root, path)] += duration
    items.sort(key=lambda item: -seconds[group_of(root, item.nodeid.partition("::")[0])])
