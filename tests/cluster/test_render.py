"""KubeRay manifests: they correspond to the options and conform to KubeRay's schema."""

import copy
import json
import shlex
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from permafrost.cli import stage_main
from permafrost.core.errors import ConfigError
from stages import render
from tests.support.slow import slow

SCHEMA = json.loads((Path(__file__).parent / "kuberay_rayjob.schema.json").read_text())
CLUSTER = ["cluster=kuberay", "cluster.image=registry/permafrost:1", "cluster.volume_claim=shared"]
PATHS = ["store.path=/mnt/permafrost/store", "run=/mnt/permafrost/run"]
ADDRESSES = ["store.path=s3://bucket/store", "run=s3://bucket/run"]
PRECOMPUTE = ["verb=precompute", *CLUSTER, *PATHS, "teacher.weights=random"]
SEVERAL = [
    PRECOMPUTE,
    [*PRECOMPUTE, "cluster.worker_gpus=2", "cluster.auth=disabled", "cluster.max_workers=4"],
    [*PRECOMPUTE, "cluster.service_account=me", "cluster.working_dir=file:///mnt/code.zip"],
    [*PRECOMPUTE, "cluster.active_deadline_seconds=3600", "cluster.ray_version=2.61.0"],
    ["verb=verify", *CLUSTER, PATHS[0], "cluster.worker_gpus=1"],
    ["verb=distill", *CLUSTER, *PATHS, "method=kd"],
    ["verb=precompute", *CLUSTER[:2], *ADDRESSES, "teacher=none", "cluster.secret=bucket-keys"],
    ["verb=sweep", *CLUSTER, *PATHS, "experiment=demo", "arms={kd: ['method=kd']}"],
]


def test_a_verb_that_is_not_there_is_named_before_anything_else():
    with pytest.raises(
        ConfigError,
        match=r"verb=distil does not exist; choose one of: preview, estimate, precompute",
    ):
        render.configure(["verb=distil"])


