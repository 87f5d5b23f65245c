"""Fixtures of all tests: a tiny demo set, a store of it and a tiny teacher, made once per test run."""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import secrets
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.papers import HAS_PAPERS
from tests.support.paths import PYTHONPATH

if TYPE_CHECKING:
    from permafrost.config.models import CifarModelConfig
    from tests.support.stores import Frozen

# The other imports are in the fixtures, because the process that distributes the tests needs no torch.

# Set here, as Ray reads these variables when any test first imports it.
os.environ |= {
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
# Ray's workers import tasks that are defined in tests.
os.environ["PYTHONPATH"] = os.pathsep.join([PYTHONPATH, os.environ.get("PYTHONPATH", "")])


_IN_MEMORY = Path("/dev/shm")
_ROOM_BYTES = 4 * 2**30


def pytest_configure(config):
    """Keep the folders of tests in memory where there is room, because some disks take 3 ms to remove a folder.

    The tests remove tens of thousands. Slow ones stay on the disk: checkpoints of one of them take 11 GB.
    """
    if config.option.markexpr != "not slow":
        return
    is_usable = _IN_MEMORY.is_dir() and os.access(_IN_MEMORY, os.W_OK | os.X_OK)
    if is_usable and shutil.disk_usage(_IN_MEMORY).free >= _ROOM_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_IN_MEMORY))


_OF_PAPERS = re.compile(
    r"^(?:from|import) (?:permafrost_papers|tests\.(?:gpu|benchmarks|papers|stages\.test_recipes)"
    r"|tests\.support\.(?:additive|bcos|broden|superfeatures))\b",
    re.MULTILINE,
)


def pytest_ignore_collect(collection_path):
    """Leave out the modules that import the packages of the papers where these are not here."""
    if HAS_PAPERS or collection_path.suffix != ".py":
        return None
    return _OF_PAPERS.search(collection_path.read_text()) is not None or None


def pytest_collection():
    """Collect no garbage while the tests are imported, of which nearly everything stays."""
    gc.disable()


@pytest.hookimpl(optionalhook=True)  # there is no such hook without pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of a module in one process, and those on Ray or a fork server in the same one."""
    from tests.support.scheduler import ModuleScheduling  # imports pytest-xdist

    return ModuleScheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Begin with the modules that take longest where several processes share the tests."""
    if hasattr(config, "workerinput"):
        from tests.support.scheduler import sort_by_durations

        sort_by_durations(config.rootpath, items)


def pytest_collection_finish():
    """Use one thread, and collect garbage rarely and only of the tests, because there are many imported objects."""
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()


def pytest_sessionfinish():
    """Unfreeze the collector, as extension modules would otherwise report leaks at exit."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def folder_of_shared_fixtures(tmp_path_factory):
    """Work in a temporary folder from the start, as fixtures of a session or module run before those of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("shared"))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks():
    """Skip fsync, a tenth of the time of all tests, which shows only when a machine loses its power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def forked_children():
    """Fork the children that try records after a death, in a hundredth of the time of a new interpreter."""
    from permafrost.store import deaths

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deaths, "_START_METHOD", "fork")
        yield


@pytest.fixture(scope="session", autouse=True)
def records_drawn_once():
    """Draw a record of the demo set once: drawing takes most of the time of packing, and tests pack the same few."""
    from permafrost_sources.demo import DemoSource

    draw, drawn = DemoSource.read, {}

    @functools.wraps(draw)
    def read(source, record):
        key = (source.config, record.content)
        if key not in drawn:
            drawn[key] = draw(source, record)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DemoSource, "read", read)
        yield


@pytest.fixture
def records_drawn_anew(monkeypatch):
    """Draw every record of the demo set, for tests of how it is drawn."""
    from permafrost_sources.demo import DemoSource

    monkeypatch.setattr(DemoSource, "read", DemoSource.read.__wrapped__)


@pytest.fixture(scope="module")
def pages_drawn_quickly():
    """Leave plots of reports empty and compress their pictures little, for tests of what a report says."""
    from permafrost_report import figures, grid_figures, pictures

    encode = pictures._webp
    with pytest.MonkeyPatch.context() as patch:
        for module in (figures, grid_figures):
            patch.setattr(module, "finish", lambda figure, axis: "data:image/svg+xml;base64,")
        patch.setattr(
            pictures, "_webp", lambda image, **options: encode(image, **(options | {"quality": 0}))
        )
        yield


@pytest.fixture(autouse=True)
def own_runs_folder(tmp_path, monkeypatch):
    """Write runs to the test's own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> CifarModelConfig:
    """ResNet-8 of width 4 for ten classes, with random weights in a file."""
    from tests.support.networks import save_tiny_teacher

    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def frozen(tmp_path_factory, tiny_teacher) -> Frozen:
    """Finished store with one Zarr pass, which tests must not change."""
    from permafrost.store.reader import Store
    from tests.support.stores import Frozen, precompute_config
    from tests.support.verbs import precompute

    config = precompute_config(tmp_path_factory.mktemp("frozen") / "store", tiny_teacher)
    precompute.run(config)
    return Frozen(Store(Path(config.store.path)), config)


@pytest.fixture
def own(frozen, tmp_path):
    """Writable copy of the frozen store with two untrained students."""
    from permafrost.store.reader import Store
    from tests.support.runs import save_student

    store = shutil.copytree(frozen.store.path, tmp_path / "store")
    config = replace(frozen.config, store=replace(frozen.config.store, path=str(store)))
    copied = replace(frozen, store=Store(store), config=config)
    save_student(copied, "one")
    save_student(copied, "two", seed=6)
    return copied


@pytest.fixture(scope="session")
def ray_cluster():
    """Local Ray session that tests share and whose processes they must not kill."""
    from permafrost.cluster.session import ray_session
    from permafrost.config.cluster import LocalClusterConfig

    with ray_session(LocalClusterConfig(cpus_per_actor=0.5), cpus=2):
        yield


@pytest.fixture
def two_threads():
    """Give torch another number of threads than the verbs of a test do."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def count_trials(request):
    """Function that reports the outcomes of a test's trials, by name, to the tables of docs/concepts/reliability.md.

    seconds    of the slowest trial, if they are measured
    megabytes  of the largest trial, if they are measured
    """

    def report(kind, outcomes, seconds=None, megabytes=None):
        values = {"kind": kind, "outcomes": dict(outcomes)}
        values |= {"seconds": seconds, "megabytes": megabytes}
        # The fixture record_property would warn of a schema of JUnit files that has no properties.
        request.node.user_properties.append(("trials", json.dumps(values)))

    return report
