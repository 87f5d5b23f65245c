"""Shares from strangers: one line for each that is not sound, and a store that is as it was."""

import itertools
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from permafrost.core.errors import ConfigError, UserError
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost_exchange import ingest_shards, share_writer
from permafrost_exchange.share_format import read_share
from tests.exchange.test_share import LICENSES, pack, run_attach, run_share
from tests.support.crashes import Stopped
from tests.support.exchange import PHOTOS, make_photographs, run_precompute
from tests.support.hostile_shares import (
    FILES,
    HARMLESS,
    PLANNED,
    TABLES,
    random_changes,
    rewrite,
    typed_changes,
)
from tests.support.processes import run_program
from tests.support.trees import tree_bytes

TEACHER = ("teacher=cifar", "teacher.name=resnet8", "teacher.weights=random")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A store with two passes, of which one is shared, and a store of the same images with one of its own."""
    photographs = make_photographs(tmp_path_factory.mktemp("hostile"))
    outputs = "annotate.outputs=[logits,maps,features]"
    run_precompute(photographs.store, "data=none", *TEACHER, outputs, "annotate.name=shared")
    pack(photographs, photographs.store.with_name("other"), "store.shard_size=5")
    run_precompute(
        photographs.store.with_name("other"), "data=none", *TEACHER, "annotate.name=sound"
    )
    return photographs


@pytest.fixture(scope="module")
def share(photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("share") / "share"
    run_share(photographs.store, folder)
    return folder


@pytest.fixture(scope="module")
def other(photographs):
    """The store that a stranger's share is attached to."""
    return photographs.store.with_name("other")


def copied(share, tmp_path):
    return shutil.copytree(share, tmp_path / "copy")


