"""The list of source files in docs/development/architecture.md."""

from __future__ import annotations

import ast

from docs.measured import ROOT


def source_files() -> str:
    """Files of the package and of the stages, with the first sentence of each."""
    package = ROOT / "pipeline" / "permafrost"
    paths = [*sorted(package.rglob("*.py")), *sorted((ROOT / "stages").glob("*.py"))]
    rows = ["| file | content |", "|---|---|"]
    for path in paths:
        if path.name == "__init__.py":
            continue
        relative = path.relative_to(package if package in path.parents else ROOT)
        summary = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0]
        link = f"../../{path.relative_to(ROOT).as_posix()}"
        rows.append(f"| [{relative.as_posix()}]({link}) | {' '.join(summary.split())} |")
    return "\n".join(rows)


TABLES = (source_files,)
