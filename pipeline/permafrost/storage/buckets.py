"""Objects in buckets: whole reads, ranges, listings and conditional writes.

An object is named by its address, such as s3://bucket/stores/demo/manifest.json. Only addresses travel between
processes. Each process connects with the credentials of its own environment, because a connection that is sent to
another process would carry them in clear. A process that was forked from one with a connection cannot use any, as its
requests would wait forever, and raises an error instead.

Objects appear whole or not at all. A request that is repeated because its response was lost may fail against its own
object, so a failed write reads what is there and is a success if it is the same.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from functools import partial
from typing import IO, Any, NamedTuple, TypeVar

from permafrost.core.errors import ConfigError, FileError, UserError, require
from permafrost.core.interrupts import check_interrupted
from permafrost.core.progress import say_if_slow
from permafrost.storage.addresses import ADDRESS

T = TypeVar("T")
logger = logging.getLogger("permafrost.buckets")

_PART_BYTES = 16 * 2**20
"""Bytes of a part of an upload; smaller objects are one request."""
_BLOCK_BYTES = 4 * 2**20
"""Bytes of a download that are handed on at once."""
_CLIENT = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "1h"}
"""Time limits of a request. The last one is for whole shards, of which a slow network carries a few MB per second."""
_TRIES = 5
"""Number of times that a request is sent whose answer breaks off, and an object read that arrives damaged."""
_PAUSE_SECONDS = 0.1
"""Time before such a request is repeated, doubled each time."""
WAIT_VARIABLE = "PERMAFROST_SERVER_WAIT"
"""Environment variable of the seconds to wait for an unreachable server."""
_SLOW_SECONDS = 30.0
"""Time after which a request without an answer is named."""
_RETRIES = {
    "max_retries": 10,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=15)},
}


class ForkError(UserError, RuntimeError):
    """Use of a bucket in a process that was forked from one that had used a bucket."""


class ReplacedError(FileError):
    """Object that another writer has written in the meantime."""


class MissingObjectError(FileError, FileNotFoundError):
    """Object that does not exist."""


class FinalError(FileError):
    """Error of a read that another try cannot mend."""


class TooLargeError(FinalError):
    """Object that is larger than any of its kind."""


class ObjectFacts(NamedTuple):
    """Object as a request shows it."""

    size: int
    e_tag: str


# ---- connections -----------------------------------------------------------------------------------


_clients: dict[str, Any] = {}
_is_forked = False


def _client(container: str) -> Any:
    """Return this process's connection to a bucket, such as s3://bucket."""
    if _is_forked:
        raise ForkError(
            f"{container} cannot be read in a process that was forked from one that had used a bucket: its requests "
            'would never end. Start processes with "spawn" or "forkserver"'
        )
    if container not in _clients:
        _clients[container] = connect(container)
    return _clients[container]


def connect(container: str) -> Any:
    """Connect to a bucket with the credentials and the endpoint of the environment.

    Args:
        container: Address of the bucket, such as s3://bucket.

    Raises:
        ConfigError: If obstore is not installed.
    """
    try:
        from obstore.store import from_url
    except ModuleNotFoundError:
        raise ConfigError(
            f"{container} needs the package obstore; install it with: pip install obstore"
        ) from None
    endpoint = os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT"))
    require(
        endpoint is None or endpoint.startswith(("http://", "https://")),
        f"AWS_ENDPOINT_URL={endpoint} must begin with http:// or https://; unset it for the servers of AWS",
    )
    plain = (endpoint or "").startswith("http://") or container.startswith("http://")
    options: dict[str, Any] = {**_CLIENT, **({"allow_http": True} if plain else {})}
    return from_url(container, client_options=options, retry_config=_RETRIES)


def _mark_forked() -> None:
    """Have a forked child refuse to use buckets if its parent has used one."""
    global _is_forked
    _is_forked = bool(_clients)


os.register_at_fork(after_in_child=_mark_forked)


def _split(address: str) -> tuple[Any, str]:
    """Return the connection and the key of an address."""
    container = _container(address)
    return _client(container), address[len(container) + 1 :]


