"""Cluster options: their limits, the meaning of paths on each kind of cluster, and connecting to Ray."""

import errno
import inspect
import json
import os
import signal
import sys
import zipfile
from pathlib import Path

import pytest

from permafrost.cluster.placement import ClusterError
from permafrost.cluster.session import _warn_of_cluster, ray_session
from permafrost.config.cluster import ExistingClusterConfig, LocalClusterConfig
from permafrost.config.compose import compose
from permafrost.config.environment import THREAD_ENVIRONMENT
from permafrost.config.paths import place_paths, with_absolute_paths
from permafrost.config.verbs import build_verb_config
from permafrost.core.errors import ConfigError
from tests.support.composition import config_of
from tests.support.papers import HAS_PAPERS, needs_papers
from tests.support.paths import ROOT

PACKAGES = {
    path.parent.name.removeprefix("permafrost_")
    for path in ROOT.glob("pipeline/permafrost_*/__init__.py")
}
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LocalClusterConfig, {"actors": 0}, "cluster.actors must be >= 1 or null, got 0"),
        (LocalClusterConfig, {"max_restarts": -1}, "cluster.max_restarts must be >= 0, got -1"),
        (ExistingClusterConfig, {"gpus_per_rank": -1.0}, "cluster.gpus_per_rank must be >= 0"),
        (ExistingClusterConfig, {"address": "ray://head:10001"}, "submit a job"),
        (ExistingClusterConfig, {"address": "local"}, "cluster.address=local must be auto or"),
    ],
)
def test_an_impossible_option_is_an_error_that_names_it(kind, options, message):
    with pytest.raises(ConfigError) as caught:
        kind(**options)

    assert message in str(caught.value)


# ---- paths ---------------------------------------------------------------------------------------


def placed(verb, *words):
    return place_paths(build_verb_config(verb, compose(verb, words)))


SHARED = [
    "store.path=/shared/store",
    "run=/shared/run",
    "teacher=cifar",
    "teacher.weights=/shared/w.pth",
]


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("store.path=stores/demo", "store.path=stores/demo"),
        ("run=mine", "run=mine"),
        ("teacher.weights=w.pth", "teacher.weights=w.pth"),
        ("data.path=photos", "data.path=photos"),
    ],
)
def test_in_a_job_a_relative_path_is_refused_with_the_way_out(monkeypatch, word, named):
    monkeypatch.setenv(JOB, "{}")

    with pytest.raises(ConfigError, match="absolute path on storage that all nodes share") as error:
        placed("precompute", "data=image_folder", "data.path=/shared/photos", *SHARED, word)

    assert str(error.value).startswith(f"{named} is relative")


@pytest.mark.parametrize(
    "words",
    [
        ["data=demo"],
        ["data=image_folder", "data.path=/shared/photos"],
        # No cache is needed, as nothing is downloaded.
        ["data=webdataset", "data.path=/shared/tars"],
        ["data=demo", "teacher.weights=random"],
        ["data=demo", "teacher=none"],
    ],
)
def test_in_a_job_absolute_paths_and_words_that_are_no_paths_will_do(monkeypatch, words):
    monkeypatch.setenv(JOB, "{}")
    shared = [word for word in SHARED if "teacher=none" not in words or "weights" not in word]

    config = placed("precompute", *shared, *words)

    assert config.store.path == "/shared/store"


@needs_papers
def test_in_a_job_the_files_of_an_evaluator_are_checked_and_the_teacher_where_it_is_asked(
    monkeypatch,
):
    monkeypatch.setenv(JOB, "{}")
    words = [*SHARED, "teacher.weights=w.pth"]

    placed("evaluate", *words)  # accuracy and localization need no teacher network

    with pytest.raises(ConfigError, match=r"teacher\.weights=w\.pth is relative"):
        placed("evaluate", *words, "evaluators=[unicam]")
    with pytest.raises(
        ConfigError, match=r"evaluate\.distance_correlation\.embeddings=e\.npy is rel"
    ):
        placed("evaluate", *words, "evaluate.distance_correlation.embeddings=e.npy")


@needs_papers
def test_a_nested_file_becomes_absolute(monkeypatch):
    config = config_of("evaluate", "evaluate.distance_correlation.embeddings=e.npy")

    options = with_absolute_paths(config).evaluate

    assert options.distance_correlation.embeddings == str(Path("e.npy").absolute())
    assert options.distance_correlation.probe_records == 512


