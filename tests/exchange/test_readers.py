"""Readers of other tools' formats, against files that are written from the descriptions of these formats."""

import logging
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from permafrost.loading.recipes import recipe_from
from permafrost.loading.windows import stored_views_of
from permafrost.store.codecs import decode_unit
from permafrost.store.verification import verify_store
from permafrost_exchange.formats.compressed_recipes import convert_recipes, layout_of
from tests.exchange.conformance import second_reader
from tests.exchange.conformance.measure import corners_here, corners_there
from tests.support import target_files
from tests.support.exchange import CLASSES, PHOTOS, make_photographs, run_ingest, values_by_key
from tests.support.slow import slow
from tests.support.view_matrices import matrices_of_fields

VIEWS = 3


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("exchange"))


@pytest.fixture
def random():
    return np.random.default_rng(1)


def key_of(path):
    return path.replace("/", "%2F").replace(".", "%2E")


def softmax(values):
    exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def ingested(photographs, *words, views=False):
    """Ingest, verify, and return the stored values of each field in the order of the paths."""
    result = run_ingest(photographs.store, *words)
    assert result.records == PHOTOS
    store = photographs.open()
    assert list(verify_store(store.path)) == []
    name = result.ingested_pass.partition(" ")[0]
    values = values_by_key(store, name, stored_views=views)
    manifest = store.open_pass(name, stored_views=views).manifest
    return manifest, {
        field: np.stack([by_key[key_of(path)] for path in photographs.paths])
        for field, by_key in values.items()
    }


def crops_of(photographs, random, views=VIEWS):
    """Draw crops in pixels (top, left, height, width), [n, V, 4]."""
    crops = []
    for height, width in photographs.sizes:
        sides = np.stack(
            [random.integers(8, height + 1, views), random.integers(8, width + 1, views)]
        )
        corners = [random.integers(0, (height, width) - side + 1) for side in sides.T]
        crops.append(np.concatenate([np.stack(corners), sides.T], axis=1))
    return np.stack(crops)


def corners_seen(matrices):
    """Corners of views in fractions of the image: x and y of the upper left and the lower right one, [..., 2, 2]."""
    whole = matrices if matrices.shape[-2] == 2 else matrices[..., :2, :]
    points = np.array([[-1, -1, 1], [1, 1, 1]]).T
    return (np.swapaxes(whole @ points, -1, -2) + 1) / 2


def require_crops(photographs, crops, flips, matrices):
    sizes = photographs.sizes[:, None]
    top, left = crops[..., 0] / sizes[..., 0], crops[..., 1] / sizes[..., 1]
    bottom = top + crops[..., 2] / sizes[..., 0]
    right = left + crops[..., 3] / sizes[..., 1]
    first = np.stack([np.where(flips, right, left), top], axis=-1)
    last = np.stack([np.where(flips, left, right), bottom], axis=-1)
    assert np.allclose(corners_seen(matrices), np.stack([first, last], axis=-2), atol=1e-3)


def dense(values, temperature=1.0):
    """Probabilities of all classes [n, V, K] by stored largest logits, the rest evenly, and the stored rest."""
    top, k = values["top_logits"] / temperature, values["top_class"].shape[-1]
    outcomes = np.concatenate([top, values["rest_logits"]], axis=-1) if k < CLASSES else top
    shares = softmax(outcomes.astype(np.float64))
    even = np.repeat(shares[..., -1:] / max(1, CLASSES - k), CLASSES, axis=-1)
    np.put_along_axis(even, values["top_class"].astype(int), shares[..., :k], -1)
    return even


# ---- arrays --------------------------------------------------------------------------------------


def test_arrays_come_by_key_in_any_order_with_their_bits(photographs, random, tmp_path):
    logits = random.normal(size=(PHOTOS, CLASSES)).astype("float32")
    maps = random.random((PHOTOS, 1, 1, 5, 5)).astype("float32")
    order = random.permutation(PHOTOS)
    names = [key_of(photographs.paths[n]) for n in order]
    target_files.write_npz(tmp_path / "t.npz", names, logits=logits[order], map=maps[order])

    words = [f"path={tmp_path / 't.npz'}", "format.frame=full", "format.explainer=gradcam"]
    manifest, values = ingested(photographs, "format=npz", *words, "format.dtype=float32")

    assert np.array_equal(values["logits"][:, 0], logits)
    assert np.array_equal(values["target_class"][:, 0, 0], logits.argmax(axis=1))
    units = values["map"][:, 0] * values["map_scale"][:, 0][:, :, None, None, None]
    assert np.allclose(units, maps, atol=1e-6)
    assert manifest.explainer == {"kind": "gradcam", "target_classes": "top1"}


