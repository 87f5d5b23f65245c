"""Variant of stages.precompute whose process ends at one image, as with a bug in a decoder.

python -m tests.support.poison <key> <part> <words of stages.precompute>
"""

import os
import sys

from pipeline.annotation import teacher_pass
from pipeline.annotation.shard_tasks import AnnotateShard
from pipeline.config.builder import build_verb_config
from pipeline.config.compose import compose
from pipeline.core.errors import UserError
from pipeline.sources.image_folder import ImageFolderSource
from pipeline.store import frames
from stages import precompute

DEADLY_STATUS = 7


class DeadlySource(ImageFolderSource):
    """Source that ends the process when one image is read."""

    def __init__(self, config, key):
        super().__init__(config)
        self.key = key

    def read(self, record):
        if record.key == self.key:
            os._exit(DEADLY_STATUS)
        return super().read(record)


class DeadlyAnnotation(AnnotateShard):
    """Task that ends the process when one frame is decoded."""

    def __call__(self, shard):
        decode = frames.decode_pixels
        table = self._store.index
        row = table["key"].to_pylist().index(os.environ["DEADLY_KEY"])
        size = table["size"][row].as_py()

        def decode_pixels(data, memory):
            if len(data) == size:
                os._exit(DEADLY_STATUS)
            return decode(data, memory)

        frames.decode_pixels = decode_pixels
        return super().__call__(shard)


def main():
    key, part, *words = sys.argv[1:]
    os.environ["DEADLY_KEY"] = key
    if part == "pack":
        precompute.build_source = lambda config: DeadlySource(config, key)
    else:
        teacher_pass.AnnotateShard = DeadlyAnnotation
    try:
        print(precompute.run(build_verb_config("precompute", compose("precompute", words))))
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    from tests.support.poison import main as importable_main

    importable_main()  # imported by name, so that actors can unpickle the classes
