"""Objects of a bucket: conditional writes, claims, the cache of a node, and processes that may not use them."""

import contextlib
import fcntl
import hashlib
import io
import itertools
import logging
import multiprocessing
import os
import threading
import time
from types import SimpleNamespace

import obstore
import pytest
from obstore.exceptions import GenericError

from permafrost.core.errors import ConfigError, FileError
from permafrost.storage import buckets, files, lock, object_cache
from permafrost.storage.addresses import Bucket, parse_bucket
from permafrost.storage.buckets import ReplacedError, create_object
from permafrost.storage.files import file_at
from permafrost.storage.lock import CLAIMS, LockedError, claim_of, folder_lock
from permafrost.storage.object_cache import CacheError, ObjectCache
from permafrost.storage.rooted_paths import RootedPath, rooted
from tests.support.buckets import (
    KEYS,
    FaultPlan,
    Network,
    count_downloads,
    free_port,
    memory_buckets,
    moto_server,
    proxy,
    put_raw,
    retry_quickly,
)
from tests.support.processes import wait_until

ADDRESS = "s3://bucket/folder/object"
FOLDER = RootedPath(Bucket("s3://bucket/folder"))


@pytest.fixture
def stores(tmp_path):
    with memory_buckets(tmp_path / "cache") as made:
        buckets._client("s3://bucket")
        yield made


@pytest.fixture
def store(stores):
    return stores["s3://bucket"]


@pytest.fixture
def cache(tmp_path):
    object_cache._remove_leftovers.cache_clear()
    return ObjectCache(tmp_path / "cache")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


# ---- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ftp://bucket/x", "write s3://"),
        ("s3://", "not the address"),
        ("s3://key:secret@bucket/x", "contains credentials"),
        ("s3://bucket/../x", "an empty name"),
        ("s3://bucket//x", "an empty name"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line_without_its_secret(text, reason):
    with pytest.raises(ConfigError, match=reason) as error:
        parse_bucket("store.path", text)
    assert "secret@" not in str(error.value)


def test_a_path_below_a_bucket_is_its_address(store):
    path = FOLDER / "a/b.tar"
    assert str(path) == "s3://bucket/folder/a/b.tar"
    assert (path.name, path.stem, path.suffix, str(path.parent)) == (
        "b.tar",
        "b",
        ".tar",
        "s3://bucket/folder/a",
    )
    with pytest.raises(FileError, match="leaves"):
        FOLDER / "../other"


# ---- files ---------------------------------------------------------------------------------------


def test_files_of_a_bucket_are_written_listed_read_moved_and_removed(store):
    files.file_at(FOLDER / "b/two").write(b"22")
    with files.file_at(FOLDER / "a").open_atomically() as file:
        file.write(b"1")
        file.destination = FOLDER / "one"  # a name may depend on the content
    with files.file_at(FOLDER / "three").create() as written:
        written.write(b"..3")
        written.seek(0)
        written.write(b"33")

    assert [path.name for path in file_at(FOLDER).paths()] == ["b", "one", "three"]
    assert [str(path) for path in file_at(FOLDER).iter_files()] == [
        f"s3://bucket/folder/{name}" for name in ("b/two", "one", "three")
    ]
    assert [str(path) for path in file_at(FOLDER).iter_files(("b",))] == [
        "s3://bucket/folder/one",
        "s3://bucket/folder/three",
    ]
    assert files.file_at(FOLDER / "three").read() == b"333"
    assert files.file_at(FOLDER / "b/two").sha256() == sha256(b"22")
    with files.file_at(FOLDER / "b/two").open() as file:
        assert files.open_size(file) == 2
        assert files.read_at(file, 1, 1) == b"2"
        assert files.map_file(file)[:] == b"22"
    files.file_at(FOLDER / "one").move(FOLDER / "moved")
    files.file_at(FOLDER / "three").remove()
    files.file_at(FOLDER / "never").remove()
    assert file_at(FOLDER / "moved").exists()
    assert not file_at(FOLDER / "one").exists()
    assert not file_at(FOLDER / "three").exists()
    assert file_at(FOLDER / "b").is_folder()
    assert file_at(FOLDER / "b").exists()
    assert not file_at(FOLDER / "moved").is_folder()
    with pytest.raises(FileNotFoundError):
        files.file_at(FOLDER / "three").open()
    with pytest.raises(FileError, match="more than the 1"):
        files.file_at(FOLDER / "b/two").read(1)


def test_a_file_whose_writer_fails_never_appears(store):
    def fail():
        with files.file_at(FOLDER / "a").open_atomically() as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(file_at(FOLDER).iter_files()) == []


def test_sizes_are_asked_for_once_where_a_block_says_so(store, monkeypatch):
    for name in ("a", "b/c"):
        files.file_at(FOLDER / name).write(b"123")
    monkeypatch.setattr(buckets, "object_facts", None)  # no request for an object
    with file_at(FOLDER).listing():
        assert [file_at(FOLDER / name).size() for name in ("a", "b/c", "d")] == [3, 3, None]


# ---- conditional writes --------------------------------------------------------------------------


def test_an_object_is_created_once_and_the_same_bytes_are_a_success(store):
    first = create_object(ADDRESS, b"one")
    assert create_object(ADDRESS, b"one") == first  # as after a response that was lost
    with pytest.raises(ReplacedError):
        create_object(ADDRESS, b"two")
    second = create_object(ADDRESS, b"two", first)
    with pytest.raises(ReplacedError):
        create_object(ADDRESS, b"three", first)
    assert create_object(ADDRESS, b"three", second)
    assert bytes(obstore.get(store, "folder/object").bytes()) == b"three"


def test_a_commit_replaces_only_the_object_that_this_process_has_read(store):
    path = FOLDER / "manifest.json"
    files.file_at(path).commit(b"one")
    files.file_at(path).commit(b"two")  # its own
    obstore.put(store, "folder/manifest.json", b"of another writer")
    with pytest.raises(ReplacedError, match="run the same command again"):
        files.file_at(path).commit(b"three")
    assert files.file_at(path).read_committed(100) == b"of another writer"
    files.file_at(path).commit(b"three")
    assert files.file_at(path).read() == b"three"


# ---- claims --------------------------------------------------------------------------------------


@pytest.fixture
def short_claims(monkeypatch):
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 0.6)
    monkeypatch.setattr(lock, "RENEWAL_SECONDS", 0.05)


