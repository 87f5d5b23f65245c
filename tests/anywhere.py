"""Runs of the tests under the conditions of other machines, and with other versions of Python and of packages.

python -m tests.anywhere [--whole | --tests PATH ...] [--write] [condition ...]

condition  names of CONDITIONS; without any, all but `lowest` and `highest`, which are `make test-versions`
--whole    run the whole suite instead of SELECTION: what depends on the machine, without slow tests and without Ray
--tests    run these files or folders instead
--write    write the rows to docs/development/testing.md, where rows of other conditions stay as they are

Each condition is checked in every process that runs tests, so a row cannot be green where the condition does not hold.
A condition that this machine cannot provide is skipped with its reason. Logs and environments are in .venv-anywhere/.
"""

from __future__ import annotations

import argparse
import locale
import os
import re
import resource
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SELECTION = (
    *("tests/core", "tests/config", "tests/store", "tests/sources", "tests/docs"),
    *("tests/stages/test_flow.py", "tests/stages/test_commandline.py"),
    *("tests/test_golden.py", "tests/test_isolation.py", "tests/test_store_format.py"),
)
PAGE = ROOT / "docs/development/testing.md"
MARKS = ("<!-- outcomes -->\n", "<!-- end of outcomes -->")
HEAD = "| condition | tests | passed | failed | skipped | seconds |\n|---|---|---|---|---|---|\n"
WORK = ROOT / ".venv-anywhere"
VARIABLE = "PERMAFROST_TEST_CONDITION"
"""Environment variable that names the condition under which the tests run."""
NOBODY = 65534
PACKAGES = ("torch", "ray", "zarr", "kornia")
"""Packages whose versions a row states."""


class Unavailable(Exception):  # noqa: N818, an outcome and no error
    """Reason why this machine cannot provide a condition."""


@dataclass
class Run:
    """Process of the tests, as a condition sets it up."""

    place: Path
    """Temporary folder of the run."""
    python: str = sys.executable
    folder: Path = ROOT
    prefix: list[str] = field(default_factory=list)
    """Words before the command."""
    environment: dict[str, str | None] = field(default_factory=dict)
    """Variables to set, or to remove where the value is None."""
    options: list[str] = field(default_factory=list)
    processes: int = 2
    busy: int = 0
    """Number of processes that keep a core busy meanwhile."""
    umask: int = -1
    said: str = ""
    """Text that the row has in addition, such as versions."""


@dataclass(frozen=True)
class Condition:
    """Condition under which the tests must pass."""

    text: str
    prepare: Callable[[Run], None]
    holds: Callable[[pytest.Config], bool]
    """Check in a process of the tests that the condition holds."""


# ---- copies and environments ---------------------------------------------------------------------


def copy_of_files(folder: Path) -> Path:
    """Copy the files of the project, without .git and what git ignores, to a folder that anyone can read."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
    return folder


def interpreter(version: str) -> str:
    """Path of the interpreter of a version such as 3.12."""
    places = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    found = shutil.which(f"python{version}") or next(map(str, reversed(places)), None)
    works = found and subprocess.run([found, "-c", ""], check=False, capture_output=True)
    if works and works.returncode == 0:
        return found
    if places:  # a shim of pyenv on PATH that is not enabled
        return str(places[-1])
    raise Unavailable(f"no Python {version} on PATH or in ~/.pyenv/versions")


def with_uv() -> dict[str, str]:
    """Environment in which uv of this environment is on PATH."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def install(name: str, python: str, lock: Path, project: Path = ROOT) -> str:
    """Make an environment from a lock file below `project`, unless it is there already; return its interpreter."""
    place = f"{WORK.name}/{name}"
    installed = project / place / ".installed"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        shutil.rmtree(project / place, ignore_errors=True)
        (project / place).parent.mkdir(exist_ok=True)
        subprocess.run(
            ["bash", ".ci/install", place, str(lock)],
            cwd=project,
            env=with_uv() | {"PYTHON": python},
            check=True,
        )
    return str(project / place / "bin" / "python")


