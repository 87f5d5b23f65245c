"""Show a store and a pass in one picture: facts, records next to their maps, and two histograms.

    permafrost show store.path=stores/demo
    permafrost show store.path=stores/demo store.teacher=[resnet8] show.split=test_swapped \\
        show.output=demo.png

Reads   <store.path>, and one teacher pass in it if there is one (named by `store.teacher=` if there are several)
Writes  the picture to `show.output=`, as PNG, SVG or PDF by its name
Rerun   the same command writes the same picture
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from permafrost.storage.files import file_at
from permafrost.store.facts import FactSheet
from permafrost.store.reader import Store
from permafrost.verbs.next_commands import NextCommands
from permafrost_report.options import ShowConfig


@dataclass(frozen=True, kw_only=True)
class ShowResult:
    """Facts about the store and its pass, and the file of the picture."""

    facts: dict[str, str] = field(default_factory=dict)
    sheets: dict[str, FactSheet] = field(default_factory=dict)
    picture: str = ""
    next: str = ""
    """Command that uses what is shown."""

    def printed(self) -> dict[str, str]:
        """Return the values for the terminal."""
        blocks = {subject: sheet.block() for subject, sheet in self.sheets.items()}
        return {**self.facts, **blocks, "picture": self.picture, "next": self.next}


def show_store(config: ShowConfig) -> ShowResult:
    """Draw the picture and write it."""
    from permafrost_report.store_sheet import show_records  # imports matplotlib

    options = config.show
    store, teacher = Store(config.store.folder), next(iter(config.store.teacher), None)
    sheet = show_records(
        store,
        options.split,
        teacher=teacher,
        records=options.records,
    )
    path = Path(config.show.output)
    file_at(path).write(sheet.encoded(path.suffix[1:]))
    return ShowResult(
        facts=sheet.facts,
        sheets=sheet.sheets,
        picture=str(path),
        next=NextCommands(store, config.store.folder.root).after_packing("", teacher or ""),
    )
