"""Name of the distribution: no page and no message names the package of another project on PyPI."""

import ast
import re
import tomllib
from datetime import date

import pytest
import yaml

from permafrost.config.version import __version__
from tests.support.pages import PAGES
from tests.support.paths import ROOT

WRONG = re.compile(r"pip3? install [^\n`]*\bpermafrost\b(?!-kd)|\bpermafrost\[[a-z]")
"""Commands that install, or requirements of, the distribution `permafrost`."""


def strings_of(path):
    """Constants of a Python file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


@pytest.mark.parametrize(
    ("text", "is_wrong"),
    [
        ("pip install permafrost", True),
        ("uv pip install -U 'permafrost[cloud]'", True),
        ("install permafrost[onnx]", True),
        ("pip install permafrost-kd", False),
        ("pip install obstore", False),
        ("permafrost teach; `pip install timm`, then permafrost", False),
    ],
)
def test_the_pattern_tells_both_names_apart(text, is_wrong):
    assert bool(WRONG.search(text)) == is_wrong


def test_no_page_installs_the_package_of_another_project():
    wrong = [
        f"{page.relative_to(ROOT)}: {found[0]}"
        for page in {*PAGES, ROOT / "README.md", *ROOT.glob("docs/**/*.md")}
        for found in WRONG.finditer(page.read_text(encoding="utf-8"))
    ]

    assert wrong == []


def test_no_message_installs_the_package_of_another_project():
    files = [*ROOT.glob("pipeline/permafrost/**/*.py"), *ROOT.glob("stages/*.py")]
    wrong = [
        f"{path.relative_to(ROOT)}: {text!r}"
        for path in files
        for text in strings_of(path)
        if WRONG.search(text)
    ]

    assert len(files) > 200
    assert wrong == []


def test_the_distribution_has_a_name_of_its_own_and_the_command_does_not_change():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [r for extra in project["optional-dependencies"].values() for r in extra]

    assert project["name"] == "permafrost-kd"
    assert project["scripts"]["permafrost"] == "permafrost.__main__:main"
    assert [r for r in requirements if r.startswith("permafrost")] == [
        "permafrost-kd[report,papers,timm,transformers,demo,onnx,cloud,heic]",
        "permafrost-kd[all]",
    ]


def test_the_version_is_one_number():
    heading = re.search(r"^## (\S+) \((\S+)\)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())

    assert heading[1] == cited["version"] == __version__
    assert heading[2] in ("unreleased", str(cited["date-released"]))
    assert isinstance(cited["date-released"], date)
    assert re.fullmatch("[0-9a-f]{40}", cited["commit"])