def resolve(name: str, resolution: str, version: str) -> Path:
    """Write the packages that pyproject.toml allows in their lowest or highest versions to a file, if they changed."""
    path = WORK / f"{name}.txt"
    words = [
        *("uv", "pip", "compile", "-q", "--no-annotate", "--no-header", "--no-emit-index-url"),
        *("--python-version", version, "--resolution", resolution, "--extra", "dev"),
    ]
    text = subprocess.run(
        [*words, "pyproject.toml"], cwd=ROOT, env=with_uv(), check=True, capture_output=True
    ).stdout
    WORK.mkdir(exist_ok=True)
    if not path.exists() or path.read_bytes() != text:
        path.write_bytes(text)
    return path


def versions(python: str) -> str:
    """Version of an interpreter and of the packages that matter most, in words."""
    code = (
        "import platform; from importlib.metadata import version; "
        f"print('Python', platform.python_version(), *(', ' + n + ' ' + version(n) for n in {PACKAGES}))"
    )
    said = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    return said.strip().replace(" , ", ", ")


# ---- conditions ----------------------------------------------------------------------------------


def set_variables(**variables: str | None) -> Callable[[Run], None]:
    return lambda run: run.environment.update(variables)


def use_one_core(run: Run) -> None:
    run.prefix = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))]


def use_turkish(run: Run) -> None:
    folder = run.place / "locales"
    folder.mkdir()
    words = ["localedef", "-i", "tr_TR", "-f", "UTF-8", str(folder / "tr_TR.UTF-8")]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"localedef cannot make tr_TR.UTF-8 ({error})") from error
    run.environment |= dict.fromkeys(("LANG", "LC_ALL"), "tr_TR.UTF-8")
    run.environment["LOCPATH"] = str(folder)


def use_umask(run: Run) -> None:
    run.umask = 0o077


def umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current


@lru_cache
def readable_project() -> tuple[Path, str]:
    """Copy of the project, and an interpreter in it, that every user can read and only root can write."""
    base = Path(tempfile.mkdtemp(prefix="permafrost-", dir="/var/tmp"))
    base.chmod(0o755)
    python = str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    # A shell starts it, as setpriv itself still finds what only root can.
    reach = [*AS_NOBODY, "sh", "-c", '"$0" -c ""', python]
    if subprocess.run(reach, check=False, capture_output=True).returncode:
        skipped = shutil.ignore_patterns("test", "__pycache__")
        shutil.copytree(sys.base_prefix, base / "python", symlinks=True, ignore=skipped)
        python = str(base / "python" / "bin" / Path(python).name)
    project = copy_of_files(base / "project")
    return project, install("user", python, project / "requirements.lock", project)


AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]


def use_another_user(run: Run) -> None:
    if os.geteuid() != 0:
        raise Unavailable("only root can start a process of another user")
    if shutil.which("setpriv") is None:
        raise Unavailable("no setpriv")
    run.folder, run.python = readable_project()
    run.prefix = AS_NOBODY
    # A copied interpreter with a shared library would look for it where it was built.
    run.environment["LD_LIBRARY_PATH"] = str(run.folder.parent / "python" / "lib")
    home = run.place / "home"
    for folder in (run.place, home):
        folder.mkdir(exist_ok=True)
        os.chown(folder, NOBODY, NOBODY)
    run.environment |= {
        **{"HOME": str(home), "USER": "nobody", "LOGNAME": "nobody"},
        **{"TMPDIR": str(run.place), "RAY_TMPDIR": str(run.place), "PYTHONDONTWRITEBYTECODE": "1"},
    }


def use_read_only_home(run: Run) -> None:
    home = run.place / "read-only"
    home.mkdir()
    home.chmod(0o555)
    if os.geteuid() == 0:  # who may write everywhere
        use_another_user(run)
    run.environment["HOME"] = str(home)


