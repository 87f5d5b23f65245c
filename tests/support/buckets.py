"""Buckets of tests: in memory, behind moto's server, and behind a proxy that disturbs the requests by a plan."""

from __future__ import annotations

import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import obstore
import pytest
from obstore.store import MemoryStore

from permafrost.storage import bucket_files, buckets, object_cache
from tests.support.kills import Killed

KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_REGION": "us-east-1"}


@contextmanager
def memory_buckets(cache: Path) -> Iterator[dict[str, MemoryStore]]:
    """Provide buckets in the memory of this process, by their addresses, with a cache of their own."""
    stores: dict[str, MemoryStore] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "_clients", {})
        patch.setattr(bucket_files, "_versions", {})
        patch.setattr(
            buckets, "connect", lambda container: stores.setdefault(container, MemoryStore())
        )
        patch.setenv("PERMAFROST_CACHE", str(cache))
        yield stores


def retry_quickly(patch: pytest.MonkeyPatch) -> None:
    """Repeat requests after hundredths of a second, as the server is on this machine."""
    soon = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=100)}
    patch.setitem(buckets._RETRIES, "backoff", soon)
    patch.setattr(buckets, "_PAUSE_SECONDS", 0.005)


def names_of(store: MemoryStore, folder: str) -> list[str]:
    """Return the names of the objects below a folder."""
    paths = (meta["path"] for block in obstore.list(store, folder) for meta in block)
    return [path[len(folder) + 1 :] for path in paths]


def contents(store: MemoryStore, folder: str) -> dict[str, bytes]:
    """Return the objects below a folder by their names."""
    return {
        name: bytes(obstore.get(store, f"{folder}/{name}").bytes())
        for name in names_of(store, folder)
    }


def files_below(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder by their names, without locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def count_downloads(patch: pytest.MonkeyPatch, pause: float = 0.0) -> list[str]:
    """Append the addresses of objects that are downloaded to a list, and begin each after a pause in seconds."""
    addresses: list[str] = []

    class Counted(buckets.Download):
        def __init__(self, address: str) -> None:
            addresses.append(address)
            time.sleep(pause)
            super().__init__(address)

    patch.setattr(object_cache, "Download", Counted)
    return addresses


def stop_after(patch: pytest.MonkeyPatch, requests: int) -> list[int]:
    """End the process at the request that follows so many that write. Return a list of how many of them are left."""
    left = [requests]
    for name in ("put_object", "create_object", "remove_object"):
        original = getattr(buckets, name)

        def request(*words: Any, original: Any = original) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return original(*words)

        patch.setattr(buckets, name, request)
    return left


# ---- servers -------------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port of the loopback address that nothing listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def moto_server() -> Iterator[str]:
    """Provide the address of an S3 server in a process of its own, with a bucket named `bucket`."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env=os.environ | KEYS,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            assert process.poll() is None, "moto's server has ended"
            try:
                _create_bucket(port)
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _create_bucket(port: int) -> None:
    """Create the bucket. Raises OSError if nothing listens at the port.

    http.client knows no proxy. urllib keeps that of the process's first request, which may be one of a test.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("PUT", "/bucket")
        status = connection.getresponse().status
    finally:
        connection.close()
    assert status == 200, f"moto's server answers {status}"


def put_raw(server: str, key: str, data: bytes = b"") -> None:
    """Give moto's bucket an object of any name, such as one that ends with a slash, which obstore cannot write."""
    connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=60)
    try:
        connection.request("PUT", f"/bucket/{quote(key)}", data)
        answer = connection.getresponse()
        answer.read()
    finally:
        connection.close()
    assert answer.status == 200, f"moto's server answers {answer.status} to {key!r}"


FAULTS = ("drop", "delay", "truncate", "lose", "403", "404", "409", "412", "429", "500", "503")
"""Kinds of faults. drop: the connection is closed before the request is passed on. lose: after it was answered, without
the answer. truncate: in the middle of the answer. A number is the status of an answer in place of the server's."""
PASSING = ("drop", "delay", "truncate", "lose", "429", "500", "503")
"""Faults that a client can overcome by asking again."""


@dataclass
class FaultPlan:
    """Faults of the requests that a proxy passes on: each is disturbed with a probability, by its number."""

    seed: int
    kinds: tuple[str, ...] = PASSING
    share: float = 0.1
    seconds: float = 0.05
    """Time of a delay."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of faults by kind, for a test to assert that they happened."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()

    def draw(self) -> str | None:
        """Draw the fault of the next request."""
        with self._lock:
            if self._random.random() >= self.share:
                return None
            kind = self._random.choice(self.kinds)
            self.counts[kind] = self.counts.get(kind, 0) + 1
            return kind


@dataclass
class Network:
    """Latency and bandwidth that a proxy adds to each request."""

    latency: float = 0.0
    bytes_per_second: float | None = None
    received: int = 0
    """Bytes of the bodies of requests so far."""


@contextmanager
def proxy(
    server: str, plan: FaultPlan | None = None, network: Network | None = None, port: int = 0
) -> Iterator[str]:
    """Provide the address of a proxy before a server on the loopback address, at any free port or at this one."""
    host = server.removeprefix("http://")
    link = network or Network()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Print nothing."""

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = self._body(length)
            if len(body) < length:  # the client has ended
                self.close_connection = True
                return
            kind = None if plan is None else plan.draw()
            time.sleep(link.latency)
            if kind == "drop":
                self.close_connection = True
                return
            if kind == "delay":
                assert plan is not None
                time.sleep(plan.seconds)
            if kind is not None and kind.isdigit():
                self._send(int(kind), [("Content-Length", "0")], b"")
                return
            upstream = http.client.HTTPConnection(host)
            headers = {n: v for n, v in self.headers.items() if n.lower() != "connection"}
            upstream.request(self.command, self.path, body or None, headers)
            answer = upstream.getresponse()
            data = answer.read()
            upstream.close()
            if kind == "lose":
                self.close_connection = True
                return
            kept = [
                (n, v)
                for n, v in answer.getheaders()
                if n.lower() not in ("transfer-encoding", "connection", "content-length")
            ]
            size = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
            if link.bytes_per_second is not None:
                time.sleep(len(data) / link.bytes_per_second)
            cut = len(data) // 2 if kind == "truncate" and data else None
            self._send(answer.status, [*kept, ("Content-Length", str(size or 0))], data[:cut])
            if cut is not None:
                self.close_connection = True

        def _body(self, length: int) -> bytes:
            """Receive the body at the network's speed, in part if the client ends."""
            body = b""
            while len(body) < length:
                part = self.rfile.read1(min(2**16, length - len(body)))
                if not part:
                    break
                body += part
                link.received += len(part)
                if link.bytes_per_second is not None:
                    time.sleep(len(part) / link.bytes_per_second)
            return body

        def _send(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
            try:
                self.send_response_only(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer  # noqa: N815

    listener = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    listener.daemon_threads = True
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_address[1]}"
    finally:
        listener.shutdown()
        listener.server_close()
