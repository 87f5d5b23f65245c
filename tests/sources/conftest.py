"""Fixtures of sources."""

import pytest

from tests.support.image_sets import WATERBIRDS, write_images, write_table
from tests.support.images import write_tar
from tests.support.tars import samples, tar_config


@pytest.fixture
def tars(tmp_path):
    """Three tars of 5, 9 and 7 samples that mix three of ten classes."""
    for number, size in enumerate((5, 9, 7)):
        write_tar(tmp_path / f"tars/train-{number:06d}.tar", samples(size, first=100 * number))
    (tmp_path / "tars/classes.txt").write_text("\n".join("abcdefghij"))
    return tar_config(tmp_path / "tars")


@pytest.fixture
def waterbirds(tmp_path):
    root = tmp_path / "waterbirds"
    written = write_images(root, *WATERBIRDS["img_filename"])
    write_table(root / "metadata.csv", WATERBIRDS)
    return root, written
