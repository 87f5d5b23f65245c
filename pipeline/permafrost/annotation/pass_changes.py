"""Reasons why a pass is new: what differs from the nearest other pass of its store, and what stays valid."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from permafrost.annotation.pass_identity import description_of, fingerprint_pass, pass_differences
from permafrost.annotation.pass_plan import PassPlan
from permafrost.config.differences import describe_fewest
from permafrost.core.digests import SHORT, canonical_json
from permafrost.core.errors import UserError
from permafrost.runs.folder import RunFolder, read_cost
from permafrost.storage.files import file_at
from permafrost.storage.local_files import PARTIAL_SUFFIX
from permafrost.storage.rooted_paths import RootedPath, name_of_path
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.reader import Store

logger = logging.getLogger("permafrost.precompute")

_DESCRIPTION = f".description{PARTIAL_SUFFIX}"
"""File of the description of a pass that is not committed yet, which is removed then."""


def begin_pass(plan: PassPlan) -> None:
    """Log what is new about a pass, and note its description, with which others are compared before it is finished."""
    logger.info("pass %s: %s", plan.folder.name, describe_missing([plan]))
    file_at(plan.folder / _DESCRIPTION).write(canonical_json(plan.description))


def describe_missing(plans: Sequence[PassPlan]) -> str:
    """Describe the missing shards of a pass, and for a pass that is not finished why it is another one.

    Args:
        plans: Plan of the pass over the first generation, and of those that follow it.
    """
    plan = next((each for each in plans if each.missing), plans[0])
    missing = [shard for each in plans for shard in each.missing]
    text = f"{len(missing):,} of {sum(len(each.shards) for each in plans):,} shards are missing"
    if not missing or file_at(plan.folder / MANIFEST_NAME).exists():
        return text
    if plan.config.run and (cost := read_cost(RunFolder(plan.config.run).path / "precompute")):
        seconds = cost["seconds"] / max(cost["records"], 1) * sum(each.records for each in missing)
        text += f", about {max(1, seconds / 60):,.0f} min at the rate of run={plan.config.run}"
    if plan.first is not None:
        return f"appended records, with the options of {plan.first.folder.name}; {text}"
    others = [path for path in file_at(plan.folder.parent).paths() if path != plan.folder]
    changed = {
        folder.name: pass_differences(
            old, plan.description, [*file, name_of_path(str(plan.teacher.weights))]
        )
        for folder in others
        for old, *file in _described(plan.store, folder)
    }
    kind = "new" if len(plan.missing) == len(plan.shards) else "begun"
    finished = sum(file_at(folder / MANIFEST_NAME).exists() for folder in others)
    stay = f"{plan.store.form.noun} and {finished} other pass{'es' * (finished != 1)} stay"
    return f"{kind}: {describe_fewest(changed)}; {stay}; {text}" if changed else text


def _described(store: Store, folder: RootedPath) -> Iterator[tuple[Any, ...]]:
    """Yield the description of a pass, and the file of its weights if it is known; none of one that follows another."""
    with suppress(UserError, FileNotFoundError, ValueError):
        if file_at(folder / MANIFEST_NAME).exists():
            if (made := store.pass_manifest(folder)).follows is None:
                yield description_of(made), made.made_with.get("weights", "")
        else:
            values = json.loads(file_at(folder / _DESCRIPTION).read())
            yield from [(values,)] * folder.name.endswith(fingerprint_pass(values)[:SHORT])
