"""The report's page in a browser: self-contained, accessible by keyboard, sortable and filterable."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from urllib.parse import unquote

import pandas as pd
import pytest

from permafrost.core.errors import ConfigError
from permafrost.runs.mirrors import RUNS
from permafrost_report import provenance
from permafrost_report.main_table import Column, variant_summary
from permafrost_report.number_files import latex_table
from permafrost_report.student_results import StudentResult, load_results
from tests.support import run_files
from tests.support.html_page import Page
from tests.support.papers import needs_papers
from tests.support.runs import report_config
from tests.support.verbs import report

METHODS = {"labels": (0.2, 0.3), "kd": (0.5, 0.7), "e2kd": (0.6, 0.9)}
CLEAR = {
    "noise": (0.05, 0.1, 0.9),
    "labels": (0.4, 0.41, 0.42),
    "kd": (0.5, 0.7, 0.9),
    "e2kd": (0.9, 0.92, 0.91),
}
"""Means that differ by more than the seeds do, except that kd and noise have a wide spread."""
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def write_sweep(
    run="sweep", methods=METHODS, evaluator=True, extra=MappingProxyType({}), first=0, options=""
):
    """Write the results of two students per variant as a sweep does, without their networks."""
    rows = []
    for variant, values in methods.items():
        for seed, value in enumerate(values, first):
            student = f"{run}/students/{variant}-{seed}"
            folder = RUNS / student
            (folder / "distill").mkdir(parents=True)
            (folder / "evaluate").mkdir()
            metrics = {"records": 10, "accuracy": value, "agreement": value / 2, **extra}
            if evaluator:
                metrics["distance_correlation"] = {"fss": {"layer1": value, "pooled": value / 3}}
            run_files.write_metrics(folder / "evaluate", {"test": metrics})
            lines = [{"step": step, "total": 1 / step} for step in (1, 2)]
            run_files.write_lines(folder / "distill", lines)
            run_files.write_config(folder / "distill/config.yaml", f"seed: {seed}\n{options}")
            name = student.removeprefix(f"{run}/")
            rows.append({"variant": variant, "point": {}, "seed": seed, "run": name})
    run_files.write_table(RUNS / run, rows)


def page_and_values(frozen, **options):
    result = report.run(report_config(frozen, "sweep", contact_records=2, **options))
    return Path(result.html), json.loads(Path(result.json).read_text())


@pytest.fixture(scope="module")
def page(frozen, tmp_path_factory):
    """Page of a sweep, which tests only read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        write_sweep()
        return page_and_values(frozen)[0].resolve()


def test_a_page_needs_nothing_but_itself(page):
    html = page.read_text()
    parsed = Page(html)

    assert parsed.open == []
    assert all(image["src"].startswith("data:image/") for image in parsed.all("img"))
    assert parsed.all("link") == []
    assert all("src" not in script for script in parsed.all("script"))
    assert not re.search(r"https?:|url\(|@import", re.sub(r'src="data:[^"]*"', "", html))
    for style in ("prefers-color-scheme: dark", "max-width: 40rem", "@media print"):
        assert style in html


@needs_papers
def test_everything_is_reachable_and_named(page):
    parsed = Page(page.read_text())

    targets = [link["href"].removeprefix("#") for link in parsed.all("a")]
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert {"results", "distance_correlation", "training", "store", "cost", "runs"} <= set(targets)
    assert set(targets) <= set(ids)
    assert len(ids) == len(set(ids))
    assert all(image["alt"] for image in parsed.all("img"))
    assert {label["for"] for label in parsed.all("label")} == {i["id"] for i in parsed.all("input")}
    wide = [a for _, a in parsed.tags if a.get("class") == "scroll"]
    assert wide
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in wide)
    assert parsed.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in parsed.all(
        "meta"
    )


@needs_papers
def test_what_a_first_reader_looks_for_stands_before_the_sections_of_single_evaluators(page):
    parsed = Page(page.read_text())

    headings = [heading["id"] for heading in parsed.all("h2")]
    links = [link["href"].removeprefix("#") for link in parsed.all("a")][1:]
    assert headings[:3] == ["summary", "results", "training"]
    assert headings.index("setup") < headings.index("distance_correlation")
    assert links == [anchor for anchor in headings if anchor in links]