def test_an_npy_file_needs_names_and_keeps_halves(photographs, random, tmp_path):
    pooled = random.normal(size=(PHOTOS, 6)).astype("float16")
    np.save(tmp_path / "t.npy", pooled)
    (tmp_path / "names.txt").write_text("".join(f"/data/{path}\n" for path in photographs.paths))

    words = [f"path={tmp_path / 't.npy'}", f"format.names={tmp_path / 'names.txt'}"]
    _, values = ingested(photographs, *words, "format.join=path", "format.frame=center_crop")

    assert values["pooled"].dtype == np.float16
    assert np.array_equal(values["pooled"][:, 0], pooled)


def test_embeddings_of_clip_retrieval_are_joined_by_the_end_of_their_path(
    photographs, random, tmp_path
):
    embeddings = random.normal(size=(PHOTOS, 8)).astype("float16")
    paths = [f"/mnt/other/{path}" for path in photographs.paths]
    target_files.write_embeddings(tmp_path / "e", paths, embeddings, 10)

    words = ["format=embeddings", f"path={tmp_path / 'e'}", "format.frame=center_crop"]
    _, values = ingested(photographs, *words, "format.crop_fraction=1")

    assert np.array_equal(values["pooled"][:, 0], embeddings)


def test_a_column_of_lists(photographs, random, tmp_path):
    logits = random.normal(size=(PHOTOS, CLASSES)).astype("float32")
    keys = [key_of(path) for path in photographs.paths]
    target_files.write_parquet(tmp_path / "t.parquet", keys, logits)

    words = ["format=parquet", f"path={tmp_path / 't.parquet'}", f"format.cache={tmp_path}"]
    _, values = ingested(photographs, *words, "format.frame=full")

    assert np.array_equal(values["logits"][:, 0], logits)


@pytest.mark.parametrize("axes", ["n h w", "n c h w", "n E c h w"])
@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_maps_come_in_every_shape_and_without_the_split_in_their_keys(
    photographs, random, tmp_path, caplog, kind, axes
):
    maps = random.random((PHOTOS, 1, 1, 5, 6)).astype("float32")
    written = maps.reshape(PHOTOS, *(1,) * (len(axes.split()) - 3), 5, 6)
    keys = [key_of(path).removeprefix("train%2F") for path in photographs.paths]
    classes = np.arange(PHOTOS) % CLASSES
    words = ["format.frame=full", "format.explainer=other", "format.dtype=float32"]
    if kind == "npz":
        target_files.write_npz(tmp_path / "t.npz", keys, map=written, target_class=classes)
    else:
        columns = {"key": keys, "map": written.tolist(), "target_class": classes}
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
        words.append(f"format.cache={tmp_path}")

    with caplog.at_level(logging.INFO):
        path = f"path={tmp_path / f't.{kind}'}"
        _, values = ingested(photographs, f"format={kind}", path, *words)

    units = values["map"] * values["map_scale"][..., None, None, None]
    assert np.allclose(units[:, 0], maps, atol=1e-6)
    assert values["target_class"][:, 0, 0].tolist() == classes.tolist()
    said = f"map {list(written.shape[1:])} is read as [1, 1, 5, 6] of a record (class, channel"
    assert said in caplog.text


def test_peoples_maps_without_logits_are_of_the_labels(photographs, random, tmp_path):
    target_files.write_npz(
        tmp_path / "t.npz",
        [key_of(path) for path in photographs.paths],
        map=random.random((PHOTOS, 5, 5)).astype("float32"),
    )

    words = [f"path={tmp_path / 't.npz'}", "format.frame=full", "format.explainer=other"]
    manifest, values = ingested(photographs, *words)

    labels = [int(path.split("/")[1].removeprefix("n")) for path in photographs.paths]
    assert values["target_class"][:, 0, 0].tolist() == labels
    assert manifest.teacher["classes"] == CLASSES
    assert manifest.explainer == {"kind": "other", "target_classes": "sample_gt"}


# ---- files of e2KD, FKD, ImageNet+ and others -----------------------------------------------------


