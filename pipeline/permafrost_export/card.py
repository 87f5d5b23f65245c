"""Cards, in Hugging Face's form: untrusted texts as Markdown, and the card of an exported student."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from permafrost.core.errors import printable
from permafrost.core.yaml_text import dump_yaml

_SPDX = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MARKS = re.compile(r"[\\`*_~\[\]<>|]|(?<=:)//")
"""Characters that mean something in Markdown."""


def license_id(name: str) -> str:
    """Return the license of a card's header: an SPDX name in lower case, or `other`."""
    return name.lower() if _SPDX.fullmatch(name.lower()) else "other"


def plain_text(text: str) -> str:
    """Return an untrusted text as plain Markdown: without links, tags, table cells or control characters."""
    return _MARKS.sub(r"\\\g<0>", printable(text))


def fact_table(rows: Mapping[str, str]) -> list[str]:
    """Return the lines of a Markdown table of names and untrusted texts."""
    return [
        "| | |",
        "|---|---|",
        *(f"| {name} | {plain_text(text)} |" for name, text in rows.items()),
    ]


def in_words(values: Mapping[str, Any]) -> str:
    """Return measurements by name as text."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else f'{value:.3g}'}"
        for name, value in values.items()
    )


def card_of_student(facts: Mapping[str, Any], program: str | None = None) -> str:
    """Return the README.md of an exported student.

    Args:
        facts: Name, license, classes, teacher, method and accuracy by what they are; None is left out.
        program: File next to the card that runs student.onnx; None if there is none.
    """
    shown = {name: str(value) for name, value in facts.items() if value not in (None, "", [])}
    header = {
        "license": license_id(shown.pop("license", "other")),
        "library_name": "timm" if shown.pop("is_timm", "") == "True" else "pytorch",
        "tags": ["image-classification", "knowledge-distillation"],
    }
    name = shown.pop("name", "student")
    lines = ["---", dump_yaml(header).rstrip(), "---", "", f"# {plain_text(name)}", ""]
    run = [
        "",
        "Run it on image files:",
        "",
        "```bash",
        "pip install onnxruntime numpy pillow pillow-heif  # pillow-heif for HEIC",
        f"python {program} student.onnx FILE_OR_FOLDER...",
        "```",
    ]
    return "\n".join([*lines, *fact_table(shown), *(run if program else []), ""])
