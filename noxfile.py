"""Runs of the tests under the conditions of other machines, and with other versions of Python and of packages.

nox --list                    the conditions (https://nox.thea.codes)
nox                           all but `lowest` and `highest`, one after the other
nox -s core                   the core alone, from a wheel without the packages next to it
nox -s umask user             some
nox -s umask -- --whole       the whole suite instead of SELECTION: what depends on the machine, without slow tests
                              and without Ray
nox -s umask -- tests/core    these words for pytest instead of the paths of SELECTION

The plug-in tests/conditions.py checks the condition in every process that runs tests. A condition that this machine
cannot provide is skipped with its reason. The counts of each run are in .nox/<condition>.xml, of which
`python -m tests.outcomes` makes the rows of docs/development/testing.md.
"""

from __future__ import annotations

import atexit
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import nox
from nox.command import CommandFailed

from tests.conditions import CONDITIONS, ON_DEVICES, RESOLVED, SELECTION, VARIABLE
from tests.support.environments import make_environment
from tests.support.paths import ROOT

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
# Also a signal to end removes the temporary folders and ends the tests.
signal.signal(signal.SIGTERM, signal.default_int_handler)
# Interpreters of pyenv that are not enabled, the newest first.
PYENV = sorted(Path("~/.pyenv/versions").expanduser().glob("3.*/bin"), reverse=True)
os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *map(str, PYENV)])

Run = Callable[[nox.Session], None]
NOBODY = 65534
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
LOCK = "requirements.lock"
VERSIONS = (
    "import platform; from importlib.metadata import version; print(f'Python {platform.python_version()}', "
    "*(f'{name} {version(name)}' for name in ('torch', 'ray', 'zarr', 'kornia')), sep=', ')"
)
"""Program that prints the versions that matter most."""
SESSIONS = {
    "instructions": {"env": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "default"}},
    "c-locale": {"env": {"LC_ALL": "C", "LANG": "C"}},
    "time-zone": {"env": {"TZ": "NPT-5:45"}},
    "no-home": {"env": {"HOME": None}},
    "proxy": {
        "env": dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
        | dict.fromkeys(("no_proxy", "NO_PROXY"))
    },
    "terminal": {"env": {"TERM": "dumb"}},
    "hash-seed": {"env": {"PYTHONHASHSEED": "4242"}},
    "umask": {"prefix": ("sh", "-c", 'umask 077 && exec "$@"', "sh")},
    "few-files": {"prefix": ("prlimit", "--nofile=256")},
    "pretended-gpu": {
        "options": ("-p", "tests.pretended_gpu.plugin"),
        "selection": ON_DEVICES,
    },
    "no-xdist": {"options": ("-p", "no:xdist"), "processes": 0},
    "busy-1": {"processes": 1, "busy": 2},
    "busy-4": {"processes": 4, "busy": 2},
}
"""Conditions that are arguments of `run_tests`."""


# ---- folders and environments --------------------------------------------------------------------


@contextmanager
def temporary_folder(prefix: str = "permafrost-", parent: str = "/var/tmp") -> Iterator[Path]:
    """Make a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(
        prefix=prefix, dir=parent, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def copy_files(folder: Path) -> Path:
    """Copy the files of the project, without .git and what git ignores, to a folder that anyone can read."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    subprocess.run(["chmod", "-R", "u=rwX,go=rX", str(folder)], check=True)
    return folder


