"""Targets that come in: joins, faults in files, interruption, and students of the pass."""

import io
import os
import shutil
import tarfile
import unicodedata
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import permafrost
from permafrost.config.compose import compose
from permafrost.config.verbs import build_verb_config
from permafrost.core.errors import ConfigError, UserError
from permafrost.loading.subset import rows_of_split
from permafrost.losses.dkd import split_divergence
from permafrost.losses.logit_distances import LOGIT_LOSSES, kd_loss
from permafrost.runs.mirrors import RUNS
from permafrost.store.commit_pass import write_pass_shard
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store
from permafrost_exchange import ingest_shards
from permafrost_exchange.formats import unpickling
from permafrost_exchange.target_reader import TargetError
from tests.exchange.test_readers import CLASSES, VIEWS, crops_of, key_of, softmax
from tests.support import target_files
from tests.support.exchange import (
    PHOTOS,
    make_photographs,
    run_ingest,
    run_precompute,
    values_by_key,
)
from tests.support.trees import tree_bytes
from tests.support.verbs import distill, evaluate, report

FULL = ("format.frame=full",)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("ingest"))


@pytest.fixture
def random():
    return np.random.default_rng(2)


def arrays(photographs, path, random, names=None, count=PHOTOS, **values):
    names = [key_of(each) for each in photographs.paths][:count] if names is None else names
    values = values or {"logits": random.normal(size=(len(names), CLASSES)).astype("float32")}
    target_files.write_npz(path, names, **values)
    return f"path={path}"


def labels_of_fkd(photographs, folder, random, **changes):
    """Write sound files of FKD, whose parts may be replaced."""
    crops = crops_of(photographs, random)
    flips = np.zeros((PHOTOS, VIEWS), bool)
    probabilities = softmax(random.normal(size=(PHOTOS, VIEWS, CLASSES)) * 3)
    target_files.write_fkd(
        folder, photographs.paths, crops, flips, photographs.sizes, probabilities, 2, False
    )
    path = folder / "train" / "n0" / "photo_04.tar"
    if changes:
        content = torch.load(path, weights_only=False)
        for place, change in changes.items():
            content[int(place[-1])] = change(content[int(place[-1])])
        torch.save(content, path)
    return ["format=fkd", f"path={folder}", f"format.classes={CLASSES}"]


def passes_of(photographs):
    return sorted((photographs.store / "teachers").glob("*/manifest.json"))


# ---- joins ---------------------------------------------------------------------------------------


def test_records_without_targets_stop_with_their_number_and_three_examples(
    photographs, random, tmp_path
):
    path = arrays(photographs, tmp_path / "t.npz", random, count=PHOTOS - 5)

    with pytest.raises(TargetError, match=r"5 of 24 records have no target, .*photo_\d\d.*0 of 19"):
        run_ingest(photographs.store, path, *FULL)


def test_missing_lists_the_records_without_targets_and_goes_on(photographs, random, tmp_path):
    path = arrays(photographs, tmp_path / "t.npz", random, count=PHOTOS - 5)

    result = run_ingest(photographs.store, path, *FULL, f"missing={tmp_path / 'missing.txt'}")

    listed = (tmp_path / "missing.txt").read_text().splitlines()
    assert sorted(listed) == sorted(key_of(p) for p in photographs.paths[PHOTOS - 5 :])
    assert result.records == PHOTOS - 5
    opened = photographs.open().open_pass(result.ingested_pass.partition(" ")[0])
    assert opened.manifest.selection["records"] == PHOTOS - 5


def test_targets_of_a_part_of_a_large_shard_are_read_by_their_rows(tmp_path, random):
    photographs = make_photographs(tmp_path)
    words = ["data=image_folder", f"data.path={photographs.folder}", "data.test_fraction=0.25"]
    run_precompute(tmp_path / "large", *words, "store.image_size=32", "teacher=none")
    store = Store(tmp_path / "large")
    names = store.index.keys(rows_of_split(store.index, "train"))
    path = arrays(photographs, tmp_path / "t.npz", random, names)

    result = run_ingest(store.path, path, *FULL, f"missing={tmp_path / 'missing.txt'}")

    with pytest.raises(StoreMismatchError, match=r"has no target of the \d+ records; set split="):
        run_distill(store.path, "other", "method=kd", "split=test", "trainer.batch_size=2")
    name = result.ingested_pass.partition(" ")[0]
    logits = np.load(tmp_path / "t.npz")["logits"]
    values = values_by_key(store, name)["logits"]
    assert set(values) == set(names)
    assert np.array_equal(np.stack([values[name][0] for name in names]), logits)


