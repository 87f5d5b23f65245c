"""Write a pass for others: targets without images, with digests, a card and licenses.

    permafrost share store.path=stores/demo pass=resnet20 to=shared \\
        "licenses={images: CC-BY-4.0, weights: MIT, targets: CC-BY-4.0}"
    permafrost share store.path=stores/demo pass=resnet20 to=hf://me/demo-targets form=huggingface "licenses={...}"

`pass=` names the pass as store.teacher= does. Readers of WebDataset, Parquet and Hugging Face's data sets read the
files, and `permafrost attach` joins them to another store of the same images.

Reads   a pass of <store.path>, and the images with images=true or pixels=true
Writes  the new folder `to`, or with hf://<user>/<name> the folder <user>-<name> and a repository of the hub
Rerun   the folder is written again, and appears once it is whole
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from permafrost_exchange.options import ShareConfig


@dataclass(frozen=True, kw_only=True)
class ShareResult:
    """Folder or address of the shared pass."""

    shared: str
    records: int
    files: int
    bytes: int
    next: str = ""


def share_targets(config: ShareConfig) -> ShareResult:
    """Write a pass for others.

    Raises:
        UserError: If the pass, the folder or the licenses cannot be used.
    """
    from permafrost_exchange.pass_card import attach_command
    from permafrost_exchange.share_writer import open_shared_pass, share_pass  # imports torch
    from permafrost_export.hub import SCHEME, repository_of, require_hub, upload_to_hub

    config.require_complete()
    store, opened = open_shared_pass(config)
    folder = Path(config.to)
    is_hub = config.to.startswith(SCHEME)
    if is_hub:
        require_hub()
        folder = Path(repository_of(config.to).replace("/", "-"))
    done = share_pass(config, store, opened, folder.resolve())
    where = upload_to_hub(done.folder, config.to, "dataset") if is_hub else str(folder)
    return ShareResult(
        shared=where,
        records=done.records,
        files=done.files,
        bytes=done.bytes,
        next=attach_command(str(folder), "ANOTHER-STORE", done.plugin)
        if config.form == "webdataset"
        else "",
    )
