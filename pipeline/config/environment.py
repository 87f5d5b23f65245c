"""Detection of submitted jobs, without importing Ray."""

from __future__ import annotations

import os

_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets for the driver of a submitted job."""


def in_submitted_job() -> bool:
    """Return whether this process is the driver of a submitted job, whose folder is a temporary copy."""
    return _JOB_VARIABLE in os.environ