def test_targets_of_no_record_are_counted(photographs, random, tmp_path):
    names = [*(key_of(p) for p in photographs.paths), "other%2Fimage%2Ejpg"]
    path = arrays(photographs, tmp_path / "t.npz", random, names)

    assert run_ingest(photographs.store, path, *FULL).targets_without_record == 1


@pytest.mark.parametrize(
    ("names_of", "words", "message"),
    [
        (
            lambda keys: [f"img{n}" for n in range(PHOTOS)],
            (),
            r"none of 24 targets .*'img0', .*the store has 'train%2F",
        ),
        (lambda keys: [*keys, keys[3]], (), "1 names mean several targets, such as"),
        (  # a stem that is in several folders
            lambda keys: ["x/0/photo_00.jpg", "x/1/photo_00.jpg"],
            ("format.join=stem",),
            r"1 names mean several targets, such as 'x/0/photo_00\.jpg'",
        ),
    ],
)
def test_names_that_mean_no_record_or_several_targets_stop(
    photographs, random, tmp_path, names_of, words, message
):
    names = names_of([key_of(p) for p in photographs.paths])
    path = arrays(photographs, tmp_path / "t.npz", random, names)

    with pytest.raises(TargetError, match=message):
        run_ingest(photographs.store, path, *FULL, *words)


def test_keys_without_their_split_mean_one_record_or_stop(tmp_path, random):
    photographs = make_photographs(tmp_path)
    shutil.copytree(photographs.folder / "train/n0", photographs.folder / "test/n0")
    words = ["data=image_folder", f"data.path={photographs.folder}", "store.image_size=32"]
    run_precompute(tmp_path / "both", *words, "teacher=none")
    names = [key_of(path).removeprefix("train%2F") for path in photographs.paths]
    path = arrays(photographs, tmp_path / "t.npz", random, names)

    with pytest.raises(TargetError, match=r"6 names mean several records, such as 'test%2Fn0%2Fph"):
        run_ingest(tmp_path / "both", path, *FULL)


def test_accents_are_the_same_in_both_forms_of_unicode(tmp_path, random):
    """Names that macOS has written have an accent as a character of its own."""
    photographs = make_photographs(tmp_path)
    names = [
        unicodedata.normalize("NFC", p.replace("photo", "fot\u00f3")) for p in photographs.paths
    ]
    for old, new in zip(photographs.paths, names, strict=True):
        (photographs.folder / old).rename(photographs.folder / new)
    words = ["data=image_folder", f"data.path={photographs.folder}", "store.image_size=32"]
    run_precompute(tmp_path / "accents", *words, "teacher=none")
    written = [unicodedata.normalize("NFD", name) for name in names]
    assert not set(written) & set(names)
    path = arrays(photographs, tmp_path / "t.npz", random, written)

    result = run_ingest(tmp_path / "accents", path, *FULL, "format.join=path")

    assert (result.records, result.targets_without_record) == (PHOTOS, 0)


def test_positions_beyond_the_split_stop(photographs, random, tmp_path):
    logits = random.normal(size=(PHOTOS, CLASSES)).astype("float32")
    maps = np.ones((PHOTOS, 1, 4, 4), "float32")
    target_files.write_e2kd(tmp_path / "fit", range(1, PHOTOS + 1), logits, maps, "grad_cam")

    with pytest.raises(TargetError, match=r"up to number 24, and split train has 24 records"):
        run_ingest(photographs.store, "format=e2kd", f"path={tmp_path / 'fit'}", *FULL)


