"""Tables of an evaluator: one column per name, one row per variant, best values marked, missing values left empty."""

from pathlib import Path

from permafrost_report.evaluator_sections import evaluator_sections
from permafrost_report.student_results import StudentResult
from tests.support.papers import needs_papers


def result(variant, seed, fss, **others):
    metrics = {"records": 10, "distance_correlation": {"fss": fss, "blocks": 1, **others}}
    return StudentResult(
        variant=variant, label=variant, seed=seed, folder=Path("nowhere"), metrics={"test": metrics}
    )


def test_an_evaluator_that_did_not_look_has_no_section():
    nobody = StudentResult(
        variant="a", label="a", seed=0, folder=Path("nowhere"), metrics={"test": {"records": 1}}
    )

    assert evaluator_sections([nobody], None, store=None) == []


@needs_papers
def test_each_quantity_is_a_table_of_means_over_seeds():
    results = [
        result("kd", 0, {"layer1": 0.2, "pooled": 0.4}),
        result("kd", 1, {"layer1": 0.4, "pooled": 0.6}),
        result(
            "e2kd", 0, {"layer1": 0.1, "pooled": 0.9}, rs={"teacher_given_student": {"pooled": 0.3}}
        ),
    ]

    (section,) = evaluator_sections(results, None, store=None)

    fss, rs = section.tables
    assert fss.caption == "FSS: teacher against student, by layer of the student; split test"
    assert [column.name for column in fss.columns] == ["layer1", "pooled"]
    kd, e2kd = fss.rows
    assert (kd["method"], kd["seeds"], kd["pooled"]["mean"]) == ("kd", 2, 0.5)
    assert (kd["layer1"]["best"], e2kd["pooled"]["sd"]) == (False, None)
    assert fss.meaning.startswith("Similarity of the student's features to the teacher's")
    assert not e2kd["pooled"]["best"]  # a single seed is no better than others
    assert [row["pooled"] and row["pooled"]["mean"] for row in rs.rows] == [None, 0.3]
    assert not rs.rows[1]["pooled"]["best"]  # no other value to compare with
    assert [plot.source[:19] for plot in section.plots] == ["data:image/svg+xml;"]


@needs_papers
def test_a_evaluated_teacher_stands_first_and_is_not_ranked():
    teacher = result("teacher", 0, {"pooled": 1.0}, relevance={"pooled": 0.9})

    (section,) = evaluator_sections(
        [result("kd", 0, {"pooled": 0.5}, relevance={"pooled": 0.2})], teacher, store=None
    )

    relevance = section.tables[1]
    assert [row["method"] for row in relevance.rows] == ["teacher", "kd"]
    assert not any(row["pooled"]["best"] for row in relevance.rows)
