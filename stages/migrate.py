"""Bring a store that an earlier version wrote to the current schema.

    permafrost migrate store.path=stores/demo

Images and arrays are neither read nor written, and fingerprints stay as they are, so runs on the store remain valid.
Run `permafrost verify` with the version that wrote the store before, and with this one afterwards.

Reads   manifests and receipts of <store.path>
Writes  its manifests, their tables of shards and its index; removes index.parquet
Rerun   finishes an interrupted migration; a store of the current schema is left as it is
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from permafrost.cli import main
from permafrost.core.errors import ConfigError
from permafrost.core.files import exists
from permafrost.core.lock import lock_folder
from permafrost.store.manifest import MANIFEST_NAME, SCHEMA_VERSION
from permafrost.store.migration import migrate_store

if TYPE_CHECKING:
    from permafrost.config.verbs import MigrateConfig


@dataclass(frozen=True, kw_only=True)
class MigrateResult:
    """Migrated manifests."""

    schema: int
    migrated: str
    """Names of the store and the passes that had an earlier schema."""


def run(config: MigrateConfig) -> MigrateResult:
    """Migrate the store. Raises ConfigError if there is none."""
    path = config.store.folder
    if not exists(path / MANIFEST_NAME):
        raise ConfigError(f"store.path={config.store.path} holds no finished store; correct it")
    with lock_folder(path):
        migrated = migrate_store(path)
    return MigrateResult(schema=SCHEMA_VERSION, migrated=", ".join(migrated) or "nothing")


if __name__ == "__main__":
    main("migrate", run, __doc__)