@pytest.mark.parametrize(("kind", "channels"), [("weight", 6), ("grad_cam", 1)])
def test_frozen_maps_of_e2kd_come_by_position(photographs, random, tmp_path, kind, channels):
    logits = random.normal(size=(PHOTOS, CLASSES)).astype("float32")
    maps = random.normal(size=(PHOTOS, channels, 6, 6)).astype("float32")
    maps = maps if kind == "weight" else abs(maps)  # GradCAM is rectified
    target_files.write_e2kd(tmp_path / "fit", range(PHOTOS), logits, maps, kind)

    words = ["format=e2kd", f"path={tmp_path / 'fit'}", "format.frame=full", "format.dtype=float32"]
    manifest, values = ingested(photographs, *words)

    assert np.array_equal(values["logits"][:, 0], logits)
    units = values["map"][:, 0, 0] * values["map_scale"][:, 0][:, :, None, None]
    assert np.allclose(units, maps, atol=1e-6)
    assert manifest.explainer["kind"] == {"weight": "bcos_weights", "grad_cam": "gradcam"}[kind]


@pytest.mark.parametrize("fp16", [slow(False), True])
def test_soft_labels_of_fkd_are_stored_views(photographs, random, tmp_path, fp16):
    crops = crops_of(photographs, random)
    flips = random.random((PHOTOS, VIEWS)) < 0.5
    probabilities = softmax(random.normal(size=(PHOTOS, VIEWS, CLASSES)) * 2)
    target_files.write_fkd(
        tmp_path / "f", photographs.paths, crops, flips, photographs.sizes, probabilities, 2, fp16
    )

    words = ["format=fkd", f"path={tmp_path / 'f'}", f"format.classes={CLASSES}"]
    manifest, values = ingested(photographs, *words, views=True)

    require_crops(photographs, crops, flips, matrices_of_fields(values))
    order = np.argsort(-probabilities, axis=-1)
    assert np.array_equal(values["top_class"], order[..., :2])
    kept = np.take_along_axis(probabilities, order, -1)
    kept[..., 2:] = kept[..., 2:].mean(axis=-1, keepdims=True)
    found = np.take_along_axis(dense(values), order, -1)
    assert np.allclose(found, kept, atol=2e-3 if fp16 else 1e-6)
    assert manifest.temperatures == (1.0,)


class NumPy1Pickler(pickle._Pickler):
    """Name NumPy's constructors as NumPy 1 did: the public sets are older than NumPy 2."""

    def save_global(self, obj, name=None):
        if getattr(obj, "__module__", None) != "numpy._core.multiarray":
            super().save_global(obj, name)
            return
        self.write(pickle.GLOBAL + f"numpy.core.multiarray\n{obj.__name__}\n".encode())
        self.memoize(obj)


def test_files_of_earlier_numpy_and_torch_are_read(photographs, random, tmp_path):
    crops = crops_of(photographs, random)
    flips = np.zeros((PHOTOS, VIEWS), bool)
    probabilities = softmax(random.normal(size=(PHOTOS, VIEWS, CLASSES)))
    labels = (photographs.sizes, probabilities, 2, True)
    target_files.write_fkd(tmp_path / "f", photographs.paths, crops, flips, *labels)
    maps = random.normal(size=(PHOTOS, CLASSES, 15, 15)).astype("float32")
    names = [path.partition("/")[2] for path in photographs.paths]
    target_files.write_relabel(tmp_path / "m", names, maps, 2)
    numpy_1 = SimpleNamespace(__name__="pickle", Pickler=NumPy1Pickler)
    for path in filter(Path.is_file, (tmp_path / "f").rglob("*")):
        torch.save(torch.load(path, weights_only=False), path, pickle_module=numpy_1)
        assert b"numpy.core.multiarray" in path.read_bytes()
    for path in filter(Path.is_file, (tmp_path / "m").rglob("*")):
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)

    for kind, folder, views in (("fkd", "f", True), ("relabel", "m", False)):
        words = [f"format={kind}", f"path={tmp_path / folder}", f"format.classes={CLASSES}"]
        manifest, _ = ingested(photographs, *words, views=views)
        assert manifest.teacher["classes"] == CLASSES