def test_a_second_writer_is_turned_away_by_name_and_the_claim_ends_with_the_block(
    stores, short_claims
):
    with (
        folder_lock(FOLDER),
        pytest.raises(LockedError, match=f"process {os.getpid()} on .* is writing"),
        folder_lock(FOLDER),
    ):
        pass
    with folder_lock(FOLDER):
        assert file_at(FOLDER / ".lock").exists()
    assert not file_at(FOLDER / ".lock").exists()


def test_the_claim_of_a_process_that_died_is_taken_over(store, short_claims):
    create_object("s3://bucket/folder/.lock", b'{"holder": "process 1 on gone", "token": "t"}')
    started = time.monotonic()
    with folder_lock(FOLDER):
        pass
    assert time.monotonic() - started >= lock.EXPIRY_SECONDS


def test_a_claim_that_was_taken_over_is_not_removed_by_its_former_holder(
    store, short_claims, monkeypatch
):
    warnings = []
    monkeypatch.setattr(lock.logger, "warning", lambda text, *words: warnings.append(text % words))
    assert CLAIMS.take(claim_of(FOLDER))
    obstore.put(store, "folder/.lock", b'{"holder": "another", "token": "other"}')
    wait_until(lambda: warnings)
    assert ["was taken over" in text for text in warnings] == [True]
    CLAIMS.release(claim_of(FOLDER))
    assert b"another" in bytes(obstore.get(store, "folder/.lock").bytes())


def test_an_endpoint_that_ignores_conditions_is_refused_at_the_first_write(store, monkeypatch):
    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda *words, mode=None, **options: put(*words, **options))
    with pytest.raises(FileError, match="does not support conditional puts"), folder_lock(FOLDER):
        pass
    assert not file_at(FOLDER / ".lock").exists()


