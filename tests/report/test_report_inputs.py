"""A repeated report: nothing is written while its inputs are the same, and all of it as soon as one differs."""

from pathlib import Path

import pytest

from permafrost.config.page_options import ReportOptions
from permafrost.config.runs import RUNS
from permafrost.config.store import StoreOptions
from permafrost.config.verbs import ReportConfig
from permafrost.report import page
from permafrost.report import page_inputs as inputs
from stages import report
from tests.support import run_files
from tests.support.runs import PAD_CROP

STUDENT = RUNS / "sweep/students/kd-0"


@pytest.fixture
def written(frozen, monkeypatch):
    """Function that makes the report of a student with the given options, and says whether it was rendered."""
    for folder in (STUDENT / "evaluate", STUDENT / "distill"):
        folder.mkdir(parents=True)
    _write_metrics(0.5)
    _write_line(1.0)
    run_files.write_config(STUDENT / "distill/config.yaml", "seed: 0\n")
    _write_sweep("kd")
    rendered = []
    render = page.render_page
    monkeypatch.setattr(page, "render_page", lambda page: rendered.append(page) or render(page))

    def write(**options):
        rendered.clear()
        config = ReportConfig(
            store=StoreOptions(path=str(frozen.store.path)),
            augment=PAD_CROP,
            report=ReportOptions(contact_records=2, cases=0, **options),
            run="sweep",
        )
        return report.run(config), bool(rendered)

    return write


def _write_metrics(accuracy):
    splits = {"test": {"records": 10, "accuracy": accuracy}}
    run_files.write_metrics(STUDENT / "evaluate", splits)


def _write_line(total):
    run_files.write_lines(STUDENT / "distill", [{"step": 1, "total": total}])


def _write_sweep(arm, run="sweep"):
    row = {"arm": arm, "point": {}, "seed": 0, "run": STUDENT.relative_to(RUNS).as_posix()}
    run_files.write_table(RUNS / run, [row])


def test_the_same_command_says_the_same_and_writes_nothing(written):
    first, rendered = written()
    before = {path: path.stat().st_mtime_ns for path in RUNS.rglob("*")}

    again, rendered_again = written()

    assert (rendered, rendered_again) == (True, False)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in RUNS.rglob("*")} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda: _write_metrics(0.6),
        lambda: _write_line(2.0),
        lambda: _write_sweep("kd2"),
        lambda: (RUNS / "sweep/report.html").write_text("damaged"),
        lambda: (RUNS / "sweep/report.csv").unlink(),
        lambda: (RUNS / "sweep/.report-inputs.json").write_text("{"),
    ],
)
def test_any_other_input_or_output_is_seen(written, change):
    written()
    change()

    _, rendered = written()

    assert rendered
    assert "damaged" not in Path(RUNS / "sweep/report.html").read_text()


def test_other_options_and_other_code_are_seen(written, monkeypatch, tmp_path):
    written()

    assert written(title="Another title")[1]
    monkeypatch.setattr(inputs, "_CODE", tmp_path)
    assert written(title="Another title")[1]


def test_another_name_for_a_student_of_another_run_is_seen(written):
    _write_sweep("at", "other")
    written(runs=("other",))
    assert not written(runs=("other",))[1]

    _write_sweep("ft", "other")

    assert written(runs=("other",))[1]


def test_a_large_file_is_compared_by_its_time(written, monkeypatch):
    monkeypatch.setattr(inputs, "_COMPARED_BY_CONTENT", 3)
    weights = STUDENT / "distill/model.safetensors"
    weights.write_bytes(b"12345")
    written()
    weights.write_bytes(b"54321")

    assert written()[1]