PLAIN = {
    "random_resized_crop": {"enable": True, "size": 24},
    "random_horizontal_flip": {"enable": True, "p": 0.5},
    "to_tensor": {"enable": True},
}
STRONG = PLAIN | {
    "uint8": {"enable": True},
    "rand_augment": {"enable": True, "p": 1.0},
    "normalize": {"mean": [0.5] * 3, "std": [0.5] * 3},
    "random_erase": {"enable": True, "p": 0.25},
}


def recipes_of(photographs, random, augmentation):
    crops = crops_of(photographs, random)
    recipes = []
    for row in range(PHOTOS):
        views = []
        for view in range(VIEWS):
            recipe = {
                "random_resized_crop": tuple(int(side) for side in crops[row, view]),
                "random_horizontal_flip": bool(random.random() < 0.5),
            }
            if "rand_augment" in augmentation:
                names = random.choice(["Color", "ShearX", "Solarize", "Equalize", "Rotate"], 2)
                sizes = {"Color": -0.2, "ShearX": 0.1, "Solarize": 128.0, "Equalize": 0.0}
                drawn = [(str(name), sizes.get(str(name), 20.0)) for name in names]
                recipe["rand_augment"] = drawn if view else None
                recipe["random_erase"] = (3, 6, 8, 5) if view == 1 else None
            views.append(recipe)
        recipes.append(views)
    return crops, recipes


@pytest.mark.parametrize("compress", [True, slow(False)])
def test_crops_of_imagenet_plus_are_stored_views(photographs, random, tmp_path, compress):
    crops, recipes = recipes_of(photographs, random, PLAIN)
    probabilities = softmax(random.normal(size=(PHOTOS, VIEWS, CLASSES)))
    target_files.write_imagenet_plus(
        tmp_path / "r", range(PHOTOS), probabilities, 3, recipes, PLAIN, compress
    )

    words = ["format=imagenet_plus", f"path={tmp_path / 'r'}", f"format.classes={CLASSES}"]
    _, values = ingested(photographs, *words, views=True)

    flips = np.array([[view["random_horizontal_flip"] for view in each] for each in recipes])
    require_crops(photographs, crops, flips, matrices_of_fields(values))
    # The fourth class has the rest by itself.
    assert np.allclose(dense(values), probabilities, atol=1e-6)


def test_recipes_of_imagenet_plus_become_values(photographs, random, tmp_path):
    _, recipes = recipes_of(photographs, random, STRONG)
    probabilities = softmax(random.normal(size=(PHOTOS, VIEWS, CLASSES)))
    target_files.write_imagenet_plus(
        tmp_path / "r", range(PHOTOS), probabilities, 2, recipes, STRONG
    )

    words = ["format=imagenet_plus", f"path={tmp_path / 'r'}", f"format.classes={CLASSES}"]
    manifest, values = ingested(photographs, *words, "format.rest=zeros", views=True)

    recipe = recipe_from(manifest.views["operations"])
    assert values["pixel_values"].shape[-1] == recipe.width == 3 + 4
    for view in range(VIEWS):
        changes = recipe.changes(torch.from_numpy(values["pixel_values"][:, view]))
        erased = [c.rows.tolist() for c in changes if c.name == "random_erasing"]
        assert erased == ([list(range(PHOTOS))] if view == 1 else [])
        drawn = [[name for name, _ in each[view]["rand_augment"] or []] for each in recipes]
        for name, change, value in (
            ("Solarize", "solarize", 128 / 255),
            ("Color", "saturation", 0.8),
        ):
            of_name = [c for c in changes if c.name == change]
            rows = sorted(row for c in of_name for row in c.rows.tolist())
            assert rows == sorted(
                row for row, names in enumerate(drawn) for n in names if n == name
            )
            assert all(np.allclose(c.values, value, atol=1e-3) for c in of_name)
    # Zeros of the rest: the stored probabilities pass through another softmax.
    top = -np.sort(-probabilities, axis=-1)[..., :2]
    shares = softmax(top)
    assert np.allclose(np.exp(values["top_logits"]), shares, atol=1e-5)