# ---- cache ---------------------------------------------------------------------------------------


def test_threads_that_want_the_same_object_download_it_once(store, cache, monkeypatch):
    obstore.put(store, "folder/object", b"content")
    addresses = count_downloads(monkeypatch, 0.1)
    read = []

    def work():
        with cache.open(ADDRESS, sha256(b"content")) as file:
            read.append(file.readall())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [b"content"] * 8
    assert addresses == [ADDRESS]


def test_an_object_that_was_replaced_is_never_served_from_its_old_copy(store, cache):
    for content in (b"old", b"new"):
        obstore.put(store, "folder/object", content)
        with cache.open(ADDRESS) as file:
            assert file.readall() == content


def test_a_copy_that_was_cut_is_downloaded_again_where_no_digest_is_known(store, cache):
    obstore.put(store, "folder/object", b"content")
    cache.open(ADDRESS).close()
    (copy,) = object_cache._files(cache.folder)
    copy.write_bytes(b"cont")
    with cache.open(ADDRESS) as file:
        assert file.readall() == b"content"


def test_bytes_that_arrive_damaged_are_an_error_and_leave_nothing(store, cache, monkeypatch):
    obstore.put(store, "folder/object", b"contemt")
    addresses = count_downloads(monkeypatch)
    with pytest.raises(FileError, match="damaged: it has sha256"):
        cache.open(ADDRESS, sha256(b"content"))
    assert len(addresses) == buckets._TRIES
    assert list(object_cache._files(cache.folder)) == []


def test_a_full_cache_gives_up_what_was_used_longest_ago_and_nothing_in_use(store, tmp_path):
    for name in "abcd":
        obstore.put(store, f"folder/{name}", name.encode() * 100)
    cache = ObjectCache(tmp_path / "cache", 300)

    def open_object(name):
        return cache.open(f"s3://bucket/folder/{name}", sha256(name.encode() * 100))

    def names():
        return {path.read_bytes()[:1].decode() for path in object_cache._files(cache.folder)}

    in_use = open_object("a")
    mapped = files.map_file(open_object("b"))  # the file is closed, the map is not
    open_object("c").close()
    for seconds, path in enumerate(sorted(object_cache._files(cache.folder))):
        os.utime(path, (seconds, seconds))
    open_object("d").close()
    assert names() == {"a", "b", "d"}
    in_use.close()
    mapped.close()
    open_object("c").close()
    assert "c" in names()
    assert len(names()) == 3
    assert mapped.closed