def _container(address: str) -> str:
    """Return the bucket of an address, such as s3://bucket."""
    match = ADDRESS.fullmatch(address)
    assert match is not None, address
    return f"{match[1]}://{match[2]}"


def _ask(address: str, verb: str, request: Callable[[], T], *, is_conditional: bool = False) -> T:
    """Return the answer to a request that may be repeated.

    obstore repeats what fails before an answer begins. A response that breaks off is requested again here, and so is a
    server that is unreachable, for the time of `wait_seconds`.

    Args:
        address: Address of the object, for messages.
        verb: What could not be done, for the message.
        request: The request.
        is_conditional: The request has a condition, whose errors are the caller's; to others they are a refusal.

    Raises:
        FileNotFoundError: If there is no such object.
        FileError: If the request fails for good.
        BaseError: Of obstore, for the condition of a conditional write.
    """
    from obstore import exceptions

    final = (
        exceptions.AlreadyExistsError,
        exceptions.PreconditionError,
        exceptions.NotSupportedError,
    )
    attempt = 0
    while True:
        try:
            with _watched(address):
                answer = request()
        except FileNotFoundError:
            _unreached.pop(_container(address), None)
            raise MissingObjectError(f"{address} does not exist") from None
        except (exceptions.BaseError, OSError) as error:
            if isinstance(error, UserError) or (is_conditional and isinstance(error, final)):
                raise
            if _is_unreached(error):
                _wait_for_server(address, verb, error)
                continue
            attempt += 1
            if attempt == _TRIES or _is_final(error):
                raise FileError(f"{address} cannot be {verb} ({_reason(error)})") from error
            logger.debug("retrying %s: %s", address, error)
            time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
        else:
            _unreached.pop(_container(address), None)
            return answer


def _watched(address: str) -> AbstractContextManager[None]:
    """Say after a while that the server has not answered the request of the block."""
    text = f"{address}: its server has not answered for {_SLOW_SECONDS:g} s; still waiting"
    return say_if_slow(logger, text, after=_SLOW_SECONDS, level=logging.WARNING)


_unreached: dict[str, float] = {}
"""Time since which each bucket's server has not been reached. A process waits once for it, and not at each request."""


def wait_seconds() -> float:
    """Return the time in seconds to wait for an unreachable server.

    Raises:
        ConfigError: If the environment variable is not such a number.
    """
    text = os.environ.get(WAIT_VARIABLE, "180")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    require(
        0 <= seconds < float("inf"), f"{WAIT_VARIABLE} must be a number of seconds, got {text!r}"
    )
    return seconds


def _wait_for_server(address: str, verb: str, error: Exception) -> None:
    """Wait before a request is repeated that has reached no server. Raises FileError once that takes too long."""
    container, now, most = _container(address), time.monotonic(), wait_seconds()
    if (since := _unreached.get(container)) is None:
        since = _unreached[container] = now
        logger.warning(
            "%s cannot be %s (%s); retrying for %g s (%s)",
            address,
            verb,
            _reason(error),
            most,
            WAIT_VARIABLE,
        )
    if now - since >= most:
        raise FileError(
            f"{address} cannot be {verb} ({_reason(error)}, for {now - since:.0f} s). Finished files are kept; run the "
            "same command again once the server answers"
        ) from error
    check_interrupted()
    time.sleep(min(_PAUSE_SECONDS * 10, most / 10))


def _is_unreached(error: Exception) -> bool:
    """Return whether a request has failed because no connection was made."""
    text = str(error)
    return "kind: Connect" in text and _UNKNOWN_HOST not in text and not _is_final(error)


def _is_final(error: Exception) -> bool:
    """Return whether the same request would fail again."""
    from obstore import exceptions

    refused = (
        exceptions.PermissionDeniedError,
        exceptions.UnauthenticatedError,
        exceptions.InvalidPathError,
    )
    return (
        isinstance(error, refused)
        or _has_no_credentials(str(error))
        or _CERTIFICATE.search(str(error)) is not None
    )


def _has_no_credentials(text: str) -> bool:
    return "169.254." in text or "metadata.google" in text or "credential" in text.lower()


