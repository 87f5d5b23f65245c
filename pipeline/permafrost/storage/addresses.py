"""Addresses of buckets and of their objects, such as s3://bucket/stores/demo/manifest.json."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from permafrost.core.errors import ConfigError, require

SCHEMES = ("s3", "gs", "az")
"""Schemes of buckets that can be written to. Only s3 has been tried."""
READ_ONLY_SCHEMES = ("https", "http")
ADDRESS = re.compile(r"([a-z0-9]+)://([^/]+)(?:/(.*))?", re.DOTALL)


@dataclass(frozen=True, order=True)
class Bucket:
    """Folder in a bucket, as the root of a RootedPath: an address and where its objects are cached."""

    address: str
    """s3://bucket/prefix, without a slash at the end."""
    cache: str | None = None
    """Folder of the node for copies of its objects; None for the default of object_cache.py."""
    cache_bytes: int | None = None
    """Largest size of that folder in bytes; None for any."""

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self.address.rpartition("/")[2]

    def joinpath(self, *parts: str) -> Bucket:
        """Append names."""
        return replace(self, address="/".join((self.address, *parts)))

    def absolute(self) -> Bucket:
        """Return the bucket itself: its address is the same for every process."""
        return self


def is_address(text: str) -> bool:
    """Return whether a path is the address of an object or of a bucket's folder."""
    return "://" in text


def parse_bucket(option: str, text: str, *, writable: bool = True) -> str:
    """Return an address without slashes at its end.

    Args:
        option: Option that has the address, for messages.
        text: The address.
        writable: Whether the folder is written to; addresses of https and http are read-only.

    Raises:
        ConfigError: If it is not a bucket address, or has credentials or an empty name, . or .. in it.
    """
    match = ADDRESS.fullmatch(text)
    schemes = SCHEMES if writable else (*SCHEMES, *READ_ONLY_SCHEMES)
    if match is None or match[1] not in schemes:
        raise ConfigError(
            f"{option}={text} is not the address of a bucket; write "
            f"{', '.join(f'{scheme}://' for scheme in schemes)} and its name, or a local folder"
        )
    require(
        "@" not in match[2],
        f"{option} contains credentials; set them in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)",
    )
    parts = (match[3] or "").rstrip("/").split("/")
    require(
        parts == [""] or not {"", ".", ".."} & set(parts),
        f"{option}={text} has an empty name, . or .. in it; write the address without",
    )
    return text.rstrip("/")