def test_a_process_that_ends_in_the_middle_of_an_eviction_leaves_a_cache_that_works(
    store, tmp_path, monkeypatch
):
    for name in "abcd":
        obstore.put(store, f"folder/{name}", name.encode() * 100)
    cache = ObjectCache(tmp_path / "cache", 300)
    for name in "abc":
        cache.open(f"s3://bucket/folder/{name}", sha256(name.encode() * 100)).close()
    remove = object_cache._remove_unused

    def remove_and_end(path):
        remove(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(object_cache, "_remove_unused", remove_and_end)
        with pytest.raises(KeyboardInterrupt):
            cache.open("s3://bucket/folder/d", sha256(b"d" * 100))
    assert len(list(object_cache._files(cache.folder))) == 2
    for name in "dabc":
        with cache.open(f"s3://bucket/folder/{name}", sha256(name.encode() * 100)) as file:
            assert file.readall() == name.encode() * 100
    assert len(list(object_cache._files(cache.folder))) == 3


def test_an_object_without_room_is_named_with_the_way_out(store, tmp_path):
    obstore.put(store, "folder/object", b"1234")
    cache = ObjectCache(tmp_path / "cache", 3)
    with pytest.raises(CacheError, match=r"no room for s3://bucket/folder/object.*Raise the limit"):
        cache.open(ADDRESS, sha256(b"1234"))


def test_a_download_that_ends_while_files_are_listed_is_counted_under_its_name(
    tmp_path, monkeypatch
):
    path = tmp_path / "ab" / "cdef"
    path.parent.mkdir()
    path.write_bytes(b"12345")
    listed = object_cache._files
    lists = iter([[path.with_name(".cdef")]])  # its name when the first listing began
    monkeypatch.setattr(object_cache, "_files", lambda folder: next(lists, None) or listed(folder))

    ((found, status),) = object_cache._files_with_status(tmp_path)

    assert (found, status.st_size) == (path, 5)


def test_downloads_in_parallel_never_exceed_the_limit_together(store, tmp_path):
    data = {str(number): bytes([number]) * 1000 for number in range(24)}
    for name, content in data.items():
        obstore.put(store, f"folder/{name}", content)
    cache = ObjectCache(tmp_path / "cache", 5000)
    sizes, stop = [], threading.Event()

    def measure():
        while not stop.is_set():
            with object_cache._locked(
                cache.folder / object_cache._ROOM
            ):  # no file is replaced meanwhile
                sizes.append(sum(_size(path) for path in object_cache._files(cache.folder)))

    def _size(path):
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return 0

    def read(names):
        for name in names:
            with cache.open(f"s3://bucket/folder/{name}", sha256(data[name])) as file:
                assert file.readall() == data[name]

    cache.folder.mkdir()
    names = list(data)
    readers = [threading.Thread(target=read, args=(names[n::4] + names[:n],)) for n in range(4)]
    watcher = threading.Thread(target=measure)
    for thread in (*readers, watcher):
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    watcher.join()
    assert 0 < max(sizes) <= 5000


def test_what_a_dead_process_left_is_removed_and_a_living_download_is_not(store, cache):
    place = cache.folder / "ab"
    place.mkdir(parents=True)
    dead, living = place / f".{'ab' * 32}.partial", place / f".{'ac' * 32}.partial"
    dead.write_bytes(b"half")
    living.write_bytes(b"half")
    with living.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        obstore.put(store, "folder/object", b"content")
        cache.open(ADDRESS, sha256(b"content")).close()
    assert not dead.exists()
    assert living.exists()


def test_waiting_for_a_download_that_stands_still_ends_with_the_name_of_its_process(
    store, cache, monkeypatch
):
    monkeypatch.setattr(object_cache, "WAIT_SECONDS", 0.2)
    monkeypatch.setenv("PERMAFROST_SERVER_WAIT", "0")
    obstore.put(store, "folder/object", b"content")
    digest = sha256(b"content")
    partial = cache.folder / digest[:2] / f".{digest}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"")
    with partial.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CacheError, match=f"process {os.getpid()}, which downloads"):
            cache.open(ADDRESS, digest)


def test_a_copy_for_other_packages_has_the_name_of_its_object_and_its_neighbor(store):
    object_cache.local_copy.cache_clear()
    obstore.put(store, "run/teach/model.safetensors", b"weights")
    obstore.put(store, "run/teach/model.json", b"{}")
    path = object_cache.local_copy("s3://bucket/run/teach/model.safetensors", "model.json")
    assert path.name == "model.safetensors"
    assert path.read_bytes() == b"weights"
    assert path.with_name("model.json").read_bytes() == b"{}"
    with pytest.raises(FileError, match="correct the address"):
        object_cache.local_copy("s3://bucket/run/teach/none", "model.json")


def test_files_of_a_bucket_are_read_at_the_same_time_and_in_order(store, tmp_path):
    folder = rooted("s3://bucket/folder")
    together = threading.Barrier(4, timeout=60)

    def read(number):
        together.wait()
        return 10 * number

    assert list(files.file_at(folder).read_each(read, range(8))) == [
        10 * number for number in range(8)
    ]

    def fail_at_three(number):
        if number == 3:
            raise FileError("the third")
        return number

    before = []
    with pytest.raises(FileError, match="the third"):
        before.extend(files.file_at(folder).read_each(fail_at_three, range(100)))
    assert before == [0, 1, 2]
    threads = set()
    local = files.file_at(rooted(str(tmp_path))).read_each(
        lambda _: threads.add(threading.get_ident()), range(3)
    )
    assert list(local) == [None] * 3
    assert threads == {threading.get_ident()}