@pytest.mark.parametrize(("line", "said"), [("3", "3 is named twice"), ("-2", "-2 is below 0")])
def test_a_position_that_cannot_be_is_named(photographs, random, tmp_path, line, said):
    lines = [*map(str, range(PHOTOS - 1)), line]
    np.save(tmp_path / "t.npy", random.normal(size=(PHOTOS, 5)).astype("float32"))
    (tmp_path / "names.txt").write_text("".join(f"{each}\n" for each in lines))
    words = [f"path={tmp_path / 't.npy'}", f"format.names={tmp_path / 'names.txt'}", *FULL]

    with pytest.raises(TargetError, match=f"number {said}; a number means one record"):
        run_ingest(photographs.store, *words, "format.join=position")


def test_an_index_map_says_which_record_a_number_is(photographs, random, tmp_path):
    logits = random.normal(size=(PHOTOS, CLASSES)).astype("float32")
    maps = np.ones((PHOTOS, 1, 4, 4), "float32")
    target_files.write_e2kd(tmp_path / "fit", range(PHOTOS), logits, maps, "grad_cam")
    order = random.permutation(PHOTOS)
    (tmp_path / "map.txt").write_text("\n".join(map(str, order)))
    words = ["format=e2kd", f"path={tmp_path / 'fit'}", *FULL]

    result = run_ingest(photographs.store, *words, f"format.index_map={tmp_path / 'map.txt'}")

    store = photographs.open()
    table = store.open_pass(result.ingested_pass.partition(" ")[0])
    shard = store.shards[0]
    key = store.index.shard_keys(0)[0]
    stored = table.read_shard(shard)["logits"][0, 0]
    position = [key_of(p) for p in photographs.paths].index(key)
    assert np.array_equal(stored, logits[order.tolist().index(position)])


def test_a_frame_that_nobody_states_is_asked_for(photographs, random, tmp_path):
    with pytest.raises(ConfigError, match=r"t\.npz is format=npz, .*\. format\.frame is not set"):
        run_ingest(photographs.store, arrays(photographs, tmp_path / "t.npz", random))


# ---- faults in files -----------------------------------------------------------------------------


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(photographs, random, tmp_path):
    words = labels_of_fkd(
        photographs, tmp_path / "f", random, part_2=lambda _: RunsCode(tmp_path / "harm")
    )
    before = passes_of(photographs)

    with pytest.raises(TargetError, match=r"photo_04\.tar: it cannot be read without running its"):
        run_ingest(photographs.store, *words)

    assert not (tmp_path / "harm").exists()
    assert passes_of(photographs) == before


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_refused_in_every_protocol(tmp_path, protocol):
    torch.save([RunsCode(tmp_path / "harm")], tmp_path / "t.pt", pickle_protocol=protocol)

    with pytest.raises(unpickling.UnpicklingError):
        unpickling.unpickle((tmp_path / "t.pt").read_bytes())

    assert not (tmp_path / "harm").exists()


def test_a_tensor_that_would_fill_the_memory_ends_its_process_alone(tmp_path):
    torch.save(torch.zeros(1).expand(2**36), tmp_path / "t.pt")

    with pytest.raises(unpickling.UnpicklingError):
        unpickling.unpickle((tmp_path / "t.pt").read_bytes())

    torch.save([1.5], tmp_path / "t.pt")
    assert unpickling.unpickle((tmp_path / "t.pt").read_bytes()) == [1.5]


def test_lists_of_lists_that_grow_without_end_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(unpickling, "SECONDS", 1.0)
    bomb = [1]
    for _ in range(11):
        bomb = [bomb] * 40
    torch.save(bomb, tmp_path / "t.pt")

    with pytest.raises(unpickling.UnpicklingError):
        unpickling.unpickle((tmp_path / "t.pt").read_bytes())


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("part_0", lambda c: c[:, :3], r"its coordinates are \[3, 3\]"),
        ("part_0", lambda c: c + 0.9, "a crop reaches beyond the image"),
        ("part_1", lambda f: f[:-1], r"its flips \[2\]"),
        ("part_2", lambda p: p[:, 0], "probabilities are invalid"),
        ("part_2", lambda p: p + 10, "it has class 1"),
        ("part_2", lambda p: p * np.nan, "class nan"),
        ("part_2", lambda p: p * 0, "lists a class twice"),
        ("part_2", lambda p: p[:1], "3 views and 1 labels"),
    ],
)
def test_soft_labels_of_another_shape_stop_at_their_file(
    photographs, random, tmp_path, part, change, message
):
    words = labels_of_fkd(photographs, tmp_path / "f", random, **{part: change})

    with pytest.raises(TargetError, match=message) as caught:
        run_ingest(photographs.store, *words, "format.views=3")

    assert "photo_04.tar" in str(caught.value)