def differences_of(html):
    """Table of differences in a page."""
    return html[html.index('data-file="differences"') :].partition("</table>")[0]


def marked_variants(html, column=0):
    table = html[html.index('data-file="results"') : html.index('data-file="differences"')]
    rows = re.findall(r'<tr data-method="(\w+)">(.*?)</tr>', table, re.DOTALL)
    return [
        variant
        for variant, row in rows
        if 'class="best"' in re.findall("<td.*?</td>", row)[1 + column]
    ]


def test_variants_above_the_first_that_is_conclusively_below_the_best_are_marked(frozen):
    write_sweep(methods=CLEAR)

    html = page_and_values(frozen)[0].read_text()

    # Neither kd nor noise is conclusively below e2kd, but noise has a lower mean than labels, which is.
    assert [marked_variants(html, column) for column in (0, 1)] == [["kd", "e2kd"]] * 2
    assert "conclusively below the best mean" in html


def test_no_variant_of_two_seeds_is_marked(frozen):
    write_sweep(methods={variant: values[:2] for variant, values in CLEAR.items()})

    assert marked_variants(page_and_values(frozen)[0].read_text()) == []


def test_no_variant_is_marked_without_a_conclusive_difference(page):
    assert marked_variants(page.read_text()) == []
    assert 'class="best"' not in page.read_text()


def test_other_runs_join_and_keep_apart_by_their_name(frozen):
    write_sweep()
    write_sweep("other", {"kd": (0.1, 0.2), "at": (0.4, 0.5)}, evaluator=False)

    _, values = page_and_values(frozen, runs=("other", "sweep/students/labels-1"))

    methods = list(dict.fromkeys(row["method"] for row in values["runs"]))
    assert methods == ["labels", "sweep: kd", "e2kd", "other: kd", "at", "sweep/students/labels-1"]
    assert values["runs"][-1] == {
        "method": "sweep/students/labels-1", "seed": 1, "accuracy": 0.3, "agreement": 0.15,
        "run": "sweep/students/labels-1",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"report\.runs names nobody"):
        page_and_values(frozen, runs=("nobody",))


def test_the_variants_of_the_run_itself_are_compared_where_other_runs_have_variants_of_the_same_names(
    frozen, caplog
):
    caplog.set_level("INFO", "permafrost.report")
    write_sweep()
    _, alone = page_and_values(frozen)
    write_sweep("other", {"kd": (0.1, 0.2), "e2kd": (0.4, 0.5)})

    _, values = page_and_values(frozen, runs=("other",))

    assert values["candidate_minus_baseline"] == alone["candidate_minus_baseline"]
    assert "grid points" not in caplog.text


def test_a_page_needs_no_pair_where_several_runs_have_one_variant_of_the_default_pair(frozen):
    write_sweep(methods={"kd": (0.5, 0.7)})
    write_sweep("other", {"kd": (0.1, 0.2)})

    _, values = page_and_values(frozen, runs=("other",))

    assert "candidate_minus_baseline" not in values
    assert {row["method"] for row in values["runs"]} == {"sweep: kd", "other: kd"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("report", "experiment=demo"), None),
        (("report", "report.columns={e: all.epg}"), "no student has all.epg"),
    ],
)
def test_a_column_that_was_not_evaluated_is_an_error_only_if_it_is_typed(frozen, words, message):
    write_sweep()
    columns = {"accuracy": "test.accuracy", "epg": "all.epg"}
    config = report_config(frozen, "sweep", words, columns=columns)

    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        values = json.loads(Path(report.run(config).json).read_text())
        assert [name for name in values["runs"][0] if name in columns] == ["accuracy"]


def test_the_points_of_another_run_s_grid_leave_the_variants_of_the_run_itself_comparable(
    frozen, caplog
):
    caplog.set_level("INFO", "permafrost.report")
    write_sweep()
    write_sweep("grid", {"kd": (0.1, 0.2)})
    rows = run_files.read_signed(RUNS / "grid/sweep.json")["runs"]
    several = [{**row, "point": {"method.tau": 2 ** row["seed"]}} for row in rows]
    run_files.change_signed(RUNS / "grid/sweep.json", {"runs": several})

    _, values = page_and_values(frozen, runs=("grid",))

    assert {row["method"] for row in values["runs"]} == {*METHODS, "kd tau=1", "kd tau=2"}
    assert values["candidate_minus_baseline"]["mean"] == pytest.approx(0.15)
    assert "grid points" not in caplog.text