def refused(folder, store):
    """Attach a folder that must be refused in one line, and leave the store as it was."""
    before = tree_bytes(store)
    with pytest.raises(UserError) as caught:
        run_attach(store, folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert tree_bytes(store) == before
    assert [path.name for path in Store(store).pass_folders()] == [
        path.name for path in (store / "teachers").iterdir()
    ]


def cases(*changes):
    return pytest.mark.parametrize(
        "change", [change for _, change in changes], ids=[name for name, _ in changes]
    )


@cases(*PLANNED.items(), *TABLES.items(), *FILES.items())
def test_a_share_that_no_pass_writes_is_refused(share, other, tmp_path, change, count_trials):
    folder = copied(share, tmp_path)
    rewrite(folder, change)

    refused(folder, other)
    count_trials("a share with a planned fault and correct digests", {"refused": 1})


def error_of(call):
    """Return the text of the error for the user that a call raises, None without one."""
    try:
        call()
    except UserError as error:
        return str(error)
    return None


def sound_or_refused(folder, change):
    """Read a changed share: either it is refused in one line, or it describes a pass."""
    try:
        rewrite(folder, change)
    except (OverflowError, ValueError):
        return  # no JSON
    error = error_of(lambda: read_share(RootedPath(folder)))
    assert error is None or "\n" not in error


def test_every_entry_of_another_type_is_refused_or_sound(share, tmp_path):
    folder = copied(share, tmp_path)
    original = (folder / "share.json").read_bytes()
    for _, change in typed_changes():
        (folder / "share.json").write_bytes(original)
        sound_or_refused(folder, change)


@pytest.mark.slow
def test_random_entries_are_refused_or_attach_a_pass_that_can_be_read(
    share, other, tmp_path, count_trials
):
    """Whatever is attached is verified, and read with all others of the store."""
    accepted = 0
    for number, (_, change) in enumerate(random_changes(20261127, 80)):
        folder = shutil.copytree(share, tmp_path / f"copy-{number}")
        store = shutil.copytree(other, tmp_path / f"store-{number}")
        rewrite(folder, change)
        before = tree_bytes(store)
        error = error_of(lambda: run_attach(store, folder))  # noqa: B023, called at once
        if error is not None:
            assert "\n" not in error
            assert tree_bytes(store) == before
        else:
            accepted += 1
            assert len(Store(store).pass_folders()) == 2
            assert list(verify_store(store)) == []
        shutil.rmtree(folder)
        shutil.rmtree(store)

    count_trials(
        "a random entry of share.json, with correct digests",
        {"refused": 80 - accepted, "attached and verified": accepted},
    )
    assert accepted < 40


@cases(*HARMLESS.items())
def test_what_share_json_does_not_list_is_not_read(share, other, tmp_path, change):
    folder = copied(share, tmp_path)
    store = shutil.copytree(other, tmp_path / "store")
    rewrite(folder, change)

    name = run_attach(store, folder).attached_pass

    assert not (store / "teachers" / name / "projections").exists()


def test_the_fingerprint_of_another_pass_is_not_taken(share, photographs, other, tmp_path):
    (sound,) = Store(other).open_passes()
    folder = copied(share, tmp_path)

    def claim(folder, values):
        values["fingerprint"] = sound.manifest.fingerprint
        values["name"] = f"claimed-{sound.manifest.fingerprint[:8]}"
        values["store_fingerprint"] = sound.manifest.store_fingerprint
        values["dataset_fingerprint"] = sound.manifest.dataset_fingerprint

    rewrite(folder, claim)
    with pytest.raises(UserError, match="has the fingerprint of sound-"):
        run_attach(other, folder)


@pytest.mark.slow
def test_damaged_bytes_are_named(share, other, tmp_path, count_trials):
    refusals = 0
    draw = random.Random(20261128)
    folder = copied(share, tmp_path)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    while refusals < 80:
        path = draw.choice(paths)
        data = path.read_bytes()
        place = draw.randrange(len(data))
        kind = draw.choice(("flip", "cut", "zeros"))
        changed = bytearray(data)
        if kind == "flip":
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            changed = changed[:place]
        else:
            changed[place : place + 16] = bytes(min(16, len(data) - place))
        if bytes(changed) == data:
            continue
        path.write_bytes(bytes(changed))
        refused(folder, other)
        refusals += 1
        path.write_bytes(data)
    count_trials("damage at a random place of a share", {"named": refusals})


# ---- what was begun ------------------------------------------------------------------------------


def stopped_after(monkeypatch, calls):
    """End share after some of its records, as if its process were killed."""
    counts = itertools.count()
    original = share_writer._iter_shards

    def stopping(*arguments):
        for shard in original(*arguments):
            if next(counts) == calls:
                raise Stopped
            yield shard

    monkeypatch.setattr(share_writer, "_iter_shards", stopping)


@pytest.mark.parametrize("form", ["webdataset", "embeddings", "huggingface"])
@pytest.mark.parametrize("calls", [0, 2, 3])
def test_an_interrupted_share_can_be_repeated(photographs, tmp_path, monkeypatch, form, calls):
    folder = tmp_path / "out"
    outputs = "annotate.outputs=[logits,pooled]"
    store = shutil.copytree(photographs.store, tmp_path / "store")
    run_precompute(store, "data=none", *TEACHER, outputs, "annotate.name=pooled")
    words = ("pass=pooled", f"form={form}")
    with monkeypatch.context() as patch:
        stopped_after(patch, calls)
        with pytest.raises(Stopped):
            run_share(store, folder, *words)
    assert [path.name for path in folder.iterdir()] == [".permafrost-share"]

    run_share(store, folder, *words)
    run_share(store, tmp_path / "whole", *words)

    assert tree_bytes(folder) == tree_bytes(tmp_path / "whole")


@pytest.mark.parametrize("over", ["nothing", "an earlier share"])
@pytest.mark.parametrize("calls", range(5))
def test_a_share_that_is_interrupted_while_files_are_moved_can_be_repeated(
    photographs, tmp_path, monkeypatch, over, calls
):
    folder = tmp_path / "out"
    if over != "nothing":
        run_share(photographs.store, folder, "form=huggingface")
    counts = itertools.count()
    rename, remove = Path.rename, Path.unlink

    def stopping(original):
        def act(path, *arguments, **options):
            if folder in path.parents and path.name != ".lock" and next(counts) == calls:
                raise Stopped
            return original(path, *arguments, **options)

        return act

    original = share_writer._publish
    with monkeypatch.context() as patch:

        def publish(*arguments):
            patch.setattr(Path, "rename", stopping(rename))
            patch.setattr(Path, "unlink", stopping(remove))
            original(*arguments)

        patch.setattr(share_writer, "_publish", publish)
        with pytest.raises(Stopped):
            run_share(photographs.store, folder)
    assert error_of(lambda: read_share(RootedPath(folder))) is not None

    run_share(photographs.store, folder)
    run_share(photographs.store, tmp_path / "whole")

    assert tree_bytes(folder) == tree_bytes(tmp_path / "whole")


def test_a_share_that_fails_leaves_nothing(photographs, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()

    def failing(*arguments):
        raise ConfigError("no card")

    monkeypatch.setattr(share_writer, "card_of_pass", failing)
    for name in ("new", "empty"):
        with pytest.raises(ConfigError, match="no card"):
            run_share(photographs.store, tmp_path / name)

    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "new").exists()


def test_a_share_is_written_where_to_leads(photographs, tmp_path, monkeypatch):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    for to in (".", "../link", "../dangling", "../gone/../" + "n" * 250):
        run_share(photographs.store, Path(to))
        run_share(photographs.store, Path(to))

    assert Path.cwd() == tmp_path / "here"
    folders = [tmp_path / name for name in ("here", "target", "later", "n" * 250)]
    assert all((folder / "share.json").exists() for folder in folders)
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", [".permafrost-share", "targets"])
def test_what_share_has_not_written_stays(photographs, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / name).symlink_to(outside)
    shutil.copytree(outside, tmp_path / "own" / name)
    (tmp_path / "file").write_text("x")

    for to in ("linked", "own", "file", "file/x"):
        with pytest.raises(UserError, match=r"name a new folder|cannot be written"):
            run_share(photographs.store, tmp_path / to)

    assert (outside / "precious").exists()
    assert (tmp_path / "own" / name / "precious").exists()


def test_a_damaged_projection_is_not_shared(photographs, tmp_path):
    store = shutil.copytree(photographs.store, tmp_path / "store")
    components = "annotate.features_channels=2"
    outputs = "annotate.outputs=[logits,features]"
    run_precompute(store, "data=none", *TEACHER, outputs, components, "annotate.name=reduced")
    path = next(store.glob("teachers/reduced-*/projections/*.npy"))
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    run_share(store, tmp_path / "sound", "pass=reduced")
    path.write_bytes(damaged)

    with pytest.raises(UserError, match="is damaged"):
        run_share(store, tmp_path / "out", "pass=reduced")


def test_records_of_a_share_are_not_taken_for_those_of_a_teacher(
    photographs, tmp_path, monkeypatch
):
    """A share of the store's own data, whose attachment was killed, and the teacher's command after it."""
    store = shutil.copytree(photographs.store, tmp_path / "store")
    (opened,) = [p for p in Store(store).pass_folders() if p.name.startswith("shared-")]
    run_share(store, tmp_path / "share", "pass=shared")
    shutil.rmtree(str(opened))
    counts = itertools.count()
    original = ingest_shards.write_pass_shard

    def stopping(*arguments):
        if next(counts) == 1:
            raise Stopped
        original(*arguments)

    outputs = "annotate.outputs=[logits,maps,features]"
    command = ("data=none", *TEACHER, outputs, "annotate.name=shared")
    with monkeypatch.context() as patch:
        patch.setattr(ingest_shards, "write_pass_shard", stopping)
        with pytest.raises(Stopped):
            run_attach(store, tmp_path / "share")

    with pytest.raises(
        UserError, match=r"its shards come from the share .* and not from this command"
    ):
        run_precompute(store, *command)

    run_attach(store, tmp_path / "share")
    assert list(verify_store(store)) == []


def test_a_share_does_not_finish_the_pass_of_a_teacher(photographs, tmp_path, monkeypatch):
    store = shutil.copytree(photographs.store, tmp_path / "store")
    (opened,) = [p for p in Store(store).pass_folders() if p.name.startswith("shared-")]
    run_share(store, tmp_path / "share", "pass=shared")
    Path(str(opened), "manifest.json").unlink()
    next(Path(str(opened), "commits").iterdir()).unlink()
    before = tree_bytes(store)

    with pytest.raises(UserError, match="come from a teacher that ran here and not from the share"):
        run_attach(store, tmp_path / "share")

    assert tree_bytes(store) == before


def test_an_interrupted_share_of_another_pass_leaves_nothing(photographs, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    store = shutil.copytree(photographs.store, tmp_path / "store")
    run_precompute(store, "data=none", *TEACHER, "annotate.name=other")
    with monkeypatch.context() as patch:
        stopped_after(patch, 2)
        with pytest.raises(Stopped):
            run_share(store, folder, "pass=shared", "form=huggingface")

    run_share(store, folder, "pass=other")

    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "records.parquet", "share.json", "targets")
    }


