"""Folders of CIFAR-10 images whose classes have from 200 down to 10 training images, for experiment=cifar10_unequal.

    python -m docs.unequal_classes data/cifar10 data/cifar10_unequal

Class c of 10 has 200 * (10 / 200)^(c / 9) images, the first ones of the tars. The test images are those of one tar.
"""

from __future__ import annotations

import sys
import tarfile
from collections import Counter
from pathlib import Path

LARGEST, SMALLEST, CLASSES = 200, 10, 10


def main(source: str, target: str) -> None:
    """Write <target>/train/<class>/<key>.jpg and <target>/test/<class>/<key>.jpg."""
    sizes = [round(LARGEST * (SMALLEST / LARGEST) ** (c / (CLASSES - 1))) for c in range(CLASSES)]
    names = (Path(source) / "classes.txt").read_text().split()
    written: Counter[tuple[str, int]] = Counter()
    for path in sorted(Path(source).glob("*-000000.tar")):
        split = path.name.partition("-")[0]
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
            for name in sorted(files):
                key, _, suffix = name.rpartition(".")
                if suffix != "jpg":
                    continue
                label = int(files[f"{key}.cls"].read())
                if split == "train" and written[split, label] == sizes[label]:
                    continue
                written[split, label] += 1
                folder = Path(target) / split / names[label]
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{key}.jpg").write_bytes(files[name].read())
    print(dict(written))


if __name__ == "__main__":
    main(*sys.argv[1:])