def test_a_column_that_some_have_leaves_the_others_open(frozen):
    write_sweep(methods={"kd": (0.5, 0.7), "e2kd": (0.6, 0.8)})
    for seed in (0, 1):
        path = RUNS / f"sweep/students/kd-{seed}/evaluate/metrics.json"
        metrics = run_files.read_signed(path)
        del metrics["splits"]["test"]["agreement"]
        run_files.change_signed(path, metrics)

    html, values = page_and_values(frozen)

    assert [row["agreement"] for row in values["runs"]] == [None, None, 0.3, 0.4]
    assert '<td data-value="">&ndash;</td>' in html.read_text()


def digest_of(text: str) -> str:
    """Source of a policy that allows this text as a script or a style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_policy_allows_the_page_s_own_style_and_script_and_nothing_else(page):
    html = page.read_text()
    (policy,) = (
        meta["content"] for meta in Page(html).all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )  # fmt: skip
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)

    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))

    assert rules == {
        "default-src": "'none'",
        "style-src": digest_of(style),
        "script-src": digest_of(script),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert html.index("Content-Security-Policy") < html.index("<style>")


def test_no_tag_has_a_style_or_a_handler_that_the_policy_would_block(page):
    tags = Page(page.read_text()).tags

    blocked = [
        (tag, name) for tag, attributes in tags for name in attributes
        if name == "style" or name.startswith("on") or name in ("srcset", "srcdoc", "action")
    ]  # fmt: skip
    links = [attributes["href"] for tag, attributes in tags if "href" in attributes]

    assert blocked == []
    assert all(link.startswith("#") for link in links)


def test_every_table_has_a_sentence_above_it_and_a_name_for_its_file(page):
    html = page.read_text()
    tables = re.findall(
        r'(.{0,450})<table class="(?:sortable|facts)" data-file="(\w*)"', html, re.S
    )

    assert {"results", "runs", "passes", "setup", "cost"} <= {name for _, name in tables}
    for before, name in tables:
        assert 'class="meaning"' in before or name == "teacher", name


def test_a_variant_near_chance_has_a_remark_in_the_table_and_in_the_summary(frozen):
    write_sweep(extra={"majority_accuracy": 0.1})

    html, values = page_and_values(frozen)

    assert values["remarks"] == {
        "labels": "not clearly above the most frequent class"
    }  # 0.25 of 10 records
    assert values["summary"][-1].startswith(
        "The accuracy of labels is not clearly above the most frequent class"
    )
    remarked = re.findall(
        r'data-csv="(\w+)" dir="auto">\w+ <span class="remark">([^<]*)', html.read_text()
    )
    assert remarked == [("labels", "not clearly above the most frequent class")]


def test_one_seed_has_no_spread_no_best_and_no_conclusion(frozen, capsys):
    write_sweep(methods={variant: values[:1] for variant, values in METHODS.items()})

    html, values = page_and_values(frozen)

    text = html.read_text()
    assert "1 seed: no spread known" in text
    assert "not conclusive" in values["summary"][0]
    assert 'class="best"' not in text
    assert "&plusmn;" not in text
    assert "standard deviation 0.0" not in text
    assert values["candidate_minus_baseline"]["interval"] is None


def test_every_column_has_the_differences_from_the_baseline_with_their_intervals(frozen):
    write_sweep(methods={**METHODS, "at": [value + 0.1 for value in METHODS["kd"]]})

    html, values = page_and_values(frozen)

    assert values["differences"]["at"]["mean"] == pytest.approx(0.1)
    found = values["differences_by_column"]
    assert {column: set(variants) for column, variants in found.items()} == {
        name: {"labels", "e2kd", "at"} for name in ("accuracy", "agreement")
    }
    assert found["agreement"]["e2kd"]["mean"] == pytest.approx(0.075)
    table = differences_of(html.read_text())
    heads = re.findall(r'data-csv="(\w+)"', table)
    assert heads == ["accuracy_minus_kd", "agreement_minus_kd"]
    rows = dict(re.findall(r'<tr data-method="(\w+)">(.*?)</tr>', table, re.DOTALL))
    assert set(rows) == {"labels", "e2kd", "at"}
    assert "+15.0 <span" in rows["e2kd"]
    assert rows["at"].count('class="open">+10.0 <span class="sd">(-50.8 to +70.8)') == 1


def test_the_table_of_differences_names_a_baseline_that_is_a_variants_own(frozen):
    write_sweep(methods={**METHODS, "at": [value + 0.1 for value in METHODS["kd"]]})

    html, values = page_and_values(frozen, baselines={"e2kd": "labels", "at": "at"})

    assert set(values["differences_by_column"]["accuracy"]) == {"labels", "e2kd"}
    text = html.read_text()
    meaning = "Differences from kd, or from the variant that a row names, of the means over seeds"
    assert meaning in text
    assert re.findall(r'<tr data-method="(\w+)"><th[^>]*>([^<]*)</th>', differences_of(text)) == [
        ("labels", "labels"),
        ("e2kd", "e2kd \N{MINUS SIGN} labels"),
    ]


def test_two_variants_have_their_differences_in_every_column_too(frozen):
    write_sweep(methods={"kd": (0.5, 0.7), "e2kd": (0.6, 0.81)})

    _, values = page_and_values(frozen)

    assert set(values["differences_by_column"]["agreement"]) == {"e2kd"}


def test_the_variants_are_described_by_their_methods_and_what_they_set(frozen):
    write_sweep()
    for variant, method in {"labels": "labels", "kd": "kd", "e2kd": "e2kd"}.items():
        for seed in (0, 1):
            path = RUNS / f"sweep/students/{variant}-{seed}/distill/config.yaml"
            tau = "" if variant == "labels" else ", tau: 7.0"
            run_files.write_config(path, f"seed: {seed}\nmethod: {{kind: {method}{tau}}}\n")

    html = page_and_values(frozen)[0].read_text()

    described = dict(re.findall(r"<dt>(\w+)</dt><dd>(.*?)</dd>", html))
    assert described["labels"] == "Labels only: the supervised baseline."
    assert described["kd"].startswith("Soft targets (Hinton et al. 2015): ")
    assert described["e2kd"].endswith("Set here: tau 7.")
    assert "<h1>Distillation report · sweep</h1>" in html
    assert re.search(
        r"<li>Accuracy is the fraction of records whose label is predicted[^<]*</li>", html
    )


@pytest.mark.slow
def test_a_grid_has_a_figure_for_each_plotted_column(frozen):
    write_sweep()
    path = RUNS / "sweep" / "sweep.json"
    rows = run_files.read_signed(path)["runs"]
    for row in rows:
        row["point"] = {"student.superfeatures": 2 ** row["seed"]}
    run_files.change_signed(path, {"runs": rows})

    def figures(**options):
        html = page_and_values(frozen, **options)[0].read_text()
        alts = [image["alt"] for image in Page(html).all("img")]
        return [alt for alt in alts if "over student.superfeatures" in alt]

    assert figures() == ["accuracy over student.superfeatures, one curve per variant"]
    assert len(figures(plotted=("accuracy", "agreement"))) == 2
    with pytest.raises(ConfigError, match=r"plotted=f1 is not one of report\.columns: accura"):
        figures(plotted=("f1",))


@pytest.mark.slow
def test_epg_alone_is_the_compared_column_and_its_chance_level_is_stated(frozen):
    extra = {"epg": 0.6, "iou": 0.4, "epg_uniform": 0.507, "majority_accuracy": 0.1}
    write_sweep(extra=extra)

    alone, values = page_and_values(frozen, columns={"epg": "test.epg"})
    html = alone.read_text()
    by_default, shown = page_and_values(frozen)

    assert "a uniform map would have 50.7 %" in html
    assert "A uniform map has 50.7 %." in html
    assert "which is not worse than chance" not in html
    assert "which is not worse than chance" in by_default.read_text()
    assert values["chance"] == {"epg": 0.507}
    assert values["candidate_minus_baseline"]["mean"] == 0
    assert list(shown["runs"][0])[:6] == ["method", "seed", "accuracy", "agreement", "epg", "iou"]
    assert shown["chance"] == {"accuracy": 0.1, "epg": 0.507, "iou": 0.507}
    assert (
        '<tr class="level"><th scope="row">constant prediction or map</th>'
        in by_default.read_text()
    )
    with pytest.raises(
        ConfigError, match=r"compared_column=f1 is not one of report\.columns: accura"
    ):
        page_and_values(frozen, compared_column="f1")


def test_the_numbers_of_students_and_variants_are_csv_files(page):
    rows, variants = (
        pd.read_csv(page.with_name(f"report.{kind}csv")) for kind in ("", "variants.")
    )

    assert list(rows.accuracy[rows.split == "test"]) == [0.2, 0.3, 0.5, 0.7, 0.6, 0.9]
    assert list(rows)[:4] == ["method", "seed", "split", "records"]
    labels = variants[(variants.metric == "accuracy") & (variants.split == "test")].iloc[0]
    half = 0.05 * 12.706204736432095  # of Student's t with one degree of freedom
    assert list(labels[["method", "seeds"]]) == ["labels", 2]
    expected = [0.25, 0.05 * 2**0.5, 0.25 - half, 0.25 + half]
    assert list(labels[["mean", "sd", "low", "high"]]) == pytest.approx(expected)


def test_runs_that_differ_in_the_seed_only_are_seeds_of_one_variant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = "inputs: {store: abc}\n"
    for task, seed, more in (
        ("0", 0, ""),
        ("1", 1, ""),
        ("again", 1, ""),
        ("other", 2, "split: x\n"),
    ):
        write_sweep(f"array/{task}", {"kd": (0.5,)}, first=seed, options=inputs + more)

    def labels(*others):
        return [each.label for each in load_results("array/0", [f"array/{o}" for o in others])]

    assert labels("1") == ["kd", "kd"]
    assert labels("again", "1") == ["array/0: kd", "array/again: kd", "array/1: kd"]
    assert labels("other") == ["array/0: kd", "array/other: kd"]


NAMES = ["b_1 & {50%}", "other"]


def test_a_latex_table_says_what_its_numbers_are(tmp_path):
    shared = {"folder": tmp_path, "metrics": {"test": {"records": 1000, "accuracy": 0.5}}}
    results = [StudentResult(variant=n, label=n, seed=s, **shared) for n in NAMES for s in range(3)]
    columns = [Column(name=name, source=f"test.{name}") for name in ("accuracy", "epg")]
    values = {NAMES[0]: [0.5, 0.51, 0.52], NAMES[1]: [0.2, 0.21, 0.22]}
    rows = [
        {"method": each.label, "accuracy": values[each.label][each.seed], "epg": None}
        for each in results
    ]
    text = latex_table(results, variant_summary(rows, columns), columns, "one_run")

    assert r"b\_1 \& \{50\%\} & 3 & \textbf{51.0 $\pm$ 1.0} [48.5, 53.5] & -- \\" in text
    assert r"other & 3 & 21.0 $\pm$ 1.0 [18.5, 23.5] & -- \\" in text
    assert r"variant & seeds & accuracy, \% & epg, \% \\" in text
    assert r"Evaluated on test (1,000 records). $\pm$ is the standard deviation over seeds" in text
    assert r"Students in runs/one\_run." in text


# ---- in a browser --------------------------------------------------------------------------------


def in_browser(page: Path, script: str) -> tuple[str, str]:
    """Run a script at the end of the page, and return the page's tags and the console output."""
    scripted = page.with_name("scripted.html")
    added = f"{{ {script} }}"
    scripted.write_text(
        page.read_text()
        .replace("script-src &#39;", f"script-src {digest_of(added)} &#39;")
        .replace("</body>", f"<script>{added}</script></body>")
    )
    ran = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={page.parent}/browser", "--dump-dom", scripted.resolve().as_uri(),
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    console = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    return ran.stdout, "\n".join(console)


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_click_sorts_and_a_word_filters_without_a_complaint(page):
    script = """
      const table = document.querySelector('#results ~ .scroll table');
      table.querySelectorAll('thead button')[2].click();
      const field = document.getElementById('filter');
      field.value = 'kd';
      field.dispatchEvent(new Event('input'));
    """

    dom, console = in_browser(page, script)

    assert console == ""
    results = dom[dom.index('id="results"') : dom.index('data-file="differences"')]
    assert 'aria-sort="descending"' in results
    assert re.findall(r'data-method="(\w+)"', results) == ["e2kd", "kd", "labels"]
    assert re.findall(r'data-method="(\w+)" hidden', results) == ["labels"]
    assert "9 of 14 rows" in dom


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_tables_can_be_saved_and_pictures_enlarged_and_closed_by_keyboard(page):
    script = """
      const first = document.querySelector('.zoom'), dialog = document.getElementById('enlarged');
      first.click();
      document.body.dataset.opened = `${dialog.open} ${dialog.querySelector('img').alt === first.firstChild.alt}`;
      dialog.querySelector('button').click();
      document.body.dataset.closed = dialog.open;
      document.body.dataset.focusable = first.tabIndex;
    """

    dom, console = in_browser(page, script)

    assert console == ""
    assert 'data-opened="true true"' in dom
    assert 'data-closed="false"' in dom
    assert 'data-focusable="0"' in dom
    (link,) = re.findall(r'download="results.csv" href="data:text/csv;charset=utf-8,([^"]*)"', dom)
    header, *variants = unquote(link).splitlines()
    assert header == "method,seeds,accuracy,accuracy_sd,agreement,agreement_sd"
    assert [line.split(",")[:3] for line in variants] == [
        ["labels", "2", "0.25"], ["kd", "2", "0.6"], ["e2kd", "2", "0.75"],
    ]  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_policy_stops_what_is_not_the_page_s_own(page):
    strange = page.with_name("strange.html")
    strange.write_text(
        page.read_text().replace("</body>", "<script>document.title = 'taken'</script></body>")
    )

    dom, console = in_browser(strange, "1;")

    assert "violates the following Content Security Policy" in console
    assert "<title>taken</title>" not in dom


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_complaint_would_be_heard(page):
    assert "nowhere is not defined" in in_browser(page, "nowhere();")[1]