def test_in_a_job_a_stage_without_a_cluster_is_checked_too(monkeypatch):
    monkeypatch.setenv(JOB, "{}")

    with pytest.raises(ConfigError, match="stores/demo is relative"):
        placed("verify", "store.path=stores/demo")


def test_beside_a_head_relative_paths_are_those_of_the_drivers_folder(tmp_path):
    words = ["data=image_folder", "data.path=photos", "store.path=s", *SHARED[2:]]
    words.append("teacher.weights=pretrained")

    config = placed("precompute", "cluster=existing", *words)

    assert config.data.path == str(tmp_path / "photos")
    assert config.store.path == str(tmp_path / "s")
    assert config.teacher.weights == "pretrained"
    # Relative paths stay as they are on this machine.
    assert placed("precompute", *words).data.path == "photos"


# ---- joining Ray ---------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Arguments of the calls of ray.init, in an environment that is restored after the test."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in (
        *("RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_USAGE_STATS_ENABLED"),
        *("RAY_worker_niceness", JOB),
    ):
        os.environ.pop(name, None)
    import ray

    made = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: made.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: made.append("shutdown"))
    return made


def test_an_existing_cluster_is_joined_without_resources_and_is_sent_the_packages(
    calls, monkeypatch
):
    monkeypatch.setattr("permafrost.config.plugins._PLACES", {})  # of other tests in this process
    with ray_session(ExistingClusterConfig(threads_per_actor=3), 8):
        assert os.environ["RAY_AUTH_MODE"] == "token"

    joined, end = calls
    assert end == "shutdown"
    assert set(joined) == {"address", "namespace", "logging_level", "log_to_driver", "runtime_env"}
    assert joined["address"] == "auto"
    runtime = joined["runtime_env"]
    packages = ["permafrost", *(f"permafrost_{name}" for name in sorted(PACKAGES))]
    assert runtime["py_modules"] == [str(ROOT / "pipeline" / name) for name in packages]
    entries = json.loads(runtime["env_vars"]["PERMAFROST_ENTRY_POINTS"])
    assert ("ked" in entries) == HAS_PAPERS
    assert runtime["env_vars"]["OMP_NUM_THREADS"] == "3"
    assert "PYTHONPATH" not in runtime["env_vars"]


def test_the_variables_of_a_job_win(calls):
    config = ExistingClusterConfig()
    job = {"runtime_env": {"working_dir": "gcs://x.zip", "env_vars": {"OMP_NUM_THREADS": "7"}}}
    os.environ[JOB] = json.dumps(job)

    with ray_session(config, 1):
        pass

    assert set(calls[0]["runtime_env"]) == {"env_vars", "py_modules", "excludes"}
    # Ray would reject a second value of a variable that the job sets.
    assert "OMP_NUM_THREADS" not in calls[0]["runtime_env"]["env_vars"]
    assert calls[0]["runtime_env"]["env_vars"].items() >= THREAD_ENVIRONMENT.items()


def test_a_local_ray_is_made_large_enough_and_has_what_the_options_say(calls):
    with ray_session(LocalClusterConfig(dashboard=True, usage_statistics=True), 100):
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
        assert os.environ["RAY_worker_niceness"] == "0"  # noqa: SIM112  # Ray spells it so

    assert calls[0]["address"] == "local"
    assert calls[0]["num_cpus"] == 101
    assert calls[0]["include_dashboard"] is True
    assert str(ROOT / "pipeline") in calls[0]["runtime_env"]["env_vars"]["PYTHONPATH"]


