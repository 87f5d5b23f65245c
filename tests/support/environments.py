"""Environments of Python without this project, for tests of what is installed and what is left out."""

import subprocess
import sys
import sysconfig
from pathlib import Path


def make_environment(folder: Path, *, with_pip: bool = False) -> Path:
    """Make an environment with the packages of this one besides this project, and return its Python.

    Its entry points and links to this checkout are not found there.
    """
    words = () if with_pip else ("--without-pip",)
    subprocess.run([sys.executable, "-m", "venv", *words, folder], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    present = {path.name for path in site.iterdir()}
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "permafrost" not in path.name and path.suffix != ".pth" and path.name not in present:
            (site / path.name).symlink_to(path)
    return folder / "bin/python"
