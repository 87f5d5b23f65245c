"""The report's page in a browser: self-contained, accessible by keyboard, sortable and filterable."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.config.report import ReportOptions
from pipeline.config.runs import RUNS
from pipeline.config.store import StoreOptions
from pipeline.config.verbs import ReportConfig
from pipeline.core.errors import ConfigError
from stages import report
from tests.support.html_page import Page
from tests.support.runs import PAD_CROP

METHODS = {"labels": (0.2, 0.3), "kd": (0.5, 0.7), "e2kd": (0.6, 0.9)}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def write_sweep(run="sweep", methods=METHODS, evaluator=True):
    """Write the results of two students per arm as a sweep does, without their networks."""
    rows = []
    for arm, values in methods.items():
        for seed, value in enumerate(values):
            student = f"{run}/students/{arm}-{seed}"
            folder = RUNS / student
            (folder / "distill").mkdir(parents=True)
            (folder / "evaluate").mkdir()
            metrics = {"records": 10, "accuracy": value, "agreement": value / 2}
            if evaluator:
                metrics["distance_correlation"] = {"fss": {"layer1": value, "pooled": value / 3}}
            (folder / "evaluate/metrics.json").write_text(json.dumps({"splits": {"test": metrics}}))
            lines = [json.dumps({"step": step, "total": 1 / step}) for step in (1, 2)]
            (folder / "distill/metrics.jsonl").write_text("\n".join(lines) + "\n")
            (folder / "distill/config.yaml").write_text(f"seed: {seed}\n")
            rows.append({"arm": arm, "point": {}, "seed": seed, "run": student})
    (RUNS / run / "sweep.json").write_text(json.dumps({"runs": rows}))


def page_and_values(frozen, **options):
    config = ReportConfig(
        store=StoreOptions(path=str(frozen.store.path)),
        augment=PAD_CROP,
        report=ReportOptions(contact_records=2, cases=0, **options),
        run="sweep",
    )
    result = report.run(config)
    return Path(result.html), json.loads(Path(result.json).read_text())


@pytest.fixture
def page(frozen):
    write_sweep()
    return page_and_values(frozen)[0]


def test_a_page_needs_nothing_but_itself(page):
    html = page.read_text()
    parsed = Page(html)

    assert parsed.open == []
    assert all(image["src"].startswith("data:image/") for image in parsed.all("img"))
    assert parsed.all("link") == []
    assert all("src" not in script for script in parsed.all("script"))
    assert not re.search(r"https?:|url\(|@import", re.sub(r'src="data:[^"]*"', "", html))


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


def test_the_style_has_a_dark_side_a_narrow_one_and_one_for_paper(page):
    html = page.read_text()

    for words in ("prefers-color-scheme: dark", "max-width: 40rem", "@media print"):
        assert words in html


def test_the_best_mean_of_each_column_is_marked(page):
    html = page.read_text()
    results = html[html.index('id="results"') : html.index('id="distance_correlation"')]
    marked = re.findall(r'data-method="(\w+)".*?</tr>', results)

    assert marked == list(METHODS)
    best = re.findall(r'<tr data-method="(\w+)">.*?class="best">([\d.]+)', results)
    assert best == [("e2kd", "75.0")]
    assert results.count('class="best"') == 2  # accuracy and agreement


def test_other_runs_join_and_keep_apart_by_their_name(frozen):
    write_sweep()
    write_sweep("other", {"kd": (0.1, 0.2), "at": (0.4, 0.5)}, evaluator=False)

    _, values = page_and_values(frozen, runs=("other", "sweep/students/labels-1"))

    methods = list(dict.fromkeys(row["method"] for row in values["runs"]))
    assert methods == ["labels", "kd", "e2kd", "other: kd", "at", "sweep/students/labels-1"]
    assert values["runs"][-1] == {
        "method": "sweep/students/labels-1", "seed": 1, "accuracy": 0.3, "agreement": 0.15,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"report\.runs names nobody"):
        page_and_values(frozen, runs=("nobody",))


def test_a_column_that_some_have_leaves_the_others_open(frozen):
    write_sweep(methods={"kd": (0.5, 0.7), "e2kd": (0.6, 0.8)})
    for seed in (0, 1):
        path = RUNS / f"sweep/students/kd-{seed}/evaluate/metrics.json"
        metrics = json.loads(path.read_text())
        del metrics["splits"]["test"]["agreement"]
        path.write_text(json.dumps(metrics))

    html, values = page_and_values(frozen)

    assert [row["agreement"] for row in values["runs"]] == [None, None, 0.3, 0.4]
    assert '<td data-value="">&ndash;</td>' in html.read_text()


# ---- in a browser --------------------------------------------------------------------------------


def in_browser(page: Path, script: str) -> tuple[str, str]:
    """Run a script at the end of the page, and return the page's tags and the console output."""
    scripted = page.with_name("scripted.html")
    scripted.write_text(
        page.read_text().replace("</body>", f"<script>{{ {script} }}</script></body>")
    )
    ran = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={page.parent}/browser", "--dump-dom", scripted.resolve().as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
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
    results = dom[dom.index('id="results"') : dom.index('id="distance_correlation"')]
    assert 'aria-sort="descending"' in results
    assert re.findall(r'data-method="(\w+)"', results) == ["e2kd", "kd", "labels"]
    assert re.findall(r'data-method="(\w+)" hidden', results) == ["labels"]
    assert "8 of 12 rows" in dom


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_complaint_would_be_heard(page):
    assert "nowhere is not defined" in in_browser(page, "nowhere();")[1]
