"""Class names from a file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pipeline.config import ConfigError


def load_class_names(path: str) -> tuple[str, ...]:
    """The lines of `data.classes`, in label order; empty lines are left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.classes={path} cannot be read: {error}") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise ConfigError(f"data.classes={path} is empty; give one class name a line")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ConfigError(f"data.classes={path} names the class {name!r} {times} times")
    return names
