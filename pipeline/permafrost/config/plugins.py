"""Plug-ins: Python files and modules of the user that add members to families, such as a loss or a network.

A plug-in adds option classes to the dictionaries of their families when it is imported:

    METHODS["mine"] = MyConfig        # permafrost.config.methods; MyConfig.implementation = "my_module:MyLoss"

`plugins=[my_losses.py, my_package.module]` names them, on the command line or in an experiment. An installed package
names its modules as entry points of the group `permafrost`, as the packages next to this one do (permafrost_report, the
papers, ...); they are imported when a family is first read. Nothing in a store or in a trained network names one.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from importlib.util import resolve_name
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from permafrost.config.environment import TOP
from permafrost.core.digests import sha256_json
from permafrost.core.errors import ConfigError, require

GROUP = "permafrost"
"""Group of the entry points by which packages name their modules."""
ENTRIES = "PERMAFROST_ENTRY_POINTS"
"""Environment variable of Ray's workers: the entry points of the driver, whose packages need not be installed there."""

T = TypeVar("T")


class Family(MutableMapping[str, T]):
    """Members of a family by name, most of them option classes. Installed packages add theirs when it is first read."""

    every: ClassVar[list[Family[Any]]] = []
    """All families, in which a plug-in may have members."""

    def __init__(self, members: Mapping[str, T]) -> None:
        """Set the members that the core has.

        They are listed by their `order`, a number of 100 unless a member states another, and then as they were added.
        """
        self._members = dict(members)
        self.every.append(self)

    def __getitem__(self, name: str) -> T:
        if name not in self._members:
            load_installed()
        return self._members[name]

    def __setitem__(self, name: str, member: T) -> None:
        """Add a member.

        Raises:
            ConfigError: If the name has another member, or if the others are classes of options and this one is not.
        """
        known = self._members.get(name, member)
        packages = {_package_of(each) for each in (known, member)}
        require(
            len(packages) == 1,
            f"{name} is a name of two packages, {' and '.join(sorted(packages))}, so one would hide the other; rename "
            "one, or uninstall its package",
        )
        require(
            is_dataclass(member) or not any(map(is_dataclass, self._members.values())),
            f"{name} must be a class of options, which is a dataclass, and not {member!r:.100}",
        )
        first, second = (getattr(each, "__qualname__", each) for each in (known, member))
        require(
            bool(first == second),
            f"{name} is the name of both {first} and {second}, so one would hide the other; rename one",
        )
        self._members[name] = member

    def replace(self, name: str, member: T) -> None:
        """Put a member in the place of one that does less, whichever package that is from."""
        self._members[name] = member

    def __delitem__(self, name: str) -> None:
        del self._members[name]

    def __iter__(self) -> Iterator[str]:
        load_installed()
        return iter(
            sorted(self._members, key=lambda name: getattr(self._members[name], "order", 100))
        )

    def __len__(self) -> int:
        load_installed()
        return len(self._members)


def _package_of(member: Any) -> str:
    """Return the top-level package of a class or a function, or of what a member names as module:name."""
    named = getattr(member, "function", getattr(member, "implementation", member))
    module = member.__module__ if isinstance(member, type) or callable(member) else str(named)
    return str(module).partition(":")[0].partition(".")[0]


# ---- installed packages ----------------------------------------------------------------------------


@cache
def entry_modules() -> dict[str, str]:
    """Return the modules that packages name as entry points of the group, by the names of the entry points.

    They are those of installed packages, those of a checkout of this package, which need not be installed, and on a
    worker of Ray those of the driver.

    Raises:
        ConfigError: If two packages use the same name.
    """
    named = [(entry.name, entry.value) for entry in entry_points(group=GROUP)]
    declared = TOP / "pyproject.toml"
    if declared.is_file():
        project = tomllib.loads(declared.read_text(encoding="utf-8"))["project"]
        named += project.get("entry-points", {}).get(GROUP, {}).items()
    named += json.loads(os.environ.get(ENTRIES, "{}")).items()
    modules: dict[str, str] = {}
    for name, module in sorted(named):  # the same order wherever they are declared
        require(
            modules.setdefault(name, module) == module,
            f"the entry point {name} of the group {GROUP} is that of two packages, {modules[name]} and {module}; "
            "uninstall one of them",
        )
    return modules


@cache
def load_installed() -> None:
    """Import the modules of installed packages.

    Raises:
        ConfigError: If one cannot be imported.
    """
    for module in entry_modules().values():
        _import(module, "installed packages")


def entry_places() -> list[Path]:
    """Return the folders or files of the packages of all entry points, for other machines.

    Raises:
        ConfigError: If a module of an entry point cannot be imported.
    """
    load_installed()
    return [
        _place_of(top)
        for top in sorted({module.partition(".")[0] for module in entry_modules().values()})
    ]


