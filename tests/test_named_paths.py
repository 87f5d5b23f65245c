"""Paths that files of strangers name, and pipes in place of files: one rule, and a list of those who ask for it."""

import ast
import os
import shutil
import zipfile

import pytest

from permafrost.cli import run_typed_command
from permafrost.config.compose import compose
from permafrost.config.data import ImageTableDataConfig
from permafrost.config.options import resolve_implementation
from permafrost.config.verbs import build_verb_config
from permafrost.core.errors import ConfigError, FileError, UserError
from permafrost.core.json_entries import stays_inside
from permafrost.sources.source import build_source
from permafrost.storage.files import named_file
from permafrost.storage.rooted_paths import name_of_path, names_in
from permafrost.storage.untrusted import load_tensors
from permafrost_exchange.format_options import (
    ArraysConfig,
    E2KDFilesConfig,
    EmbeddingsConfig,
    ListColumnsConfig,
    TinyViTConfig,
)
from permafrost_exchange.target_reader import reading
from tests.support.image_sets import image_bytes, write_images
from tests.support.items import for_each
from tests.support.paths import ROOT
from tests.support.verbs import precompute

LICENSES = "licenses={images: MIT, weights: MIT, targets: MIT}"
CALLERS = {
    "stays_inside": {
        "core/json_entries.py require_inside",
        "sources/image_files.py _relative",
        "storage/rooted_paths.py __truediv__",
    },
    "require_inside": {
        "../permafrost_report/student_results.py read_sweep",
        "store/entries.py __post_init__",
        "store/manifest.py check_files",
        "store/shards.py __post_init__",
    },
    "named_file": {
        "../permafrost_sources/huggingface_sets.py _read_file",
        "../permafrost_papers/interpretability/concepts.py _read_file",
    },
}
"""Functions that ask whether a path in a file stays in its folder. Below a store or a share a RootedPath asks."""
OPENED = {
    "datacompdr.py gzip.open": "bytes of a member",
    "npy_files.py archive.open": "a member of an archive that is open",
    "unpickling.py open": "/proc/self/status",
    "tar_members.py tarfile.open": "a file that is open",
}
"""Calls in the readers of strangers' files that open something by other means than storage/files.py, and what it is."""
_OPENERS = ("open", "read_bytes", "read_text", "read_schema", "ParquetFile")


def functions_of(path):
    """Yield (function, call) of each call in a module, with the innermost function that has it."""
    tree = ast.parse(path.read_text())
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call):
                    yield function, node


def test_the_callers_of_the_rule_are_known():
    base = ROOT / "pipeline/permafrost"
    callers = {name: set() for name in CALLERS}
    for path in (ROOT / "pipeline").rglob("*.py"):
        for function, call in functions_of(path):
            if isinstance(call.func, ast.Name) and call.func.id in callers:
                callers[call.func.id].add(f"{os.path.relpath(path, base)} {function.name}")

    assert callers == CALLERS


def test_readers_open_files_through_functions_that_refuse_pipes_and_devices():
    """The methods of `file_at` do; `Path.open` waits for a pipe, and reads a device without end."""
    opened = set()
    for folder in ("permafrost/sources", "permafrost_sources", "permafrost_exchange"):
        for path in (ROOT / "pipeline" / folder).rglob("*.py"):
            for _, call in functions_of(path):
                text = ast.unparse(call.func)
                last = text.rpartition(".")[2]
                is_ours = text.startswith("file_at(")
                if not is_ours and last in _OPENERS:
                    opened.add(f"{path.name} {text}")

    assert opened == set(OPENED)


@for_each(
    "path,name",
    [
        *[("stores/demo", "stores/demo"), ("./w.pth", "w.pth"), ("", "")],
        *[("/home/doe/w.pth", "w.pth"), ("/home/doe/nets.py:make", "nets.py:make")],
        *[("../doe/store", "store"), ("~/doe/run", "run"), ("s3://bucket/doe/store", "store")],
    ],
)
def test_a_path_leaves_the_machine_as_a_name(path, name):
    assert name_of_path(path) == name
    assert names_in({"a": [path, 3, None]}) == {"a": [name, 3, None]}