def test_a_ray_that_does_not_start_is_started_once_more(calls, monkeypatch, caplog):
    import ray

    init, attempts = ray.init, []

    def slow_at_first(**options):
        attempts.append(options)
        if len(attempts) == 1:
            raise Exception("The current node timed out during startup. This could happen because")
        return init(**options)

    monkeypatch.setattr(ray, "init", slow_at_first)
    with caplog.at_level("INFO"), ray_session(LocalClusterConfig(), 1):
        pass

    assert len(attempts) == 2
    assert "starting Ray" in caplog.messages[0]
    assert "Ray did not start: The current node timed out" in caplog.messages[1]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            LocalClusterConfig(),
            OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes"),
            r"AF_UNIX.*/a/long/path, is too long.*set TMPDIR to a",
        ),
        (
            LocalClusterConfig(),
            Exception("The current node timed out during startup.\nThis could happen"),
            r"2 attempts.*executor=serial.*trainer\.ranks=1",
        ),
        (
            ExistingClusterConfig(),
            RuntimeError("Version mismatch:\n  2.9\n  2.60."),
            r"Version mismatch: 2.9 2.60\); start one",
        ),
    ],
)
def test_what_ray_complains_about_is_said_in_one_line_with_its_remedy(
    calls, monkeypatch, config, error, message
):
    import ray

    def fail(**_):
        raise error

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr("tempfile.tempdir", "/a/long/path")

    with pytest.raises(ClusterError, match=message) as caught, ray_session(config, 1):
        pass
    assert "\n" not in str(caught.value)


def test_workers_of_a_local_ray_start_from_a_path_with_a_space(calls, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/my projects/permafrost/.venv/bin/python")

    with ray_session(LocalClusterConfig(), 1):
        pass

    assert calls[0]["runtime_env"]["py_executable"] == "'/my projects/permafrost/.venv/bin/python'"


def test_what_the_environment_says_about_authentication_wins(calls):
    os.environ["RAY_AUTH_MODE"] = "disabled"

    with ray_session(ExistingClusterConfig(), 1):
        assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_rays_handler_of_sigterm_is_replaced_by_ours(calls, monkeypatch):
    import ray

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        ray, "init", lambda **_: signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    )

    with ray_session(ExistingClusterConfig(), 1):
        assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("variable", [True, False])
def test_a_head_that_nobody_listens_at_is_one_clear_error_at_once(calls, variable):
    from tests.support.ray_nodes import free_port

    address = f"127.0.0.1:{free_port()}"
    if variable:
        os.environ["RAY_ADDRESS"] = address
    config = ExistingClusterConfig() if variable else ExistingClusterConfig(address=address)

    with (
        pytest.raises(
            ClusterError,
            match=f"cluster.address={config.address} \\(.*{os.strerror(errno.ECONNREFUSED)}\\); start",
        ),
        ray_session(config, 1),
    ):
        pass

    assert calls == []


# ---- upload of a job -----------------------------------------------------------------------------


def test_a_job_takes_the_code_along_and_neither_data_nor_results(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    folder = tmp_path / "checkout"
    kept = [
        "pipeline/permafrost/a.py",
        "stages/b.py",
        "conf/data/demo.yaml",
        "pipeline/permafrost/store/files.py",
    ]
    left = ["data/x.tar", "runs/r/model.safetensors", "stores/s/manifest.json", "tests/t.py"]
    left += [".venv/bin/python", ".venv-bench/bin/python", ".git/config"]
    left += ["pipeline/permafrost/__pycache__/a.pyc"]
    for name in [*kept, *left]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    for name in (".gitignore", ".rayignore"):
        (folder / name).write_text((ROOT / name).read_text())

    package = tmp_path / "package.zip"
    newer = inspect.signature(create_package).parameters.keys() & {"include_gitignore"}
    create_package(
        str(folder),
        package,
        include_parent_dir=False,
        excludes=[],  # newer versions of Ray have defaults
        **dict.fromkeys(newer, True),
    )

    files = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert files == {*kept, ".gitignore", ".rayignore"}


def test_messages_of_a_lost_node_are_a_line_each_and_are_not_repeated(caplog):
    retry = "Task work failed. The task will be retried. Error: RPC error {}"
    dead = "The node with node id: {} and address: 10.0.0.{} has been marked dead"
    log = "Raylet is terminated. Last lines of the Raylet logs:\n    one\n    two \x1b[31m"
    messages = [*(retry.format(number) for number in range(20)), dead.format("a1f", 2), log]
    said = set()
    for message in [*messages, dead.format("b2e", 3)]:
        _warn_of_cluster(said, {"lines": [message], "pid": "raylet", "is_err": False}, False)

    assert caplog.messages == [
        "Ray: Task work failed",
        "Ray: The node with address: 10.0.0.2 has been marked dead",
        "Ray: Raylet is terminated",
        "Ray: The node with address: 10.0.0.3 has been marked dead",
    ]
