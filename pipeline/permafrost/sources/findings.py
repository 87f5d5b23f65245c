"""Findings of a preview: a family of rules, each of which looks for one kind of problem.

    FINDINGS["watermarks"] = find_watermarks        # of a plug-in: a function of a Preview that yields (level, message)

A message states what was understood, with an example, and the fix. An error stops `precompute` unless data.accept
names the finding. Messages are kept next to stores, so they name no absolute path.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pkgutil import resolve_name

from permafrost.config.data import FACTS_OF_FINDINGS, FINDINGS, STORE_FINDINGS, FileDataConfig
from permafrost.config.suggestions import suggest
from permafrost.core.errors import ConfigError, UserError, quote
from permafrost.sources.data_preview import Preview
from permafrost.store.facts import Fact, Finding, read_data_facts
from permafrost.store.reader import Store

logger = logging.getLogger("permafrost.precompute")

_DAMAGED = "damaged_files"
"""Finding of files that cannot be packed, whatever the user means."""


def add_findings(preview: Preview) -> Preview:
    """Return a preview with the findings of all rules, errors first.

    Raises:
        ConfigError: If data.accept names no finding.
    """
    accepted = preview.data.accept if isinstance(preview.data, FileDataConfig) else ()
    for name in accepted:
        if name not in FINDINGS:
            raise ConfigError(
                f"data.accept: there is no finding {quote(name)}{suggest(name, FINDINGS)}; findings are: "
                f"{', '.join(FINDINGS)}"
            )
    findings: list[Finding] = []
    facts: list[Fact] = []
    for name, rule in FINDINGS.items():
        for remark in (resolve_name(rule) if isinstance(rule, str) else rule)(preview):
            if isinstance(remark, Fact):
                facts.append(remark)
                continue
            level, message = remark
            if level == "error" and name in accepted and name != _DAMAGED:
                level = "warning"
            findings.append(Finding(name=name, level=level, message=message))
    findings.sort(key=lambda finding: ("error", "warning", "note").index(finding.level))
    return replace(preview, findings=tuple(findings), measured=tuple(facts))


def complete_facts(store: Store) -> None:
    """Add the findings and facts of all rules about a packed store to its own, unless they are there, and log them."""
    kept = read_data_facts(store.folder)
    if kept is None or kept.is_complete:
        return
    remarks = [each for rule in STORE_FINDINGS.values() for each in resolve_name(rule)(store)]
    findings = [each for each in remarks if isinstance(each, Finding)]
    facts = [each for each in remarks if isinstance(each, Fact)]
    for fact in facts:
        logger.info("%s: %s%s", fact.name, fact.text(), f". {fact.warning}" * bool(fact.warning))
    log_findings(findings)
    kept.with_facts(facts, findings, FACTS_OF_FINDINGS).write(store.folder)


class DataError(UserError):
    """Error for data that were probably misunderstood, according to a finding."""


def log_findings(findings: Iterable[Finding]) -> None:
    """Log warnings and notes, one line each."""
    for finding in findings:
        if finding.level == "warning":
            logger.warning("warning: %s (%s)", finding.message, finding.name)
        elif finding.level == "note":
            logger.info("%s (%s)", finding.message, finding.name)


def check_findings(preview: Preview) -> None:
    """Log warnings and notes, one line each.

    Raises:
        DataError: If there are findings that are errors; it has a line for each.
    """
    log_findings(preview.findings)
    errors = preview.with_level("error")
    if not errors:
        return
    lines = [f"{finding.message} ({finding.name})" for finding in errors]
    lines[-1] += f". Nothing was packed by this command{accept_hint(preview)}"
    error = DataError(" ".join(lines))
    error.lines = lines
    raise error


def accept_hint(preview: Preview) -> str:
    """Return what to add to a message so that the user can accept its errors; empty if that would not help."""
    names = list(dict.fromkeys(finding.name for finding in preview.with_level("error")))
    names = [name for name in names if name in FINDINGS and name != _DAMAGED]
    return f"; if the data are as you mean them: data.accept=[{','.join(names)}]" if names else ""