def texts_of(folder):
    """Text of every file of a folder, and of the members of archives."""
    for path in folder.rglob("*"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from ((path.name, archive.read(name)) for name in archive.namelist())
        elif path.is_file() and path.suffix not in (".yaml", ".pt"):
            yield path.name, path.read_bytes()


def test_nothing_that_is_given_away_has_folders_of_this_machine(frozen, tmp_path):
    """Absolute paths as options of every command, searched for in a share, an export and a report."""
    pytest.importorskip("onnxruntime")
    private = tmp_path / "DOE" / "study"
    store = shutil.copytree(frozen.store.path, private / "store")
    where = [f"store.path={store}", f"run={private / 'mine'}"]
    words = ["student=cifar", "student.name=resnet8", "student.width=4", "trainer.epochs=1"]
    page = [*where, "report.cases=0", "report.columns={accuracy: test.accuracy}"]
    texts = []
    for verb, options in [
        ("distill", [*where, *words, "trainer.batch_size=8", "method=kd"]),
        ("report", [*where, "report.cases=0"]),  # which names the command that is missing
        ("evaluate", [*where, "evaluators=[accuracy]", "evaluate.splits=[test]"]),
        ("report", page),
        ("export", where),
        ("share", [f"store.path={store}", f"to={private / 'shared'}", LICENSES]),
    ]:
        run_typed_command(verb, options)
        reports = (private / "mine").glob("report.[hjc]*")
        texts += [(f"{verb}: {path.name}", path.read_bytes()) for path in reports]

    texts += [*texts_of(private / "shared"), *texts_of(private / "mine/distill/export")]
    assert len(texts) > 10
    of_code = (str(ROOT).encode(), b"site-packages")  # where the program's source is
    for private in (b"DOE", *of_code):
        assert [name for name, text in texts if private in text] == []


@for_each("path", ["a", "a/b.png", "a b/..c", "...", "a/.hidden"])
def test_a_path_below_stays_inside(path):
    assert stays_inside(path)


@for_each("path", ["", "/etc/passwd", "..", "../a", "a/../../b", "a/..", "a\0b"])
def test_a_path_that_leaves_does_not(path):
    assert not stays_inside(path)


def test_a_named_file_lies_in_its_folder_or_a_cache_also_by_its_links(tmp_path):
    data, cache, outside = (tmp_path / name for name in ("data", "cache", "outside"))
    for folder in (data, cache, outside):
        folder.mkdir()
        (folder / "x.png").write_bytes(b"x")
    (data / "in.png").symlink_to("x.png")
    (data / "cached.png").symlink_to(cache / "x.png")
    (data / "out.png").symlink_to(outside / "x.png")
    (data / "circle").symlink_to("circle")

    assert named_file("in.png", data) == (data / "x.png").resolve()
    assert named_file(str(cache / "x.png"), data, cache) == (cache / "x.png").resolve()
    assert named_file("cached.png", data, cache) == (cache / "x.png").resolve()
    for name in ("cached.png", "out.png", "../outside/x.png", str(outside / "x.png"), "/dev/zero"):
        with pytest.raises(FileError, match="leads out of"):
            named_file(name, data)
    for name in ("circle", "a\0b"):
        with pytest.raises(FileError, match=r"cannot be used as a path|leads out of"):
            named_file(name, data)


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", " ../secret.png"])
def test_a_cell_of_a_table_names_no_file_outside(tmp_path, name):
    write_images(tmp_path / "set", "a/1.png")
    (tmp_path / "secret.png").write_bytes(image_bytes())
    (tmp_path / "set" / "t.csv").write_text(f"path,label\na/1.png,0\n{name},1\n")
    config = ImageTableDataConfig(path=str(tmp_path / "set" / "t.csv"))

    with pytest.raises(
        ConfigError, match=r"row 3, column path: .*secret\.png is not in data\.root"
    ):
        list(build_source(config).records())


def pipe(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


def of_format(cls, tmp_path, *names, **options):
    """List the targets of a folder in which these names are pipes."""
    for name in names:
        pipe(tmp_path / name)
    path = tmp_path / names[0] if len(names) == 1 else tmp_path
    reader = resolve_implementation(cls)(cls(frame="full", **options), path)

    def read():
        with reading(str(path)):
            list(reader.listing())

    return read


def arrays(tmp_path):
    return of_format(ArraysConfig, tmp_path, "t.npz")


def rows_of_one_array(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a\n")
    return of_format(ArraysConfig, tmp_path, "t.npy", names=str(names))


def names_of_rows(tmp_path):
    return of_format(ArraysConfig, tmp_path, "t.npy", names=str(pipe(tmp_path / "names.txt")))


def lists(tmp_path):
    return of_format(ListColumnsConfig, tmp_path, "t.parquet", cache=str(tmp_path / "copies"))


def embeddings(tmp_path):
    return of_format(
        EmbeddingsConfig, tmp_path, "img_emb/img_emb_0.npy", "metadata/metadata_0.parquet"
    )


def epochs(tmp_path):
    return of_format(TinyViTConfig, tmp_path, "rank0-keys.txt", "rank0-values.bin", classes=4)


def positions(tmp_path):
    index_map = pipe(tmp_path / "map.txt")
    return of_format(E2KDFilesConfig, tmp_path, "0.pt", "1.pt", index_map=str(index_map))


def table(suffix):
    def build(tmp_path):
        path = pipe(tmp_path / f"t{suffix}")
        source = build_source(ImageTableDataConfig(path=str(path)))
        return lambda: list(source.records())

    return build


def tensors(tmp_path):
    path = pipe(tmp_path / "x.safetensors")
    return lambda: load_tensors(path)


def weights(tmp_path):
    path = pipe(tmp_path / "x.pth")
    words = [f"store.path={tmp_path / 's'}", "data=digits", "teacher=cifar", "executor=serial"]
    config = build_verb_config(
        "precompute", compose("precompute", [*words, f"teacher.weights={path}"])
    )
    return lambda: precompute.run(config)


@pytest.mark.parametrize(
    "build",
    [
        *(arrays, rows_of_one_array, names_of_rows, lists, embeddings, epochs, positions),
        *(table(".csv"), table(".parquet"), tensors, weights),
    ],
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, build):
    read = build(tmp_path)

    with pytest.raises(UserError):
        read()