@pytest.mark.parametrize("bfloat16", [slow(False), True])
def test_embeddings_of_datacompdr_are_joined_by_the_digest_of_the_image(
    photographs, random, tmp_path, bfloat16
):
    crops = crops_of(photographs, random)
    recipes = [[(tuple(map(int, box)), [(0, 0.0), (11, 127.5)]) for box in each] for each in crops]
    embeddings = random.normal(size=(PHOTOS, VIEWS, 6)).astype("float32")
    uids = [f"{n:032x}" for n in range(PHOTOS)]
    target_files.write_datacompdr(
        tmp_path / "d", uids, photographs.digests, recipes, embeddings, bfloat16, 9
    )

    words = ["format=datacompdr", f"path={tmp_path / 'd'}"]
    manifest, values = ingested(photographs, *words, views=True)

    flips = np.zeros((PHOTOS, VIEWS), bool)
    require_crops(photographs, crops, flips, matrices_of_fields(values))
    assert np.allclose(values["pooled"], embeddings, rtol=1e-2 if bfloat16 else 0, atol=1e-7)
    recipe = recipe_from(manifest.views["operations"])
    (solarized,) = recipe.changes(torch.from_numpy(values["pixel_values"][:, 0]))
    assert np.allclose(solarized.values, 0.5, atol=1e-3)


@pytest.mark.parametrize("has_token", [True, slow(False)])
def test_features_of_theia_are_joined_by_key(photographs, random, tmp_path, has_token):
    features = random.normal(size=(PHOTOS, 5, 4, 4)).astype("float32")
    features = torch.tensor(features).bfloat16().float().numpy()
    tokens = features[:, :, 0, 0].copy() if has_token else None
    order = random.permutation(PHOTOS)
    stems = [photographs.stems[n] for n in order]
    target_files.write_theia(
        tmp_path / "t",
        "facebook_dinov2-large",
        stems,
        features[order],
        None if tokens is None else tokens[order],
        9,
    )

    words = ["format=theia", f"path={tmp_path / 't' / 'facebook_dinov2-large'}"]
    _, values = ingested(photographs, *words)

    units = (
        decode_unit(values["features_1"][:, 0]) * values["features_1_scale"][:, 0, :, None, None]
    )
    assert np.allclose(units, features, atol=2e-3 * np.abs(features).max())
    assert ("pooled" in values) == has_token
    if has_token:
        assert np.array_equal(values["pooled"][:, 0], tokens)


@pytest.mark.parametrize("ranks", [slow(1), 5])
def test_logits_of_tinyvit_are_of_views_that_nobody_knows(photographs, random, tmp_path, ranks):
    probabilities = softmax(random.normal(size=(PHOTOS, CLASSES)))
    target_files.write_tinyvit(tmp_path / "e", photographs.stems, probabilities, 3, ranks)
    folder = next(path.parent for path in (tmp_path / "e").rglob("rank0-keys.txt"))

    words = ["format=tinyvit", f"path={folder}", f"format.classes={CLASSES}"]
    manifest, values = ingested(photographs, *words)

    assert manifest.teacher["frame"] == "unknown"
    assert np.allclose(dense(values)[:, 0], probabilities, atol=2e-3)


# ---- label maps ----------------------------------------------------------------------------------


def require_labels(folder, paths, boxes, values, *, transposed):
    """Check probabilities [n, V] of boxes (top, left, height, width) [n, V, 4] against the second reader's."""
    order = [0, 1, 2, 3] if transposed else [1, 0, 3, 2]
    for row, path in enumerate(paths):
        file = (folder / path.partition("/")[2]).with_suffix(".pt")
        expected = second_reader.relabel(file, boxes[row][:, order], CLASSES)
        assert np.allclose(dense(values)[row], expected, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, slow(True)])
def test_label_maps_give_the_label_of_every_crop(photographs, random, tmp_path, transposed):
    maps = random.normal(size=(PHOTOS, CLASSES, 15, 15)).astype("float32") * 3
    names = [path.partition("/")[2] for path in photographs.paths]
    target_files.write_relabel(tmp_path / "m", names, maps, 2)

    words = [
        *("format=relabel", f"path={tmp_path / 'm'}", f"format.classes={CLASSES}"),
        f"format.transposed={str(transposed).lower()}",
        *("views=random", "views.count=2", "augment=resized_crop_flip"),
    ]
    _, values = ingested(photographs, *words, views=True)

    corners = corners_seen(matrices_of_fields(values))
    low, high = corners.min(axis=-2), corners.max(axis=-2)
    # Without the rounding of a side, which decides about the number of points.
    boxes = np.concatenate([low[..., ::-1], (high - low)[..., ::-1] - 1e-5 / 15], axis=-1)
    require_labels(tmp_path / "m", photographs.paths, boxes, values, transposed=transposed)


