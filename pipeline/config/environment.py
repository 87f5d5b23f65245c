"""Whether this process runs inside a submitted job; Ray itself is not imported."""

from __future__ import annotations

import os

_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the driver of a submitted job."""


def in_submitted_job() -> bool:
    """Whether this process is the driver of a submitted job: its folder is then a temporary copy."""
    return _JOB_VARIABLE in os.environ
