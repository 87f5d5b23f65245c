"""Variant of stages.precompute whose process ends or stops at one image.

python -m tests.support.poison <part> <key> <file> <words of stages.precompute>

part  pack or teacher: the part of the work in which the image of record <key> is special
file  a path at which the process writes its id before it stops itself, once; or - to end the process each time, as a
      bug in a decoder does
"""

import hashlib
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from permafrost.annotation import teacher_pass
from permafrost.annotation.shard_tasks import AnnotateShard
from permafrost.sources import data_preview, source
from permafrost.sources.data_preview import ReadHeaders
from permafrost.sources.image_folder import ImageFolderSource
from permafrost.store import record_form

DEADLY_STATUS = 7


def interrupt(file):
    """End this process, or stop it if no process has been stopped with this file."""
    if file == "-":
        os._exit(DEADLY_STATUS)
    try:
        with Path(file).open("x") as opened:
            opened.write(f"{os.getpid()}\n")
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGSTOP)


class InterruptedSource(ImageFolderSource):
    """Source that interrupts the process when one image is read."""

    def __init__(self, config, *, key, file):
        super().__init__(config)
        self.key, self.file = key, file

    def read(self, record):
        if record.key == self.key:
            interrupt(self.file)
        return super().read(record)


class UninterruptedHeaders(ReadHeaders):
    """Task of the preview, which comes before the part of the work that is meant."""

    def __call__(self, part):
        plain = ImageFolderSource(self.source.config)
        return ReadHeaders(
            source=plain,
            listing=self.listing,
            folder=self.folder,
            regions=self.regions,
            decoded=self.decoded,
        )(part)


@dataclass(frozen=True, kw_only=True)
class InterruptedAnnotation(AnnotateShard):
    """Task that interrupts the process when one frame is decoded."""

    key: str
    file: str

    def __call__(self, shard):
        with self._interrupted():
            return super().__call__(shard)

    def annotate_alone(self, shard, keys, key):
        with self._interrupted():
            super().annotate_alone(shard, keys, key)

    @contextmanager
    def _interrupted(self):
        index = self._store.index
        digests = {  # of all shards, as the one that follows is decoded, too
            key: digest
            for number in range(len(self._store.shards))
            for key, digest in zip(
                index.shard_keys(number), index.image_sha256(number), strict=True
            )
        }
        decode = record_form.decode_pixels

        def decode_pixels(data, memory):
            if hashlib.sha256(data).hexdigest() == digests.get(self.key):
                interrupt(self.file)
            return decode(data, memory)

        record_form.decode_pixels = decode_pixels
        try:
            yield
        finally:
            record_form.decode_pixels = decode


def run():
    # Imported here, as a cluster's actors get the package without its YAML files, which a command line reads.
    from permafrost.cli import stage_main

    part, key, file = sys.argv[1:4]
    del sys.argv[1:4]
    if part == "pack":
        data_preview.ReadHeaders = UninterruptedHeaders
        source.build_source = partial(InterruptedSource, key=key, file=file)
    else:
        teacher_pass.AnnotateShard = partial(InterruptedAnnotation, key=key, file=file)
    stage_main("precompute")


if __name__ == "__main__":
    from tests.support.poison import run as importable_run

    importable_run()  # imported by name, so that actors can unpickle the classes