def test_label_maps_without_views_give_the_label_of_the_whole_image(photographs, random, tmp_path):
    maps = random.normal(size=(PHOTOS, CLASSES, 15, 15)).astype("float32")
    names = [path.partition("/")[2] for path in photographs.paths]
    target_files.write_relabel(tmp_path / "m", names, maps, CLASSES)

    words = ["format=relabel", f"path={tmp_path / 'm'}", f"format.classes={CLASSES}"]
    _, values = ingested(photographs, *words)

    whole = np.tile([0.0, 0.0, 1.0, 1.0], (PHOTOS, 1, 1))
    require_labels(tmp_path / "m", photographs.paths, whole, values, transposed=True)


CROP = {"random_crop": {"size": 32, "padding": 4}, "random_horizontal_flip": {"p": 0.5}}


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (50, 50)])
@pytest.mark.parametrize("size", [32, [32], [32, 48]])
def test_an_image_is_resized_before_the_crop(height, width, size):
    """A number is the size of the shorter side, as in the committed configuration for CIFAR-100."""
    augmentation = {"resize": {"size": size}, **CROP}
    recipes = [[size, (0, 0), True], [size, (8, 3), False]]
    image = Image.fromarray(np.zeros((height, width, 3), np.uint8))
    views = []
    for resize, crop, flip in recipes:
        one = {"random_crop": crop, "random_horizontal_flip": flip}
        resize = resize[0] if len(np.atleast_1d(resize)) == 1 and size != 32 else resize
        views.append(second_reader.replay(image, {"resize": resize, **one}, augmentation))

    made = convert_recipes(recipes, layout_of(augmentation), height, width)

    here = corners_here(matrices_of_fields(made), 1)
    assert np.allclose(here, corners_there(views), atol=1e-6)


def test_a_name_that_their_code_ignores_is_ignored():
    layout = layout_of({"random_resize_crop": {"size": 32}, "random_horizontal_flip": {"p": 0.5}})
    made = convert_recipes([[True]], layout, 40, 60)

    assert layout.ignored == ("random_resize_crop",)
    assert layout.view_size(40, 60) == (40, 60)
    assert matrices_of_fields(made)[0].tolist() == [[-1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_recipe_with_more_values_than_its_configuration_is_refused():
    """Values would be taken for those of another operation."""
    layout = layout_of({"random_resize_crop": {"size": 32}, "random_horizontal_flip": {"p": 0.5}})

    with pytest.raises(ValueError, match="a recipe has 2 values, and its configuration lists"):
        convert_recipes([[(0, 0, 8, 8), True]], layout, 40, 60)


@pytest.mark.parametrize(
    ("augmentation", "said"),
    [
        ({"center_crop": {"size": 32}}, "center_crop"),
        ({"random_crop": {"size": 32, "padding_mode": "reflect"}}, "random_crop.padding_mode"),
        ({"resize": {"size": 32, "max_size": 64}}, "resized by"),
        ({"random_resized_crop": {"size": [32, 48]}}, "one crop of a size"),
        ({"rand_augment": {"num_ops": 9}}, "9 operations"),
    ],
)
def test_what_views_here_cannot_show_is_refused(augmentation, said):
    with pytest.raises(ValueError, match=said):
        layout_of(augmentation)


def test_a_translation_is_a_fraction_of_the_side_that_it_moves_along():
    """Views of the whole image have two sides."""
    layout = layout_of({"rand_augment": {"num_ops": 1}})
    recipes = [[[(3, 12.0)]], [[(4, 12.0)]]]

    made = convert_recipes(recipes, layout, 40, 60)

    sizes = torch.tensor([[40, 60]]).expand(2, 2)
    recipe = recipe_from(layout.operations)
    matrices = stored_views_of(made, recipe, sizes, (32, 32), "").canonical_from_view.numpy()
    assert np.allclose(matrices[0, :2, 2], [-2 * 12 / 60, 0], atol=3e-4)  # of float16
    assert np.allclose(matrices[1, :2, 2], [0, -2 * 12 / 40], atol=3e-4)


def test_an_operation_that_torchvision_does_not_have_is_refused():
    layout = layout_of({"rand_augment": {"num_ops": 1}})

    for name in ("Twirl", 14):
        with pytest.raises(ValueError, match="there is no operation"):
            convert_recipes([[[(name, 1.0)]]], layout, 40, 60)