def test_values_that_are_not_finite_name_their_record(photographs, random, tmp_path):
    logits = random.normal(size=(PHOTOS, CLASSES)).astype("float32")
    logits[7, 1] = np.inf
    path, key = arrays(photographs, tmp_path / "t.npz", random, logits=logits), photographs.paths[7]

    with pytest.raises(TargetError, match=f"of {key_of(key)} has values that are not finite"):
        run_ingest(photographs.store, path, *FULL)


@pytest.mark.parametrize(
    ("field", "values_of", "message"),
    [
        (
            "logits",
            lambda random: softmax(random.normal(size=(PHOTOS, CLASSES))),
            r"format\.fields=\{probabilities",
        ),
        (
            "probabilities",
            lambda random: random.random((PHOTOS, CLASSES)),
            "if they are logits, name them logits",
        ),
        ("logits", lambda _: np.ones((PHOTOS, CLASSES)), "the logits of all records are the same"),
    ],
)
def test_values_that_cannot_be_what_they_are_called_are_refused(
    photographs, random, tmp_path, field, values_of, message
):
    values = {field: values_of(random).astype("float32")}

    with pytest.raises(TargetError, match=message):
        run_ingest(
            photographs.store, arrays(photographs, tmp_path / "t.npz", random, **values), *FULL
        )


def test_votes_with_zeros_have_the_right_softmax_at_every_temperature(
    photographs, random, tmp_path
):
    """Votes of 51 people: p^(1/tau) / sum, in float64, to which the losses of the stored logits compare."""
    votes = random.multinomial(
        51, [0.6, 0.3, 0.09, *[0.01 / (CLASSES - 3)] * (CLASSES - 3)], PHOTOS
    )
    assert ((votes == 0).sum(axis=1) >= 1).any()
    names = [key_of(path) for path in photographs.paths]
    target_files.write_npz(tmp_path / "t.npz", names, probabilities=(votes / 51).astype("float32"))

    made = run_ingest(photographs.store, f"path={tmp_path / 't.npz'}", *FULL, "name=votes")

    stored = values_by_key(photographs.open(), made.ingested_pass.partition(" ")[0])["logits"]
    logits = torch.from_numpy(np.stack([stored[name][0] for name in names]))
    student = torch.from_numpy(random.normal(size=logits.shape) * 3).requires_grad_()
    for tau in (1.0, 4.0, 20.0):
        powers = torch.from_numpy(votes / 51).pow(1 / tau)
        powers[torch.from_numpy(votes == 0)] = 0
        expected = powers / powers.sum(dim=1, keepdim=True)
        for kept in (logits, logits.half().float()):
            rounding = {"rtol": 0, "atol": 1e-6 if kept is logits else 1e-3}
            assert torch.allclose((kept.double() / tau).softmax(dim=1), expected, **rounding)
        terms = torch.special.entr(expected) + expected * (student / tau).log_softmax(dim=1)
        exact = -(tau**2) * terms.sum(dim=1).mean()
        for given in (student, student.float()):
            assert kd_loss(given, logits, tau).item() == pytest.approx(exact.item(), rel=1e-5)
            losses = [loss(given, logits, tau) for loss in LOGIT_LOSSES.values()]
            losses += split_divergence(given, logits, torch.from_numpy(votes.argmax(axis=1)), tau)
            (gradient,) = torch.autograd.grad(sum(loss.sum() for loss in losses), student)
            assert all(loss.isfinite().all() for loss in [*losses, gradient])


