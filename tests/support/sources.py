"""Sources and their fingerprints."""

from __future__ import annotations

import re
import shlex

from permafrost.config.compose import compose
from permafrost.config.verbs import build_verb_config
from permafrost.sources.source import build_source
from tests.support.listings import fingerprint_records
from tests.support.paths import ROOT


def fingerprint(config):
    source = build_source(config)
    return fingerprint_records(config, source.revision, source.records())


def documented_config(command_part, page="datasets.md"):
    """Data options of the only command of a how-to page that contains a text."""
    (command,) = [c for c in "".join(code_blocks("bash", page)).splitlines() if command_part in c]
    return build_verb_config("precompute", compose("precompute", shlex.split(command)[2:])).data


def code_blocks(language, page="datasets.md"):
    """Code blocks of a how-to page, with continued lines joined."""
    blocks = re.findall(rf"```{language}\n(.*?)```", page_text(page), flags=re.DOTALL)
    return [re.sub(r" \\\n\s*", " ", block) for block in blocks]


def page_text(page="datasets.md"):
    """Text of a how-to page."""
    return (ROOT / "docs" / "howto" / page).read_text(encoding="utf-8")
