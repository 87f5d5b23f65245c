"""The manifest of a KubeRay RayJob: a cluster for one command, created for it and removed afterwards."""

from __future__ import annotations

import shlex
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Sequence

    from permafrost.config.cluster import KubeRayClusterConfig

_VOLUME = "shared"


def rayjob_manifest(
    config: KubeRayClusterConfig, command: Sequence[str], *, works_in_driver: bool
) -> dict[str, Any]:
    """Build a RayJob that runs `command`.

    works_in_driver  True if the command itself computes and must run on a worker; the driver of actors runs on the
                     head
    """
    spec: dict[str, Any] = {
        "entrypoint": shlex.join(command),
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": config.ttl_seconds_after_finished,
        "backoffLimit": config.backoff_limit,
        "submitterPodTemplate": _submitter(config),
        "rayClusterSpec": _cluster(config),
    }
    if config.active_deadline_seconds is not None:
        spec["activeDeadlineSeconds"] = config.active_deadline_seconds
    if config.working_dir is not None:
        spec["runtimeEnvYAML"] = yaml.safe_dump({"working_dir": config.working_dir})
    if works_in_driver:
        # The head offers no CPU, so an entrypoint that requests one runs on a worker.
        spec["entrypointNumCpus"] = config.worker_cpus
        if config.worker_gpus:
            spec["entrypointNumGpus"] = config.worker_gpus
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": config.name, "namespace": config.namespace},
        "spec": spec,
    }


def _cluster(config: KubeRayClusterConfig) -> dict[str, Any]:
    low, high = config.scale
    cluster: dict[str, Any] = {
        "rayVersion": config.ray_version or version("ray"),
        "authOptions": {"mode": config.auth},
        "headGroupSpec": {
            # No actor runs on the head, next to Ray's services and the driver.
            "rayStartParams": {"num-cpus": "0"},
            "template": _pod(
                config, "ray-head", _resources(config.head_cpus, config.head_memory, gpus=0)
            ),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": config.workers,
                "minReplicas": low,
                "maxReplicas": high,
                "rayStartParams": {},
                "template": _pod(
                    config,
                    "ray-worker",
                    _resources(config.worker_cpus, config.worker_memory, config.worker_gpus),
                ),
            }
        ],
    }
    if low < high:
        cluster["enableInTreeAutoscaling"] = True
    return cluster


def _pod(config: KubeRayClusterConfig, name: str, resources: dict[str, Any]) -> dict[str, Any]:
    """Build a pod with the volume. KubeRay itself mounts memory at /dev/shm."""
    mount = {"name": _VOLUME, "mountPath": config.mount_path}
    claim = {"claimName": config.volume_claim}
    spec: dict[str, Any] = {
        "containers": [_container(config, name, resources) | {"volumeMounts": [mount]}],
        "volumes": [{"name": _VOLUME, "persistentVolumeClaim": claim}],
    }
    if config.service_account is not None:
        spec["serviceAccountName"] = config.service_account
    return {"spec": spec}


def _submitter(config: KubeRayClusterConfig) -> dict[str, Any]:
    """Build the pod that submits the command to the head, with the same Ray settings."""
    container = _container(config, "submitter", _resources(1, "1Gi", gpus=0))
    return {"spec": {"restartPolicy": "Never", "containers": [container]}}


def _container(
    config: KubeRayClusterConfig, name: str, resources: dict[str, Any]
) -> dict[str, Any]:
    settings = {
        "RAY_AUTH_MODE": config.auth,
        "RAY_USAGE_STATS_ENABLED": str(int(config.usage_statistics)),
    }
    return {
        "name": name,
        "image": config.image,
        "imagePullPolicy": config.image_pull_policy,
        "env": [{"name": key, "value": value} for key, value in settings.items()],
        "resources": resources,
    }


def _resources(cpus: int, memory: str, gpus: int) -> dict[str, Any]:
    """Build equal requests and limits, because Ray schedules by the limits."""
    amounts: dict[str, str] = {"cpu": str(cpus), "memory": memory}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {"requests": amounts, "limits": dict(amounts)}
