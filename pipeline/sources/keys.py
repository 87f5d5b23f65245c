"""Keys of records made from paths."""

from __future__ import annotations

from urllib.parse import quote


def escape_key(path: str) -> str:
    """temporary"""
    return quote(path, safe="").replace(".", "%2E").replace("~", "%7E")
