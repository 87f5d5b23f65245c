"""Text files that carry their own SHA-256, so that a damaged one is recognized before anything is read from it.

    JSON   the line ` "self_sha256": "<digest>",` after the first one
    YAML   the comment `# sha256: <digest>` as the last line

The digest covers the text without that line, and other programs read both as they read any file. A digest does not
authenticate the author: who reads the values checks their types and ranges as well.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from permafrost.core.digests import plain_values
from permafrost.core.errors import UserError
from permafrost.core.json_entries import EntryError
from permafrost.core.yaml_text import read_values
from permafrost.storage.files import file_at
from permafrost.storage.untrusted import FormatError

_JSON_START, _JSON_END = b' "self_sha256": "', b'",'
_YAML_START = b"# sha256: "
SIGNATURE = "self_sha256"
"""Name of the digest in a JSON file."""


class DamagedFileError(UserError, ValueError):
    """File whose bytes are not those that were written."""


class DigestError(ValueError):
    """Text that is not the one that its digest was computed from; the reader of the file adds its name."""


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a mapping as JSON with its digest, atomically."""
    file_at(path).write(sign_json(values))


def sign_json(
    values: Mapping[str, Any], *, sort_keys: bool = False, allow_nan: bool = True
) -> bytes:
    """Return the JSON text of a mapping that is not empty, with its digest.

    Args:
        values: The mapping.
        sort_keys: Write entries in the order of their names instead of that of the mapping.
        allow_nan: Write NaN and infinite numbers as null; without, they are a ValueError.
    """
    text = (
        json.dumps(
            plain_values(values) if allow_nan else values,
            indent=1,
            sort_keys=sort_keys,
            allow_nan=False,
        )
        + "\n"
    )
    opening, rest = text.encode().split(b"\n", 1)
    digest = hashlib.sha256(text.encode()).hexdigest().encode()
    return b"".join((opening, b"\n", _JSON_START, digest, _JSON_END, b"\n", rest))


def check_json(raw: bytes) -> dict[str, Any]:
    """Return the mapping of a JSON text without its digest.

    Raises:
        DigestError: If the digest is missing or wrong, or the text is not a JSON mapping.
    """
    before, _, after = raw.partition(b"\n" + _JSON_START)
    claim, _, rest = after.partition(b"\n")
    body = before + b"\n" * (b"\n" in after) + rest
    _compare(body, claim[: -len(_JSON_END)] if claim.endswith(_JSON_END) else None)
    try:
        values = json.loads(body)
        if b"\\ud" in body.lower():  # half of a surrogate pair, which no other file can hold
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DigestError(f"it is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise DigestError(f"it is a {type(values).__name__}, not a mapping")
    return values


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Read a JSON file that carries its digest.

    Args:
        path: The file.
        advice: Fix, for the error message.

    Raises:
        DamagedFileError: If the digest is missing or wrong, or the content is not a mapping.
        FileNotFoundError: If the file is missing.
        FileError: If it cannot be read.
    """
    raw = file_at(path).read()
    with naming_damage(path, advice):
        return check_json(raw)


def write_yaml(path: Path, text: str) -> None:
    """Write YAML text with its digest, atomically."""
    data = text.encode()
    file_at(path).write(data + _YAML_START + hashlib.sha256(data).hexdigest().encode() + b"\n")


def read_yaml(path: Path, advice: str) -> dict[str, Any]:
    """Read the mapping of a YAML file that carries its digest.

    Args:
        path: The file.
        advice: Fix, for the error message.

    Raises:
        DamagedFileError: If the digest is missing or wrong, or the content is not a mapping.
        FileNotFoundError: If the file is missing.
        FileError: If it cannot be read.
    """
    body, start, claim = file_at(path).read().rpartition(_YAML_START)
    try:
        _compare(body, claim[:-1] if start and claim.endswith(b"\n") else None)
        values = copy.deepcopy(_parse_yaml(body))
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise DigestError("it is not a mapping of names")
    except ValueError as error:
        raise damaged(path, error, advice) from error
    return values


_parse_yaml = lru_cache(maxsize=64)(read_values)
"""Value of a YAML text, which is parsed once, as commands read the same options several times."""


def damaged(path: Path, reason: object, advice: str) -> DamagedFileError:
    """Return the error to raise for a damaged file.

    Args:
        path: The file.
        reason: What is wrong with it.
        advice: Fix, for the end of the message.
    """
    return DamagedFileError(f"{path} is damaged: {reason}; {advice}")


@contextmanager
def naming_damage(path: Path, advice: str) -> Iterator[None]:
    """Raise what a block finds wrong with the content of a file as a DamagedFileError; the arguments are its."""
    try:
        yield
    except (DigestError, EntryError, FormatError) as error:
        raise damaged(path, error, advice) from error


def _compare(body: bytes, claimed: bytes | None) -> None:
    """Raise DigestError unless the digest that a text claims is its own."""
    if claimed is None:
        raise DigestError("it does not list its own sha256")
    actual = hashlib.sha256(body).hexdigest()
    if claimed != actual.encode():
        raise DigestError(
            f"its text has sha256 {actual[:12]}, but it lists {claimed[:12].decode(errors='replace')!r}"
        )