def test_an_array_that_promises_more_than_it_has_stops_before_memory(photographs, tmp_path):
    with zipfile.ZipFile(tmp_path / "t.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape in (("keys", (2,)), ("logits", (2**40, CLASSES))):
            data = io.BytesIO()
            values = np.zeros(2, "U4") if name == "keys" else np.zeros((2, CLASSES), "float32")
            header = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(data, header)
            archive.writestr(f"{name}.npy", data.getvalue() + values.tobytes())

    with pytest.raises(TargetError, match=r"its shape is \(1099511627776, 4\)"):
        run_ingest(photographs.store, f"path={tmp_path / 't.npz'}", *FULL)


def test_an_array_of_objects_is_not_unpickled(photographs, random, tmp_path):
    odd = np.array([RunsCode(tmp_path / "harm")] * PHOTOS)
    names = np.array([key_of(p) for p in photographs.paths])
    np.savez(tmp_path / "t.npz", keys=names, logits=odd)

    with pytest.raises(TargetError, match="holds Python objects"):
        run_ingest(photographs.store, f"path={tmp_path / 't.npz'}", *FULL)
    assert not (tmp_path / "harm").exists()


def features_of_theia(photographs, folder, change):
    features = np.ones((PHOTOS, 2, 3, 3), "float32")
    target_files.write_theia(folder, "vit", photographs.stems, features, None, PHOTOS)
    (path,) = (folder / "vit").glob("*.tar")
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    change(members)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return ["format=theia", f"path={folder / 'vit'}"]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:20],
        lambda data: (2**60).to_bytes(8, "little") + data[8:],
        lambda data: data.replace(b"BF16", b"F999"),
        lambda data: data.replace(b"[2, 3, 3]", b"[9, 3, 3]"),
        lambda data: b"",
    ],
)
def test_a_damaged_safetensors_member_stops_at_its_name(photographs, tmp_path, change):
    name = f"{photographs.stems[3]}.vit.safetensors"
    words = features_of_theia(
        photographs, tmp_path, lambda members: members.update({name: change(members[name])})
    )

    with pytest.raises(TargetError, match=photographs.stems[3]):
        run_ingest(photographs.store, *words)


def test_members_with_names_that_leave_the_folder_write_nothing(photographs, tmp_path):
    words = features_of_theia(
        photographs, tmp_path / "t", lambda members: members.update({"../../out.safetensors": b"x"})
    )
    before = set(tmp_path.rglob("*"))

    result = run_ingest(photographs.store, *words)

    assert result.targets_without_record == 1
    assert set(tmp_path.rglob("*")) == before


def test_a_truncated_tar_stops(photographs, tmp_path):
    words = features_of_theia(photographs, tmp_path, lambda members: None)
    (path,) = (tmp_path / "vit").glob("*.tar")
    path.write_bytes(path.read_bytes()[:-20000])

    with pytest.raises(UserError, match=r"\.tar"):
        run_ingest(photographs.store, *words)


def test_recipes_of_other_images_stop(photographs, random, tmp_path):
    recipes = [[((0, 0, 500, 500), [(0, 0.0), (0, 0.0)])]] * PHOTOS
    embeddings = random.normal(size=(PHOTOS, 1, 4))
    uids = [str(n) for n in range(PHOTOS)]
    target_files.write_datacompdr(
        tmp_path, uids, photographs.digests, recipes, embeddings, False, PHOTOS
    )

    with pytest.raises(TargetError, match="the recipes are of other images"):
        run_ingest(photographs.store, "format=datacompdr", f"path={tmp_path}")


