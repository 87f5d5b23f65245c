"""The page of previews lists every finding, with its levels."""

import re

from permafrost.config.data import FINDINGS
from permafrost_findings.equal_images import EQUAL_IMAGES
from tests.sources.test_findings import CASES
from tests.support.image_sets import folder_config, write_images
from tests.support.pages import blocks_of
from tests.support.paths import ROOT
from tests.support.previews import message_of, preview_of

ROWS = dict(
    re.findall(
        r"^\| `(\w+)` \| ([^|]*) \|",
        (ROOT / "docs/howto/own-data.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
)


def test_every_finding_has_a_row():
    assert list(ROWS) == [*FINDINGS, *EQUAL_IMAGES]


def test_a_row_has_the_levels_that_the_tests_show():
    shown = {name: set() for name in FINDINGS}
    for case in CASES:
        name, level, _ = case.values
        shown[name] |= {level} - {None}

    for name, levels in shown.items():
        assert levels <= set(re.findall(r"error|warning|note", ROWS[name])), name


def test_the_rule_of_the_page_names_rare_classes(tmp_path):
    (block,) = blocks_of(ROOT / "docs/howto/own-data.md", "python")
    counts = {"cat": 12, "dog": 3}
    write_images(tmp_path, *(f"{c}/{i}.jpg" for c, count in counts.items() for i in range(count)))
    try:
        exec(block.code, {})
        result = preview_of(folder_config(tmp_path))
    finally:
        FINDINGS.pop("rare_classes", None)

    assert message_of(result, "rare_classes") == "class dog has 3 records to train on"
