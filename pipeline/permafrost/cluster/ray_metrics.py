"""Numbers of passes and trainings for Ray's metrics, which each node of a cluster offers to Prometheus.

docs/howto/cluster.md lists them, with a panel for Grafana.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from permafrost.core.tasks import ShardResult, Subject


def _metrics(tags: dict[str, str], **descriptions: str) -> dict[str, Any]:
    """Build metrics by name: a counter for a description that begins with "Number" or "Seconds", else a gauge."""
    from ray.util.metrics import Counter, Gauge

    built: dict[str, Any] = {}
    for name, text in descriptions.items():
        kind = Counter if text.startswith(("Number", "Seconds")) else Gauge
        built[name] = kind(f"permafrost_{name}", text, tuple(tags))
        built[name].set_default_tags(tags)
    return built


class PassMetrics:
    """Numbers of the work on shards, with the tags `store` and `pass`."""

    def __init__(self, subject: Subject, shards: int = 0) -> None:
        """Begin to count.

        Args:
            subject: Store, and the pass or other work on it.
            shards: Number of shards to do.
        """
        self._metrics = _metrics(
            {"store": subject.store, "pass": subject.name},
            records="Number of records done",
            shards_done="Number of shards done",
            shard_seconds="Seconds of actors for the shards done",
            wait_seconds="Seconds of these in which actors waited for images",
            shards="Shards of this call",
            actors="Actors at work",
            restarts="Shards that were begun again after a loss",
        )
        self._shards = shards

    def add(self, result: ShardResult[Any]) -> None:
        """Count a shard."""
        for name, amount in {
            "records": result.records,
            "shards_done": 1,
            "shard_seconds": result.seconds,
            "wait_seconds": result.waits.get("decode", 0.0),
        }.items():
            if amount > 0:  # Ray refuses to add nothing
                self._metrics[name].inc(amount)

    def set_actors(self, actors: int, restarts: int) -> None:
        """Set the numbers of actors and of shards that were begun again. Ray forgets what is not set for 20 s."""
        self._metrics["shards"].set(self._shards)
        self._metrics["actors"].set(actors)
        self._metrics["restarts"].set(restarts)


class TrainingMetrics:
    """Numbers of a training on ranks, with the tag `run`. A call takes a line of its metrics."""

    def __init__(self, run: str, ranks: int, batch_size: int) -> None:
        """Begin to measure.

        Args:
            run: Name of the run.
            ranks: Number of ranks.
            batch_size: Number of records in a step of all ranks.
        """
        self._ranks, self._batch_size = ranks, batch_size
        self._metrics = _metrics(
            {"run": run},
            ranks="Ranks that train",
            step="Step of the training",
            loss="Mean loss of the last steps",
            step_seconds="Mean time of the last steps in seconds",
        )

    def __call__(self, line: Mapping[str, float]) -> None:
        self._metrics["ranks"].set(self._ranks)
        self._metrics["step"].set(line["step"])
        self._metrics["loss"].set(line["total"])
        self._metrics["step_seconds"].set(self._batch_size / line["records_per_second"])
