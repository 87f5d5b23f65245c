"""The commands of the Dockerfile, run by a shell in a folder that stands for the image.

Packages are those of this environment instead of an installation of requirements.lock, which `make install` makes. The
build of the project itself needs a package index.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT


def instructions():
    """Instructions of the file, as pairs of the word and the rest."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


@pytest.mark.slow
def test_the_files_that_are_copied_make_the_command(tmp_path):
    commands = tmp_path / "commands"
    commands.mkdir()
    environment = tmp_path / "environment"
    commands_here = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    uv = shutil.which("uv", path=commands_here)
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, environment], check=True)
    packages = next((environment / "lib").glob("python*/site-packages"))
    installed = next(path for path in map(str, sys.path) if path.endswith("site-packages"))
    (packages / "installed.pth").write_text(installed + "\n")
    (commands / "useradd").write_text("#!/bin/sh\n")
    (commands / "apt-get").write_text("#!/bin/sh\n")
    (commands / "pip").write_text('#!/bin/sh\n[ "$1 $2 $3" = "install --no-cache-dir uv" ]\n')
    (commands / "uv").write_text(
        f'#!/bin/bash\nset -- "${{@/--system/--python={environment}/bin/python}}"\n'
        f'[[ "$*" == *requirements.lock* ]] || exec {uv} "$@"\n'
        "test -s requirements.lock\n"
    )
    for command in commands.iterdir():
        command.chmod(0o755)
    path = os.pathsep.join([str(environment / "bin"), str(commands), os.environ["PATH"]])
    folder, ran = tmp_path, []
    for word, rest in instructions():
        if word == "WORKDIR":
            folder = tmp_path / rest.lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(
                    ROOT / source, folder / target if target != "./" else folder / source
                )
        elif word == "RUN":
            subprocess.run(
                ["sh", "-ec", rest], cwd=folder, env={**os.environ, "PATH": path}, check=True
            )
            ran.append(rest)
        elif word == "ENTRYPOINT":
            entry = re.findall(r'"([^"]+)"', rest)
        else:
            assert word in {"FROM", "USER"}
    code = "import permafrost; print(permafrost.__file__)"
    manifest = yaml.safe_load((ROOT / "docs/howto/rayjob.yaml").read_text())
    job = shlex.split(manifest["spec"]["entrypoint"])
    printed, located, composed = (
        subprocess.run(
            [environment / "bin" / words[0], *words[1:]],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for words in ([*entry, "distill", "--help"], ["python", "-c", code], [*job, "--cfg", "job"])
    )

    assert len(ran) == 3
    assert "method" in printed
    assert yaml.safe_load(composed)["cluster"]["kind"] == "existing"
    assert Path(located.strip()).is_relative_to(tmp_path / "opt/permafrost/pipeline")
