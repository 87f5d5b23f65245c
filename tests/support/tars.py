"""Tars written elsewhere."""

from permafrost_sources.options import WebDatasetDataConfig
from tests.support.images import png


def samples(number, classes=3, first=0):
    """Members of a tar of images with the labels 0, 1, 2, 0, ..."""
    members = {}
    for index in range(first, first + number):
        members |= {f"{index:04d}.png": png(index), f"{index:04d}.cls": str(index % classes)}
    return members


def tar_config(path, **options):
    return WebDatasetDataConfig(path=str(path), **options)
