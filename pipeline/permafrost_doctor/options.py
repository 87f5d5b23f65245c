"""Verb `doctor`: its options, and how it enters."""

from __future__ import annotations

from dataclasses import dataclass, field

from permafrost.config.cluster import ClusterConfig, LocalClusterConfig
from permafrost.config.options import Options
from permafrost.config.verbs import VERBS, Verb


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Options):
    """Sections that `doctor` reads."""

    cluster: ClusterConfig = field(default_factory=LocalClusterConfig)


VERBS["doctor"] = Verb(
    options=DoctorConfig,
    function="permafrost_doctor.doctor:examine_machine",
    order=90,
    common=(
        "cluster cluster.address cluster.auth cluster.actors cluster.cpus_per_actor "
        "cluster.gpus_per_actor cluster.threads_per_actor"
    ),
    python="Say what this machine has, and what a pass and a training would use of it.",
)
