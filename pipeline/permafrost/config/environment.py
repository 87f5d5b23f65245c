"""Folders of the code, and detection of submitted jobs, without importing Ray."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""Folder of the package."""
TOP = PACKAGE if (PACKAGE / "stages").is_dir() else PACKAGE.parents[1]
"""Folder that holds stages/ and conf/: the package in a wheel, the repository in a checkout."""
CONF = TOP / "conf"
"""Folder of the YAML files."""

_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets for the driver of a submitted job."""


def in_submitted_job() -> bool:
    """Return whether this process is the driver of a submitted job, whose folder is a temporary copy."""
    return _JOB_VARIABLE in os.environ
