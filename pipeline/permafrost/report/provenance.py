"""Origin of a report: the teachers' networks, the commands that made the run, and the version that wrote the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from permafrost.config.builder import build_config
from permafrost.config.models import MODELS
from permafrost.config.version import __version__
from permafrost.core.errors import UserError
from permafrost.models.cost import count_parameters
from permafrost.models.providers import build_model
from permafrost.report.passes import UsedPass
from permafrost.report.training_facts import describe_network
from permafrost.store.reader import TeacherPass


def describe_teachers(passes: Sequence[UsedPass]) -> list[dict[str, str]]:
    """Describe the network of every pass: its students, name, size, weights and explainer."""
    return [_describe_teacher(*used) for used in passes]


def _describe_teacher(teacher: TeacherPass, learners: Sequence[str]) -> dict[str, str]:
    described = teacher.manifest.teacher
    facts = {
        "Pass": teacher.name,
        "Students": ", ".join(learners) or "none learned from it, they are compared with it",
        "Network": describe_network(described.get("architecture", {})),
    }
    parameters = _parameters(described)
    if parameters is not None:
        facts["Parameters"] = f"{parameters:,}"
    made_with = dict(teacher.manifest.made_with)
    weights = [made_with.pop("weights", ""), f"sha256 {described.get('weights_sha256')}"]
    facts["Weights"] = ", ".join(filter(None, weights))
    if teacher.explainer is not None:
        explained = teacher.manifest.explainer.get("explained_classes")
        facts["Maps"] = f"{teacher.explainer} of {explained}"
    if made_with:
        listed = (f"{name} {value}" for name, value in made_with.items())
        facts["Computed with"] = ", ".join(listed)
    return facts


def _parameters(described: dict[str, Any]) -> int | None:
    """Count the parameters of a described network, None if that needs a download."""
    architecture = described.get("architecture", {})
    if ":" in str(architecture.get("name")):
        return None
    try:
        cls = MODELS[architecture["kind"]]
        config = build_config(cls, dict(architecture), "teacher")
        return count_parameters(build_model(config, int(described["classes"])).network)
    except (KeyError, UserError):  # a network of another version
        return None


def describe_writing() -> str:
    """Say which version writes the report. When it does is in the log, as the same inputs give the same page."""
    return f"by permafrost {__version__}"
