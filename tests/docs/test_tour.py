"""The notebook docs/tour.ipynb: it is committed without outputs, and it runs."""

import json

import pytest

from tests.support.paths import ROOT

TOUR = ROOT / "docs" / "tour.ipynb"


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads(TOUR.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]

    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


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
    assert len(pictures) == 1
