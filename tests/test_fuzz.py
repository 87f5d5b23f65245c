"""Fuzzing of what is parsed: sound files with arbitrary edits, signed again where a digest would refuse them first.

`make test` runs a fixed sample of about 20 seconds, `make test-all` about ten minutes. Failures that were fixed are
cases of their own in the tests of the parser.
"""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from permafrost.config.compose import compose
from permafrost.config.data import ImageTableDataConfig
from permafrost.config.options import options_of
from permafrost.config.verbs import VERBS, build_verb_config
from permafrost.core.errors import ConfigError
from permafrost.sources.image_table import ImageTableSource
from permafrost.store.arrow_files import read_table, table_schema
from permafrost.store.codecs import decode_npy, encode_npy
from permafrost.store.commit_markers import MARKER_SCHEMA, PASS_MARKER_SCHEMA, read_marker
from permafrost.store.entries import ManifestError
from permafrost.store.manifest import read_pass_manifest, read_store_manifest
from permafrost.store.reader import Store
from permafrost.store.shards import PassShardTable
from permafrost_papers.ked.data_options import TableDataConfig
from permafrost_papers.ked.table import TableSource
from permafrost_sources.options import WebDatasetDataConfig
from permafrost_sources.webdataset import WebDatasetSource
from tests.support.fuzzing import Edited, edited_bytes, edited_json, fuzz, reads_or_refuses
from tests.support.index_table import index_table
from tests.support.photo_table import write_photo_table
from tests.support.signing import (
    file_entry,
    load,
    load_shards,
    pass_folder,
    sign,
    sign_index,
    sign_shards,
)
from tests.support.store_kinds import build_store, write_tars

pytestmark = pytest.mark.timeout(1800)


def examples(few: int, many: int):
    """Numbers of examples in `make test` and in `make test-all`."""
    return pytest.mark.parametrize(
        "examples", [few, pytest.param(many, marks=pytest.mark.slow)], ids=["sample", "many"]
    )


@pytest.fixture
def refused_share(count_trials):
    """Function that reads examples, counts their outcomes for docs/concepts/reliability.md, and returns a fraction."""

    def of(subject, examples, cases, read):
        refusals = []
        fuzz(examples, cases, lambda case: refusals.append(reads_or_refuses(lambda: read(case))))
        refused = sum(refusals)
        count_trials(subject, {"refused": refused, "read": len(refusals) - refused})
        return refused / examples

    return of


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tiny_teacher):
    """Function from a backend to the folder of its sound store, which is made on first use."""
    made = {}

    def of(backend):
        if backend not in made:
            made[backend] = build_store(backend, tmp_path_factory.mktemp(backend), tiny_teacher)
        return made[backend]

    return of


def read_store(store: Path) -> None:
    """Read the index and every value of the pass."""
    opened = Store(store)
    index_table(opened)
    (teacher_pass,) = opened.open_passes()
    for shard in opened.shards:
        teacher_pass.read_shard(shard)


# ---- stores --------------------------------------------------------------------------------------


@examples(30, 6_000)
def test_a_manifest_is_read_or_refused(examples, stores, tmp_path, refused_share):
    store = shutil.copytree(stores("zarr"), tmp_path / "store")
    folder = pass_folder(store)
    originals = {place: (place / "manifest.json").read_bytes() for place in (store, folder)}
    sound = {place: load(place) for place in originals}

    def read(case):
        place, values = case
        sign(place, values)
        try:
            read_store(store)
        finally:
            (place / "manifest.json").write_bytes(originals[place])

    cases = [st.tuples(st.just(place), edited_json(values)) for place, values in sound.items()]
    share = refused_share("a signed manifest", examples, st.one_of(cases), read)

    assert share > 1 / 4, "few edits were noticed, so they hit nothing"
    read_store(store)


@examples(30, 4_000)
def test_an_unsigned_manifest_is_refused(examples, stores, tmp_path):
    store = shutil.copytree(stores("zarr"), tmp_path / "store")
    folder = pass_folder(store)
    sound = {path: (path / "manifest.json").read_bytes() for path in (store, folder)}

    def check(case):
        place, data = case
        if data == sound[place]:
            return
        (place / "manifest.json").write_bytes(data)
        read = read_store_manifest if place == store else read_pass_manifest
        assert reads_or_refuses(lambda: read(place)) or json.loads(data) == json.loads(sound[place])
        (place / "manifest.json").write_bytes(sound[place])

    fuzz(
        examples,
        st.one_of([st.tuples(st.just(path), edited_bytes(data)) for path, data in sound.items()]),
        check,
    )


