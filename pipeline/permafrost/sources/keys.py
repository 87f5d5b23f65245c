"""Record keys, derived from the records' paths in their source."""

from __future__ import annotations

import hashlib
from urllib.parse import quote

from permafrost.core.errors import ConfigError
from permafrost.core.records import MAX_KEY_BYTES

LONG_KEY_HEAD = 150
"""Number of leading bytes that are kept of a key that is too long."""


def escape_key(path: str) -> str:
    """Escape a relative path to a record's key: ASCII letters, digits, - and _, the rest percent-escaped UTF-8.

    `urllib.parse.unquote` restores the path, except for a key above the limit, which ends in a hash.
    """
    try:
        escaped = quote(path, safe="", errors="strict")
    except UnicodeEncodeError:
        raise ConfigError(f"the file name {path!r} is not UTF-8; rename the file") from None
    # quote() does not escape these two.
    escaped = escaped.replace(".", "%2E").replace("~", "%7E")
    return escaped if len(escaped) <= MAX_KEY_BYTES else _shorten(escaped)


def _shorten(escaped: str) -> str:
    head = escaped[:LONG_KEY_HEAD]
    last_escape = head.rfind("%")
    if last_escape > LONG_KEY_HEAD - len("%2E"):
        head = head[:last_escape]
    return f"{head}-{hashlib.blake2b(escaped.encode(), digest_size=16).hexdigest()}"
