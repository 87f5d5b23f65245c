"""The notebook docs/tour.ipynb: it is committed with its outputs, and it runs."""

import json

import pytest

from tests.support.paths import ROOT

TOUR = ROOT / "docs" / "tour.ipynb"
PICTURES = 3


def test_the_notebook_is_committed_with_its_outputs():
    cells = json.loads(TOUR.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]

    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == PICTURES
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert "/tmp/" not in json.dumps([output.get("text") for output in outputs])


@pytest.mark.slow
def test_the_notebook_runs():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(TOUR, as_version=4)

    nbclient.NotebookClient(
        notebook, timeout=None, resources={"metadata": {"path": ROOT / "docs"}}
    ).execute()

    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == PICTURES
