"""The commands `python -m stages.<verb>`. Stages share state only on disk and contain no logic themselves."""

import sys
from pathlib import Path

_SOURCES = Path(__file__).resolve().parent.parent / "pipeline"
if (
    _SOURCES.is_dir()
):  # a checkout runs its own package, installed or not; a wheel has no such folder
    sys.path.insert(0, str(_SOURCES))