def install(session: nox.Session, environment: str, requirements: str, **variables: str) -> None:
    """Install packages and the project of the current folder, also where TORCH_BACKEND asks for another torch."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # with uv
    words = ("bash", ".ci/install", environment, requirements)
    session.run_install(*words, env={"PATH": path, **variables}, external=True)


def resolve(session: nox.Session, resolution: str) -> str:
    """Write the packages that pyproject.toml allows in their lowest or highest versions to a file."""
    path = str(Path(session.virtualenv.location) / RESOLVED)
    words = ("uv", "pip", "compile", "-q", "--no-annotate", "--no-header", "--no-emit-index-url")
    which = ("--upgrade", "--python-version", session.python, "--resolution", resolution)
    session.run_install(*words, *which, "--extra", "dev", "pyproject.toml", "-o", path)
    return path


def run_in_environment(session: nox.Session, condition: str, requirements: str) -> None:
    """Run the tests in the environment of the session, with the packages of a file."""
    install(session, os.path.relpath(session.virtualenv.location), requirements)
    said = session.run("python", "-c", VERSIONS, silent=True, log=False) or ""
    run_tests(session, condition, python="python", said=said.strip())


# ---- running -------------------------------------------------------------------------------------


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Keep cores busy; the processes also end when this one is killed."""
    program = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_tests(
    session: nox.Session,
    condition: str,
    *,
    python: str = sys.executable,
    prefix: tuple[str, ...] = (),
    env: dict[str, str | None] | None = None,
    options: tuple[str, ...] = (),
    selection: tuple[str, ...] = SELECTION,
    processes: int = 2,
    busy: int = 0,
    said: str = "",
    folder: Path | None = None,
) -> None:
    """Run the tests under a condition, and keep their counts if they ran to the end.

    `prefix` is put before the command, variables of `env` that are None are removed, `busy` processes keep a core busy
    each, the row will have `said` in addition, and the tests may write their counts to `folder`.
    """
    if prefix and shutil.which(prefix[0]) is None:
        session.skip(f"no {prefix[0]}")
    words = session.posargs
    if "--whole" in words:
        words = [word for word in words if word != "--whole"]
    else:
        words = ["-m", "not slow and not ray", *(words or selection)]
    kept = ROOT / session.env_dir.parent / f"{condition}.xml"
    kept.parent.mkdir(exist_ok=True)
    kept.unlink(missing_ok=True)
    written = folder / kept.name if folder else kept
    variables = {
        **dict.fromkeys(name for name in os.environ if name.startswith("LC_")),
        **{"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "LANG": "C.UTF-8"},
        **{VARIABLE: condition, **(env or {})},
    }
    parallel = ("-n", str(processes), "--dist", "loadfile", "--no-loadscope-reorder")
    command = [
        *(*prefix, python, "-m", "pytest", "-q", "-p", "tests.conditions"),
        *("-p", "no:cacheprovider", f"--junitxml={written}", *options),
        *(("-o", f"junit_suite_name={said}") if said else ()),
        *(parallel if processes else ()),
        *words,
    ]
    try:
        with busy_processes(busy):
            session.run(*command, env=variables)
    except CommandFailed as failed:
        if failed.return_code != 1:  # with 1, all tests ran and some failed
            written.unlink(missing_ok=True)
        raise
    finally:
        if written != kept and written.exists():
            shutil.copy(written, kept)


# ---- conditions ----------------------------------------------------------------------------------


def condition(name: str, **options: object) -> Callable[[Run], Run]:
    """Register a function as the session of a condition, whose text `nox --list` shows."""

    def register(function: Run) -> Run:
        function.__doc__ = CONDITIONS[name].text
        return nox.session(name=name, **({"venv_backend": "none"} | options))(function)

    return register


for name, arguments in SESSIONS.items():

    @condition(name)
    def run(session: nox.Session, arguments: dict[str, object] = arguments) -> None:
        run_tests(session, session.name, **arguments)


@condition("one-core")
def one_core(session: nox.Session) -> None:
    core = str(min(os.sched_getaffinity(0)))
    run_tests(session, session.name, prefix=("taskset", "--cpu-list", core))


@condition("turkish")
def turkish(session: nox.Session) -> None:
    with temporary_folder() as folder:
        words = ["localedef", "-i", "tr_TR", "-f", "UTF-8", str(folder / "tr_TR.UTF-8")]
        try:
            subprocess.run(words, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            session.skip(f"localedef cannot make tr_TR.UTF-8 ({error})")
        env = {"LANG": "tr_TR.UTF-8", "LC_ALL": "tr_TR.UTF-8", "LOCPATH": str(folder)}
        run_tests(session, session.name, env=env)


@condition("file-system")
def file_system(session: nox.Session) -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == ROOT.stat().st_dev:
        session.skip("no file system in /dev/shm")
    with temporary_folder("permafrost ü ", str(shared)) as folder:
        run_tests(session, session.name, env={"TMPDIR": str(folder)})


@condition("no-git")
def no_git(session: nox.Session) -> None:
    with temporary_folder() as folder, session.chdir(copy_files(folder / "project")):
        run_tests(session, session.name)


@condition("no-papers")
def no_papers(session: nox.Session) -> None:
    with temporary_folder() as folder, session.chdir(copy_files(folder / "project")):
        for name in ("pipeline/permafrost_papers", "tests/papers"):
            shutil.rmtree(name)
        project = Path("pyproject.toml")
        project.write_text(re.sub(r".*permafrost_papers\..*\n", "", project.read_text()))
        python = make_environment(folder / "python")
        env: dict[str, str | None] = {"PYTHONPATH": str(Path.cwd() / "pipeline")}
        # The pages have results of the papers.
        paths = tuple(path for path in SELECTION if path != "tests/docs")
        run_tests(session, session.name, python=str(python), env=env, selection=paths)


@nox.session(name="core", venv_backend="none")
def core(session: nox.Session) -> None:
    """Print what an installation without extras has, run seven verbs of the core alone, then add each package."""
    for extra in ("", "[all]"):
        with temporary_folder() as folder:
            session.run_install("uv", "venv", "-q", str(folder))
            python = ("--python", str(folder / "bin/python"))
            session.run_install("uv", "pip", "install", "-q", *python, f".{extra}")
            sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
            packages = len(list(folder.glob("lib/*/site-packages/*.dist-info")))
            session.log(f"permafrost-kd{extra}: {packages} packages, {sum(sizes) / 1e6:,.0f} MB")
    command = (sys.executable, "-m", "pytest", "-q", "-m", "slow", "tests/test_core_alone.py")
    session.run(*command, *session.posargs)


@condition("random-order")
def random_order(session: nox.Session) -> None:
    seed = secrets.randbelow(10**6)
    options = ("--random-order", f"--random-order-seed={seed}")
    with temporary_folder() as folder:
        words = ("-q", "--target", str(folder), "--no-deps", "pytest-random-order")
        session.run_install(sys.executable, "-m", "pip", "install", *words)
        env = {"PYTHONPATH": str(folder)}
        run_tests(session, session.name, env=env, options=options, said=f"seed {seed}")


# ---- another user --------------------------------------------------------------------------------


@cache
def readable_project() -> tuple[Path, str]:
    """Copy the project so that every user can read and only root can write it, and find an interpreter for it."""
    base = Path(tempfile.mkdtemp(prefix="permafrost-", dir="/var/tmp"))
    atexit.register(shutil.rmtree, base)
    base.chmod(0o755)
    python = str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    # A shell starts it, as setpriv itself still finds what only root can.
    reach = [*AS_NOBODY, "sh", "-c", '"$0" -c ""', python]
    if subprocess.run(reach, check=False, capture_output=True).returncode:
        skipped = shutil.ignore_patterns("test", "__pycache__")
        shutil.copytree(sys.base_prefix, base / "python", symlinks=True, ignore=skipped)
        python = str(base / "python" / "bin" / Path(python).name)
    return copy_files(base / "project"), python


def run_as_nobody(session: nox.Session, place: Path, home: Path) -> None:
    """Run the tests as another user, with a folder for temporary files that this user can write."""
    if os.geteuid() != 0:
        session.skip("only root can start a process of another user")
    if shutil.which("setpriv") is None:
        session.skip("no setpriv")
    project, python = readable_project()
    os.chown(place, NOBODY, NOBODY)
    env = {
        **{"HOME": str(home), "USER": "nobody", "LOGNAME": "nobody"},
        **{"TMPDIR": str(place), "RAY_TMPDIR": str(place), "PYTHONDONTWRITEBYTECODE": "1"},
        # A copied interpreter with a shared library would look for it where it was built.
        "LD_LIBRARY_PATH": str(project.parent / "python" / "lib"),
    }
    with session.chdir(project):
        if not (project / ".venv/.installed").exists():
            install(session, ".venv", LOCK, PYTHON=python)
        interpreter = str(project / ".venv/bin/python")
        run_tests(
            session, session.name, python=interpreter, prefix=AS_NOBODY, env=env, folder=place
        )


@condition("user")
def user(session: nox.Session) -> None:
    with temporary_folder() as place:
        home = place / "home"
        home.mkdir()
        shutil.chown(home, NOBODY, NOBODY)
        run_as_nobody(session, place, home)


@condition("read-only-home")
def read_only_home(session: nox.Session) -> None:
    with temporary_folder() as place:
        home = place / "home"
        home.mkdir(mode=0o555)
        if os.geteuid() == 0:  # who may write everywhere
            run_as_nobody(session, place, home)
        else:
            run_tests(session, session.name, env={"HOME": str(home)})


# ---- versions ------------------------------------------------------------------------------------

NEWEST: list[str] = []
"""Newest version of Python that is there, once it was found."""
for version in ("3.11", "3.12", "3.13", "3.14"):

    @condition(f"python{version}", python=version, venv_backend=None)
    def pinned(session: nox.Session) -> None:
        run_in_environment(session, session.name, LOCK)


@condition("lowest", python="3.11", venv_backend=None, default=False)
def lowest(session: nox.Session) -> None:
    run_in_environment(session, session.name, resolve(session, "lowest-direct"))


@condition("highest", python=["3.14", "3.13", "3.12"], venv_backend=None, default=False)
def highest(session: nox.Session) -> None:
    if NEWEST:
        session.skip(f"Python {NEWEST[0]} is there")
    NEWEST.append(session.python)
    run_in_environment(session, "highest", resolve(session, "highest"))
