"""The numbers of a report for other programs: CSV files for pandas, and a table of the variants in LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from permafrost.runs.folder import RunFolder
from permafrost_report.class_results import score_rows
from permafrost_report.comparison import mean_interval
from permafrost_report.main_table import Column, student_rows, variant_summary
from permafrost_report.run_commands import without_folders
from permafrost_report.student_results import StudentResult


def number_tables(
    results: Sequence[StudentResult], networks: Sequence[Mapping[str, Any]]
) -> tuple[str, str]:
    """Format every number of every evaluator as CSV, with fractions as they are and no value as an empty cell.

    Args:
        results: Results of the students.
        networks: Rows of the students' networks, from `network_rows`.

    Returns:
        A table with a row for each student and split; and one with a row for each variant, split and metric, with mean,
        standard deviation `sd`, and the 95 % interval from `low` to `high`.
    """
    students: list[dict[str, Any]] = []
    variants: list[dict[str, Any]] = []
    facts = {row["run"]: row for row in networks}
    for split in dict.fromkeys(split for result in results for split in result.numbers):
        members = [result for result in results if split in result.numbers]
        columns = [
            Column(name=name, source=f"{split}.{name}")
            for name in dict.fromkeys(name for result in members for name in result.numbers[split])
            if name != "records"
        ]
        scored = score_rows(student_rows(members, columns), members, columns)
        keys = {
            result.label: {
                **result.point,
                "split": split,
                "records": result.numbers[split]["records"],
            }
            for result in members
        }
        students += [
            {"method": result.label, "seed": result.seed, **keys[result.label], **row}
            | {"run": without_folders(result.run), **facts.get(without_folders(result.run), {})}
            | {"folder": without_folders(str(result.evaluation))}
            for result, row in zip(members, scored, strict=True)
        ]
        variants += [
            {"method": variant["method"], **keys[variant["method"]], "metric": column.name}
            | {"seeds": variant["seeds"], "mean": summary["mean"], "sd": summary["sd"]}
            | dict(zip(("low", "high"), mean_interval(summary, variant["seeds"]), strict=False))
            for variant in variant_summary(scored, columns)
            for column in columns
            if (summary := variant[column.name])
        ]
    return _csv(students), _csv(variants)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---- latex -----------------------------------------------------------------------------------------


_COMMANDS = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$", "↓": r"$\downarrow$"}
)
"""Characters that LaTeX reads as commands, or lacks."""


def latex_table(
    results: Sequence[StudentResult],
    variants: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    run: str,
) -> str:
    """Format the variants as a table of the package booktabs, with a caption that says what its numbers are.

    Args:
        results: Results of the students.
        variants: Rows of the variants, from `variant_summary`.
        columns: Columns of the table.
        run: Name of the run.
    """
    records = {
        split: f"{split} ({numbers['records']:,.0f} records)"
        for result in results
        for split, numbers in result.numbers.items()
        if any(column.source.startswith((f"{split}.", "all.")) for column in columns)
    }
    caption = (
        f"Evaluated on {' and '.join(records.values())}. ± is the standard deviation over seeds; brackets are 95 % "
        "intervals, of accuracies over test images and seeds, of other numbers over seeds (Student's t). Bold: not "
        "conclusively below the best mean; nothing is bold without a conclusive difference. Students in "
        f"{without_folders(str(RunFolder(run).path))}."
    )
    head, *body = (
        " & ".join(cells) + r" \\"
        for cells in (
            ["variant", "seeds", *(column.title.translate(_COMMANDS) for column in columns)],
            *(
                [str(variant["method"]).translate(_COMMANDS), str(variant["seeds"])]
                + [_cell(column, variant[column.name], variant["seeds"]) for column in columns]
                for variant in variants
            ),
        )
    )
    lines = (
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption.translate(_COMMANDS)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(columns) + 1)}}}",
        *(r"\toprule", head, r"\midrule", *body, r"\bottomrule"),
        r"\end{tabular}",
        r"\end{table}",
    )
    return "\n".join(lines)


def _cell(column: Column, summary: Mapping[str, Any] | None, seeds: int) -> str:
    """Format mean, deviation and interval, in bold for the best."""
    if summary is None:
        return "--"
    interval = ", ".join(map(column.text, mean_interval(summary, seeds)))
    text = column.spread(summary).translate(_COMMANDS)
    return (rf"\textbf{{{text}}}" if summary["best"] else text) + f" [{interval}]" * bool(interval)