@examples(40, 8_000)
@pytest.mark.parametrize("name", ["key", "key_offsets", "label"])
def test_an_index_is_read_or_refused(examples, name, stores, tmp_path, refused_share):
    store = shutil.copytree(stores("zarr"), tmp_path / "store")
    values = load(store)
    sound = (store / values["index"][name]["path"]).read_bytes()

    def read(data):
        sign_index(store, **{name: bytes(data)})
        index_table(Store(store))

    assert refused_share("a signed index", examples, edited_bytes(sound), read) > 1 / 4


@examples(30, 6_000)
@pytest.mark.parametrize("of_pass", [False, True])
def test_a_marker_is_read_or_refused(examples, of_pass, stores, tmp_path, refused_share):
    store = stores("zarr")
    folder, schema = (pass_folder(store), PASS_MARKER_SCHEMA) if of_pass else (store, MARKER_SCHEMA)
    sound = next((folder / "commits").glob("*.parquet"))
    expected = read_marker(sound, schema)
    path = tmp_path / "marker.parquet"

    def read(data):
        path.write_bytes(data)
        table, rest = read_marker(path, schema)
        # Statistics and padding are not read; whatever is read is the commit marker's own content.
        assert table.equals(expected[0])
        assert rest == expected[1]

    cases = edited_bytes(sound.read_bytes())
    assert refused_share("a commit marker", examples, cases, read) > 1 / 4


@examples(25, 4_000)
@pytest.mark.parametrize("of_pass", [False, True])
def test_a_table_of_shards_is_read_or_refused(examples, of_pass, stores, tmp_path, refused_share):
    store = shutil.copytree(stores("zarr"), tmp_path / "store")
    folder = pass_folder(store) if of_pass else store
    values = load(folder)
    path = folder / values["shards"]["path"]
    sound = path.read_bytes()

    def read(data):
        path.write_bytes(data)
        sign(folder, values | {"shards": file_entry(path.parent, path.name)})
        read_store(store)

    assert refused_share("a signed table of shards", examples, edited_bytes(sound), read) > 1 / 4


@examples(15, 2_000)
def test_a_tar_of_fields_is_read_or_refused(examples, stores, tmp_path, refused_share):
    store = shutil.copytree(stores("webdataset"), tmp_path / "store")
    folder = pass_folder(store)
    rows = load_shards(folder, PassShardTable.schema)
    (entry,) = rows[0]["files"]
    path = folder / entry["path"]

    def read(data):
        path.write_bytes(data)
        signed = file_entry(folder, entry["path"])
        entry.update(signed | {"sha256": bytes.fromhex(signed["sha256"])})
        sign_shards(folder, rows, PassShardTable.schema)
        opened = Store(store)
        (teacher_pass,) = opened.open_passes()
        teacher_pass.read_shard(opened.shards[0])

    cases = edited_bytes(path.read_bytes())
    share = refused_share("a signed tar of a pass's fields", examples, cases, read)
    assert share > 1 / 10


# ---- sources -------------------------------------------------------------------------------------


@examples(30, 6_000)
def test_a_tar_of_samples_is_read_or_refused(examples, tmp_path, refused_share):
    folder = tmp_path / "tars"
    write_tars(folder)
    path = folder / "train-000000.tar"
    (folder / "train-000001.tar").unlink()
    sound = path.read_bytes()[:20_480]  # some samples; the rest of the archive is alike

    def read(data):
        path.write_bytes(data)
        source = WebDatasetSource(WebDatasetDataConfig(path=str(folder), on_error="skip"))
        for record in source.records():
            source.read(record)

    cases = edited_bytes(sound + bytes(1024))
    assert refused_share("a tar of images", examples, cases, read) > 1 / 10


CELLS = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        [
            *("", "nan", "1e999", "-0", '"', '""', "a,b", "\r", "\n", "\0", "[{}]", '[{"x0": 1}]'),
            *("train", "../x", "/etc/passwd", "\x1b[2J", "\ud800", "True", "[1, 2]"),
            *("9" * 400, "x" * 70_000),
        ]
    ),
)


@st.composite
def csv_files(draw, header: list[str], sound: list[list[str]]) -> Edited:
    """Draw a table of some of the sound rows with a few other cells, quoted or not, some of them edited as bytes."""
    rows = [list(row) for row in [header, *sound[: draw(st.integers(0, len(sound)))]]]
    for _ in range(draw(st.integers(0, 3))):
        row = draw(st.sampled_from(rows))
        row[draw(st.integers(0, len(row) - 1))] = draw(CELLS)
    if draw(st.integers(0, 9)) == 0:
        rows[-1] = rows[-1][: draw(st.integers(0, len(header)))] + draw(st.lists(CELLS, max_size=2))
    text = io.StringIO()
    if draw(st.booleans()):
        csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    else:
        text.write("\n".join(",".join(row) for row in rows))
    data = text.getvalue().encode(errors="surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        data = draw(st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe"])) + data  # of UTF-8, of UTF-16
    return draw(edited_bytes(data)) if draw(st.integers(0, 3)) == 0 else Edited(data)


