"""Table of the names of permafrost that the packages next to it import, which is all that a package needs."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from typing import TYPE_CHECKING

from docs.measured import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PIPELINE = ROOT / "pipeline"


def imported_names() -> dict[str, set[str]]:
    """Return the names that packages import from modules of permafrost, by module."""
    names: dict[str, set[str]] = defaultdict(set)
    for path in sorted(PIPELINE.glob("permafrost_*/**/*.py")):
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("permafrost."):
                names[str(node.module)] |= {alias.name for alias in node.names}
    return names


def module_path(module: str) -> Path:
    """Return the file of a module of the core."""
    return PIPELINE / f"{module.replace('.', '/')}.py"


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def docstrings_of(module: str) -> Iterator[tuple[str, str, ast.stmt]]:
    """Yield name, docstring and definition of what a module defines; a constant's docstring is the text below it."""
    body = _tree(module_path(module)).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, ast.get_docstring(node) or "", node
            continue
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        text = str(after.value.value) if is_text else ""  # type: ignore[union-attr]
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [each for target in targets if target is not None for each in ast.walk(target)]
        yield from ((each.id, text, node) for each in names if isinstance(each, ast.Name))


def doors() -> str:
    """Modules of permafrost, and the names that the packages next to it import from them."""
    rows = ["| module of `permafrost` | content | names |", "|---|---|---|"]
    for module, names in sorted(imported_names().items()):
        place = module.removeprefix("permafrost.").replace(".", "/")
        (first,) = (ast.get_docstring(_tree(module_path(module))) or "").split("\n\n")[:1]
        content = " ".join(first.split()).replace("|", "\\|")
        listed = ", ".join(f"`{name}`" for name in sorted(names))
        link = f"[{place}](../../pipeline/permafrost/{place}.py)"
        rows.append(f"| {link} | {content} | {listed} |")
    return "\n".join([*rows, ""])


TABLES = (doors,)
