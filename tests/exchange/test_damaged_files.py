"""Files of every format with bytes that were changed: one clear error, or targets that pass all checks."""

import shutil

import numpy as np
import pytest

from permafrost.core.errors import UserError
from tests.exchange.test_readers import (
    CLASSES,
    STRONG,
    VIEWS,
    crops_of,
    key_of,
    recipes_of,
    softmax,
)
from tests.support import target_files
from tests.support.exchange import PHOTOS, make_photographs, run_ingest
from tests.support.slow import slow


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("damaged"))


def written(kind, photographs, folder):
    """Write sound files of a format, and return the words that ingest them."""
    random = np.random.default_rng(5)
    keys = [key_of(path) for path in photographs.paths]
    logits = random.normal(size=(PHOTOS, CLASSES)).astype("float32")
    probabilities = softmax(random.normal(size=(PHOTOS, VIEWS, CLASSES)) * 2)
    crops = crops_of(photographs, random)
    short = [path.partition("/")[2] for path in photographs.paths]
    words = [f"format={kind}", f"path={folder}"]
    of_classes = f"format.classes={CLASSES}"
    if kind == "npz":
        target_files.write_npz(folder / "t.npz", keys, logits=logits)
        return [words[0], f"path={folder / 't.npz'}", "format.frame=full"]
    if kind == "parquet":
        target_files.write_parquet(folder / "t.parquet", keys, logits)
        return [*words, "format.frame=full", f"format.cache={folder.parent / 'copies'}"]
    if kind == "embeddings":
        target_files.write_embeddings(folder, photographs.paths, logits, 10)
        return [*words, "format.frame=full"]
    if kind == "e2kd":
        maps = random.random((PHOTOS, 1, 4, 4)).astype("float32")
        target_files.write_e2kd(folder, range(PHOTOS), logits, maps, "grad_cam")
        return [*words, "format.frame=full"]
    if kind == "fkd":
        flips = np.zeros((PHOTOS, VIEWS), bool)
        facts = (photographs.sizes, probabilities, 2, False)
        target_files.write_fkd(folder, photographs.paths, crops, flips, *facts)
        return [*words, of_classes]
    if kind == "imagenet_plus":
        _, recipes = recipes_of(photographs, random, STRONG)
        target_files.write_imagenet_plus(folder, range(PHOTOS), probabilities, 2, recipes, STRONG)
        return [*words, of_classes]
    if kind == "datacompdr":
        recipes = [[(tuple(map(int, b)), [(0, 0.0), (7, 0.1)]) for b in each] for each in crops]
        embeddings = random.normal(size=(PHOTOS, VIEWS, 4)).astype("float32")
        uids = [str(n) for n in range(PHOTOS)]
        facts = (photographs.digests, recipes, embeddings, True, 9)
        target_files.write_datacompdr(folder, uids, *facts)
        return words
    if kind == "theia":
        features = random.normal(size=(PHOTOS, 2, 3, 3)).astype("float32")
        target_files.write_theia(folder, "vit", photographs.stems, features, None, 9)
        return [words[0], f"path={folder / 'vit'}"]
    if kind == "tinyvit":
        target_files.write_tinyvit(folder, photographs.stems, probabilities[:, 0], 2, 2)
        return [*words, of_classes]
    maps = random.normal(size=(PHOTOS, CLASSES, 15, 15)).astype("float32")
    target_files.write_relabel(folder, short, maps, 2)
    return [*words, of_classes, "format.transposed=false"]


KINDS = (
    *("npz", "parquet", "embeddings", "e2kd", "fkd", "imagenet_plus", "datacompdr", "theia"),
    *("tinyvit", "relabel"),
)


def damage(path, random):
    """Change a file: flip some bytes, cut it, zero a part, repeat a part, or write noise."""
    data = bytearray(path.read_bytes())
    place, kind = int(random.integers(0, max(1, len(data)))), int(random.integers(0, 5))
    if kind == 0:
        for number in random.integers(0, len(data), 4):
            data[number] ^= int(random.integers(1, 256))
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    elif kind == 3:
        data[place:place] = data[place : place + 200]
    else:
        noise = random.integers(0, 256, len(data[place : place + 32]), np.uint8)
        data[place : place + 32] = noise.tobytes()
    path.write_bytes(bytes(data))


def outcome_of(store, words):
    """Text of the error of an ingestion, empty if there was none."""
    try:
        run_ingest(store, *words)
    except UserError as error:
        return str(error).strip()
    return ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trials", [2, slow(60)])
def test_damage_is_an_error_of_one_line_or_leaves_sound_targets(
    kind, photographs, tmp_path, trials
):
    random = np.random.default_rng(KINDS.index(kind))
    (tmp_path / "sound").mkdir()
    words = written(kind, photographs, tmp_path / "sound")
    store = photographs.store
    assert run_ingest(store, *words).records == PHOTOS
    outcomes = []
    for number in range(trials):
        folder = tmp_path / f"trial{number}"
        shutil.copytree(tmp_path / "sound", folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        damage(files[int(random.integers(0, len(files)))], random)
        changed = [word.replace(str(tmp_path / "sound"), str(folder)) for word in words]
        outside = {path for path in tmp_path.rglob("*") if folder not in path.parents}
        outcomes.append(outcome_of(store, changed))
        copies = {path for path in tmp_path.rglob("*") if "copies" in path.parts}
        new = {path for path in tmp_path.rglob("*") if folder not in path.parents}
        assert new - outside <= copies
    assert not [outcome for outcome in outcomes if "\n" in outcome]
    assert any(outcomes) or trials < 40  # control
