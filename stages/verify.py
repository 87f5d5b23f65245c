"""Check every byte, count, key and value of a store against its manifests.

    permafrost verify experiment=demo
    permafrost verify store.path=stores/demo
    permafrost verify store.path=stores/photos store.teacher=[fkd] teacher=torchvision teacher.name=resnet50 \\
        teacher.weights=resnet50.pth

With teacher=, the network that is said to have made a pass is run on a sample of its views, and compared with it.

Reads   all of <store.path>
Writes  nothing; prints a line for each problem, with exit code 1 if there is any. With teacher=, the agreement is
        written into the pass's manifest
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from permafrost.cli import stage_main
from permafrost.config.cluster import LocalClusterConfig
from permafrost.config.models import ModelConfig, NoModelConfig
from permafrost.config.verbs import VerifyConfig
from permafrost.core.errors import UserError
from permafrost.core.tasks import SerialExecutor
from permafrost.storage.files import file_size, iter_files, listing
from permafrost.storage.lock import lock_folder
from permafrost.storage.rooted_paths import LinkError, RootedPath
from permafrost.store.reader import Store
from permafrost.store.verification import unfinished_passes, verify_store

logger = logging.getLogger("permafrost.verify")


class DamagedStoreError(UserError):
    """Error for a store that does not match its manifests, with a line for each problem."""

    def __init__(self, store: RootedPath, problems: Sequence[str]) -> None:
        self.lines = (
            f"{len(problems)} problem(s) in {store}:",
            *(f"  {problem}" for problem in problems),
            "to repair a file of the store, delete it and run permafrost precompute again (for a folder of artifacts/, "
            "the stage that made it); restore a file outside the store yourself",
        )
        super().__init__("\n".join(self.lines))


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """Numbers of verified records and passes."""

    verified_records: int
    verified_passes: int
    verified_bytes: str
    unfinished_passes: str = ""
    """Names of passes that were begun and have no manifest yet, which readers ignore."""
    agreement: dict[str, str] = field(default_factory=dict)
    """Agreement of passes with `teacher=` by their names, empty if no teacher was named."""


def run(config: VerifyConfig) -> VerifyResult:
    """Check the whole store.

    Raises:
        DamagedStoreError: If there are problems; it lists every one.
    """
    path = config.store.folder
    size = _size(path)
    logger.info("%s: reading all of its %s files, %s", path, f"{size[0]:,}", _format_bytes(size[1]))
    problems = list(verify_store(path))
    if problems:
        raise DamagedStoreError(path, problems)
    unfinished = unfinished_passes(path)
    for folder in unfinished:
        logger.warning(
            "%s is an unfinished pass, which readers ignore: finish it with permafrost precompute store.path=%s and "
            "the options of its teacher, or delete its folder",
            folder,
            config.store.path,
        )
    store = Store(path)
    passes = [*store.pass_folders(), *store.pass_folders(stored_views=True)]
    return VerifyResult(
        verified_records=store.num_records(),
        verified_passes=len(passes),
        verified_bytes=_format_bytes(size[1]),
        unfinished_passes=", ".join(folder.name for folder in unfinished),
        agreement={} if isinstance(config.teacher, NoModelConfig) else _compare(config, store),
    )


def _compare(config: VerifyConfig, store: Store) -> dict[str, str]:
    """Compare passes with the teacher of the options, and note the agreement in their manifests."""
    from permafrost.annotation.precision import describe_agreement  # imports torch
    from permafrost.exchange.passport import check_pass

    assert isinstance(config.teacher, ModelConfig)
    names = config.store.teacher
    has_views = not store.pass_folders() if not names else not store.passes_named(names[0])
    texts = {}
    with lock_folder(store.folder):
        for teacher_pass in store.open_passes(names, stored_views=has_views):
            passport = check_pass(
                store,
                teacher_pass,
                config.teacher,
                config.passport,
                LocalClusterConfig(),
                SerialExecutor(),
            )
            texts[teacher_pass.name] = (
                f"{passport.teacher}: {describe_agreement(passport.agreement)}"
            )
    return texts


def _size(folder: RootedPath) -> tuple[int, int]:
    """Return the number of files below a folder and their bytes, without links that may not be there."""
    files = total = 0
    with listing(folder):
        for path in iter_files(folder):
            with suppress(LinkError):
                size = file_size(path)
                files, total = files + (size is not None), total + (size or 0)
    return files, total


def _format_bytes(count: float) -> str:
    """Format a number of bytes with a binary unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


if __name__ == "__main__":
    stage_main("verify", run, __doc__)
