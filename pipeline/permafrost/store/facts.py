"""Facts about data, a teacher, its targets, a student and a machine: values, and where each comes from.

A sheet is the same on the terminal, in reports and cards, in Python (`store.facts()`), and in `facts.json` next to the
manifest of a store or a pass and in the folder of a run. The file is outside of identities and fingerprints.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeVar

from permafrost.core.errors import FileError, printable
from permafrost.core.json_entries import EntryError, from_dict
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import AnyPath
from permafrost.storage.signed_files import DigestError, check_json, sign_json

logger = logging.getLogger("permafrost.facts")
T = TypeVar("T")

FACTS_NAME = "facts.json"
"""File of facts in the folder of a store, a pass or a training."""
MAX_FACTS_BYTES = 2**26
_WIDTH, _NAME_WIDTH = 80, 14
Level = Literal["error", "warning", "note"]
"""Level of a finding: an error stops `precompute`."""
TYPED, ASSUMED, MEASURED, UNKNOWN = "typed", "assumed", "measured", "unknown"
"""Sources of facts, besides names of files and of what a value was read from."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A value, where it comes from, and what is doubtful about it."""

    name: str
    value: str
    source: str
    warning: str = ""
    """Why it may be wrong, with the fix; empty for a fact that is plain, or that findings explain."""
    findings: tuple[str, ...] = ()
    """Names of the findings that are about it."""

    @property
    def is_doubtful(self) -> bool:
        """True if it is marked."""
        return bool(self.warning or self.findings)

    def text(self) -> str:
        """Return the value, its source in brackets, and the names of its findings."""
        return f"{printable(self.value)} [{printable('; '.join([self.source, *self.findings]))}]"


@dataclass(frozen=True, kw_only=True)
class FactSheet:
    """Facts about one thing. Its text is meant for 80 columns; `!` marks what is doubtful."""

    subject: str
    """data, teacher, targets, student or machine."""
    facts: tuple[Fact, ...]

    def marked(self, findings: Iterable[Finding], facts: Mapping[str, str]) -> FactSheet:
        """Return the sheet with the names of findings, except of notes, at the facts that they are about.

        Args:
            findings: The findings.
            facts: Names of facts by the name of the finding.
        """
        names: dict[str, dict[str, None]] = {}
        for finding in findings:
            if finding.level != "note" and finding.name in facts:
                names.setdefault(facts[finding.name], {})[finding.name] = None
        marked = (
            replace(fact, findings=(*fact.findings, *names.get(fact.name, ())))
            for fact in self.facts
        )
        return replace(self, facts=tuple(marked))

    def __getitem__(self, name: str) -> Fact:
        return next(fact for fact in self.facts if fact.name == name)

    def rows(self) -> dict[str, str]:
        """Return the text of each fact by its name, marked if it is doubtful, for tables."""
        return {
            fact.name: f"{'! ' * fact.is_doubtful}{fact.text()}{f'. {fact.warning}' * bool(fact.warning)}"
            for fact in self.facts
        }

    def lines(self) -> list[str]:
        """Return the lines, wrapped at 80 columns, with explanations of doubtful facts at the end."""
        lines = []
        for fact in self.facts:
            mark = "!" if fact.is_doubtful else " "
            lines += _wrapped(f"{mark} {fact.name:{_NAME_WIDTH}}", fact.text())
        for fact in self.facts:
            if fact.warning:
                lines += _wrapped(f"! {fact.name}: ", printable(fact.warning), 4)
        return lines

    def __str__(self) -> str:
        return "\n".join([f"{self.subject}:", *self.lines()])

    def block(self) -> str:
        """Return the lines as a value of a result, which begins a line of its own."""
        return "\n".join(["", *self.lines()])


def announce(sheets: Iterable[FactSheet]) -> None:
    """Log sheets, each as one block."""
    for sheet in sheets:
        logger.info("%s", sheet, extra={"is_block": True})


def _wrapped(head: str, text: str, indent: int | None = None) -> list[str]:
    inner = " " * (len(head) + 1 if indent is None else indent)
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{head.rstrip()} " if indent else f"{head} ",
        subsequent_indent=inner,
        break_on_hyphens=False,
    )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Problem with the data, or a note on something that can be understood in several ways."""

    name: str
    level: Level
    """error: nothing is packed unless data.accept names it. warning: likely a mistake. note: what was understood."""
    message: str


@dataclass(frozen=True, kw_only=True)
class StoredFacts:
    """Content of <store>/facts.json."""

    source: str
    records: dict[str, int]
    """Number of records of each split."""
    unlabeled: dict[str, int]
    """Number of records without a label of each split."""
    classes: int
    records_of_classes: dict[str, tuple[int, ...]]
    """Number of records of each class, by split; empty for more than 10,000 classes."""
    sheet: FactSheet
    findings: tuple[Finding, ...]
    is_complete: bool = False
    """True once the packed records are compared with one another."""
    splits: str = ""
    """Origin of the splits: drawn by files or by groups, or given by the data; empty in earlier stores."""

    def with_facts(
        self, facts: Iterable[Fact], findings: Sequence[Finding], names: Mapping[str, str]
    ) -> StoredFacts:
        """Return these with further facts and findings, complete; the arguments are as for `FactSheet.marked`."""
        sheet = FactSheet(subject=self.sheet.subject, facts=(*self.sheet.facts, *facts))
        return replace(
            self,
            sheet=sheet.marked(findings, names),
            findings=(*self.findings, *findings),
            is_complete=True,
        )

    def write(self, store: AnyPath) -> None:
        """Write the facts next to the store, where they replace those of an earlier command."""
        file_at(store / FACTS_NAME).write(sign_json(asdict(self)))


@dataclass(frozen=True, kw_only=True)
class _StoredSheets:
    """Content of facts.json next to a pass, and in the folder of a run."""

    sheets: tuple[FactSheet, ...]


def write_sheets(folder: AnyPath, sheets: Mapping[str, FactSheet]) -> None:
    """Write the sheets of a pass or a run."""
    file_at(folder / FACTS_NAME).write(
        sign_json(asdict(_StoredSheets(sheets=tuple(sheets.values()))))
    )


def read_sheets(folder: AnyPath) -> dict[str, FactSheet]:
    """Return the sheets of a pass or a run by their subjects; none if the file is missing or damaged."""
    stored = read_facts_file(folder, lambda values: from_dict(_StoredSheets, values))
    return {} if stored is None else {sheet.subject: sheet for sheet in stored.sheets}


def read_facts_file(folder: AnyPath, build: Callable[[dict[str, object]], T]) -> T | None:
    """Return what a facts.json has; None if it is missing, or damaged, which is logged."""
    path = folder / FACTS_NAME
    if not file_at(path).exists():
        return None
    try:
        return build(check_json(file_at(path).read(MAX_FACTS_BYTES)))
    except (DigestError, EntryError, FileError) as error:
        logger.warning("%s is damaged and is not shown: %s; it may be deleted", path, error)
        return None


def read_data_facts(store: AnyPath) -> StoredFacts | None:
    """Return the facts next to a store; None if the file is missing, or if it is damaged, which is logged."""
    return read_facts_file(store, lambda values: from_dict(StoredFacts, values))