def test_a_range_is_read_without_a_copy(store, tmp_path):
    obstore.put(store, "folder/object", b"0123456789")
    file = files.file_at(FOLDER / "object").open_ranges()
    assert files.open_size(file) == 10
    assert [files.read_at(file, 3, offset) for offset in (0, 4, 8)] == [b"012", b"456", b"89"]
    assert not (tmp_path / "cache").exists()
    with pytest.raises(FileNotFoundError):
        files.file_at(FOLDER / "none").open_ranges()


# ---- processes and servers -----------------------------------------------------------------------


def _use_in_child(answers):
    try:
        buckets.object_facts(ADDRESS)
        answers.send("used it")
    except buckets.ForkError as error:
        answers.send(str(error))


def test_a_forked_process_raises_an_error_where_its_requests_would_hang(stores):
    buckets.object_facts(ADDRESS)
    context = multiprocessing.get_context("fork")
    received, answers = context.Pipe(duplex=False)
    child = context.Process(target=_use_in_child, args=(answers,))
    child.start()
    assert received.poll(60)
    assert '"spawn" or "forkserver"' in received.recv()
    child.join()


def test_an_endpoint_without_a_scheme_is_one_line(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:5333")
    with pytest.raises(ConfigError, match=r"AWS_ENDPOINT_URL=127.0.0.1:5333 must begin with http"):
        buckets.connect("s3://bucket")


def test_a_server_that_does_not_answer_is_named(stores, monkeypatch, caplog):
    create_object(ADDRESS, b"content")
    answer = threading.Event()

    def say(level, message):
        assert level == logging.WARNING
        caplog.records.append(message)
        answer.set()

    read = obstore.get
    monkeypatch.setattr(buckets, "_SLOW_SECONDS", 0.01)
    monkeypatch.setattr(buckets.logger, "log", say)
    monkeypatch.setattr(obstore, "get", lambda *key: (answer.wait(), read(*key))[1])

    assert buckets.read_object(ADDRESS)[0] == b"content"
    assert caplog.records[0] == f"{ADDRESS}: its server has not answered for 0.01 s; still waiting"


def test_without_the_package_one_line_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(ConfigError, match="pip install obstore"):
        buckets.connect("s3://bucket")


@pytest.fixture(scope="module")
def server():
    with moto_server() as address:
        yield address


@pytest.fixture
def client_of(monkeypatch, tmp_path):
    """Function that connects this process to an endpoint."""

    def connect(address):
        place = {"AWS_ENDPOINT_URL": address, "PERMAFROST_CACHE": str(tmp_path / "cache")}
        for name, value in (KEYS | place).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(buckets, "_clients", {})
        monkeypatch.setattr(buckets, "_unreached", {})
        retry_quickly(monkeypatch)

    return connect


def test_a_server_of_s3_has_conditions_parts_and_listings(server, client_of, monkeypatch):
    client_of(server)
    monkeypatch.setattr(buckets, "_PART_BYTES", 5 * 2**20)
    large = os.urandom(12 * 2**20)
    buckets.put_object("s3://bucket/x/large", io.BytesIO(large), len(large), sha256(large))
    assert buckets.object_sha256("s3://bucket/x/large") == sha256(large)
    assert buckets.read_range("s3://bucket/x/large", 4, 7) == large[7:11]
    tag = create_object("s3://bucket/x/small", b"1")
    with pytest.raises(ReplacedError):
        create_object("s3://bucket/x/small", b"2")
    create_object("s3://bucket/x/small", b"2", tag)
    assert dict(buckets.iter_objects("s3://bucket/x")) == {"large": len(large), "small": 1}
    with pytest.raises(FileError, match="bucket does not exist"):
        create_object("s3://none/x", b"1")
    with pytest.raises(FileError, match=r"s3://none cannot be listed \(404 Not Found"):
        list(buckets.iter_objects("s3://none"))


ODD_NAMES = ["a b", "a#b?c", "a%2Fb", "a+b", "a\\b", "[x]", "k" * 255, "~", "é"]


@pytest.mark.parametrize(
    ("markers", "names"),
    [
        (["zz/"], ["a"]),  # after every object
        (["", "a/", "m/", "m/n/", "zz/"], ["a/b", "m-1", "m/n-1", "m/n/o", "zz-1"]),
        (["x/", "y/", "z/"], []),
        ([], ODD_NAMES),
        ([], ["l" * 255 + "/" + "m" * 255, "n/" * 490 + "n"]),
    ],
)
def test_a_listing_ends_whatever_the_names_and_has_no_markers_of_folders(
    server, client_of, request, markers, names
):
    client_of(server)
    folder = f"list-{request.node.callspec.indices['names']}"
    for name in [*markers, *names]:
        put_raw(server, f"{folder}/{name}", b"" if name in markers else b"1")
    put_raw(server, f"{folder}/empty")  # a file, although it has no bytes
    path = rooted(f"s3://bucket/{folder}")
    expected = dict.fromkeys(names, 1) | {"empty": 0}
    assert list(itertools.islice(buckets.iter_objects(str(path)), 100)) == sorted(expected.items())
    entries = {entry.name: entry.kind for entry in buckets.list_entries(str(path))}
    assert entries == {
        name.partition("/")[0]: "folder" if "/" in name else "file"
        for name in [*filter(None, markers), *expected]
    }
    assert file_at(path).is_folder()
    for name, size in expected.items():
        assert buckets.object_facts(f"{path}/{name}").size == size


def test_a_listing_that_breaks_off_goes_on_after_its_last_object(server, client_of, monkeypatch):
    client_of(server)
    names = [f"{number:02d}" for number in range(9)]
    for name in ["00/", "05-1/", *names]:
        put_raw(server, f"broken/{name}", name.encode() * (not name.endswith("/")))
    listed, starts = obstore.list, []

    def list_few(client, prefix, *, offset, chunk_size):
        starts.append(offset)
        blocks = iter(listed(client, prefix, offset=offset, chunk_size=3))
        yield next(blocks)
        if len(starts) < 4:
            raise GenericError("the answer breaks off")
        yield from blocks

    monkeypatch.setattr(obstore, "list", list_few)
    assert [name for name, _ in buckets.iter_objects("s3://bucket/broken")] == names
    assert len(starts) == 4


def test_a_name_that_no_path_can_have_is_one_line(server, client_of):
    client_of(server)
    put_raw(server, "refused/a//b", b"1")
    with pytest.raises(FileError, match=r"s3://bucket/refused cannot be listed \(.*refused/a//b"):
        list(buckets.iter_objects("s3://bucket/refused"))


def test_a_server_that_refuses_connections_is_asked_until_it_is_back(
    server, client_of, monkeypatch, caplog
):
    client_of(server)
    create_object("s3://bucket/away/a", b"1")
    port, tries, pause = free_port(), [], time.sleep
    client_of(f"http://127.0.0.1:{port}")
    monkeypatch.setitem(buckets._RETRIES, "max_retries", 0)
    away = contextlib.ExitStack()

    def come_back(seconds):
        tries.append(seconds)
        if len(tries) == 2 * buckets._TRIES:  # more than an answer that breaks off is asked for
            away.enter_context(proxy(server, port=port))
        pause(0.001)

    monkeypatch.setattr(buckets.time, "sleep", come_back)
    with away:
        assert buckets.read_object("s3://bucket/away/a")[0] == b"1"
        warned = [text for text in caplog.messages if "connection refused" in text]
        assert len(warned) == 1
        assert "PERMAFROST_SERVER_WAIT" in warned[0]
        assert not buckets._unreached


def test_a_server_that_stays_away_is_waited_for_once_and_the_line_names_the_way_out(
    client_of, monkeypatch
):
    client_of(f"http://127.0.0.1:{free_port()}")
    monkeypatch.setitem(buckets._RETRIES, "max_retries", 0)
    monkeypatch.setenv("PERMAFROST_SERVER_WAIT", "0.05")
    pauses, pause = [], time.sleep
    # Other threads of the process sleep, too.
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda s: pauses.append(s) or pause(s))
    monkeypatch.setattr(buckets, "time", clock)
    line = r"cannot be read \(connection refused, for 0 s\).*run the same command again"
    for waits in (True, False):
        pauses.clear()
        with pytest.raises(FileError, match=line):
            buckets.read_object("s3://bucket/away/a")
        assert bool(pauses) == waits
    for text in ("soon", "-1", "inf"):
        monkeypatch.setenv("PERMAFROST_SERVER_WAIT", text)
        with pytest.raises(ConfigError, match="PERMAFROST_SERVER_WAIT must be a number of seconds"):
            buckets.read_object("s3://bucket/away/a")


