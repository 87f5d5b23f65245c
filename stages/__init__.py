"""The commands `python -m stages.<verb>`. Stages share state only on disk and contain no logic themselves."""

import sys
from pathlib import Path

_SOURCES = Path(__file__).resolve().parent.parent / "pipeline"
if (
    _SOURCES.is_dir()
):  # a checkout runs its own package, installed or not; a wheel has no such folder
    sys.path.insert(0, str(_SOURCES))

try:
    import permafrost.cli  # noqa: F401
except ImportError as error:
    if (error.name or "").startswith("permafrost"):
        raise
    version = ".".join(map(str, sys.version_info[:2]))
    sys.exit(
        f"permafrost: error: {sys.executable} (Python {version}) lacks what the package needs: {error}. Run the stages "
        "by the interpreter of an environment that has it; a job runs the `python` that was found first where its Ray "
        "was started, as in PATH=$PWD/.venv/bin:$PATH ray start --head"
    )
