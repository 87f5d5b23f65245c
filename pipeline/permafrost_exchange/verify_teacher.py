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

from dataclasses import asdict, dataclass, field

from permafrost.config.cluster import LocalClusterConfig
from permafrost.config.models import ModelConfig
from permafrost.core.tasks import SerialExecutor
from permafrost.storage.lock import folder_lock
from permafrost.store.reader import Store
from permafrost.verbs.verify import VerifyResult, verify_bytes
from permafrost_exchange.options import VerifyTeacherConfig


@dataclass(frozen=True, kw_only=True)
class VerifyTeacherResult(VerifyResult):
    """Numbers of verified records and passes, and what a teacher says of the passes."""

    agreement: dict[str, str] = field(default_factory=dict)
    """Agreement of passes with `teacher=` by their names, empty if no teacher was named."""
    next: str = ""
    """Command that uses the store."""


def verify_teacher(config: VerifyTeacherConfig) -> VerifyTeacherResult:
    """Check the whole store, then compare passes with the teacher of the options, if there is one.

    Raises:
        DamagedStoreError: If there are problems; it lists every one.
    """
    from permafrost.verbs.next_commands import NextCommands  # imports torch

    verified = asdict(verify_bytes(config))
    if isinstance(config.teacher, ModelConfig):
        verified["agreement"] = _compare(config, config.teacher)
    commands = NextCommands(Store(config.store.folder), config.store.folder.root)
    return VerifyTeacherResult(**verified, next=commands.after_packing(""))


def _compare(config: VerifyTeacherConfig, teacher: ModelConfig) -> dict[str, str]:
    """Compare passes with a teacher, and note the agreement in their manifests."""
    from permafrost_exchange.passport import check_pass, describe_passport  # imports torch

    store = Store(config.store.folder)
    names = config.store.teacher
    has_views = not store.pass_folders() if not names else not store.passes_named(names[0])
    texts = {}
    with folder_lock(store.folder):
        for teacher_pass in store.open_passes(names, stored_views=has_views):
            options = (config.passport, LocalClusterConfig(), SerialExecutor())
            manifest = check_pass(store, teacher_pass, teacher, *options)
            texts[teacher_pass.name] = describe_passport(manifest)
    return texts
