"""Sources and their fingerprints."""

from __future__ import annotations

import re
import shlex

from pipeline.config.builder import build_verb_config
from pipeline.config.compose import compose
from pipeline.sources.build import build_source
from pipeline.store.pack import fingerprint_dataset
from tests.support.paths import ROOT


def fingerprint(config):
    source = build_source(config)
    return fingerprint_dataset(config, source.revision, source.records())


def documented_config(command_part):
    (command,) = [c for c in "".join(code_blocks("bash")).splitlines() if command_part in c]
    return build_verb_config("precompute", compose("precompute", shlex.split(command)[2:])).data


def code_blocks(language):
    """Code blocks of the pages on data sets and tables, with continued lines joined."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return [re.sub(r" \\\n\s*", " ", block) for block in blocks]


PAGE = "\n".join(
    (ROOT / "docs" / "howto" / name).read_text(encoding="utf-8")
    for name in ("datasets.md", "tables.md")
)