def experiment_folders() -> dict[str, Path]:
    """Return the folder `experiments` next to the module of each entry point, by the name of the entry point.

    Raises:
        ConfigError: If a module of an entry point cannot be imported.
    """
    load_installed()
    return {
        name: Path(str(sys.modules[module].__file__)).parent / "experiments"
        for name, module in entry_modules().items()
    }


def _place_of(top: str) -> Path:
    """Return the folder of a top-level package that was imported, or the file of a module."""
    module = sys.modules[top]
    return Path(module.__path__[0]) if hasattr(module, "__path__") else Path(str(module.__file__))


# ---- files and modules ---------------------------------------------------------------------------


SHIPPED = "PERMAFROST_SHIPPED_PLUGINS"
"""Environment variable of Ray's workers: the top-level modules of the driver's plug-ins, which are imported by name
because the driver's files are elsewhere."""
_PLACES: dict[str, Path] = {}
"""File or package folder of each plug-in, by the name of its top-level module."""


def load_plugins(names: Sequence[str] = ()) -> None:
    """Import the named plug-ins and those of installed packages.

    Args:
        names: Python files (my_losses.py) and modules (my_package.module), which may be in the current folder.

    Raises:
        ConfigError: If one cannot be imported, or has a member that is implemented outside of it.
    """
    for name in names:
        _import_own(name, "plugins")
    load_installed()
    _check_implementations({module.partition(".")[0] for module in entry_modules().values()})


def _check_implementations(installed: set[str]) -> None:
    """Raise ConfigError if a plug-in's member is implemented by a module that is not a plug-in.

    A copy of a plug-in may name the original file as its implementation. The original would run, unfingerprinted.

    Args:
        installed: Top-level modules of installed plug-ins, which count besides the named ones.
    """
    allowed = {"", "permafrost", *installed, *_PLACES, *_shipped()}
    for family in Family.every:
        for kind, member in [*family.items()]:
            # An output is a value, which does not know the module that made it.
            defined = member.__module__ if isinstance(member, type) else ""
            module = str(getattr(member, "implementation", "")).partition(":")[0]
            named = not defined or defined.partition(".")[0] in _PLACES
            if named and module.partition(".")[0] not in allowed:
                place = (
                    f"{sys.modules[defined].__file__}: {kind}" if defined else f"OUTPUTS[{kind!r}]"
                )
                raise ConfigError(
                    f"{place} has implementation={member.implementation!r}, but {module} is not a file of plugins=; "
                    f"write {defined or '<name of the file>'}:<name>"
                )


def resolve_factory(factory: str) -> Callable[..., Any]:
    """Import the function that `factory` names, my_package.networks:build or my_networks.py:build.

    Raises:
        ConfigError: If it names no function, or if its module cannot be imported.
    """
    location, _, name = factory.rpartition(":")
    require(
        bool(location) and name.isidentifier(),
        f"factory={factory} must name a function, as in my_networks.py:build",
    )
    built: Callable[..., Any] | None = getattr(_import_own(location, "factory"), name, None)
    if not callable(built):
        raise ConfigError(f"factory={factory}: {location} has no function {name}")
    return built


def module_at(location: str) -> str:
    """Return the name of the module in a file, or the name of a module as it is."""
    return Path(location).stem if location.endswith(".py") else location


def require_named(factory: str | None, path: Path) -> None:
    """Check that the user has named the module of a function that a file on disk names.

    A file that came with a network must not choose the code that is run.

    Args:
        factory: Function of the network that the file describes, None or empty if it has none.
        path: The file, for messages.

    Raises:
        ConfigError: If neither the user nor this package has named the module.
    """
    location = str(factory or "").rpartition(":")[0]
    top = module_at(location).partition(".")[0]
    require(
        not factory or top in _PLACES or top in _shipped(),
        f"{path} names a network that {factory} builds; name its file or module, plugins=[{location}]",
    )


def _shipped() -> list[str]:
    return os.environ.get(SHIPPED, "").split(",")


def _import_own(location: str, option: str) -> Any:
    """Import a file or module of the user, and note where its package is."""
    name = module_at(location)
    top = name.partition(".")[0]
    if top in _shipped():
        return _import(name, f"{option}={location}")
    path = Path(location).absolute() if location.endswith(".py") else None
    require(
        all(part.isidentifier() for part in name.split(".")),
        f"{option}={location}: {name} is not a module name; name a Python file or a module",
    )
    if path is not None:
        require(path.is_file(), f"{option}={location}: there is no such file; correct the path")
    folder = str(path.parent if path is not None else Path.cwd())
    if folder not in sys.path:  # at the end, so that no file hides an installed module
        sys.path.append(folder)
    importlib.invalidate_caches()
    module = _import(name, f"{option}={location}")
    origin = sys.modules[top].__file__
    require(
        path is None or (origin is not None and path.samefile(origin)),
        f"{option}={location}: another module is called {name} ({origin}); rename the file",
    )
    _PLACES[top] = _place_of(top)
    return module