def test_views_that_mix_two_images_are_refused(photographs, random, tmp_path):
    augmentation = {"random_resized_crop": {"size": 24}, "mixup": {"alpha": 0.2}}
    recipes = [[{"random_resized_crop": (0, 0, 9, 9)}] for _ in range(PHOTOS)]
    probabilities = softmax(random.normal(size=(PHOTOS, 1, CLASSES)))
    words = ["format=imagenet_plus", f"path={tmp_path / 'r'}", f"format.classes={CLASSES}"]
    target_files.write_imagenet_plus(
        tmp_path / "r", range(PHOTOS), probabilities, 2, recipes, augmentation
    )
    assert run_ingest(photographs.store, *words).records == PHOTOS  # none of them is mixed

    content = torch.load(tmp_path / "r" / "3.pth.tar", weights_only=False)
    content[1][0]["params"][0] = 7
    torch.save(content, tmp_path / "r" / "3.pth.tar")
    with pytest.raises(TargetError, match="a view mixes two images"):
        run_ingest(photographs.store, *words)


# ---- interruption --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_an_interrupted_pass_is_finished_with_the_same_bytes(
    tmp_path, monkeypatch, random, backend
):
    photographs = make_photographs(tmp_path)
    words = labels_of_fkd(photographs, tmp_path / "f", random)
    words.append(f"store={backend}" if backend == "webdataset" else "store=zarr")
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write_pass_shard(*arguments)

    monkeypatch.setattr(ingest_shards, "write_pass_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        run_ingest(photographs.store, *words)
    monkeypatch.undo()
    result = run_ingest(photographs.store, *words)
    assert 0 < result.ingested_records < PHOTOS
    name = result.ingested_pass.partition(" ")[0]
    finished = tree_bytes(photographs.store / "teachers" / name)

    other = make_photographs(tmp_path / "other")
    run_ingest(other.store, *words)

    assert tree_bytes(other.store / "teachers" / name) == finished
    assert not list((photographs.store / "teachers" / name).glob("join*"))


def test_a_changed_file_is_another_pass(photographs, random, tmp_path):
    path = tmp_path / "t.npz"
    first = run_ingest(photographs.store, arrays(photographs, path, random), *FULL)
    again = run_ingest(photographs.store, f"path={path}", *FULL)
    arrays(photographs, path, random)
    other = run_ingest(photographs.store, f"path={path}", *FULL)

    assert (again.ingested_pass, again.ingested_records) == (first.ingested_pass, 0)
    assert other.ingested_pass != first.ingested_pass
    assert other.ingested_records == PHOTOS


# ---- students ------------------------------------------------------------------------------------


def run_distill(store, run, *words, splits="train"):
    words = [
        *(f"store.path={store}", f"run={run}", "student.name=resnet8", "trainer.epochs=1"),
        *("trainer.batch_size=8", "trainer.num_threads=1", *words),
    ]
    distill.run(build_verb_config("distill", compose("distill", words)))
    words = [f"store.path={store}", f"run={run}", f"evaluate.splits=[{splits}]"]
    return evaluate.run(build_verb_config("evaluate", compose("evaluate", words)))


def test_a_student_replays_the_views_of_soft_labels(photographs, random, tmp_path):
    words = labels_of_fkd(photographs, tmp_path / "f", random)
    name = run_ingest(photographs.store, *words, "name=labels").ingested_pass.partition(" ")[0]

    options = ["method=kd", "method.tau=1", "mode=replay", "views=random", f"views.count={VIEWS}"]
    result = run_distill(photographs.store, "fkd", *options, f"store.teacher=[{name}]")

    assert 0 <= result.splits["train"]["accuracy"] <= 1
    with pytest.raises(StoreMismatchError, match=rf"{name} has stored views, for mode=replay"):
        run_distill(photographs.store, "frozen", "method=kd", f"store.teacher=[{name}]")


def test_targets_of_one_split_are_compared_with_there_alone(tmp_path, random):
    photographs = make_photographs(tmp_path)
    for path in photographs.paths[::3]:
        target = photographs.folder / path.replace("train", "test", 1)
        target.parent.mkdir(parents=True, exist_ok=True)
        (photographs.folder / path).rename(target)
    words = ["data=image_folder", f"data.path={photographs.folder}", "store.image_size=32"]
    run_precompute(tmp_path / "two", *words, "teacher=none")
    names = [key_of(p) for n, p in enumerate(photographs.paths) if n % 3]
    path = arrays(photographs, tmp_path / "t.npz", random, names)

    assert run_ingest(tmp_path / "two", path, *FULL).records == len(names)
    splits = run_distill(tmp_path / "two", "one_split", "method=kd", splits="train,test").splits

    assert "agreement" in splits["train"]
    assert "agreement" not in splits["test"]
    words = [f"store.path={tmp_path / 'two'}", "run=one_split"]
    report.run(build_verb_config("report", compose("report", words)))


def test_a_temperature_that_the_labels_do_not_have_is_refused(photographs, random, tmp_path):
    words = labels_of_fkd(photographs, tmp_path / "f", random)
    name = run_ingest(photographs.store, *words).ingested_pass.partition(" ")[0]

    options = ["method=kd", "method.tau=4", "mode=replay", "views=random", f"views.count={VIEWS}"]
    with pytest.raises(StoreMismatchError, match=r"method\.tau=4"):
        run_distill(photographs.store, "fkd4", *options, f"store.teacher=[{name}]")


def test_a_student_is_trained_on_the_records_that_have_targets(
    photographs, random, tmp_path, caplog
):
    path = arrays(photographs, tmp_path / "t.npz", random, count=PHOTOS - 5)
    words = ["format.frame=full", f"missing={tmp_path / 'missing.txt'}", "name=part"]
    result = run_ingest(photographs.store, path, *words)
    name = result.ingested_pass.partition(" ")[0]

    with caplog.at_level("WARNING"):
        run_distill(photographs.store, "part", f"store.teacher=[{name}]", "method=kd")

    assert f"{name} has no targets of 5 of the 24 records" in caplog.text
    evaluated = permafrost.evaluate(
        "evaluate.splits=[train]", store=photographs.store, run="part"
    ).splits["train"]
    table = pq.read_table(RUNS / "part" / "evaluate" / "records.parquet").to_pylist()
    compared = [row for row in table if row["teacher_predictions"] is not None]
    same = [row["predictions"] == row["teacher_predictions"] for row in compared]
    assert (evaluated["records"], evaluated["compared_records"]) == (PHOTOS, PHOTOS - 5)
    assert len(compared) == PHOTOS - 5
    assert evaluated["agreement"] == pytest.approx(np.mean(same))
    store = permafrost.open_store(str(photographs.store))
    with pytest.raises(StoreMismatchError, match=r"does not cover 5 .*select\(keys="):
        permafrost.RecordLoader(store.select("train"), teacher=name, batch_size=4)
    covered = [key_of(p) for p in photographs.paths[: PHOTOS - 5]]
    loader = permafrost.RecordLoader(
        store.select("train", keys=covered), teacher=name, batch_size=19
    )
    (batch,) = loader
    logits = np.load(tmp_path / "t.npz")["logits"]
    order = [covered.index(key) for key in batch.keys]
    assert np.array_equal(batch.logits, logits[order])


def test_targets_of_other_classes_are_a_warning(photographs, random, tmp_path, caplog):
    logits = random.normal(size=(PHOTOS, CLASSES + 3)).astype("float32")
    path = arrays(photographs, tmp_path / "t.npz", random, logits=logits)

    with caplog.at_level("WARNING"):
        run_ingest(photographs.store, path, *FULL)

    assert f"the targets are of {CLASSES + 3} classes, and the data of {CLASSES}" in caplog.text


def test_a_student_with_other_classes_than_the_targets_is_refused(photographs, random, tmp_path):
    result = run_ingest(photographs.store, arrays(photographs, tmp_path / "t.npz", random), *FULL)
    name = result.ingested_pass.partition(" ")[0]

    with pytest.raises(
        ConfigError, match=rf"student\.classes=7, but the logits of .* {CLASSES} classes"
    ):
        run_distill(
            photographs.store, "other", f"store.teacher=[{name}]", "method=kd", "student.classes=7"
        )


def test_targets_of_unknown_views_teach_only_if_the_options_say_so(photographs, random, tmp_path):
    probabilities = softmax(random.normal(size=(PHOTOS, CLASSES)))
    target_files.write_tinyvit(tmp_path / "e", photographs.stems, probabilities, 2, 1)
    words = ["format=tinyvit", f"path={tmp_path / 'e'}", f"format.classes={CLASSES}"]
    name = run_ingest(photographs.store, *words).ingested_pass.partition(" ")[0]

    options = ["method=kd", "method.tau=1", "augment=none", f"store.teacher=[{name}]"]
    with pytest.raises(StoreMismatchError, match=r"store\.unknown_views=true"):
        run_distill(photographs.store, "unknown", *options)
    result = run_distill(photographs.store, "unknown", *options, "store.unknown_views=true")
    assert 0 <= result.splits["train"]["accuracy"] <= 1


# ---- copies of columns ---------------------------------------------------------------------------


def lists_of(folder, keys, logits, changed):
    """Write a Parquet file with a given time of change."""
    folder.mkdir(parents=True)
    path = folder / "part-0.parquet"
    lists = pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), CLASSES)
    table = pa.table({"key": list(keys), "logits": lists})
    pq.write_table(
        table, path, compression="none", use_dictionary=False, write_statistics=False
    )  # files of equal size
    os.utime(path, ns=(changed, changed))
    return path


