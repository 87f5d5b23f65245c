"""Passes that go out without their images, and come back into other stores."""

import hashlib
import io
import json
import re
import shutil
import sys
import types
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from PIL import Image
from safetensors.torch import save_file

from permafrost import open_store
from permafrost.config.compose import compose
from permafrost.config.models import CifarModelConfig
from permafrost.config.verbs import build_verb_config
from permafrost.core.errors import ConfigError
from permafrost.models.providers import build_model
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.storage.signed_files import sign_json
from permafrost.store.arrow_files import read_table
from permafrost.store.entries import ManifestError
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost_exchange.share_format import _ROW_BYTES, SHARED_RECORDS_SCHEMA
from permafrost_exchange.target_reader import TargetError
from tests.exchange.test_ingest import run_distill
from tests.exchange.test_readers import key_of
from tests.support import target_files
from tests.support.exchange import (
    CLASSES,
    PHOTOS,
    loaded_plugin,
    make_photographs,
    run_ingest,
    run_precompute,
    values_by_key,
)
from tests.support.growing import TEACHER as GROWING_TEACHER
from tests.support.growing import Pictures, growing_options
from tests.support.trees import tree_bytes
from tests.support.verbs import attach, precompute, share

TEACHER = ("teacher=cifar", "teacher.name=resnet8", "teacher.weights=random")
LICENSES = "licenses={images: CC-BY-4.0, weights: MIT, targets: CC0-1.0}"
OUTPUTS = "annotate.outputs=[logits,maps,pooled,class_maps,attention,features]"


def run_share(store, folder, *words, licenses=LICENSES):
    words = [f"store.path={store}", f"to={folder}", *words, licenses]
    return share.run(build_verb_config("share", compose("share", words)))


