"""Folders that tests read."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "pipeline")])
"""Variable with which another interpreter finds the tests, the stages and the package."""
SHARED_DATA = ROOT.parent / "shared" / "data"
"""Real images and published weights. They are not part of the project, so tests that need them may be skipped."""