def _import(name: str, where: str) -> Any:
    folder = Path.cwd()
    try:
        with redirect_stdout(sys.stderr):  # results of a command alone are on the standard output
            return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # any error of the user's module, and its end of the program
        raise ConfigError(
            f"the plug-in {name} of {where} cannot be imported ({type(error).__name__}: {error}); correct it, or "
            "run the command in the folder that contains it"
        ) from error
    finally:
        os.chdir(folder)  # relative paths are those of the command, wherever a plug-in goes


def plugin_places() -> dict[str, Path]:
    """Return the file or package folder of each plug-in that was named, by top-level module, for other machines."""
    return dict(_PLACES)


def plugin_digests(config: Any) -> dict[str, str]:
    """Return the SHA-256 of the code of each plug-in that a config uses, by `plug-in <module>`.

    Args:
        config: Dataclass of options, with nested ones, whose classes may be a plug-in's, or name a `factory`.
    """
    tops = {module.partition(".")[0] for module in _modules_of(config)}
    places = {top: _place_of(top) for top in tops & {*_shipped()} & {*sys.modules}} | _PLACES
    return {f"plug-in {top}": _digest(places[top]) for top in sorted(tops & places.keys())}


def _modules_of(config: Any) -> Iterator[str]:
    """Iterate over the modules of the classes of a config's sections, and of what implements them."""
    if not is_dataclass(config) or isinstance(config, type):
        return
    yield type(config).__module__
    yield str(getattr(config, "implementation", ""))
    location = str(getattr(config, "factory", "")).rpartition(":")[0]
    if location:
        _import_own(location, "factory")
        yield module_at(location)
    added = getattr(config, "added", {})
    for value in (*(getattr(config, field.name) for field in fields(config)), *added.values()):
        for member in value if isinstance(value, tuple) else (value,):
            yield from _modules_of(member)


_MAX_IMPORTED = 200
"""Largest number of imported modules whose code is part of a plug-in's identity."""
_OTHERS = (
    Path(__file__).resolve().parents[2],
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")),
)
"""Folders of this package and those next to it, of the standard library and of installed packages."""
_INSTALLED = {"site-packages", "dist-packages"}
"""Names of further folders of installed packages."""


def _digest(location: Path) -> str:
    """Return the SHA-256 of the code of a file or a package, and of the user's own modules that it imports.

    Imports are followed without importing. Comments and the layout of the code do not count.
    """
    paths = [location] if location.is_file() else sorted(location.rglob("*.py"))
    waiting = [
        (".".join(path.relative_to(location.parent).with_suffix("").parts), path) for path in paths
    ]
    texts: dict[str, str] = {}
    for name, path in waiting:  # to which imports are added
        name = name.removesuffix(".__init__")
        if name not in texts and len(texts) < len(paths) + _MAX_IMPORTED:
            tree, texts[name] = _parse(path)
            package = name if path.stem == "__init__" else name.rpartition(".")[0]
            places = {imported: _own_file(imported) for imported in _imports_of(tree, package)}
            waiting += [(imported, place) for imported, place in sorted(places.items()) if place]
    return sha256_json(texts)


def _parse(path: Path) -> tuple[ast.AST, str]:
    """Return the tree of a file and its text without comments; all of a file that is not Python."""
    data = path.read_bytes()
    with suppress(SyntaxError, ValueError):
        tree = ast.parse(data)
        return tree, ast.unparse(tree)
    return ast.Module([], []), data.hex()


def _imports_of(tree: ast.AST, package: str) -> set[str]:
    """Return the modules that code may import, and the packages around them."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            with suppress(ImportError):  # above the topmost package
                base = resolve_name("." * node.level + (node.module or ""), package)
                names.update((base, *(f"{base}.{alias.name}" for alias in node.names)))
    parts = [name.split(".") for name in names]
    return {".".join(each[:stop]) for each in parts for stop in range(1, len(each) + 1)}


def _own_file(name: str) -> Path | None:
    """Return the Python file of a module outside of installed packages; None for other modules and other names."""
    places, path, parts = None, Path(), name.split(".")
    for stop in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:stop]), places)
        if spec is None:
            return None
        path, places = Path(spec.origin or "").resolve(), spec.submodule_search_locations or []
    others = any(path.is_relative_to(folder) for folder in _OTHERS) or _INSTALLED & {*path.parts}
    return path if path.suffix == ".py" and not others else None
