"""The manifest of docs/howto/rayjob.yaml: it conforms to KubeRay's schema, and its command composes."""

import copy
import json
import re
import shlex
from pathlib import Path, PurePosixPath

import jsonschema
import pytest
import yaml

from permafrost.config.compose import compose
from permafrost.config.verbs import build_verb_config
from tests.support.paths import ROOT

SCHEMA = json.loads((Path(__file__).parent / "kuberay_rayjob.schema.json").read_text())
FILE = ROOT / "docs/howto/rayjob.yaml"
CODE = re.compile(r"^( *)# ( *(?:[a-z][\w-]*:(?: |$)|- \{).*)", re.MULTILINE)
"""A line that a user may uncomment: an entry, and no sentence."""


def manifest():
    return yaml.safe_load(FILE.read_text())


def pods(values):
    cluster = values["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_kuberays_own_schema_takes_the_manifest():
    jsonschema.validate(manifest(), SCHEMA)


def test_kuberays_own_schema_takes_it_with_all_that_is_commented_out():
    whole = CODE.sub(r"\1\2", FILE.read_text())
    values = yaml.safe_load(whole)

    jsonschema.validate(values, SCHEMA)
    assert values["spec"]["entrypointNumCpus"] == 4
    assert values["spec"]["activeDeadlineSeconds"] == 86400
    assert yaml.safe_load(values["spec"]["runtimeEnvYAML"])["working_dir"].startswith("file:///")
    assert values["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert values["spec"]["suspend"] is True
    assert list(values["metadata"]["labels"]) == ["kueue.x-k8s.io/queue-name"]
    assert pods(values)[0]["serviceAccountName"] == "permafrost"
    assert pods(values)[0]["containers"][0]["envFrom"] == [{"secretRef": {"name": "bucket-keys"}}]
    assert {"nodeSelector", "tolerations"} <= pods(values)[1].keys()
    for spec in (*pods(values), values["spec"]["submitterPodTemplate"]["spec"]):
        assert spec["imagePullSecrets"] == [{"name": "registry-login"}]
    users = re.findall(r"(?:--uid|USER) (\d+)", (ROOT / "Dockerfile").read_text())
    assert set(users) == {str(spec["securityContext"]["fsGroup"]) for spec in pods(values)}


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
def test_the_schema_refuses_a_misspelt_field(path, right, wrong):
    broken = copy.deepcopy(manifest())
    place = broken
    for step in path:
        place = place[step]
    place[wrong] = place.pop(right)

    with pytest.raises(jsonschema.ValidationError, match=wrong):
        jsonschema.validate(broken, SCHEMA)


def test_the_schema_refuses_a_number_where_ray_takes_text():
    broken = manifest()
    broken["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0

    with pytest.raises(jsonschema.ValidationError, match="not of type 'string'"):
        jsonschema.validate(broken, SCHEMA)


def test_its_command_composes_and_writes_to_the_volume_only():
    command, verb, *words = shlex.split(manifest()["spec"]["entrypoint"])
    config = build_verb_config(verb, compose(verb, words))
    (mount,) = {
        m["mountPath"] for p in pods(manifest()) for m in p["containers"][0]["volumeMounts"]
    }

    assert (command, config.cluster.kind) == ("permafrost", "existing")
    for path in (config.store.path, config.run, config.data.path, config.teacher.weights):
        assert PurePosixPath(path).is_relative_to(mount)


def test_the_head_offers_no_cpu_and_only_workers_have_gpus():
    head, worker = pods(manifest())
    cluster = manifest()["spec"]["rayClusterSpec"]

    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    assert "nvidia.com/gpu" in worker["containers"][0]["resources"]["limits"]
    for pod in (head, worker):
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert pod["volumes"][0]["name"] == container["volumeMounts"][0]["name"]
