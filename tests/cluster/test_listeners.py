"""Sockets that listen and connect while each verb runs: no more than the tables in SECURITY.md say."""

import re
import subprocess
import sys
from functools import partial

import pytest

from permafrost.config.verbs import VERBS
from tests.support import connections
from tests.support.listeners import listeners_of, listeners_while
from tests.support.paths import ROOT
from tests.support.processes import environment, wait_until

DATA = ("image_size=16", "min_digit_size=8", "max_digit_size=12", "test_digits=10")
DATA += ("train_digits=40", "teacher_digits=12", "teacher_placements=1", "test_placements=1")
TEACHER = ("experiment=demo", "teacher.width=4")
IMAGES = ("store.shard_size=16", *(f"data.{option}" for option in DATA))
PACKED = ("experiment=demo", "teacher=none", *IMAGES)
MADE = (*TEACHER, *IMAGES)
EPOCH = ("teaching.trainer.epochs=1", "teaching.trainer.batch_size=4")
STUDENT = ("experiment=demo", "student.width=4", "trainer.epochs=1")
VARIANTS = (
    "variants={kd: [method=kd], labels: [method=labels]}",
    "seeds=[0]",
    "evaluators=[accuracy]",
)
ACCURACY = ("report.columns={accuracy: test.accuracy}", "report.compared_column=accuracy")
LICENSES = "licenses={images: CC-BY-2.0, weights: Apache-2.0, targets: Apache-2.0}"
SERIAL = {
    "preview": ("preview", "experiment=demo"),
    "precompute without a teacher": ("precompute", *PACKED, "executor=serial"),
    "teach": ("teach", *TEACHER, *EPOCH),
    "precompute": ("precompute", *MADE, "executor=serial"),
    "verify": ("verify", "store.path=stores/demo"),
    "show": ("show", "store.path=stores/demo"),
    "diff": ("diff", "stores/demo", "stores/demo"),
    "estimate": ("estimate", *PACKED),
    "distill": ("distill", *STUDENT, "run=single"),
    "evaluate": ("evaluate", "experiment=demo", "run=single", "evaluators=[accuracy]"),
    "export": ("export", "experiment=demo", "run=single"),
    "doctor": ("doctor",),
    "sweep": ("sweep", *STUDENT, *VARIANTS, "executor=serial"),
    "report": ("report", "experiment=demo", *ACCURACY),
    "share": ("share", "store.path=stores/demo", "to=shared", LICENSES),
    "share a table": ("share", "store.path=stores/demo", "to=table", "form=huggingface", LICENSES),
    "attach": ("attach", "from=shared", "store.path=stores/demo", "executor=serial"),
    "ingest": (
        *("ingest", "format=parquet", "path=table/data", "format.cache=copies"),
        *("format.frame=full", "store.path=stores/demo", "executor=serial"),
    ),
}
RAY = {
    "precompute": ("precompute", *MADE, "executor=ray", "store.path=stores/on_ray"),
    "sweep": ("sweep", *STUDENT, *VARIANTS, "executor=ray", "run=on_ray", "store.teacher=resnet8"),
    "distill": ("distill", *STUDENT, "run=ranks", "trainer.ranks=2", "store.teacher=resnet8"),
}
OF_RAY = {"gcs_server", "raylet", "agent", "worker", "monitor", "dashboard", "python"}
"""Programs of a local Ray that SECURITY.md names; python is the driver."""
TABLE = [
    line.strip("| ").split(" | ")
    for line in (ROOT / "SECURITY.md").read_text().splitlines()
    if line.startswith("| `")
]
"""Rows of both tables, of which the first three say what listens."""


def command(words):
    return [sys.executable, "-m", f"stages.{words[0]}", *words[1:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("listeners")


@pytest.fixture(scope="module")
def recorded(folder):
    """Environment of commands that record their connections; of others where none can be recorded."""
    if connections.WHY_NOT:
        return environment()
    return connections.recorded_environment(connections.compile_recorder(folder), folder)


@pytest.mark.slow
def test_nothing_listens_or_leaves_the_machine_without_ray(folder, recorded):
    listening, asked = {}, {}
    for name, words in SERIAL.items():
        listening[name], _ = listeners_while(command(words), folder, recorded)
        asked[name] = connections.asked_beyond_this_machine(folder)

    assert listening == asked == {name: set() for name in SERIAL}
    assert connections.reports_of_libraries(folder) == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", RAY)
def test_a_local_ray_listens_and_connects_as_the_tables_say(folder, recorded, name):
    if not (folder / "runs" / "demo" / "teach").exists():
        for stage in ("precompute without a teacher", "teach", "precompute"):
            listeners_while(command(SERIAL[stage]), folder)
    connections.asked_beyond_this_machine(folder)
    listening, _ = listeners_while(command(RAY[name]), folder, recorded)

    assert {"gcs_server", "raylet"} <= {each.program for each in listening}
    assert {each.program for each in listening} <= OF_RAY
    assert connections.asked_beyond_this_machine(folder) <= connections.OF_RAY


def test_the_table_has_every_verb():
    without_ray, in_one_process, on_ray = TABLE[:3]
    verbs = set(re.findall(r"`([a-z]+)`", without_ray[0] + in_one_process[0]))

    assert without_ray[1] == in_one_process[1] == "nothing"
    assert verbs == set(VERBS) == {words[0] for words in SERIAL.values()}
    assert {words[0] for words in RAY.values()} <= set(re.findall(r"`([a-z]+)`", on_ray[0]))
    for program in OF_RAY - {"python"}:
        assert program in on_ray[1]


def test_a_socket_that_listens_is_noticed(tmp_path):
    """Control: a child process that listens on all interfaces, and one that listens on this machine only."""
    code = "import socket, sys; s = socket.create_server((sys.argv[1], 0)); print(1, flush=True); input()"
    for address, reach in (("0.0.0.0", "all interfaces"), ("127.0.0.1", "this machine")):
        child = subprocess.Popen(
            [sys.executable, "-c", code, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout.readline().strip() == b"1"
        found = wait_until(partial(listeners_of, child.pid))
        child.communicate(b"\n")
        assert {each.reach for each in found} == {reach}
