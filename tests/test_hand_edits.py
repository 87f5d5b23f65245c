"""Edits of texts as people and their programs make them: the same values, or one line that names the file."""

import io
import re
import shutil
import tarfile
from collections import Counter

import pytest

from permafrost.config.data import ImageFolderDataConfig, ImageTableDataConfig
from permafrost.core.errors import UserError
from permafrost.sources.classes import load_class_names
from permafrost.sources.image_folder import ImageFolderSource
from permafrost.sources.image_table import ImageTableSource
from permafrost.storage.files import iter_lines
from permafrost.storage.signed_files import read_json, sign_json
from permafrost_papers.interpretability.class_similarity import read_similarity
from permafrost_papers.interpretability.concepts import BrodenFolder
from permafrost_papers.ked.data_options import TableDataConfig
from permafrost_papers.ked.table import TableSource
from permafrost_sources.options import WebDatasetDataConfig
from permafrost_sources.webdataset import WebDatasetSource
from permafrost_transformers.classifiers import _read_prompts
from permafrost_transformers.options import TransformersModelConfig
from tests.support.composition import config_of
from tests.support.store_kinds import write_tars

EDITS = {
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "byte-order mark": lambda text: "\ufeff" + text,
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-le"),
    "Latin-1": lambda text: text.replace("cat", "ch\xe4t").encode("latin-1"),
    "comma after two lines": lambda text: re.sub(r"\n", ",\n", text, count=2),
    "comma before a bracket": lambda text: re.sub(r"([\]}])", r",\1", text, count=1),
    "tabs": lambda text: re.sub(r"(?m)^  +", "\t", text),
    "conflict": lambda text: re.sub(
        r"\n(.*\n)", r"\n<<<<<<< HEAD\n\1=======\n\1>>>>>>> other\n", text, count=1
    ),
    "doubled name": lambda text: re.sub(
        r'(?m)^( *"?(?:label|lr)"?: )(.*\n)', r"\1\2\g<1>7,\n", text, count=1
    ),
    "decimal comma": lambda text: re.sub(r"(\d)\.(\d)", r"\1,\2", text),
    "typographic quotes": lambda text: re.sub(r"['\"](\w+)['\"]", "\u201c\\1\u201d", text),
    "Ctrl-Z": lambda text: text + "\x1a",
}
BRODEN = {
    "index.csv": "image,sh,sw,object\na.png,2,2,1\nb.png,2,2,1;2\n",
    "category.csv": "name,first\nobject,1\n",
    "label.csv": "number,name\n1,cat\n2,dog\n",
    "c_object.csv": "number,coverage\n1,0.5\n2,0.25\n",
}


def listed(source):
    return source.classes, [str(record) for record in source.records()]


def read_table(path):
    (path.parent / "a.png").write_bytes(b"x")
    return listed(ImageTableSource(ImageTableDataConfig(path=str(path), boxes="boxes")))


def read_sample(path):
    with tarfile.open(path.with_name("a.tar"), "w") as tar:
        for name, data in (("a.png", b"x"), ("a.json", path.read_bytes())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return listed(WebDatasetSource(WebDatasetDataConfig(path=str(path.with_name("a.tar")))))


def read_broden(path):
    for name in BRODEN.keys() - {path.name}:
        path.with_name(name).write_text(BRODEN[name])
    concepts = BrodenFolder(path.parent)
    return concepts.labels, [(row["image"], row["sh"], row["object"]) for row in concepts.rows]


NAMES = "cat\ndog\ncow\n"
BOXES = '[{"x0": 1.5, "y0": 0, "x1": 3, "y1": 4}]'
READERS = {
    "own.yaml": (
        "seed: 1\noptimizer:\n  kind: 'adam'\n  lr: 0.1\n",
        lambda path: config_of("distill", f"experiment={path}"),
    ),
    "classes.txt": (NAMES, lambda path: load_class_names(str(path))),
    "prompts.txt": (NAMES, lambda path: _read_prompts(TransformersModelConfig(prompts=str(path)))),
    "groups.txt": ("cat\ndog\ncat\n", lambda path: read_similarity(path, 3).tolist()),
    "names.txt": (NAMES, lambda path: list(iter_lines(path))),
    "photos.csv": (
        f"path,label,boxes\na.png,cat,'{BOXES}'\n".replace('"', '""').replace("'", '"'),
        read_table,
    ),
    "flows.csv": (
        'label,n,size\ncat,1,"1.5"\ndog,2,"2.5"\n',
        lambda path: listed(TableSource(TableDataConfig(path=str(path)))),
    ),
    "a.json": (f'{{\n  "label": 3,\n  "boxes": {BOXES}\n}}\n', read_sample),
    **{name: (text, read_broden) for name, text in BRODEN.items()},
    "s.json": (sign_json({"label": "cat", "lr": 0.1}).decode(), lambda path: read_json(path, "")),
}


@pytest.mark.parametrize("name", READERS)
def test_an_edited_text_has_the_same_values_or_is_named(name, tmp_path, count_trials):
    text, read = READERS[name]
    path = tmp_path / name
    path.write_text(text)
    sound, outcomes = read(path), {}
    for edit, change in EDITS.items():
        if (edited := change(text)) == text:
            continue
        path.write_bytes(edited if isinstance(edited, bytes) else edited.encode())
        try:
            outcomes[edit] = "the same values" if read(path) == sound else "other values"
        except UserError as error:
            is_named = "\n" not in str(error) and re.search(rf"{name}|optimizer|seed", str(error))
            outcomes[edit] = "one line" if is_named else str(error)
    count_trials("a text that is edited by hand", Counter(outcomes.values()))

    assert set(outcomes.values()) <= {"the same values", "one line"}, outcomes
    harmless = "one line" if name == "s.json" else "the same values"
    assert (outcomes["CRLF"], outcomes["byte-order mark"]) == (harmless, harmless)


@pytest.mark.parametrize("kind", ["tars", "images"])
def test_copies_that_programs_leave_in_data_are_not_read(kind, tmp_path):
    write_tars(tmp_path / "tars")
    path = tmp_path / "tars/train-000000.tar"
    source = WebDatasetSource(WebDatasetDataConfig(path=str(path.parent)))
    if kind == "images":
        source = ImageFolderSource(ImageFolderDataConfig(path=str(tmp_path / "images")))
        path = tmp_path / "images/train/cat/a.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    sound = listed(source)

    for name in ("._{0}{1}", "{0}{1}~", ".DS_Store", "Thumbs.db", "desktop.ini", "~${0}{1}"):
        path.with_name(name.format(path.stem, path.suffix)).write_bytes(b"x")
    for name in ("{0} (conflicted copy 2026-11-02){1}", "{0}.sync-conflict-20261102-101010-ABC{1}"):
        shutil.copy(path, path.with_name(name.format(path.stem, path.suffix)))
        shutil.copytree(path.parent, path.parent.with_name(name.format(path.parent.name, "")))

    assert listed(type(source)(source.config)) == sound
