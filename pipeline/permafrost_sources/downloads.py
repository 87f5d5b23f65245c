"""Downloads of single files, which are kept with their digest."""

from __future__ import annotations

import hashlib
import http.client
import io
import shutil
import urllib.request
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from permafrost.core.errors import UserError, require
from permafrost.storage.files import file_at

_TIMEOUT_SECONDS = 60


class DownloadError(UserError, OSError):
    """File that could not be downloaded."""


def download(url: str, folder: Path) -> Path:
    """Download the file of an http(s) address to a folder below `folder`, unless it already exists there.

    Each remote folder, and each query, has its own local folder, so files of one name from two addresses are separate.

    Returns:
        The path of the file.

    Raises:
        DownloadError: If it cannot be downloaded whole.
    """
    parts = urlsplit(url)
    parent, _, name = parts.path.rpartition("/")
    place = hashlib.sha256(f"{parts.netloc}{parent}?{parts.query}".encode()).hexdigest()[:16]
    path = folder / place / name
    digest = _digest_of(path)
    if path.exists() and digest.exists():
        return path
    try:
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response,
            file_at(path).open_atomically() as file,
        ):
            shutil.copyfileobj(response, cast("io.BytesIO", file), 2**20)
            expected = response.headers.get("Content-Length")
            if expected is not None and int(expected) != file.bytes:
                raise DownloadError(
                    f"{url} ended after {file.bytes} of {expected} bytes; try again"
                )
        file_at(digest).write(file.sha256.encode())
    except UserError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{url} cannot be downloaded: {error}") from error
    return path


def check_download(path: Path) -> None:
    """Compare a file that `download` has kept with its digest.

    Raises:
        DownloadError: If it is another file now.
    """
    require(
        file_at(path).sha256() == file_at(_digest_of(path)).read(64).decode("ascii", "replace"),
        f"{path} is not the file that was downloaded; delete it and run the same command again",
        DownloadError,
    )


def _digest_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")