@pytest.mark.parametrize("kind", ["drop", "truncate", "lose", "429", "500", "503"])
def test_every_request_survives_one_fault(server, client_of, kind):
    plan = FaultPlan(0, (kind,), share=1.0)
    is_disturbed = iter([True, False] * 1000)
    plan.draw = lambda: kind if next(is_disturbed) and not plan.counts.update({kind: 1}) else None
    with proxy(server, plan) as address:
        client_of(address)
        where = f"s3://bucket/{kind}"
        create_object(f"{where}/a", b"one")
        buckets.put_object(f"{where}/b", io.BytesIO(b"two"), 3, sha256(b"two"))
        assert buckets.read_object(f"{where}/a")[0] == b"one"
        assert buckets.object_facts(f"{where}/b").size == 3
        assert [name for name, _ in buckets.iter_objects(where)] == ["a", "b"]
        assert [entry.name for entry in buckets.list_entries(where)] == ["a", "b"]
        assert buckets.read_range(f"{where}/b", 2, 1) == b"wo"
        buckets.remove_object(f"{where}/b")
        assert buckets.object_facts(f"{where}/b") is None
    assert plan.counts == {kind: 1}


# ---- kills -----------------------------------------------------------------------------------------


def _download(environment, folder, digest):
    os.environ.update(environment)
    ObjectCache(folder).open("s3://bucket/kills/large", digest)