def test_files_of_one_name_size_and_time_are_two_files(photographs, random, tmp_path):
    """As `tar --mtime` and archives that can be repeated make them."""
    keys = [key_of(path) for path in photographs.paths]
    halves = [keys[: PHOTOS // 2], keys[PHOTOS // 2 :]]
    logits = random.permutation(PHOTOS * CLASSES).reshape(PHOTOS, CLASSES).astype("float32")
    parts = np.split(logits, 2)
    paths = [
        lists_of(tmp_path / "q" / name, half, part, 10**18)
        for name, half, part in zip(("a", "b"), halves, parts, strict=True)
    ]
    assert len({(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths}) == 1

    words = ["format=parquet", f"path={tmp_path / 'q'}", f"format.cache={tmp_path / 'c'}", *FULL]
    result = run_ingest(photographs.store, *words)

    name = result.ingested_pass.partition(" ")[0]
    values = values_by_key(photographs.open(), name)["logits"]
    assert np.array_equal(np.stack([values[key][0] for key in keys]), logits)


def test_a_file_that_was_replaced_under_its_size_and_time_is_read_again(
    photographs, random, tmp_path
):
    keys = [key_of(path) for path in photographs.paths]
    logits = random.permutation(PHOTOS * CLASSES).reshape(PHOTOS, CLASSES).astype("float32")
    words = ["format=parquet", f"path={tmp_path / 'q'}", f"format.cache={tmp_path / 'c'}", *FULL]
    names = []
    for values in (logits, logits[::-1]):
        path = lists_of(tmp_path / "q", keys, values, 10**18)
        names.append(run_ingest(photographs.store, *words).ingested_pass.partition(" ")[0])
        path.unlink()
        path.parent.rmdir()

    assert names[0] != names[1]
    stored = values_by_key(photographs.open(), names[1])["logits"]
    assert np.array_equal(np.stack([stored[key][0] for key in keys]), logits[::-1])


def test_a_damaged_copy_is_named_when_it_is_read(photographs, random, tmp_path):
    keys = [key_of(path) for path in photographs.paths]
    logits = random.normal(size=(PHOTOS, CLASSES)).astype("float32")
    lists_of(tmp_path / "q", keys, logits, 10**18)
    words = ["format=parquet", f"path={tmp_path / 'q'}", f"format.cache={tmp_path / 'c'}", *FULL]
    before = {folder.name for folder in photographs.open().pass_folders()}
    run_ingest(photographs.store, *words, "name=first")
    (copy,) = (tmp_path / "c").iterdir()
    data = bytearray(copy.read_bytes())
    at = data.index(logits[5].tobytes())
    data[at] ^= 1
    copy.write_bytes(bytes(data))
    for folder in photographs.open().pass_folders():
        if folder.name not in before:
            shutil.rmtree(str(folder))

    with pytest.raises(UserError, match=rf"{copy.name} is damaged: .* row 6"):
        run_ingest(photographs.store, *words, "name=first")
    copy.unlink()
    assert run_ingest(photographs.store, *words, "name=first").records == PHOTOS
