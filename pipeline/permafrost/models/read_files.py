"""Files that the function of a network of one's own reads as it builds: settings, weights, lists of classes.

They are part of what the network is, so a pass or a run of it must not continue with other ones.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import local

from permafrost.config.models import ModelConfig
from permafrost.core.digests import sha256_json
from permafrost.storage.files import file_at

_OF_CODE = (".py", ".pyc", ".pyi", ".so", ".pyd", ".dll")
_OF_SYSTEM = tuple(
    f"{os.path.realpath(path)}/"
    for path in (*sysconfig.get_paths().values(), "/proc", "/sys", "/etc", "/usr/share", "/usr/lib")
)
_RECORDER = local()
_PATHS: dict[str, tuple[Path, ...]] = {}
"""Files that a network reads, by its options and outputs, of which a process describes several networks."""


@contextmanager
def recorded_reads() -> Iterator[set[Path]]:
    """Collect the regular files that this thread opens to read in the block, without code and the system's own."""
    _install()
    paths: set[str] = set()
    _RECORDER.paths = paths
    collected: set[Path] = set()
    try:
        yield collected
    finally:
        _RECORDER.paths = None
        collected.update(
            path
            for path in map(Path, paths)
            if path.is_file()
            and not str(path).endswith(_OF_CODE)
            and not os.path.realpath(path).startswith(_OF_SYSTEM)
        )


def digests_of_reads(config: ModelConfig, outputs: int) -> dict[str, str]:
    """Return the SHA-256 of the files that the factory of a network reads, by name, empty without a factory.

    Args:
        config: Options of the network.
        outputs: Number of its outputs.
    """
    if not getattr(config, "factory", ""):
        return {}
    if (key := f"{outputs} {config!r}") not in _PATHS:
        _PATHS[key] = _paths_read(config, outputs)
    weights = Path(str(config.weights or ""))
    digests: dict[str, str] = {}
    for path in _PATHS[key]:
        if not (weights.is_file() and path.samefile(weights)):
            name, digest = f"file {path.name}", file_at(path).sha256()
            # Files of one name in several folders have one entry.
            digests[name] = sha256_json([digests[name], digest]) if name in digests else digest
    return digests


def _paths_read(config: ModelConfig, outputs: int) -> tuple[Path, ...]:
    from permafrost.core.generators import SeededDraws
    from permafrost.models.providers import provider_of

    try:
        with SeededDraws(0), recorded_reads() as paths:
            provider_of(config).build(config, outputs)
    except Exception:  # which the build that is used will say
        return ()
    return tuple(sorted(paths))


@cache
def _install() -> None:
    sys.addaudithook(_observe)


def _observe(event: str, arguments: tuple[object, ...]) -> None:
    if (paths := getattr(_RECORDER, "paths", None)) is None or event != "open":
        return
    path, mode, _ = arguments
    writes = isinstance(mode, str) and any(letter in mode for letter in "wax+")
    if isinstance(path, (str, bytes, os.PathLike)) and not writes:
        paths.add(str(Path(os.fsdecode(path)).absolute()))
