"""Download of files that are kept, each downloaded whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import urllib.request
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from permafrost.core.errors import UserError
from permafrost.core.files import open_atomically

if TYPE_CHECKING:
    import io
    from pathlib import Path

_TIMEOUT_SECONDS = 60


class DownloadError(UserError, OSError):
    """File that could not be downloaded."""


def download(url: str, folder: Path) -> Path:
    """Download the file of an http(s) address to a folder below `folder`, unless it already exists there.

    Each remote folder has its own local folder, so files of one name from two remote folders are separate.
    """
    parent, _, name = urlsplit(url).path.rpartition("/")
    place = hashlib.sha256(f"{urlsplit(url).netloc}{parent}".encode()).hexdigest()[:8]
    path = folder / place / name
    if path.exists():
        return path
    try:
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response,
            open_atomically(path) as file,
        ):
            shutil.copyfileobj(response, cast("io.BytesIO", file), 2**20)
            expected = response.headers.get("Content-Length")
            if expected is not None and int(expected) != file.bytes:
                raise DownloadError(
                    f"{url} ended after {file.bytes} of {expected} bytes; try again"
                )
    except UserError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{url} cannot be downloaded: {error}") from error
    return path