def run_attach(store, folder, *words):
    words = [f"store.path={store}", f"from={folder}", "executor=serial", *words]
    return attach.run(build_verb_config("attach", compose("attach", words)))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A store with a canonical pass of all outputs and one of strong views."""
    photographs = make_photographs(tmp_path_factory.mktemp("share"))
    strong = [
        *("views=random", "views.count=2", "annotate.name=views"),
        "augment.operations=[{kind: resized_crop}, {kind: randaugment}, {kind: random_erasing}]",
    ]
    run_precompute(photographs.store, "data=none", *TEACHER, OUTPUTS, "annotate.name=whole")
    run_precompute(photographs.store, "data=none", *TEACHER, *strong)
    return photographs


@pytest.fixture(scope="module")
def names(photographs):
    store = photographs.open()
    views = [f.name for f in store.pass_folders(stored_views=True)]
    whole = [f.name for f in store.pass_folders() if f.name.startswith("whole")]
    return {"whole": whole[0], "views": views[0]}


@pytest.fixture(scope="module")
def shared(photographs, names, tmp_path_factory):
    """The folder of each pass, as others get it."""
    folders = {}
    for kind, name in names.items():
        folders[kind] = tmp_path_factory.mktemp("shared") / kind
        result = run_share(photographs.store, folders[kind], f"pass={name}", "pixels=true")
        assert result.records == PHOTOS
    return folders


def pack(photographs, store, *words):
    options = [f"data.path={photographs.folder}", "store.image_size=32", *words]
    run_precompute(store, "data=image_folder", *options, "teacher=none")
    return Store(store)


# ---- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "views"])
def test_a_pass_comes_back_with_its_bytes_in_a_store_that_was_packed_again(
    photographs, names, shared, tmp_path, kind
):
    pack(photographs, tmp_path / "store", "store.shard_size=7")

    result = run_attach(tmp_path / "store", shared[kind])

    assert (result.attached_pass, result.joined_by) == (names[kind], "files")
    before = tree_bytes(photographs.store / "teachers" / names[kind])
    after = tree_bytes(tmp_path / "store" / "teachers" / names[kind])
    made_with = {
        name: json.loads(tree.pop("manifest.json")) for name, tree in (("a", before), ("b", after))
    }
    markers = [name for name in before if name.startswith("commits/")]
    assert markers
    assert {n: d for n, d in before.items() if "shards-" not in n and n not in markers} == {
        n: d for n, d in after.items() if "shards-" not in n and n not in markers
    }
    assert made_with["b"]["made_with"].pop("attached_by")
    for manifest in made_with.values():
        del manifest["self_sha256"], manifest["shards"]
    assert made_with["a"] == made_with["b"]
    assert list(verify_store(tmp_path / "store")) == []


@pytest.mark.parametrize("kind", ["whole", "views"])
def test_other_shards_backends_and_formats_have_the_same_values(
    photographs, names, shared, tmp_path, kind
):
    pack(
        photographs,
        tmp_path / "store",
        *("store=webdataset", "store.shard_size=5", "store.format=raw"),
    )

    result = run_attach(tmp_path / "store", shared[kind], "store=webdataset")

    assert result.joined_by == "pixels"
    assert result.attached_pass != names[kind]
    views = kind == "views"
    before = values_by_key(photographs.open(), names[kind], stored_views=views)
    after = values_by_key(Store(tmp_path / "store"), result.attached_pass, stored_views=views)
    assert before.keys() == after.keys()
    for field, by_key in before.items():
        assert all(np.array_equal(value, after[field][key]) for key, value in by_key.items())
    assert run_attach(tmp_path / "store", shared[kind], "store=webdataset").attached_records == 0


def test_records_are_found_under_other_names(photographs, shared, tmp_path):
    for number, path in enumerate(sorted((photographs.folder).rglob("*.png"))):
        target = tmp_path / "renamed" / "train" / path.parent.name / f"x{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    renamed = types.SimpleNamespace(folder=tmp_path / "renamed")
    pack(renamed, tmp_path / "store", "store.shard_size=7")

    assert run_attach(tmp_path / "store", shared["whole"]).records == PHOTOS


def test_a_student_of_an_attached_pass_is_that_of_the_original(
    photographs, names, shared, tmp_path
):
    pack(photographs, tmp_path / "store", "store.shard_size=7")
    run_attach(tmp_path / "store", shared["whole"])
    words = ["method=e2kd", "augment=pad_crop_flip", f"store.teacher=[{names['whole']}]"]

    run_distill(photographs.store, "original", *words)
    run_distill(tmp_path / "store", "attached", *words)

    one, other = (
        SavedNetwork(RUNS / run / "distill").load()[0].state_dict()
        for run in ("original", "attached")
    )
    assert all((one[name] == other[name]).all() for name in one)


# ---- other pixels, damage and options ------------------------------------------------------------


def test_a_pass_over_several_generations_is_shared_as_far_as_it_goes(tmp_path):
    pictures = Pictures(tmp_path / "pictures")
    pictures.add_all(range(5))
    precompute.run(growing_options(pictures, tmp_path / "store", teacher=GROWING_TEACHER))
    shared, records = [], []
    for number, teacher in enumerate([None, GROWING_TEACHER, None]):
        pictures.add_all([f"more{number}"])
        precompute.run(growing_options(pictures, tmp_path / "store", teacher=teacher, append=True))
        shared.append(tmp_path / f"shared{number}")
        records.append(run_share(tmp_path / "store", shared[-1]).records)
    assert records == [10, 14, 14]
    assert len({json.loads((path / "share.json").read_text())["name"] for path in shared}) == 2

    other = tmp_path / "other"
    pictures.path_of("more2", "cat").unlink()
    pictures.path_of("more2", "dog").unlink()
    precompute.run(growing_options(pictures, other))
    assert run_attach(other, shared[1]).records == 14
    assert list(verify_store(other)) == []
    there, here = (
        open_store(path).table(fields=("logits", "map")).to_pandas().set_index("key")
        for path in (tmp_path / "store", other)
    )
    for key, row in here.iterrows():
        np.testing.assert_array_equal(row["logits"], there.loc[key, "logits"])
        np.testing.assert_array_equal(row["map"], there.loc[key, "map"])


def test_a_share_has_the_classes_that_its_teacher_knows(tmp_path):
    pictures, stores = Pictures(tmp_path / "pictures"), [tmp_path / "store", tmp_path / "other"]
    pictures.add_all(range(5))
    for store in stores:
        precompute.run(growing_options(pictures, store, teacher=GROWING_TEACHER))
    pictures.add_all("ab", ("bird",))
    for store in stores:
        precompute.run(growing_options(pictures, store, append=True))
    precompute.run(growing_options(pictures, stores[0], teacher=GROWING_TEACHER))
    run_share(stores[0], tmp_path / "shared")
    assert json.loads((tmp_path / "shared" / "share.json").read_text())["classes"] == ["cat", "dog"]
    labels = pq.read_table(tmp_path / "shared" / "records.parquet")["label"].to_pylist()
    assert (min(labels), max(labels), len(labels)) == (-1, 1, 12)  # none of birds
    for folder in (stores[1] / "teachers").iterdir():
        shutil.rmtree(folder)
    assert run_attach(stores[1], tmp_path / "shared").records == 12
    precompute.run(growing_options(pictures, tmp_path / "at once"))
    with pytest.raises(TargetError, match="the store also has 'bird'"):
        run_attach(tmp_path / "at once", tmp_path / "shared")


def test_the_share_of_another_pass_is_not_written_over(photographs, names, shared):
    with pytest.raises(ConfigError, match="share of another pass"):
        run_share(photographs.store, shared["whole"], f"pass={names['views']}")


def test_other_pixels_are_refused(shared, tmp_path):
    other = make_photographs(tmp_path)
    image = Image.open(next(other.folder.rglob("*.png")))
    pixels = np.asarray(image).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(next(other.folder.rglob("*.png")))
    pack(other, tmp_path / "changed", "store.shard_size=7")

    with pytest.raises(
        TargetError, match=r"1 of 24 records have no target, by the SHA-256 of their"
    ):
        run_attach(tmp_path / "changed", shared["whole"])


def test_a_store_of_other_images_is_refused(shared, tmp_path, frozen):
    with pytest.raises(TargetError, match="has none of them, by the SHA-256"):
        run_attach(frozen.store.path, shared["whole"])


@pytest.mark.parametrize("name", ["share.json", "records.parquet", "targets/*.tar", "README.md"])
def test_a_flipped_byte_of_a_shared_folder_is_named(photographs, shared, tmp_path, name):
    shutil.copytree(shared["whole"], tmp_path / "copy")
    path = next((tmp_path / "copy").glob(name))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    pack(photographs, tmp_path / "store", "store.shard_size=7")

    with pytest.raises(TargetError, match=path.name):
        run_attach(tmp_path / "store", tmp_path / "copy")


def test_a_path_that_leaves_the_folder_is_refused(photographs, shared, tmp_path):
    from permafrost.storage.signed_files import check_json, sign_json

    shutil.copytree(shared["whole"], tmp_path / "copy")
    path = tmp_path / "copy" / "share.json"
    values = check_json(path.read_bytes())
    values["files"]["../outside"] = "0" * 64
    path.write_bytes(sign_json(values, sort_keys=True))

    with pytest.raises(TargetError, match="leaves the folder"):
        run_attach(photographs.store, tmp_path / "copy")


@pytest.mark.parametrize(
    "said", ["", "weights: not found,", "weights: Unknown, ", "weights: '', ", "weights: n/a,"]
)
def test_licenses_are_asked_for(photographs, names, tmp_path, said):
    with pytest.raises(ConfigError, match=r"licenses=.* must say under which license weights"):
        run_share(
            photographs.store,
            tmp_path / "s",
            f"pass={names['whole']}",
            licenses=f"licenses={{images: MIT, {said} targets: MIT}}",
        )


def test_maps_of_a_users_explainer_keep_their_name_their_files_and_its_code(
    photographs, names, tmp_path
):
    values = values_by_key(photographs.open(), names["whole"])
    keys = sorted(values["logits"])
    network = build_model(CifarModelConfig(name="resnet8", weights="random"), CLASSES).network
    save_file(network.state_dict(), tmp_path / "mine.safetensors")
    logits = np.stack([values["logits"][key][0] for key in keys])
    maps = np.random.default_rng(0).normal(size=(PHOTOS, 8, 8)).astype("float32")
    target_files.write_npz(tmp_path / "ig.npz", keys, logits=logits, map=maps)
    digests = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in ("ig.npz", "mine.safetensors")
    }
    words = ["name=ig", f"path={tmp_path / 'ig.npz'}", "format.frame=full"]
    teacher = [*TEACHER[:2], f"teacher.weights={tmp_path / 'mine.safetensors'}"]
    accept = "passport.accept=[unknown,temperature,classes,rows,preprocessing,maps]"
    with loaded_plugin(tmp_path / "signed_maps.py"):
        explained = "format.explainer=signed_maps"
        made = run_ingest(photographs.store, *words, explained, *teacher, accept)
        name = made.ingested_pass.partition(" ")[0]
        result = run_share(photographs.store, tmp_path / "s", f"pass={name}")
    card = (tmp_path / "s/README.md").read_text()
    for line in (
        "# Targets of ig on store (image\\_folder)",
        f"| targets from | ig.npz, sha256 {digests['ig.npz']} |",
        f"| weights | mine.safetensors, sha256 {digests['mine.safetensors']} |",
        "'plugins=[<this folder>/plugins/signed_maps.py]'",
    ):
        assert line in card
    code = tmp_path / "s/plugins/signed_maps.py"
    assert f"'plugins=[{code}]'" in result.next

    pack(photographs, tmp_path / "other", "store.shard_size=7")
    with pytest.raises(TargetError, match=re.escape(f"and name it with 'plugins=[{code}]'")):
        run_attach(tmp_path / "other", tmp_path / "s")
    assert "signed_maps" not in sys.modules  # nothing was run
    with loaded_plugin(code):
        assert run_attach(tmp_path / "other", tmp_path / "s").attached_pass == name
    described = json.loads((tmp_path / "s/share.json").read_text())
    del described["self_sha256"]
    described["explainer"]["kind"] = "gradcam"
    (tmp_path / "s/share.json").write_bytes(sign_json(described))
    pack(photographs, tmp_path / "third", "store.shard_size=7")
    with pytest.raises(TargetError, match="but GradCAM gives none below 0"):
        run_attach(tmp_path / "third", tmp_path / "s")
    assert not (tmp_path / "third/teachers").exists()
    with pytest.raises(ConfigError, match="maps of explainer signed_maps; name its plug-in"):
        run_share(photographs.store, tmp_path / "again", f"pass={name}")


def test_a_folder_with_other_files_is_left_alone(photographs, names, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "notes.txt").write_text("mine")

    with pytest.raises(ConfigError, match=r"has other files, such as notes\.txt"):
        run_share(photographs.store, tmp_path / "s", f"pass={names['whole']}")


# ---- other readers -------------------------------------------------------------------------------


def test_webdataset_reads_targets_and_images(photographs, names, tmp_path):
    run_share(photographs.store, tmp_path / "s", f"pass={names['whole']}", "images=true")
    values = values_by_key(photographs.open(), names["whole"])

    tars = sorted(str(path) for path in (tmp_path / "s" / "targets").glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert len(samples) == PHOTOS
    for sample in samples:
        key = sample["__key__"]
        assert np.array_equal(sample["logits.npy"], values["logits"][key])
        path = next(p for p in photographs.paths if key_of(p) == key)
        raw = np.asarray(Image.open(photographs.folder / path).convert("RGB"))
        assert raw.shape[:2] == Image.open(photographs.folder / path).size[::-1]
    (first,) = webdataset.WebDataset(tars[:1], shardshuffle=False).slice(1)
    image = Image.open(io.BytesIO(first["png"]))
    path = next(p for p in photographs.paths if key_of(p) == first["__key__"])
    assert image.size == Image.open(photographs.folder / path).size


def test_a_share_without_keys_has_numbers_and_comes_back(photographs, names, tmp_path, caplog):
    """Photographs are named by their keys otherwise, which is said with an example."""
    caplog.set_level("INFO", "permafrost.share")
    run_share(photographs.store, tmp_path / "named", f"pass={names['whole']}")
    assert f"such as {unquote(photographs.open().index.keys([0])[0])}; keys=false" in caplog.text
    caplog.clear()
    for form in ("webdataset", "embeddings", "huggingface"):
        words = [f"pass={names['whole']}", f"form={form}", "keys=false"]
        run_share(photographs.store, tmp_path / form, *words)
        tables = (tmp_path / form).rglob("*.parquet")
        text = repr([tree_bytes(tmp_path / form), *(pq.read_table(t).to_pylist() for t in tables)])
        assert "photo_" not in text
        assert "| keys | numbers, in place of names of files |" in text
    assert "keys=false" not in caplog.text

    pack(photographs, tmp_path / "store", "store.shard_size=7")
    assert run_attach(tmp_path / "store", tmp_path / "webdataset").records == PHOTOS
    one = values_by_key(photographs.open(), names["whole"])["logits"]
    other = values_by_key(Store(tmp_path / "store"), names["whole"].rpartition("-")[0])["logits"]
    assert all(np.array_equal(value, other[key]) for key, value in one.items())


def test_embeddings_go_out_and_come_in(photographs, names, tmp_path):
    run_share(photographs.store, tmp_path / "e", f"pass={names['whole']}", "form=embeddings")
    words = ["format=embeddings", f"path={tmp_path / 'e'}", "format.join=path", "format.frame=full"]

    result = run_ingest(photographs.store, *words)

    one = values_by_key(photographs.open(), names["whole"])["pooled"]
    other = values_by_key(photographs.open(), result.ingested_pass.partition(" ")[0])["pooled"]
    assert all(np.array_equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("kind", ["whole", "views"])
def test_parquet_of_a_hub_folder_has_a_column_per_field(photographs, names, tmp_path, kind):
    words = [f"pass={names[kind]}", "form=huggingface", "images=true"]
    run_share(photographs.store, tmp_path / "h", *words)

    card = (tmp_path / "h" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "cc0-1.0"
    assert header["configs"][0]["data_files"] == [
        {"split": "train", "path": "data/train-*.parquet"}
    ]
    assert "| weights | MIT |" in card
    assert "| data: brightness | " in card
    assert "| targets: entropy | " in card
    table = pq.read_table(tmp_path / "h" / "data" / "train-00000.parquet").to_pydict()
    values = values_by_key(photographs.open(), names[kind], stored_views=kind == "views")
    for row, key in enumerate(table["key"]):
        assert np.array_equal(
            np.array(table["logits"][row], "float16"), values["logits"][key].ravel()
        )
        assert table["image"][row]["bytes"][:4] == b"\x89PNG"
    if kind == "whole":  # its maps are flat lists
        words = ["format=parquet", f"path={tmp_path / 'h/data'}", f"format.cache={tmp_path}"]
        result = run_ingest(photographs.store, *words, "format.frame=full", "name=again")
        again = values_by_key(photographs.open(), result.ingested_pass.partition(" ")[0])
        assert again.keys() == {"logits", "pooled"}


def test_the_hub_gets_a_folder_and_its_kind(photographs, names, tmp_path, monkeypatch):
    calls = []

    class HfApi:
        def create_repo(self, name, repo_type, exist_ok):
            calls.append(("create", name, repo_type, exist_ok))

        def upload_folder(self, folder_path, repo_id, repo_type, delete_patterns):
            calls.append(("upload", repo_id, repo_type))
            assert {"targets/*", "share.json"} <= set(delete_patterns)
            assert json.loads((tmp_path / "me-targets" / "share.json").read_text())
            assert folder_path == str(tmp_path / "me-targets")

    hub = types.ModuleType("huggingface_hub")
    hub.HfApi = HfApi
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    shutil.copytree(photographs.store, tmp_path / "store")
    monkeypatch.chdir(tmp_path)

    words = [f"pass={names['whole']}", "form=huggingface"]
    result = run_share(tmp_path / "store", "hf://me/targets", *words)

    assert calls == [("create", "me/targets", "dataset", True), ("upload", "me/targets", "dataset")]
    assert result.shared == "hf://datasets/me/targets"
    with pytest.raises(ConfigError, match="must be hf://<user>/<name>"):
        run_share(tmp_path / "store", "hf://targets", *words)


def test_a_store_in_a_bucket_takes_and_gives_passes(photographs, names, shared, tmp_path):
    from tests.support.buckets import memory_buckets

    with memory_buckets(tmp_path / "cache"):
        run_precompute(
            "s3://bucket/store",
            *("data=image_folder", f"data.path={photographs.folder}", "store.image_size=32"),
            *("store.shard_size=7", "teacher=none"),
        )
        result = run_attach("s3://bucket/store", shared["whole"])
        again = run_attach("s3://bucket/store", shared["whole"])
        run_share("s3://bucket/store", tmp_path / "out", f"pass={names['whole']}")

    assert result.attached_pass == names["whole"]
    assert (result.attached_records, again.attached_records) == (PHOTOS, 0)
    for path in sorted((shared["whole"] / "targets").iterdir()):
        assert (tmp_path / "out" / "targets" / path.name).read_bytes() == path.read_bytes()


def write_shared_records(path, records):
    names = [f"folder/photograph-{number:06d}.jpg" for number in range(records)]
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    columns = [names, ["train"] * records, [3] * records, [names[0]] * records, digests, digests]
    arrays = [
        pa.array(values, field.type)
        for values, field in zip(columns, SHARED_RECORDS_SCHEMA, strict=True)
    ]
    table = pa.Table.from_arrays(arrays, schema=SHARED_RECORDS_SCHEMA)
    pq.write_table(table, path)
    return table


@pytest.mark.parametrize("records", [40, 300, 3000, 30_000])
def test_the_records_of_a_share_of_any_size_are_within_their_limit(tmp_path, records):
    """A bound of texts grows with the square of their number, and must not be taken for their bytes."""
    path = tmp_path / "records.parquet"
    table = write_shared_records(path, records)

    assert read_table(path, SHARED_RECORDS_SCHEMA, most=_ROW_BYTES * records).equals(table)


def test_records_beyond_their_limit_are_not_read(tmp_path):
    path = tmp_path / "records.parquet"
    write_shared_records(path, 3000)

    with pytest.raises(ManifestError, match="would have more than 480,000 bytes"):
        read_table(path, SHARED_RECORDS_SCHEMA, most=160 * 3000)