def is_home_read_only() -> bool:
    try:
        (Path.home() / "written").write_text("")
    except OSError:
        return True
    return False


def use_other_file_system(run: Run) -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == ROOT.stat().st_dev:
        raise Unavailable("no file system in /dev/shm")
    run.place = Path(tempfile.mkdtemp(prefix="permafrost ü ", dir=shared))
    run.environment["TMPDIR"] = str(run.place)


def is_other_file_system() -> bool:
    place = tempfile.gettempdir()
    return "ü " in place and Path(place).stat().st_dev != Path.cwd().stat().st_dev


def use_copy(run: Run) -> None:
    run.folder = copy_of_files(run.place / "project")


def use_no_xdist(run: Run) -> None:
    run.options, run.processes = ["-p", "no:xdist"], 0


def use_random_order(run: Run) -> None:
    place, seed = str(run.place / "packages"), secrets.randbelow(10**6)
    words = ["uv", "pip", "install", "-q", "--target", place, "--no-deps", "pytest-random-order"]
    subprocess.run(words, env=with_uv(), check=True)
    run.environment["PYTHONPATH"] = place
    run.options = ["--random-order", f"--random-order-seed={seed}"]
    run.said = f"seed {seed}"


def use_busy_cores(processes: int) -> Callable[[Run], None]:
    def prepare(run: Run) -> None:
        run.processes, run.busy = processes, 2

    return prepare


def use_few_files(run: Run) -> None:
    run.prefix = ["prlimit", "--nofile=256"]


def use_python(version: str) -> Callable[[Run], None]:
    def prepare(run: Run) -> None:
        lock = ROOT / "requirements.lock"
        run.python = install(f"python{version}", interpreter(version), lock)
        run.said = versions(run.python)

    return prepare


def use_lowest(run: Run) -> None:
    packages = resolve("lowest", "lowest-direct", "3.11")
    run.python = install("lowest", interpreter("3.11"), packages)
    run.said = versions(run.python)


def use_highest(run: Run) -> None:
    for version in ("3.14", "3.13", "3.12"):
        try:
            python = interpreter(version)
        except Unavailable:
            continue
        run.python = install("highest", python, resolve("highest", "highest", version))
        run.said = versions(run.python)
        return
    raise Unavailable("no Python above 3.11")


def is_environment(name: str) -> Callable[[pytest.Config], bool]:
    return lambda _: Path(sys.prefix) == WORK / name


def has_variable(name: str) -> Callable[[pytest.Config], bool]:
    return lambda _: name in os.environ


