"""Repair of a finished store that has lost files: its tables from the commit markers, its shards from the data.

Lost shards of a store of one generation are missing ones of its packing (pack.py). Where there are several generations,
the listed records are compared with the store first, and each generation is packed again as it was.
"""

from __future__ import annotations

import numpy as np

from permafrost.config.store import PrecomputeConfig
from permafrost.core.errors import require, shorten
from permafrost.core.records import Source
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.commit import commit_store, is_whole, needs_commit
from permafrost.store.generations import StoreComparison, describe_changes, shards_of_rows
from permafrost.store.image_shards import Packing
from permafrost.store.listing import Listing
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.pack import PackPlan, derive_packing
from permafrost.store.reader import Store
from permafrost.store.shard_plan import ShardPlan


def restore_tables(path: RootedPath) -> None:
    """Write lost tables of a store of several generations again, from the commit markers. Others are left as they are.

    Args:
        path: Folder of the store, which this process has locked.

    Raises:
        ManifestError: If a commit marker is missing or damaged.
    """
    is_lost = file_at(path / MANIFEST_NAME).exists() and needs_commit(path)
    if is_lost and (manifest := Store(path).manifest).generations:
        commit_store(
            path,
            [],
            manifest.dataset,
            classes=manifest.classes,
            packing=Packing(columns=manifest.columns, on_error="skip"),
            image_size=None,
            rows_per_shard=manifest.rows_per_shard,
            max_skipped=manifest.generations[-1].skipped,
            before=manifest,
        )


def plan_repair(
    config: PrecomputeConfig,
    comparison: StoreComparison,
    source: Source,
    listing: Listing,
    plans: list[ShardPlan],
) -> PackPlan | None:
    """Plan the first generation that has lost shards as it was packed; None if no shard is lost.

    Args:
        config: Options of the command.
        comparison: Records that the store has.
        source: Source of the records.
        listing: Listing of all records of the source, with labels in the order of the store's classes.
        plans: Shards of all records of the source, as of a first packing.

    Raises:
        ConfigError: If the records of a lost shard are not as they were packed, or are not in the data.
    """
    store = comparison.store
    with file_at(store.folder).listing():
        lost = [
            number for number, shard in enumerate(store.shards) if not is_whole(store.folder, shard)
        ]
    if not lost:
        return None
    names = {store.shards[shard].name for shard in lost}
    require(
        not describe_changes(config.data, comparison, source, listing),
        f"{store.path} has lost {len(lost)} shards ({shorten(sorted(names), 3)}), and their records are not as they "
        "were packed; restore the shards from a copy, or pack the data into another store.path",
    )
    parts = store.manifest.packed_parts()
    number = int(np.searchsorted(np.cumsum([part.shards for part in parts]), lost[0], "right"))
    dataset = parts[number].dataset
    tag = f"{dataset.fingerprint[:8]}-" if number else ""
    shards = shards_of_rows(store, listing, comparison.rows[number], plans, tag)
    missing = [plan for plan in shards if plan.name in names]
    require(
        len(missing) > 0,
        f"{store.path} has lost {shorten(sorted(names), 3)}, which the data do not have; restore them from a copy",
    )
    return PackPlan(
        path=store.folder,
        source=source,
        classes=comparison.classes,
        dataset=dataset,
        packing=derive_packing(config, source),
        shards=shards,
        missing=missing,
        before=store.manifest,
        repairs=True,
    )