def manifest_of(tmp_path, *words):
    """Render a manifest, and return the contents of its file."""
    path = tmp_path / "job.yaml"
    render.run(render.configure([*words, f"output={path}"]))
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Manifest of a precompute job, which tests must not change."""
    return manifest_of(tmp_path_factory.mktemp("manifest"), *PRECOMPUTE)


@pytest.mark.parametrize(
    "words", [SEVERAL[0], *map(slow, SEVERAL[1:])], ids=lambda words: " ".join(words[-1:])
)
def test_kuberays_own_schema_takes_the_manifest(tmp_path, words):
    jsonschema.validate(manifest_of(tmp_path, *words), SCHEMA)


@pytest.mark.parametrize(
    ("path", "right", "wrong"),
    [
        (["spec"], "backoffLimit", "backOffLimit"),
        (["spec", "rayClusterSpec"], "authOptions", "authOption"),
        (["spec", "rayClusterSpec", "headGroupSpec"], "rayStartParams", "rayStartParam"),
        (
            [
                *("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec"),
                *("containers", 0, "resources"),
            ],
            "limits",
            "limit",
        ),
    ],
)
def test_the_schema_refuses_a_misspelt_field(manifest, path, right, wrong):
    broken = copy.deepcopy(manifest)
    place = broken
    for step in path:
        place = place[step]
    place[wrong] = place.pop(right)

    with pytest.raises(jsonschema.ValidationError, match=wrong):
        jsonschema.validate(broken, SCHEMA)


def test_the_schema_refuses_a_number_where_ray_takes_text(manifest):
    broken = copy.deepcopy(manifest)
    broken["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0

    with pytest.raises(jsonschema.ValidationError, match="not of type 'string'"):
        jsonschema.validate(broken, SCHEMA)


def test_a_shell_makes_the_verbs_own_words_of_the_entrypoint(tmp_path):
    words = [*PRECOMPUTE[1:], "annotate.payloads=[logits, map]"]
    spec = manifest_of(tmp_path, "verb=precompute", *words)["spec"]

    assert shlex.split(spec["entrypoint"]) == ["python", "-m", "stages.precompute", *words]
    assert "entrypointNumCpus" not in spec  # the driver runs on the head, its actors on workers
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_a_stage_that_computes_itself_is_sent_to_a_worker_without_words_of_the_cluster(tmp_path):
    options = ["cluster.worker_cpus=8", "cluster.worker_gpus=1"]
    spec = manifest_of(tmp_path, "verb=verify", *CLUSTER, *options, PATHS[0])["spec"]

    assert spec["entrypoint"] == f"python -m stages.verify {PATHS[0]}"
    assert (spec["entrypointNumCpus"], spec["entrypointNumGpus"]) == (8, 1)


def test_an_estimate_measures_on_a_worker(tmp_path):
    spec = manifest_of(tmp_path, "verb=estimate", *PRECOMPUTE[1:], "cluster.worker_cpus=8")["spec"]

    assert spec["entrypoint"].startswith("python -m stages.estimate ")
    assert spec["entrypointNumCpus"] == 8


def test_every_pod_has_the_volume_and_only_workers_have_gpus(tmp_path):
    cluster = manifest_of(tmp_path, *PRECOMPUTE, "cluster.worker_gpus=2", "cluster.workers=3")[
        "spec"
    ]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]

    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (3, 3, 3)
    assert "enableInTreeAutoscaling" not in cluster
    assert cluster["authOptions"] == {"mode": "token"}
    for pod in (cluster["headGroupSpec"]["template"]["spec"], group["template"]["spec"]):
        (container,) = pod["containers"]
        assert container["volumeMounts"][0]["mountPath"] == "/mnt/permafrost"
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "shared"
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        assert gpus == ("2" if container["name"] == "ray-worker" else None)


def test_ray_scales_where_the_numbers_of_workers_differ(tmp_path):
    words = ["cluster.min_workers=0", "cluster.workers=2", "cluster.max_workers=5"]
    cluster = manifest_of(tmp_path, *PRECOMPUTE, *words)["spec"]["rayClusterSpec"]

    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["workerGroupSpecs"][0]["minReplicas"] == 0
    assert cluster["workerGroupSpecs"][0]["maxReplicas"] == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verb=bake"], "verb=bake does not exist; choose one of: preview, estimate, precompute"),
        (
            ["verb=render"],
            "verb=render does not exist; choose one of: preview, estimate, precompute",
        ),
        ([*PRECOMPUTE, "teacher.nmae=x"], "unknown option teacher.nmae"),
        ([*PRECOMPUTE, "method=kd"], "precompute takes no method="),
        ([*PRECOMPUTE, "store.shard_size=0"], "store.shard_size must be >= 1"),
        ([*PRECOMPUTE, "store.path=stores/demo"], "store.path=stores/demo is relative"),
        ([*PRECOMPUTE, "run=/tmp/run"], "run=/tmp/run would be lost with its pod"),
        (
            ["verb=verify", PATHS[0], "cluster=local"],
            "cluster=local is not allowed here; choose one of kuberay",
        ),
    ],
)
def test_what_the_job_would_refuse_is_refused_before_it_is_submitted(words, message):
    extra = CLUSTER if len(words) == 1 else []

    with pytest.raises(ConfigError) as caught:
        render.configure([*words, *extra])

    assert message in str(caught.value)


def test_the_command_line_prints_nothing_but_yaml(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["render", *PRECOMPUTE])
    monkeypatch.setattr("signal.signal", lambda *_: None)

    stage_main("render", render.run, render.__doc__, render.configure)

    assert yaml.safe_load(capsys.readouterr().out)["kind"] == "RayJob"


def test_a_job_with_a_bucket_has_a_secret_in_place_of_a_volume(tmp_path):
    words = [*CLUSTER[:2], *ADDRESSES, "teacher=none", "cluster.secret=bucket-keys"]
    cluster = manifest_of(tmp_path, "verb=precompute", *words)["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert "volumes" not in pod
        (container,) = pod["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "bucket-keys"}}]
        assert "volumeMounts" not in container


@pytest.mark.parametrize("option", ["store.path", "run"])
def test_without_a_volume_nothing_may_be_written_to_a_pod(option):
    words = [word for word in ADDRESSES if not word.startswith(option)]
    with pytest.raises(
        ConfigError, match=rf"{option}=/mnt/x would be lost .*cluster\.volume_claim"
    ):
        render.configure(
            ["verb=precompute", *CLUSTER[:2], *words, f"{option}=/mnt/x", "teacher=none"]
        )
