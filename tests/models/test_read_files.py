"""Files that a network of one's own reads as it is built are part of what it is."""

from itertools import count
from pathlib import Path

import pytest

import permafrost
from permafrost.config.models import CifarModelConfig, ModuleConfig
from permafrost.models.network import Network
from permafrost.models.read_files import digests_of_reads, recorded_reads
from tests.support.words import TINY_DATA

NETWORK = """
import json
from itertools import count
from pathlib import Path
from torch import nn

HERE = Path(__file__).parent


def build(classes):
    settings = json.loads((HERE / "settings.json").read_text())
    (HERE / "log.txt").write_text("built")
    layer = nn.Conv2d(3, settings["width"], 3, settings["stride"], 1)
    return nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(settings["width"], classes))
"""
DATA = [*TINY_DATA, "data.image_size=32"]


MODULES = (f"network_with_settings_{number}" for number in count())
"""Names of modules, each for one test, as a process has one module of a name."""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = next(MODULES)
    (tmp_path / f"{name}.py").write_text(NETWORK)
    (tmp_path / "settings.json").write_text('{"width": 8, "stride": 2}')
    return ModuleConfig(
        factory=f"{name}.py:build", layer="1", weights="random",
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip


def test_only_files_that_are_read_are_collected(tmp_path):
    (tmp_path / "read.txt").write_text("a")

    with recorded_reads() as paths:
        (tmp_path / "read.txt").read_text()
        (tmp_path / "written.txt").write_text("b")
        Path("/proc/self/stat").read_bytes() if Path("/proc/self/stat").exists() else None
    (tmp_path / "written.txt").read_text()

    assert paths == {tmp_path / "read.txt"}


def test_settings_are_part_of_a_networks_identity(config, tmp_path):
    before = Network(config, 10).describe()
    assert "file settings.json" in before
    assert "file log.txt" not in before
    assert Network(config, 10).describe() == before

    (tmp_path / "settings.json").write_text('{"width": 8, "stride": 4}')

    assert Network(config, 10).describe()["file settings.json"] != before["file settings.json"]


def test_files_of_one_name_in_two_folders_both_count(config, tmp_path):
    file = tmp_path / config.factory.partition(":")[0]
    code = file.read_text().replace(
        "    layer =", '    (HERE / "more/settings.json").read_text()\n    layer ='
    )
    file.write_text(code)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/settings.json").write_text("a")
    (digest,) = digests_of_reads(config, 10).values()

    (tmp_path / "more/settings.json").write_text("b")
    (changed,) = digests_of_reads(config, 10).values()
    (tmp_path / "settings.json").write_text('{"width": 8, "stride": 3}')

    assert len({digest, changed, *digests_of_reads(config, 10).values()}) == 3


def test_networks_without_a_factory_read_nothing_that_counts():
    assert digests_of_reads(CifarModelConfig(name="resnet8"), 10) == {}


def test_a_pass_and_a_student_of_other_settings_are_others(config, tmp_path):
    file = config.factory.partition(":")[0]
    words = [
        f"plugins=[{file}]", "executor=serial", "annotate.outputs=[logits,maps]",
        "teacher=module", f"teacher.factory={config.factory}", "teacher.layer='1'",
        "teacher.weights=random",
    ]  # fmt: skip
    first = permafrost.precompute("store.path=s", *DATA, *words).passes
    assert permafrost.precompute("store.path=s", *DATA, *words).passes == first
    student = [
        "store.path=s", "run=r", f"plugins=[{file}]", "student=module", "trainer.epochs=1",
        f"student.factory={config.factory}", "student.layer='1'", "trainer.batch_size=8",
        "method=kd", "augment=none", f"store.teacher=[{first[0]}]",
    ]  # fmt: skip
    permafrost.distill(*student)

    (tmp_path / "settings.json").write_text('{"width": 8, "stride": 4}')

    assert permafrost.precompute("store.path=s", *DATA, *words).passes != first
    with pytest.raises(permafrost.UserError, match="settings"):
        permafrost.distill(*student)
