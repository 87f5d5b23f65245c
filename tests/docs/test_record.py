"""Recording of an experiment's committed results from its report."""

import json

import pytest

from docs import measured, record

REPORT = {
    "passes": [{"name": "resnet8-0", "bytes": 12.3456789}],
    "networks": [{"method": "kd", "parameters": 10}],
    "teacher": {"accuracy": 0.8},
    "chance": {"accuracy": 0.1},
    "runs": [
        {"method": "kd", "seed": 0, "accuracy": 1 / 3},
        {"method": "kd", "seed": 1, "accuracy": 0.5},
    ],
    "differences": {},
    "summary": ["KD is a method."],
}


def test_results_come_back_as_they_were_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "EXPERIMENTS", tmp_path)
    results = record.committed_results(
        REPORT, "permafrost sweep experiment=mine", "2 cores", "held-out images"
    )

    (tmp_path / "mine.results.json").write_text(record.one_row_a_line(results))

    assert measured.results_of("mine") == {
        "command": "permafrost sweep experiment=mine",
        "machine": "2 cores",
        "chosen_on": "held-out images",
        "teacher": {"accuracy": 0.8},
        "runs": [
            {"method": "kd", "seed": 0, "accuracy": 0.33333},
            {"method": "kd", "seed": 1, "accuracy": 0.5},
        ],
        "networks": [{"method": "kd", "parameters": 10}],
        "passes": [{"name": "resnet8-0", "bytes": 12.34568}],
    }
    assert [run["seed"] for run in measured.runs_of("mine", "kd")] == [0, 1]


def test_a_new_measurement_keeps_what_was_added_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "EXPERIMENTS", tmp_path)
    earlier = {"chosen_on": "holdout", "search": [1], "passes": [2], "runs": []}
    (tmp_path / "mine.results.json").write_text(json.dumps(earlier))
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    words = ["record", str(tmp_path / "report.json"), "mine", "--machine", "2 cores"]
    monkeypatch.setattr("sys.argv", words)

    record.main()

    found = measured.results_of("mine")
    assert (found["chosen_on"], found["search"], len(found["runs"])) == ("holdout", [1], 2)
    assert found["passes"] != [2]


def test_on_what_options_were_chosen_must_be_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measured, "EXPERIMENTS", tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    words = ["record", str(tmp_path / "report.json"), "mine", "--machine", "2 cores"]

    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        record.main()

    assert "say on what the options of mine.results.json were chosen" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*words, "--chosen-on", "held-out images, seed 0"])
    record.main()
    assert measured.results_of("mine")["chosen_on"] == "held-out images, seed 0"


def test_every_committed_result_says_on_what_its_options_were_chosen():
    files = list(measured.committed_results().values())

    assert len(files) > 40
    assert [str(path) for path in files if not json.loads(path.read_text()).get("chosen_on")] == []


def test_a_student_has_a_line_of_its_own():
    text = record.one_row_a_line(record.committed_results(REPORT, "make", "2 cores", "nothing"))

    lines = [line for line in text.splitlines() if '"seed"' in line]
    assert [json.loads(line.strip(" ,"))["seed"] for line in lines] == [0, 1]


def test_a_student_without_a_value_has_no_entry_for_it():
    rows = [{"method": "labels", "seed": 0, "accuracy": 0.5, "distilled": None}]

    results = record.committed_results({"runs": rows}, "make", "2 cores", "nothing")

    assert results["runs"] == [{"method": "labels", "seed": 0, "accuracy": 0.5}]


def test_a_report_without_students_is_refused():
    with pytest.raises(ValueError, match="no evaluated students"):
        record.committed_results(
            {"teacher": {"accuracy": 0.8}, "runs": []}, "make", "2 cores", "nothing"
        )
