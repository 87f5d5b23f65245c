"""Content of a page: the students of a run, their teacher, a given network, and how they compare, read from disk."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from permafrost.config.points import point_label
from permafrost.evaluation.results import threshold_of
from permafrost.evaluation.trained_student import UNTRAINED, TrainedStudent
from permafrost.runs.folder import SWEEP_NAME, RunFolder
from permafrost.store.reader import Store
from permafrost_report.case_pictures import SplitCases, show_cases
from permafrost_report.cases import open_pair
from permafrost_report.class_results import ClassSection, class_section, score_rows
from permafrost_report.comparison import (
    ONE_SEED,
    differences_by_column,
    seeds_in_words,
    variant_difference,
)
from permafrost_report.conclusions import (
    chance_remarks,
    conclusions,
    remarks_in_words,
    student_to_ship,
    unmeasured_accuracy,
)
from permafrost_report.figures import colors_of
from permafrost_report.main_table import (
    Column,
    accuracy_limit,
    chance_row,
    columns_of,
    compared_column,
    passes_of_variants,
    student_rows,
    teacher_rows,
    variant_summary,
)
from permafrost_report.model_selection import (
    ModelSelection,
    curve_of,
    load_selection,
    reservations,
    ties_in_words,
)
from permafrost_report.options import ReportConfig, ReportOptions
from permafrost_report.passes import UsedPass, check_named_passes, describe_passes, used_passes
from permafrost_report.pictures import readable_classes
from permafrost_report.provenance import network_rows
from permafrost_report.run_commands import shown_command, without_folders
from permafrost_report.student_results import (
    StudentResult,
    epoch_curves,
    load_network,
    load_results,
    load_teacher,
    names_of_runs,
    split_by_evaluation,
    untrained_results,
)

logger = logging.getLogger("permafrost.report")


@dataclass(frozen=True, kw_only=True)
class PageContent:
    """Content of a page."""

    config: ReportConfig
    store: Store
    results: list[StudentResult]
    """All students, also one that was not evaluated yet."""
    values: dict[str, Any]
    """Content of report.json."""
    columns: Sequence[Column]
    compared: Column | None
    """Column by which variants are compared."""
    teacher: StudentResult | None
    network: StudentResult | None
    """Given network that was evaluated in this run (evaluate model=network)."""
    selection: ModelSelection | None
    cases: list[SplitCases]
    classes: ClassSection | None
    """Accuracy by class and confusions, None without single labels."""
    used_passes: list[UsedPass]
    """Passes of the store that the students learned from or were compared with."""
    next_command: str
    """Command that evaluates a student without results, or the one that the config names."""

    @property
    def options(self) -> ReportOptions:
        """Section `report` of the config."""
        return self.config.report

    @property
    def colors(self) -> dict[str, str]:
        """Color of each network in the plots."""
        networks = [*self.results, *([self.network] if self.network else [])]
        labels = dict.fromkeys(one.label for one in [*networks, *split_by_evaluation(networks)])
        return colors_of(list(labels), self.teacher.label if self.teacher else None)

    @property
    def headline(self) -> str:
        """Difference of candidate and baseline in one line, empty if there is none."""
        difference, column = self.values.get("candidate_minus_baseline"), self.compared
        if difference is None or column is None:
            return ""
        opening = (
            f"{self.options.candidate} - {self.options.baseline} in {column.name}: "
            f"{column.difference(difference['mean'])}"
        )
        if difference["interval"] is None:
            return f"{opening} ({ONE_SEED})"
        low, high = (column.difference(bound, unit=False) for bound in difference["interval"])
        seeds = seeds_in_words(*difference["seeds"], images=difference["images"])
        return f"{opening} (95 % interval {low} to {high} by Welch's t, {seeds})"


def gather_page(config: ReportConfig) -> PageContent:
    """Gather what the page of a run shows, without training or evaluating anything.

    Raises:
        UnknownRunError: If the run does not exist.
        ConfigError: If report.columns or store.teacher names what no student has.
        DamagedFileError: If a file of a run is damaged.
    """
    store = Store(config.store.folder)
    results = load_results(config.run, config.report.runs, store)
    students = [result for result in results if result.is_evaluated]
    teacher, network = load_teacher(config.run, store), load_network(config.run, store)
    logger.info(
        "report of %s and of run %s: %d students, %d of them evaluated%s",
        config.store.path,
        config.run,
        len(results),
        len(students),
        ", and a given network" if network else "",
    )
    evaluated = students or ([network] if network else [])
    used = used_passes(results, store)
    check_named_passes(config.store.teacher, used, store)
    selection = load_selection(config.run)
    config = replace(config, report=_without_unknown_columns(config, evaluated))
    options = _with_named_runs(config, results)
    config = replace(config, report=options)
    columns = columns_of(options.columns, evaluated) if evaluated else []
    if evaluated:
        options.check_names([column.name for column in columns])
    compared = compared_column(options.compared_column, columns)
    pair = (
        open_pair(config, [student for student in students if student.trains_classifier])
        if students and options.cases and store.form.has_places
        else None
    )
    cases = show_cases(pair, options) if pair else []
    networks = network_rows(results, RunFolder(config.run).path / "report.times.json")
    values: dict[str, Any] = {"passes": describe_passes(store)}
    if results:
        values |= {"networks": list(networks.values())}
        values |= _student_values(config.run, results, store)
    following = options.next_command
    if waiting := values.get("unevaluated"):
        following = waiting["command"]
        waiting["command"] = shown_command(shlex.split(following)[1:])
    if compared:
        values |= _result_values(
            options, evaluated, columns, compared, teacher, networks, len(store.manifest.classes)
        )
        trained = [one for one in students if one.trains_classifier and one.run in networks]
        if best_student := student_to_ship(values["runs"], trained, compared, selection):
            words = ["export", f"run={best_student[0].run}"]
            following = following or shlex.join(["permafrost", *words])
            values["export"] = {"command": shown_command(words), "reason": best_student[1]}
    if untrained := list(
        dict.fromkeys(student.label for student in students if not student.trains_classifier)
    ):
        sentence = f"The last layer of {', '.join(untrained)} was {UNTRAINED}."
        values["summary"] = [*values.get("summary", []), sentence]
    values["remarks"] = {
        **values.get("remarks", {}),
        **dict.fromkeys(untrained, "last layer not trained"),
        **_threshold_remarks(students),
    }
    if network:
        values["network"] = network.numbers
    if cases:
        values["cases"] = [case for split in cases for case in split.chosen]
    if classes := class_section(
        evaluated, readable_classes(store.manifest.classes), options.candidate
    ):
        values["classes"] = classes.values
    if selection:
        values["selection"] = {
            "select": selection.select,
            "ties": ties_in_words(selection),
            "candidates": [
                {
                    "variant": candidate.variant,
                    "point": candidate.point,
                    "label": point_label(candidate.point),
                    "seeds": len(candidate.values),
                    "chosen": candidate.chosen,
                    **candidate.summary,
                }
                for candidate in selection.candidates
            ],
        }
    if sentences := reservations(config.run, results, selection):
        values["summary"] = [*sentences, *values.get("summary", [])]
    return PageContent(
        config=config,
        store=store,
        results=results,
        values=values,
        columns=columns,
        compared=compared,
        teacher=teacher,
        network=network,
        selection=selection,
        cases=cases,
        classes=classes,
        used_passes=used,
        next_command=following,
    )


def _threshold_remarks(students: Sequence[StudentResult]) -> dict[str, str]:
    """Return how the labels of each variant are predicted, if their thresholds are not at a probability of 0.5."""
    chosen = {student.label: threshold_of(student.evaluation) for student in students}
    if not any(chosen.values()):
        return {}
    return {
        label: f"threshold {value or 0.5}"
        if not isinstance(value, str)
        else f"thresholds of {value}"
        for label, value in chosen.items()
    }


def _without_unknown_columns(config: ReportConfig, results: list[StudentResult]) -> ReportOptions:
    """Return the options without the columns of an experiment that no student has, or a student outside a sweep.

    A command may name fewer evaluators than its experiment. A column that was typed stays, so
    that its absence is an error.
    """
    options = config.report
    is_typed = not config.command or any(
        word.startswith("report.columns") for word in config.command
    )
    if is_typed and ((RunFolder(config.run).path / SWEEP_NAME).exists() or len(results) != 1):
        return options
    if missing := {
        name: source
        for name, source in options.columns.items()
        if all(result.find(source) is None for result in results)
    }:
        logger.info("without the columns %s, which were not evaluated", ", ".join(missing.values()))
    return replace(
        options,
        columns={name: source for name, source in options.columns.items() if name not in missing},
        compared_column=None if options.compared_column in missing else options.compared_column,
        plotted=tuple(name for name in options.plotted if name not in missing),
    )


def _with_named_runs(config: ReportConfig, results: Sequence[StudentResult]) -> ReportOptions:
    """Return the options with the run's own variants called as in the report, whose names may have the run's."""
    labels = {result.label for result in results}
    names = names_of_runs([config.run, *config.report.runs])

    def full(variant: str) -> str:
        variant = names.get(variant, variant)
        prefixed = f"{names[config.run]}: {variant}"
        return prefixed if variant not in labels and prefixed in labels else variant

    options = config.report
    return replace(
        options,
        baseline=full(options.baseline),
        candidate=full(options.candidate),
        baselines={full(variant): full(other) for variant, other in options.baselines.items()},
    )


def _student_values(run: str, results: list[StudentResult], store: Store) -> dict[str, Any]:
    """Curves of the students, and the command that evaluates one without results."""
    values: dict[str, Any] = {}
    if curves := epoch_curves(results):
        values["curves"] = curves
    missing = next((result for result in results if not _has_results(result)), None)
    if missing is not None:
        command = TrainedStudent(missing.training_folder).evaluate_command(run, store)
        logger.info("%s was not evaluated yet; run: %s", missing.folder, command)
        values["unevaluated"] = {"label": missing.label, "command": command}
    return values


def _has_results(result: StudentResult) -> bool:
    """Return whether a student was evaluated, one whose last layer was not trained by its features."""
    if result.trains_classifier:
        return result.is_evaluated
    return any(name != "records" for metrics in result.numbers.values() for name in metrics)


def _result_values(
    options: ReportOptions,
    results: list[StudentResult],
    columns: list[Column],
    compared: Column,
    teacher: StudentResult | None,
    networks: Mapping[str, dict[str, Any]],
    classes: int,
) -> dict[str, Any]:
    """Rows of teacher, chance and students, and their comparison."""
    rows = score_rows(student_rows(results, columns), results, columns)
    for row, result in zip(rows, results, strict=True):
        row |= {"run": without_folders(result.run)} | networks.get(result.run, {})
    teachers, chance = teacher_rows(results, columns, teacher), chance_row(results, columns)
    values: dict[str, Any] = {
        "teacher": next(iter(teachers.values()), {}),
        **({"teachers": teachers} if len(teachers) > 1 else {}),
        "chance": chance,
        "random_networks": variant_summary(
            student_rows(untrained_results(results), columns), columns
        ),
        "runs": rows,
        "variants": variant_summary(rows, columns, passes_of_variants(results)),
    }
    pair = (options.candidate, options.baseline)
    if _has_a_pair(results, options):
        values["candidate_minus_baseline"] = variant_difference(rows, *pair, compared.name)
    differences = differences_by_column(
        rows, options.baseline, options.baselines, [column.name for column in columns]
    )
    values["differences"] = (
        differences.get(compared.name, {}) if len({row["method"] for row in rows}) > 2 else {}
    )
    values["differences_by_column"] = differences
    is_trained = results[0].seed is not None  # a given network alone is not a variant
    values["summary"] = (
        conclusions(rows, compared, pair, teachers=teachers, chance=chance) if is_trained else []
    )
    if is_trained and (limit := accuracy_limit(results, [compared, *columns])):
        values["remarks"] = chance_remarks(rows, *limit)
        values["summary"] += remarks_in_words(values["remarks"], limit[0], teachers, limit[1])
    unlabeled = {row["method"]: row for row in rows if row.is_unlabeled}
    values["summary"] += [
        unmeasured_accuracy(row, unlabeled, classes) for row in list(unlabeled.values())[:1]
    ]
    values["remarks"] = {
        **values.get("remarks", {}),
        **dict.fromkeys(unlabeled, "accuracy not measured"),
    }
    return values


def _has_a_pair(results: list[StudentResult], options: ReportOptions) -> bool:
    """Return whether candidate and baseline can be compared: a variant with several points is not one method."""
    labels = {result.label for result in results}
    several = {curve_of(result) for result in results} - labels
    pair = {options.candidate, options.baseline}
    if not pair & several:
        names = {name.rpartition(": ")[2] for name in pair}  # see _with_named_runs
        return names != {ReportOptions.candidate, ReportOptions.baseline} or pair <= labels
    logger.info(
        "no difference of candidate and baseline, because of several grid points in %s; sweep with select=, or "
        "name one point of each variant, as in report.candidate='%s'",
        ", ".join(sorted(several)),
        next(result.label for result in results if curve_of(result) != result.label),
    )
    return False
