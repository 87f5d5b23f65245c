"""Check every byte, count, key and value of a store against its manifests.

    python -m stages.verify experiment=demo
    python -m stages.verify store.path=stores/demo

Reads   <store.path>, all of it
Writes  nothing; prints a line for each problem, and the exit code is 1 if there is any
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commandline import main
from pipeline.errors import UserError
from pipeline.store.reader import Store
from pipeline.store.verification import verify_store

if TYPE_CHECKING:
    from pipeline.config import VerifyConfig


class DamagedStoreError(UserError):
    """A store in which something is not what its manifests say."""


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What was found in order."""

    verified_records: int
    verified_passes: int


def run(config: VerifyConfig) -> VerifyResult:
    """Check the whole store; DamagedStoreError names every problem."""
    path = Path(config.store.path)
    problems = list(verify_store(path))
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise DamagedStoreError(
            f"{len(problems)} problem(s) in {path}:\n{listed}\n"
            "to repair, delete the files named and the manifest.json beside them, then run stages.precompute again"
        )
    store = Store(path)
    passes = [*store.pass_folders(), *store.pass_folders(stored_views=True)]
    return VerifyResult(verified_records=store.index.num_rows, verified_passes=len(passes))


if __name__ == "__main__":
    main("verify", run, __doc__)