def test_a_share_is_written_over_by_itself_and_by_another_form(photographs, tmp_path):
    run_share(photographs.store, tmp_path / "out", "form=huggingface")
    run_share(photographs.store, tmp_path / "out")

    assert not (tmp_path / "out" / "data").exists()
    assert read_share(RootedPath(tmp_path / "out")).form == "webdataset"
    (tmp_path / "out" / ".gitattributes").write_text("mine")
    with pytest.raises(UserError, match=r"has other files, such as \.gitattributes"):
        run_share(photographs.store, tmp_path / "out")


def test_two_shares_at_once_are_one(photographs, tmp_path, monkeypatch):
    original = share_writer._iter_shards

    def meanwhile(*arguments):
        yield from original(*arguments)
        monkeypatch.setattr(share_writer, "_iter_shards", original)
        with pytest.raises(UserError, match="another process is writing to"):
            run_share(photographs.store, tmp_path / "out")

    monkeypatch.setattr(share_writer, "_iter_shards", meanwhile)
    assert run_share(photographs.store, tmp_path / "out").records == PHOTOS
    assert run_attach(photographs.store, tmp_path / "out").records == PHOTOS


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["share", "attach", "ingest"])
def test_kills_at_random_moments_can_be_repeated(photographs, share, tmp_path, verb, count_trials):
    """The whole process is killed at 14 moments of each verb, from its start to its end."""
    keys = Store(photographs.store).index.keys(range(PHOTOS))
    np.savez(
        tmp_path / "t.npz",
        keys=np.array(keys),
        logits=np.random.default_rng(1).normal(size=(PHOTOS, 4)).astype("float32"),
    )
    store = shutil.copytree(photographs.store.with_name("other"), tmp_path / "store")
    words = {
        "share": [f"store.path={photographs.store}", f"to={tmp_path / 'out'}", LICENSES],
        "attach": [f"store.path={store}", f"from={share}", "executor=serial"],
        "ingest": [
            *(f"store.path={store}", f"path={tmp_path / 't.npz'}", "format=npz"),
            *("format.frame=full", "executor=serial"),
        ],
    }[verb]
    command = [sys.executable, "-m", f"stages.{verb}", *words]
    written = tmp_path / ("out" if verb == "share" else "store")
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.monotonic() - started
    expected = tree_bytes(written)
    draw = random.Random(f"{verb} 20261129")
    outcomes = {"ended": 0, "killed": 0}
    for _ in range(14):
        if verb == "share":
            shutil.rmtree(written)
        else:
            shutil.rmtree(store)
            shutil.copytree(photographs.store.with_name("other"), store)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(seconds * draw.uniform(0.5, 1))
        process.send_signal(signal.SIGKILL)
        outcomes["killed" if process.wait() == -signal.SIGKILL else "ended"] += 1
        again = run_program(command)
        assert again.returncode == 0, again.stderr
        assert tree_bytes(written) == expected
    count_trials(f"SIGKILL of {verb} at a random moment, and the same command again", outcomes)