CONDITIONS = {
    "one-core": Condition("one core", use_one_core, lambda _: len(os.sched_getaffinity(0)) == 1),
    "instructions": Condition(
        "AVX2 in oneDNN and no vector instructions in ATen",
        set_variables(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="default"),
        lambda _: _cpu_capability() == "DEFAULT",
    ),
    "c-locale": Condition(
        "LC_ALL=C",
        set_variables(LC_ALL="C", LANG="C"),
        lambda _: locale.setlocale(locale.LC_ALL, "") == "C",
    ),
    "turkish": Condition(
        "LC_ALL=tr_TR.UTF-8, also for numbers and dates",
        use_turkish,
        lambda _: (
            locale.setlocale(locale.LC_ALL, "") == "tr_TR.UTF-8"
            and locale.localeconv()["decimal_point"] == ","
        ),
    ),
    "time-zone": Condition(
        "a time zone 5:45 hours east of Greenwich",
        set_variables(TZ="NPT-5:45"),
        lambda _: time.localtime().tm_gmtoff == 20700,
    ),
    "umask": Condition("umask 077", use_umask, lambda _: umask() == 0o077),
    "user": Condition(
        "a user other than root, and a checkout that only root can write",
        use_another_user,
        lambda _: os.geteuid() != 0 and not os.access(Path.cwd(), os.W_OK),
    ),
    "read-only-home": Condition(
        "a home folder that cannot be written",
        use_read_only_home,
        lambda _: is_home_read_only(),
    ),
    "no-home": Condition(
        "no variable HOME", set_variables(HOME=None), lambda _: "HOME" not in os.environ
    ),
    "file-system": Condition(
        "TMPDIR on a tmpfs, with a space and an umlaut in its name",
        use_other_file_system,
        lambda _: is_other_file_system(),
    ),
    "no-git": Condition(
        "an unpacked copy without .git", use_copy, lambda _: not Path(".git").exists()
    ),
    "no-xdist": Condition(
        "one process, without pytest-xdist",
        use_no_xdist,
        lambda config: not config.pluginmanager.hasplugin("xdist"),
    ),
    "random-order": Condition(
        "modules and tests in random order",
        use_random_order,
        lambda config: bool(config.getoption("random_order_bucket", None)),
    ),
    "busy-1": Condition("one process beside two busy ones", use_busy_cores(1), lambda _: True),
    "busy-4": Condition("four processes beside two busy ones", use_busy_cores(4), lambda _: True),
    "few-files": Condition(
        "256 open files per process",
        use_few_files,
        lambda _: resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 256,
    ),
    "proxy": Condition(
        "a proxy that does not answer",
        set_variables(
            **dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"),
            **dict.fromkeys(("no_proxy", "NO_PROXY")),
        ),
        lambda _: urllib.request.getproxies().get("http") == "http://127.0.0.1:9",
    ),
    "terminal": Condition(
        "TERM=dumb", set_variables(TERM="dumb"), lambda _: os.environ["TERM"] == "dumb"
    ),
    "hash-seed": Condition(
        "another hash seed", set_variables(PYTHONHASHSEED="4242"), has_variable("PYTHONHASHSEED")
    ),
    **{
        f"python{version}": Condition(
            "the pinned packages", use_python(version), is_environment(f"python{version}")
        )
        for version in ("3.11", "3.12", "3.13", "3.14")
    },
    "lowest": Condition(
        "the lowest version of every package that pyproject.toml allows",
        use_lowest,
        is_environment("lowest"),
    ),
    "highest": Condition(
        "the highest version of every package that pyproject.toml allows",
        use_highest,
        is_environment("highest"),
    ),
}
VERSIONS = ("lowest", "highest")


def _cpu_capability() -> str:
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def pytest_configure(config: pytest.Config) -> None:
    """Check, in each process that runs tests, that the condition holds and that the intended files are tested."""
    import permafrost

    name = os.environ[VARIABLE]
    if not CONDITIONS[name].holds(config):
        pytest.exit(f"the condition {name} does not hold", returncode=3)
    if not Path(permafrost.__file__).is_relative_to(Path.cwd()):
        pytest.exit(f"the tests would import {permafrost.__file__}", returncode=3)


# ---- running -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Counts of one run of the tests."""

    tests: int
    failed: int
    skipped: int
    seconds: float
    failures: tuple[str, ...] = ()


