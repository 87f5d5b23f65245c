"""Check every byte, count, key and value of a store against its manifests.

    python -m stages.verify experiment=demo
    python -m stages.verify store.path=stores/demo
    python -m stages.verify experiment=demo equivariance=true

With equivariance=true the teacher is asked again on views of some records, one kind of augmentation at a time:
how far its answers there are from the stored ones, map moved along, says what frozen targets cost.

Reads   <store.path>, all of it; with equivariance=true the teacher's weights
Writes  nothing; prints a line for each problem, and the exit code is 1 if there is any
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli import main
from pipeline.config.models import NoModelConfig
from pipeline.core.errors import UserError
from pipeline.store.reader import Store
from pipeline.store.verification import verify_store

if TYPE_CHECKING:
    from pipeline.config.verbs import VerifyConfig


class DamagedStoreError(UserError):
    """A store in which something is not what its manifests say."""


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What was found in order."""

    verified_records: int
    verified_passes: int
    equivariance: str = ""
    """A line a kind of operation."""


def run(config: VerifyConfig) -> VerifyResult:
    """Check the whole store; DamagedStoreError names every problem."""
    path = Path(config.store.path)
    problems = list(verify_store(path))
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise DamagedStoreError(
            f"{len(problems)} problem(s) in {path}:\n{listed}\n"
            "to repair a file of the store, delete it and run stages.precompute again (for a folder of artifacts/ "
            "what made it); a file outside the store is yours to restore"
        )
    store = Store(path)
    equivariance = ""
    if config.equivariance and not isinstance(config.teacher, NoModelConfig):
        from pipeline.evaluation.equivariance import teacher_equivariance  # imports torch

        equivariance = teacher_equivariance(config, store, config.teacher)
    passes = [*store.pass_folders(), *store.pass_folders(stored_views=True)]
    return VerifyResult(
        verified_records=store.index.num_rows,
        verified_passes=len(passes),
        equivariance=equivariance,
    )


if __name__ == "__main__":
    main("verify", run, __doc__)
