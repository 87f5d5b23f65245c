"""Inputs of a report, by which a repeated command finds that its files are still those that it would write."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.config.runs import RUNS, to_plain_dict
from permafrost.config.version import __version__
from permafrost.core.signed_files import DamagedFileError, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from permafrost.config.verbs import ReportConfig
    from permafrost.report.student_results import StudentResult


_NAME = ".report-inputs.json"
_CODE = Path(__file__).parent
_COMPARED_BY_CONTENT = 2**20
"""Size in bytes up to which a file is compared by its content, and above which by its size and time."""


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """Digest of all that a report is made from: options, code of the pages, store and runs."""

    folder: Path
    """Folder of the run, in which the digest is kept."""
    sha256: str

    @classmethod
    def of(cls, config: ReportConfig, results: list[StudentResult]) -> ReportInputs:
        """Read the inputs of a report of these results."""
        store, run = Path(config.store.path), RUNS / config.run
        named = [[one.label, one.point, one.seed, str(one.folder)] for one in results]
        described = [__version__, to_plain_dict(config), named]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        manifests = [store / "manifest.json", *sorted(store.glob("teachers/*/manifest.json"))]
        folders = {run, *(result.folder for result in results)}
        manifests += sorted(RUNS.glob("*/precompute*.yaml"))  # among the commands of the page
        for path in [*_files(_CODE), *manifests, *_files(*sorted(folders))]:
            digest.update(_described(path))
        return cls(folder=run, sha256=digest.hexdigest())

    def find(self) -> dict[str, Any] | None:
        """Return what was printed for the same inputs, None if there is no report of them."""
        try:
            kept = read_json(self.folder / _NAME, "")
        except (OSError, DamagedFileError):  # the report is then written again
            return None
        if kept.get("sha256") != self.sha256:
            return None
        written: dict[str, str] = kept["files"]
        if any(not Path(p).is_file() or _content(Path(p)) != sha for p, sha in written.items()):
            return None
        printed: dict[str, Any] = kept["printed"]
        return printed

    def keep(self, files: Iterable[Path], printed: dict[str, Any]) -> None:
        """Keep the digest of these inputs with the files that were written and what is printed."""
        written = {str(path): _content(path) for path in files}
        kept = {"sha256": self.sha256, "files": written, "printed": printed}
        write_json(self.folder / _NAME, kept)


def _files(*folders: Path) -> Iterator[Path]:
    """Iterate over the files of folders, without bytecode, reports and hidden files."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            is_output = path.name.startswith(("report.", ".")) or path.suffix == ".pyc"
            if path.is_file() and not is_output:
                yield path


def _described(path: Path) -> bytes:
    """Name of a file, and its content or, of a large one, its size and time."""
    found = path.stat()
    large = found.st_size > _COMPARED_BY_CONTENT
    content = [found.st_size, found.st_mtime_ns] if large else _content(path)
    return json.dumps([str(path), content]).encode()


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
