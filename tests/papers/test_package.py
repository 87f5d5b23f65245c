"""The package of docs/howto/package.md, installed by pip into a fresh environment, through all verbs and Ray."""

import json
import os
import re
import shlex

import pytest

from tests.support.environments import make_environment
from tests.support.paths import ROOT
from tests.support.processes import environment, run_program
from tests.support.ray_nodes import RAY, node_environment, ray_nodes

PAGE = (ROOT / "docs/howto/package.md").read_text()
FILES = dict(re.findall(r"^```(?:python|toml|yaml)\n# (\S+)\n(.*?)^```", PAGE, re.M | re.S))
(COMMANDS,) = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)


def run(folder, *words):
    """Run a program in a folder, with nothing of this checkout on its path. Returns what it has printed."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    known = {name: value for name, value in environment().items() if name not in hidden}
    done = run_program(words, cwd=folder, env=known)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with an environment, in which permafrost and the package are installed, and its bin folder."""
    top = tmp_path_factory.mktemp("package")
    for name, text in FILES.items():
        path = top / "my-paper" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (top / "my-paper/my_paper/__init__.py").touch()
    tools = make_environment(top / "env", with_pip=True).parent
    pip = (tools / "python", "-m", "pip", "install", "-q", "--no-deps")
    try:
        run(top, *pip, ROOT, "./my-paper")
    except AssertionError as error:
        if "No matching distribution" in str(error):
            pytest.skip("pip cannot download what packages are built with")
        raise
    return top, tools


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_installed_package_goes_through_all_verbs_and_ray(world):
    top, tools = world
    for command in COMMANDS.replace("\\\n", "").splitlines():
        program, *words = shlex.split(command)
        if program == "permafrost":
            run(top, tools / "permafrost", *words)

    script = "import permafrost, my_paper; print(permafrost.__file__, my_paper.__file__)"
    for place in run(top, tools / "python", "-c", script).split():
        assert place.startswith(str(top / "env"))
    (plain,) = (top / "stores/my_paper/teachers").glob("blocks-*/manifest.json")
    (mirrored,) = (top / "stores/my_paper/teachers").glob("mirrored-*/manifest.json")
    assert json.loads(plain.read_text())["added"] == {"tone_channels": 16}
    assert json.loads(mirrored.read_text())["views"]["sampler"] == "mirrored"
    (student,) = (top / "runs/my_paper/small/students").glob("code-seed0-*")
    lines = (student / "distill/metrics.jsonl").read_text().splitlines()
    assert "code" in json.loads(lines[-1])
    assert (top / "runs/my_paper/twin/teach/note.txt").read_text() == "blocks"
    assert len(list((top / "stores/my_paper/artifacts").glob("tone-*/manifest.json"))) == 1
    page = (top / "runs/my_paper/small/report.html").read_text()
    assert "16 channels, mean" in page
    assert "How sure the networks are." in page


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_an_added_verb_is_shown_called_and_run_as_any_other(world):
    top, tools = world
    store = "store.path=stores/verb"
    packed = ("data=digits", "data.test_fraction=0.2", "store.shard_size=300", "executor=serial")
    network = ("teacher=blocks", "teacher.weights=random", "annotate.outputs=[logits,tone]")
    run(top, tools / "permafrost", "precompute", store, *packed, *network)
    done = run(top, tools / "permafrost", "tones", store, "executor=serial")
    helped = run(top, tools / "permafrost", "tones", "--help")
    listed = run(top, tools / "permafrost", "--help")
    page = run(top, tools / "python", ROOT / "docs/options.py")
    script = f"import permafrost; print(permafrost.tones({store!r}).tones)"
    called = run(top, tools / "python", "-c", script)
    with ray_nodes(PATH=os.pathsep.join([str(tools), os.environ["PATH"]])) as nodes:
        nodes.start_head("--num-cpus=2", dashboard=True)
        job = (tools / "python", "-m", "permafrost", "tones", "cluster=existing", "executor=ray")
        submit = (RAY, "job", "submit", "--address", nodes.dashboard, "--")
        words = [*submit, *job, f"store.path={top / 'stores/verb'}"]
        environment = node_environment()
        submitted = run_program(words, cwd=top, env=environment)

    order = [line.split()[0] for line in listed.splitlines() if line.startswith("  ")]
    assert order[order.index("show") + 1] == "tones"
    assert "Print the mean tones of a pass." in listed
    assert helped.startswith("Print the mean tones of a pass.")
    assert "tones.channels=3" in helped
    assert "## tones" in page
    assert "| `tones.channels` | integer | `3` |" in page
    (tones,) = re.findall(r"^tones: (.*)$", done, re.M)
    assert len(tones.split()) == 3
    assert called.strip() == tones
    assert f"tones: {tones}" in submitted.stdout, submitted.stdout + submitted.stderr


def test_the_page_has_every_door_of_its_table():
    doors = re.findall(r"^\|.*\| `([a-z_A-Z.]+)` \|$", PAGE, re.M)

    assert len(doors) == 10
    assert all(
        any(door in text or name.endswith(door) for name, text in FILES.items()) for door in doors
    )