def read_outcome(path: Path, seconds: float) -> Outcome:
    """Read the counts from a JUnit file of pytest. An error of a fixture counts as a failed test."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = tuple(f"{case.get('classname')}::{case.get('name')}" for case in bad)
    return Outcome(len(cases), len(bad), skipped, seconds, names)


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    words = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(words) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_tests(name: str, run: Run, tests: list[str]) -> Outcome | str:
    """Run the tests under a condition; return their counts, or a line where they did not run."""
    inherited = {n: v for n, v in os.environ.items() if not n.startswith("LC_") and n != "LANG"}
    variables = inherited | {
        **{"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "LANG": "C.UTF-8"},
        **{VARIABLE: name, **run.environment},
    }
    report = run.place / "junit.xml"
    parallel = ["-n", str(run.processes), "--dist", "loadfile", "--no-loadscope-reorder"]
    command = [
        *(*run.prefix, run.python, "-m", "pytest", "-q", "-p", "tests.anywhere"),
        *("-p", "no:cacheprovider", f"--junitxml={report}", *run.options),
        *(parallel if run.processes else []),
        *tests,
    ]
    WORK.mkdir(exist_ok=True)
    log = WORK / f"{name}.log"
    started = time.monotonic()
    with log.open("w") as output, busy_processes(run.busy):
        code = subprocess.run(
            command,
            cwd=run.folder,
            env={n: v for n, v in variables.items() if v is not None},
            umask=run.umask,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    seconds = time.monotonic() - started
    if code not in (0, 1) or not report.exists():
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        return f"error: pytest ended with {code} ({lines[-1][:100] if lines else 'no output'})"
    return read_outcome(report, seconds)


def measure(name: str, tests: list[str]) -> tuple[str, Outcome | str]:
    """Set up a condition and run the tests; return the first cell of its row and the outcome."""
    condition = CONDITIONS[name]
    place = Path(tempfile.mkdtemp(prefix="permafrost-", dir="/var/tmp"))
    run = Run(place)
    try:
        condition.prepare(run)
        outcome = run_tests(name, run, tests)
    except Unavailable as reason:
        outcome = f"skipped: {reason}"
    finally:
        for folder in {place, run.place}:
            shutil.rmtree(folder, ignore_errors=True)
    return f"{name}: {condition.text}{f' ({run.said})' if run.said else ''}", outcome


def format_row(cell: str, outcome: Outcome | str) -> str:
    if isinstance(outcome, str):
        return f"| {cell} | {outcome} | | | | |\n"
    passed = outcome.tests - outcome.failed - outcome.skipped
    counts = (outcome.tests, passed, outcome.failed, outcome.skipped, round(outcome.seconds))
    return f"| {cell} | {' | '.join(f'{count:,}' for count in counts)} |\n"


def merge_rows(page: str, rows: dict[str, str]) -> str:
    """Replace the rows of these conditions in a page, in the order of CONDITIONS."""
    before, _, rest = page.partition(MARKS[0])
    table, _, after = rest.partition(MARKS[1])
    kept = {found[1]: found[0] for found in re.finditer(r"^\| ([\w.-]+): .*\n", table, re.M)}
    merged = kept | rows
    lines = "".join(merged[name] for name in CONDITIONS if name in merged)
    return f"{before}{MARKS[0]}\n{HEAD}{lines}\n{MARKS[1]}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        usage=__doc__.strip().splitlines()[2],
        description=__doc__.partition("\n\n")[2].partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--tests", nargs="+", metavar="PATH")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("names", nargs="*", metavar="condition")
    words = parser.parse_args()
    for name in words.names:
        if name not in CONDITIONS:
            parser.error(f"no condition {name}; choose from {', '.join(CONDITIONS)}")
    paths = words.tests or ([] if words.whole else SELECTION)
    tests = [*paths] if words.whole else ["-m", "not slow and not ray", *paths]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which removes the temporary folders
    try:
        good = measure_all(words, tests)
    finally:
        if readable_project.cache_info().currsize:
            shutil.rmtree(readable_project()[0].parent)
    sys.exit(0 if good else 1)


def measure_all(words: argparse.Namespace, tests: list[str]) -> bool:
    """Print a row for each condition, and return whether no test failed."""
    rows, good = {}, True
    print(HEAD, end="", flush=True)
    for name in words.names or [name for name in CONDITIONS if name not in VERSIONS]:
        cell, outcome = measure(name, tests)
        rows[name] = format_row(cell, outcome)
        print(rows[name], end="", flush=True)
        if isinstance(outcome, str):
            good = good and outcome.startswith("skipped")
        else:
            good = good and not outcome.failed
            for failure in outcome.failures:
                print(f"  failed: {failure}", file=sys.stderr)
        if words.write:
            PAGE.write_text(merge_rows(PAGE.read_text(), rows))
    return good


if __name__ == "__main__":
    main()