@examples(30, 6_000)
def test_a_table_of_numbers_is_read_or_refused(examples, tmp_path, refused_share):
    path = tmp_path / "flows.csv"

    def read(data):
        path.write_bytes(data)
        source = TableSource(TableDataConfig(path=str(path), split="split", categorical=("kind",)))
        for record in source.records():
            values = np.frombuffer(source.read(record).image, np.uint8)
            assert len(values) > 0

    header = ["label", "split", "kind", "bytes", "packets"]
    rows = [["web", "train", "tcp", "1.5", "3"], ["dns", "train", "udp", "2", ""]]
    rows += [["web", "test", "icmp", "-1e9", "0"]]
    share = refused_share("a CSV of numbers", examples, csv_files(header, rows), read)

    assert 1 / 10 < share < 1


@examples(60, 6_000)
def test_a_table_of_images_is_read_or_refused(examples, tmp_path, refused_share):
    table = write_photo_table(tmp_path, per_class=2)
    with table.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    config = ImageTableDataConfig(
        path=str(table), labels="labels", label=None, split="split", boxes="boxes", on_error="skip"
    )

    def read(data):
        table.write_bytes(data)
        source = ImageTableSource(config)
        for record in source.records():
            source.read(record)

    share = refused_share("a CSV of images", examples, csv_files(header, rows[:4]), read)

    assert 1 / 10 < share < 1


# ---- command line --------------------------------------------------------------------------------

VALUES = st.one_of(
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        [
            *("null", "true", "", "[", "[]", "{}", "{a: 1}", "[1, [2]]", "'", '"', "1:2", "1e999"),
            *("${oc.env:HOME}", "${x}", "${", "${a:${b:${c}}}", "a=b", "-1", "0", "&a [*a, *a]"),
            *("!!python/object:os.system", "\0", "../..", "\ud800", "?", "*", "%", "\\", "~", "@"),
            *("x" * 5000, "[" * 400),
        ]
    ),
)


def option_arguments(verb: str) -> list[str]:
    """Names of the verb's options and sections, and of the options of some members."""
    own = [option.name for option in options_of(VERBS[verb].options)]
    return [
        *own,
        "experiment",
        "run",
        "trainer.epochs",
        "store.path",
        "method",
        "data",
        "teacher.name",
    ]


@examples(10, 1_000)
@pytest.mark.parametrize("verb", ["precompute", "distill", "sweep"])
def test_a_command_line_is_read_or_refused(examples, verb, refused_share):
    names = st.sampled_from(option_arguments(verb))
    words = st.one_of(
        st.tuples(names, VALUES).map("=".join),
        st.tuples(st.sampled_from(["+", "~", "++", "a.", "."]), names).map("".join),
        VALUES,
    )

    def read(given_arguments):
        build_verb_config(verb, compose(verb, given_arguments))

    cases = st.lists(words, min_size=1, max_size=2)
    assert refused_share("a command line", examples, cases, read) > 1 / 4


@pytest.mark.parametrize("word", ["data=0", "data=\0", "store=0", "cluster=0", "experiment=0"])
def test_a_member_that_is_no_name_is_refused(word):
    with pytest.raises(ConfigError, match=r"does not exist.*; choose one of"):
        compose("precompute", [word])


# ---- cases that were traced back -----------------------------------------------------------------


def test_a_table_with_a_text_that_is_not_utf_8_is_refused(tmp_path):
    offsets, data = np.array([0, 2], np.int32).tobytes(), b"a\x80"
    text = pa.Array.from_buffers(pa.string(), 1, [None, *map(pa.py_buffer, (offsets, data))])
    schema = table_schema(name=pa.string())
    pq.write_table(pa.Table.from_arrays([text], schema=schema), tmp_path / "t.parquet")

    with pytest.raises(ManifestError, match=r"t\.parquet cannot be read as Parquet .*UTF8"):
        read_table(tmp_path / "t.parquet", schema)


def test_an_array_whose_header_is_no_python_literal_is_refused():
    sound = encode_npy(np.zeros(3, np.float32))
    for edited in (sound.replace(b"{", b"(", 1), sound.replace(b"(3,)", b"(3,\0")):
        with pytest.raises(ManifestError, match="x cannot be read as npy"):
            decode_npy(edited, "float32", (3,), "x")
