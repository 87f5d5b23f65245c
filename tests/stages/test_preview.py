"""The verb `preview`, and what becomes of a preview in `precompute` and in the report."""

import json

import pytest

from permafrost.config.data import FINDINGS
from permafrost.storage.files import file_at
from permafrost.store.facts import read_data_facts
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from tests.support.image_sets import folder_config, write_images
from tests.support.images import write_tar
from tests.support.previews import preview_of
from tests.support.stores import precompute_config
from tests.support.tars import samples, tar_config
from tests.support.verbs import precompute


@pytest.fixture
def photos(tmp_path):
    """Folder of two splits with a file that is no picture and a mask among the images."""
    write_images(
        tmp_path / "photos", *(f"Training/{c}/{i}.jpg" for c in ("cat", "dog") for i in range(4))
    )
    write_images(
        tmp_path / "photos", *(f"Testing/{c}/{i}.jpg" for c in ("cat", "dog") for i in range(2))
    )
    (tmp_path / "photos/Training/cat/notes.txt").write_text("x")
    return tmp_path / "photos"


def test_the_verb_prints_what_was_understood_and_writes_nothing(permafrost, photos, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = permafrost("preview", f"data.path={photos}", "data=image_folder")

    assert code == 0, err
    assert "  records        test 4, train 8 [image_folder]" in out
    assert "cat         2         4" in out
    assert "  images         JPEG 12 [all headers]" in out
    assert "note     split_spellings: Testing is split test, Training is split train" in out
    assert "1 .txt (Training/cat/notes.txt)" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_errors_are_shown_with_the_option_that_accepts_them(permafrost, photos, tmp_path):
    write_images(photos, "Training/cat/masks/0.png")
    words = ("data=image_folder", f"data.path={photos}")
    _, out, _ = permafrost("preview", *words)
    code, _, err = permafrost("precompute", *words, f"store.path={tmp_path}/store", "teacher=none")

    assert "error    other_things: folders inside of class folders (1, such as" in out
    assert "data.accept=[other_things]" in out
    assert code == 1
    assert "data.accept=[other_things]" in err
    assert not (tmp_path / "store/images").exists()


def test_without_data_it_says_what_it_needs(permafrost):
    code, _, err = permafrost("preview")

    assert code == 2
    assert "preview needs data=" in err


def test_the_preview_beside_a_store_is_the_same_wherever_the_data_are(tmp_path):
    for place in ("a", "b/c"):
        write_images(
            tmp_path / place / "set", *(f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(3))
        )
        (tmp_path / place / "set/cat/readme.md").write_text("x")
        data = folder_config(tmp_path / place / "set")
        precompute.run(precompute_config(tmp_path / place / "store", data=data))
    first, second = (Store(tmp_path / place / "store") for place in ("a", "b/c"))

    texts = [file_at(store.folder / "facts.json").read() for store in (first, second)]
    assert texts[0] == texts[1]
    assert str(tmp_path) not in texts[0].decode()
    assert read_data_facts(first.folder).records == {"train": 6}


def test_nothing_is_previewed_where_nothing_is_packed(photos, tmp_path, monkeypatch):
    config = precompute_config(tmp_path / "store", data=folder_config(photos))
    precompute.run(config)
    monkeypatch.setattr(precompute.module, "preview_source", lambda *_, **__: 1 / 0)

    assert precompute.run(config).packed_records == 0


@pytest.mark.parametrize(
    "text", ["", "{}", '{"a": 1}', '{\n "self_sha256": "0",\n "a": 1\n}', "[" * 100_000]
)
def test_a_damaged_preview_is_named_and_harms_nothing(photos, tmp_path, caplog, text):
    precompute.run(precompute_config(tmp_path / "store", data=folder_config(photos)))
    (tmp_path / "store/facts.json").write_text(text)

    with caplog.at_level("WARNING"):
        assert read_data_facts(Store(tmp_path / "store").folder) is None

    assert "facts.json is damaged" in caplog.text
    (problem,) = verify_store(tmp_path / "store")
    assert "facts.json is damaged" in problem
    assert "not part of the store" in problem


def test_a_store_without_a_preview_is_whole(photos, tmp_path):
    precompute.run(precompute_config(tmp_path / "store", data=folder_config(photos)))
    (tmp_path / "store/facts.json").unlink()

    assert read_data_facts(Store(tmp_path / "store").folder) is None
    assert list(verify_store(tmp_path / "store")) == []


def test_a_resumed_precompute_says_how_many_records_there_are(photos, tmp_path):
    config = precompute_config(tmp_path / "store", data=folder_config(photos))
    precompute.run(config)

    again = precompute.run(config)

    assert (again.packed_records, again.records) == (0, "12")


def test_a_strangers_finding_is_used_by_the_command(permafrost, photos, tmp_path, monkeypatch):
    (tmp_path / "rules.py").write_text(
        "from permafrost.sources.findings import FINDINGS\n"
        "def find_cats(preview):\n"
        "    if 'cat' in preview.classes:\n"
        "        yield 'warning', f'{preview.count(\"train\", 0)} cats'\n"
        "FINDINGS['cats'] = find_cats\n"
    )
    words = ("data=image_folder", f"data.path={photos}", "plugins=[rules.py]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "permafrost.config.plugins._PLACES", {}
    )  # so that no later Ray looks for it
    try:
        code, out, err = permafrost("preview", *words)
    finally:
        FINDINGS.pop("cats", None)

    assert code == 0, err
    assert "warning  cats: 4 cats" in out


def test_members_of_several_tars_are_counted_once(tmp_path):
    for number in range(3):
        members = {}
        for place in range(number + 1):
            members[f"{number}{place}.png"] = samples(1)["0000.png"]
            members[f"{number}{place}.json"] = json.dumps({"y": 1})
        write_tar(tmp_path / f"tars/train-{number:03d}.tar", members)

    found = preview_of(tar_config(tmp_path / "tars"), all=True).findings

    (message,) = (finding.message for finding in found if finding.name == "missing_labels")
    assert "their other members are 6 .json (" in message


@pytest.mark.slow
@pytest.mark.ray
def test_tars_are_previewed_on_ray(ray_cluster, tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"tars/train-{number:03d}.tar", samples(6, first=10 * number))
    write_tar(
        tmp_path / "tars/val-000.tar",
        {"x.png": samples(1)["0000.png"], "x.json": json.dumps({"y": 1})},
    )

    result = preview_of(tar_config(tmp_path / "tars"), executor="ray", all=True)
    alone = preview_of(tar_config(tmp_path / "tars"), all=True)

    assert result.counts.records == {"train": 18, "val": 1}
    assert result.stored() == alone.stored()
    assert "keys of their .json are 'y'" in next(
        finding.message for finding in result.findings if finding.name == "missing_labels"
    )


def test_an_image_that_a_table_names_twice_is_an_error(permafrost, tmp_path):
    write_images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_text("path,label\na.jpg,cat\na.jpg,dog\nb.jpg,dog\n")
    code, out, err = permafrost("preview", "data=image_table", f"data.path={tmp_path}/t.csv")

    assert code == 0, err
    assert "error    repeated_keys: " in out
    assert "records 1 and 2 have the key 'a%2Ejpg'" in out


def test_the_next_command_packs_into_a_store_of_a_plain_name(permafrost, photos, monkeypatch):
    _, out, _ = permafrost("preview", f"data.path={photos}", "data=image_folder")
    assert "store.path=stores/photos teacher=none" in out
    _, out, _ = permafrost("preview", f"data.path={photos}", "data=image_folder", "experiment=demo")
    assert "next:" not in out  # it would lose what was typed

    monkeypatch.chdir(photos)
    _, out, _ = permafrost("preview", "data.path=.", "data=image_folder")
    assert "store.path=stores/my-store teacher=none" in out
