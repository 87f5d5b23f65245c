"""Time to read the full-resolution map of one crop, by the size of inner chunks and by data type.

    python -m tests.benchmarks.map_chunks

Maps of 6x224x224 values that hardly compress, as those of trained B-cos networks, are read as a student of random crops
reads them: only the chunks that the crop touches, from the page cache, with their CRC-32C, through Blosc.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

SIDE, CHANNELS = 224, 6
RECORDS, CROPS, ROUNDS = 48, 400, 3


@dataclass(frozen=True)
class Chunks:
    """File of maps in chunks of `tile` pixels squared."""

    path: Path
    dtype: str
    tile: int
    places: dict[tuple[int, int, int], tuple[int, int, int]]
    """(record, row, column) of a chunk -> its offset, size and CRC-32C."""

    @classmethod
    def write(cls, path: Path, maps: list[NDArray[np.float32]], dtype: str, tile: int) -> Chunks:
        """Write all maps."""
        places = {}
        shuffle = blosc.SHUFFLE if dtype == "float16" else blosc.NOSHUFFLE
        with path.open("wb") as file:
            for record, values in enumerate(maps):
                stored = (np.round(values * 127) if dtype == "int8" else values).astype(dtype)
                for row in range(SIDE // tile):
                    for column in range(SIDE // tile):
                        part = stored[:, row * tile :, column * tile :][:, :tile, :tile]
                        data = blosc.compress(np.ascontiguousarray(part), b"zstd", 1, shuffle)
                        crc32c = google_crc32c.value(data)
                        places[record, row, column] = (file.tell(), len(data), crc32c)
                        file.write(data)
        return cls(path, dtype, tile, places)

    def read(self, crops: list[tuple[float, float, float, float]]) -> int:
        """Read a crop (x, y, width, height) of each record in turn, and return the number of bytes read."""
        tile, most, total = self.tile, SIDE // self.tile - 1, 0
        with self.path.open("rb") as file:
            for number, (x, y, width, height) in enumerate(crops):
                whole = np.empty((CHANNELS, SIDE, SIDE), self.dtype)
                for row in range(
                    int(y * SIDE) // tile, min(most, int((y + height) * SIDE) // tile) + 1
                ):
                    for column in range(
                        int(x * SIDE) // tile, min(most, int((x + width) * SIDE) // tile) + 1
                    ):
                        offset, size, crc32c = self.places[number % RECORDS, row, column]
                        data = os.pread(file.fileno(), size, offset)
                        assert google_crc32c.value(data) == crc32c
                        part = np.frombuffer(blosc.decompress(data), self.dtype)
                        at = np.s_[
                            :, row * tile : (row + 1) * tile, column * tile : (column + 1) * tile
                        ]
                        whole[at] = part.reshape(CHANNELS, tile, tile)
                        total += size
        return total


def random_crops(generator: np.random.Generator) -> list[tuple[float, float, float, float]]:
    """Draw crops of 8 to 100 % of the area with an aspect of 3/4 to 4/3, in shares of the side."""
    crops = []
    for _ in range(CROPS):
        area, aspect = (
            generator.uniform(0.08, 1),
            np.exp(generator.uniform(*np.log([3 / 4, 4 / 3]))),
        )
        width, height = min(1, np.sqrt(area * aspect)), min(1, np.sqrt(area / aspect))
        crops.append(
            (generator.uniform(0, 1 - width), generator.uniform(0, 1 - height), width, height)
        )
    return crops


def main() -> None:
    """Measure all layouts and print a Markdown table."""
    blosc.set_nthreads(1)
    generator = np.random.default_rng(0)
    maps = [generator.standard_normal((CHANNELS, SIDE, SIDE), np.float32) for _ in range(RECORDS)]
    maps = [values / np.abs(values).max() for values in maps]
    crops = random_crops(generator)
    print(
        "| stored as | inner chunk | kB stored | kB read for a crop | ms |",
        "|---|---|---|---|---|",
        sep="\n",
    )
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float16", "int8"):
            for tile in (224, 112, 56):
                chunks = Chunks.write(Path(folder) / f"{dtype}-{tile}", maps, dtype, tile)
                seconds = []
                for _ in range(ROUNDS):
                    started = time.perf_counter()
                    total = chunks.read(crops)
                    seconds.append(time.perf_counter() - started)
                stored = chunks.path.stat().st_size / RECORDS / 1e3
                print(
                    f"| {dtype} | {tile}x{tile} | {stored:.0f} | {total / CROPS / 1e3:.0f} | "
                    f"{median(seconds) / CROPS * 1e3:.2f} |"
                )


if __name__ == "__main__":
    main()