def test_a_page_without_accuracy_says_so_in_its_summary_and_table(frozen):
    write_sweep(methods={"kd": (0.5, 0.7)})
    for folder in RUNS.glob("sweep/students/*/evaluate"):
        run_files.write_metrics(folder, {"test": {"records": 1, "agreement": 0.5}})
        run_files.write_records(folder, "test", [(-1, 3, 3)])
        run_files.write_config(folder / "config.yaml", "inputs: {store: x}\nevaluate: {}\n")

    html, values = page_and_values(frozen)

    assert values["remarks"] == {"kd": "accuracy not measured"}
    assert values["summary"][-1].startswith("The accuracy of kd was not measured, because no evalu")
    assert '<span class="remark">accuracy not measured' in html.read_text()


def test_a_student_has_its_folder_its_costs_and_the_command_that_exports_it(
    frozen, swept, tmp_path, monkeypatch
):
    monkeypatch.chdir(shutil.copytree(swept, tmp_path / "copy"))
    times, measure = [], provenance._milliseconds
    monkeypatch.setattr(provenance, "_milliseconds", lambda at: times.append(measure(at)) or 1.5)
    config = report_config(frozen, "grid")
    (RUNS / "grid/report.times.json").unlink(missing_ok=True)

    result = report.run(config)
    written = [Path(path).read_bytes() for path in (result.html, result.json, result.csv)]
    rows = json.loads(Path(result.json).read_text())["runs"]

    for row in rows:
        weights = RUNS / row["run"] / "distill/model.safetensors"
        assert row["bytes"] == weights.stat().st_size
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    best = max(rows, key=lambda row: row["accuracy"])["run"]
    assert result.next == f"permafrost export run={best}"
    for text in (result.next, '<span class="note" dir="auto">test_'):  # a key below its image
        assert text in Path(result.html).read_text()
    table = pd.read_csv(result.csv)
    assert list(table.split) == ["test", "test", "test_swapped", "test_swapped"]
    assert list(table.bytes[:2]) == [row["bytes"] for row in rows]
    assert all((Path(folder) / "metrics.json").exists() for folder in table.folder)
    assert {"map_cosine", "accuracy_low", "run", "milliseconds"} <= set(table)
    printed = report.run(replace(config, report=replace(config.report, format="latex")))
    assert printed.latex[1:] == (RUNS / "grid/report.tex").read_text()
    report.run(config)
    assert [Path(path).read_bytes() for path in (result.html, result.json, result.csv)] == written
    assert [time > 0 for time in times] == [True]  # of two students and of both reports