def _upload(environment, data):
    os.environ.update(environment)
    buckets.put_object("s3://bucket/kills/upload", io.BytesIO(data), len(data), sha256(data))


@pytest.fixture
def large(server, client_of):
    """An object of 8 MB, and the environment of a process that reads it at 4 MB per second."""
    client_of(server)
    data = os.urandom(2**23)
    buckets.put_object("s3://bucket/kills/large", io.BytesIO(data), len(data), sha256(data))
    network = Network(bytes_per_second=4e6)
    with proxy(server, network=network) as address:
        cache = os.environ["PERMAFROST_CACHE"]
        yield data, KEYS | {"PERMAFROST_CACHE": cache, "AWS_ENDPOINT_URL": address}, network


def start(target, *words):
    process = multiprocessing.get_context("spawn").Process(target=target, args=words)
    process.start()
    return process


def test_a_reader_that_is_killed_in_a_download_leaves_no_wrong_copy(large, cache):
    data, environment, _ = large
    digest = sha256(data)
    partial = cache.folder / digest[:2] / f".{digest}.partial"
    process = start(_download, environment, cache.folder, digest)
    wait_until(partial.exists)
    process.kill()
    process.join()
    assert partial.exists()  # it died in the middle
    assert not partial.with_name(digest).exists()
    with cache.open("s3://bucket/kills/large", digest) as file:
        assert file.readall() == data
    assert [path.name for path in object_cache._files(cache.folder)] == [digest]


def test_a_writer_that_is_killed_in_an_upload_leaves_no_object(large):
    data, environment, network = large
    process = start(_upload, environment, data)
    wait_until(lambda: network.received > 0)
    process.kill()
    process.join()
    assert process.exitcode != 0
    address = "s3://bucket/kills/upload"
    assert buckets.object_facts(address) is None
    buckets.put_object(address, io.BytesIO(data), len(data), sha256(data))
    assert buckets.object_sha256(address) == sha256(data)