_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(?:Other\(\s*OtherError\(\s*)?(\w+)")
_UNKNOWN_HOST = "Name or service not known"
_NO_CONNECTION = {
    "failed to lookup address": "no such host",
    "ConnectionRefused": "connection refused",
}
_STATUS = re.compile(r"status code: (\d+ [\w -]+)|\b(\d{3} [A-Z][\w ]+)")
_CODE = re.compile(r"<Code>(\w+)</Code>")


def _reason(error: BaseException) -> str:
    """Return the cause of a failed request in a few words."""
    text = str(error)
    if _has_no_credentials(text):
        return "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run where the machine has a role"
    if (certificate := _CERTIFICATE.search(text)) is not None:
        return f"the server's certificate is not accepted, {certificate[1]}; SSL_CERT_FILE may name more authorities"
    if reason := next((reason for shown, reason in _NO_CONNECTION.items() if shown in text), ""):
        return reason
    first = text.strip().partition("\n")[0]
    status, code = _STATUS.search(first), _CODE.search(text)
    if status is None:
        return (
            first.rpartition(" - ")[2].partition("Debug source")[0].strip().rstrip(":")
            or "no answer"
        )
    reason = (status[1] or status[2]).strip()
    return f"{reason}, {code[1]}" if code else reason


# ---- reading -------------------------------------------------------------------------------------


def existing_facts(address: str) -> ObjectFacts:
    """Return the size and the ETag of an object.

    Raises:
        MissingObjectError: If there is no such object.
        FileError: If it cannot be read.
    """
    import obstore

    client, key = _split(address)
    if not key:
        raise MissingObjectError(f"{address} does not exist")
    return _facts(_ask(address, "read", lambda: obstore.head(client, key)))


def object_facts(address: str) -> ObjectFacts | None:
    """Return the size and the ETag of an object, None if there is none.

    Raises:
        FileError: If it cannot be read.
    """
    with suppress(FileNotFoundError):
        return existing_facts(address)
    return None


def _facts(meta: Any) -> ObjectFacts:
    return ObjectFacts(int(meta["size"]), str(meta["e_tag"] or meta["last_modified"]))


class Download:
    """Object that is being downloaded: its facts, and its bytes in blocks, once."""

    def __init__(self, address: str) -> None:
        """Send the request.

        Args:
            address: Address of the object.

        Raises:
            FileNotFoundError: If there is no such object.
            FileError: If it cannot be read.
        """
        import obstore

        client, key = _split(address)
        self.address = address
        self._result = _ask(address, "read", lambda: obstore.get(client, key))
        self.facts = _facts(self._result.meta)

    def blocks(self) -> Iterator[memoryview]:
        """Iterate over the bytes.

        Raises:
            FileError: If they end too early.
        """
        from obstore.exceptions import BaseError

        received = 0
        try:
            blocks = self._result.stream(min_chunk_size=_BLOCK_BYTES)
            while True:
                with _watched(self.address):
                    block = next(blocks, None)
                if block is None:
                    break
                view = memoryview(block)
                received += len(view)
                yield view
        except (BaseError, OSError) as error:
            raise FileError(f"{self.address} cannot be read ({_reason(error)})") from error
        require(
            received == self.facts.size,
            f"{self.address} cannot be read (the answer has {received} of {self.facts.size} bytes)",
            FileError,
        )


def read_object(address: str, most: int | None = None) -> tuple[bytes, ObjectFacts]:
    """Read an object whole.

    Args:
        address: Address of the object.
        most: Largest number of bytes; None for any. A larger object is not read.

    Returns:
        The bytes, and the facts in the answer.

    Raises:
        FileNotFoundError: If there is no such object.
        TooLargeError: If it is larger than `most`.
        FileError: If it cannot be read.
    """

    def read() -> tuple[bytes, ObjectFacts]:
        download = Download(address)
        size = download.facts.size
        if most is not None and size > most:
            raise TooLargeError(
                f"{address} has {size:,} bytes, more than the {most:,} that such a file can have. Restore it, or "
                "delete it"
            )
        return b"".join(download.blocks()), download.facts

    return read_again(read)


def read_again(read: Callable[[], T]) -> T:
    """Return what is read of an object, again if its answer breaks off or is damaged.

    Args:
        read: Function that reads it from the beginning. A FinalError and a missing object end the tries.
    """
    for _ in range(_TRIES - 1):
        try:
            return read()
        except (FileNotFoundError, FinalError):
            raise
        except FileError as error:
            logger.info("%s; it is read again", error)
    return read()


def read_range(address: str, size: int, offset: int) -> bytes:
    """Read `size` bytes of an object from `offset`, fewer only at its end.

    Raises:
        FileNotFoundError: If there is no such object.
        FileError: If it cannot be read.
    """
    import obstore

    if size == 0:
        return b""
    client, key = _split(address)
    return _ask(
        address, "read", lambda: bytes(obstore.get_range(client, key, start=offset, length=size))
    )


class Entry(NamedTuple):
    """Object, or folder of objects, in a folder."""

    name: str
    kind: str
    """file or folder."""
    size: int = 0
    e_tag: str = ""

    def is_dir(self) -> bool:
        """Return whether it is a folder."""
        return self.kind == "folder"

    def is_file(self) -> bool:
        """Return whether it is an object."""
        return self.kind == "file"

    def is_symlink(self) -> bool:
        """Return False, as a bucket has no links."""
        return False


def list_entries(address: str) -> list[Entry]:
    """Return what is in a folder, sorted by name, without the markers of folders.

    Raises:
        FileError: If it cannot be listed.
    """
    import obstore

    client, key = _split(address)
    answer = _ask(address, "listed", lambda: obstore.list_with_delimiter(client, key or None))
    start = len(key) + 1 if key else 0
    folders = [
        Entry(str(prefix)[start:].strip("/"), "folder") for prefix in answer["common_prefixes"]
    ]
    objects = [
        Entry(str(meta["path"])[start:], "file", int(meta["size"]), str(meta["e_tag"]))
        for meta in answer["objects"]
        if str(meta["path"]) != key  # the marker of the folder itself
    ]
    return sorted([*folders, *objects])


def iter_objects(address: str) -> Iterator[tuple[str, int]]:
    """Iterate over the names below a folder, relative to it and in their order, with their sizes in bytes.

    Markers of folders are left out.

    Raises:
        FileError: If the folder cannot be listed.
    """
    import obstore

    client, key = _split(address)
    start = len(key) + 1 if key else 0
    last: str | None = None
    blocks: Iterator[Any] | None = None

    def next_block() -> Any:
        nonlocal blocks
        # The first one, or one after an error, which continues from the last object.
        if blocks is None:
            blocks = iter(obstore.list(client, key or None, offset=last, chunk_size=1000))
        try:
            return next(blocks, [])
        except BaseException:
            blocks = None
            raise

    while block := _ask(address, "listed", next_block):
        for meta in _without_markers(address, client, block):
            last = str(meta["path"])
            yield last[start:], int(meta["size"])


def _without_markers(address: str, client: Any, block: Sequence[Any]) -> list[Any]:
    """Return the objects of a listing without the markers of folders.

    A marker is an empty object whose key ends with a slash, as consoles and mounts create for a folder. obstore lists
    it without the slash, and finds no empty object of that name.
    """
    import obstore

    def is_object(meta: Any) -> bool:
        try:
            answer = _ask(address, "listed", lambda: obstore.head(client, str(meta["path"])))
        except FileNotFoundError:
            return False
        return int(answer["size"]) == 0

    if not (empty := [number for number, meta in enumerate(block) if int(meta["size"]) == 0]):
        return list(block)
    # Number of empty objects of a listing that are asked for at the same time.
    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(is_object, [block[number] for number in empty])
        markers = {number for number, answer in zip(empty, answers, strict=True) if not answer}
    return [meta for number, meta in enumerate(block) if number not in markers]


# ---- writing -------------------------------------------------------------------------------------


def put_object(address: str, file: IO[bytes], size: int, sha256: str) -> None:
    """Write an object whole, in place of any other.

    Args:
        address: Address of the object.
        file: Content, open for reading.
        size: Number of its bytes.
        sha256: SHA-256 of its bytes, for the case that a response is lost.

    Raises:
        FileError: If it could not be written.
    """
    import obstore

    client, key = _split(address)

    def put() -> None:
        file.seek(0)
        try:
            obstore.put(client, key, file, use_multipart=size > _PART_BYTES, chunk_size=_PART_BYTES)
        except Exception:
            if not _has_content(address, size, sha256):
                raise

    try:
        _ask(address, "written", put)
    except FileNotFoundError:
        raise FileError(
            f"{address} cannot be written (its bucket does not exist, or an upload was aborted); create the bucket, "
            "or correct the address"
        ) from None
    if size <= _PART_BYTES:
        return
    if (facts := object_facts(address)) is None or facts.size != size:
        size_there = "nothing" if facts is None else f"{facts.size} bytes"
        raise FileError(
            f"{address} cannot be written ({size_there} of {size} bytes are there afterwards)"
        )


def _has_content(address: str, size: int, sha256: str) -> bool:
    """Return whether an object has these bytes, although writing it failed."""
    try:
        facts = object_facts(address)
        return facts is not None and facts.size == size and object_sha256(address) == sha256
    except (FileError, FileNotFoundError):
        return False


def object_sha256(address: str) -> str:
    """Return the SHA-256 of an object, read in blocks.

    Raises:
        FileNotFoundError: If there is no such object.
        FileError: If it cannot be read.
    """

    def read() -> str:
        digest = hashlib.sha256()
        for block in Download(address).blocks():
            digest.update(block)
        return digest.hexdigest()

    return read_again(read)


def create_object(address: str, data: bytes, replaces: str | None = None) -> str:
    """Write a small object if none is there, or only the one with an ETag.

    A request that is repeated meets its own object: if that has the same bytes, it is a success.

    Args:
        address: Address of the object.
        data: Content of the object.
        replaces: ETag of the object that may be replaced; None replaces none.

    Returns:
        The ETag of the written object.

    Raises:
        ReplacedError: If another object is there.
        FileError: If it cannot be written, or the endpoint has no conditional writes.
    """
    import obstore
    from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

    client, key = _split(address)
    for _ in range(_TRIES):
        mode: Any = "create" if replaces is None else {"e_tag": replaces}
        try:
            put = partial(obstore.put, client, key, data, mode=mode)
            return str(_ask(address, "written", put, is_conditional=True)["e_tag"])
        except NotSupportedError as error:
            raise refuse_unconditional(address) from error
        except FileNotFoundError:
            if replaces is None:
                raise FileError(
                    f"{address} cannot be written (its bucket does not exist)"
                ) from None
        except (AlreadyExistsError, PreconditionError):
            pass
        except FileError as error:
            if "501" in str(error):
                raise refuse_unconditional(address) from error
            if (e_tag := _e_tag_of(address, data)) is None:
                raise
            return e_tag
        if (e_tag := _e_tag_of(address, data)) is not None:
            return e_tag
        if object_facts(address) is not None:
            raise ReplacedError(f"{address} was written by another process in the meantime")
        replaces = None  # what it was to replace was removed
    raise FileError(f"{address} cannot be written (it is refused as existing, and does not exist)")


def refuse_unconditional(address: str) -> FileError:
    """Return the error to raise for an endpoint that does not support conditional writes."""
    return FileError(
        f"{address} cannot be written: the endpoint does not support conditional puts (If-None-Match), without which "
        "two writers could mix their files; use a local folder or another endpoint"
    )


def _e_tag_of(address: str, data: bytes) -> str | None:
    """Return the ETag of an object if it has these bytes."""
    try:
        content, facts = read_object(address, len(data))
    except (FileError, FileNotFoundError):
        return None
    return facts.e_tag if content == data else None


def remove_object(address: str) -> None:
    """Remove an object if it exists.

    Raises:
        FileError: If it cannot be removed.
    """
    import obstore

    client, key = _split(address)
    with suppress(FileNotFoundError):
        _ask(address, "removed", lambda: obstore.delete(client, key))


def move_object(address: str, destination: str) -> None:
    """Give an object another name in its bucket, in place of any object of that name.

    Raises:
        FileError: If it does not exist, or cannot be copied or removed.
    """
    import obstore

    client, key = _split(address)
    _, other = _split(destination)
    _ask(address, "moved", lambda: obstore.copy(client, key, other))
    remove_object(address)
