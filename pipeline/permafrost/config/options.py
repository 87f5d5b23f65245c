"""Declaration of options: one dataclass field per option, with its type, limits, docstring and role.

    @dataclass(frozen=True, kw_only=True)
    class KDConfig(Options):
        tau: Annotated[float, Gt(0)] = 1.0
        \"\"\"Temperature of the soft targets.\"\"\"
        weights: Annotated[str | None, Role.FILE, Role.OUTSIDE_IDENTITY] = None

Defaults, YAML groups, checks, the list of paths, a run's identity, `--help` and docs/reference/options.md are all
derived from it. Limits are those of the package annotated_types. null satisfies every limit.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import sys
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Self,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Gt, Le, Lt

from permafrost.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Hashable


class Role(Enum):
    """A property of an option beyond its value."""

    FILE = "names a file or folder, so its meaning depends on the machine"
    OUTSIDE_IDENTITY = "does not change a run's results"
    BY_FINGERPRINT = (
        "names an input, whose fingerprint takes the place of its name in a run's identity"
    )
    SET_BY_STAGE = "is set by the stage from the command line, not by the user"
    IN_WEIGHTS = "is part of the weights once the network is trained, and is not read with them"
    CACHE = "names a folder of copies, which may be made again"
    IF_SET = "is part of an identity only if it is set, because it came after files without it"
    OUTSIDE_DATASET = "changes where or how a source's records are read, not the records themselves"


Command = Annotated[tuple[str, ...], Role.SET_BY_STAGE, Role.OUTSIDE_IDENTITY]
"""Verb and words of the command that made a run, as they were typed; empty if it was not made by a command."""


@dataclass(frozen=True)
class Option:
    """Field of an options class."""

    name: str
    hint: Any
    """Type without limits and roles."""
    limits: tuple[Any, ...]
    roles: frozenset[Role]
    default: Any
    """Default value; MISSING if the option is required."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of all options classes; checks the limits of its fields."""

    section: ClassVar[str] = ""
    """Section that its fields belong to, for messages; empty if several sections use this class."""
    implementation: ClassVar[str] = ""
    """`module:name` of the implementation of a member of a family, imported on first use."""
    minimal: ClassVar[tuple[str, ...]] = ()
    """Overrides required by a member of a family, such as data.path=folder."""

    @classmethod
    def complete(cls) -> type[Options]:
        """Return the class with the options that plug-ins have added to it, itself if there are none."""
        return cls

    def __post_init__(self) -> None:
        prefix = f"{self.section}." if self.section else ""
        for option in options_of(type(self)):
            if option.limits:
                check_limits(option, getattr(self, option.name), prefix + option.name)


@dataclass(frozen=True, kw_only=True)
class OpenOptions(Options):
    """Base class of a section to which the members of a family add options.

    An instance is of a class that has the options of all registered members, which is made when it is first needed.
    """

    is_complete: ClassVar[bool] = False

    def __new__(cls, **values: Any) -> Self:
        return cast("Self", object.__new__(cls.complete()))

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made again where the instance is loaded.
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return _restore, (type(self).__bases__[-1], values)

    @classmethod
    def complete(cls) -> type[Options]:
        if cls.is_complete:
            return cls
        return _complete(cast("Hashable", cls), cls.added_sections(), cls.added_bases())

    @classmethod
    def added_sections(cls) -> tuple[tuple[str, type[Options]], ...]:
        """Return the name and the class of each section that a member adds. They do not enter the identity."""
        return ()

    @classmethod
    def added_bases(cls) -> tuple[type[Options], ...]:
        """Return the classes whose options the members add."""
        return ()


@cache
def _complete(
    key: Hashable,
    sections: tuple[tuple[str, type[Options]], ...],
    bases: tuple[type[Options], ...],
) -> type[Options]:
    cls = cast("type[OpenOptions]", key)
    made = make_dataclass(
        cls.__name__,
        [
            (name, Annotated[options, Role.OUTSIDE_IDENTITY], field(default_factory=options))
            for name, options in sections
        ],
        bases=(*bases, cls),
        namespace={"__module__": cls.__module__, "__doc__": cls.__doc__, "is_complete": True},
        frozen=True,
        kw_only=True,
    )
    return cast("type[Options]", made)


def _restore(cls: type[OpenOptions], values: dict[str, Any]) -> OpenOptions:
    return cls(**values)


def options_of(cls: type[Any]) -> tuple[Option, ...]:
    """Return the options of a class in the order of its fields, inherited ones first."""
    return _options_of(cast("Hashable", cls.complete() if issubclass(cls, Options) else cls))


@cache
def _options_of(key: Hashable) -> tuple[Option, ...]:
    cls = cast("type[Any]", key)
    hints = [
        get_type_hints(base, include_extras=True)
        for base in cls.__mro__
        if issubclass(base, Options) and base is not Options
    ]
    return tuple(
        _option(spec, [own[spec.name] for own in hints if spec.name in own]) for spec in fields(cls)
    )


def _option(spec: Any, hints: list[Any]) -> Option:
    """Build the option that a field declares. A field redeclared with another default keeps its limits and roles.

    hints  type hints of the field in each class that declares it, the most derived first
    """
    extras: tuple[Any, ...] = ()
    for hint in hints:
        if get_origin(hint) is Annotated:
            extras = get_args(hint)[1:]
            break
    hint = get_args(hints[0])[0] if get_origin(hints[0]) is Annotated else hints[0]
    default = spec.default
    if default is MISSING and spec.default_factory is not MISSING:
        default = spec.default_factory()
    return Option(
        name=spec.name,
        hint=hint,
        limits=tuple(extra for extra in extras if not isinstance(extra, Role)),
        roles=frozenset(extra for extra in extras if isinstance(extra, Role)),
        default=default,
    )


def plain_defaults(cls: type[Any]) -> dict[str, Any]:
    """Return the defaults of a class as plain YAML values: lists for tuples, null for an empty mapping."""
    return {option.name: to_plain(option.default) for option in options_of(cls)}


def to_plain(value: Any) -> Any:
    """Convert a default to a plain YAML value."""
    if isinstance(value, Options):
        return plain_defaults(type(value))
    if isinstance(value, (list, tuple)):
        return [to_plain(member) for member in value]
    return (value or None) if isinstance(value, dict) else value


def is_left_out(option: Option, value: Any) -> bool:
    """Return whether an identity leaves out an option at this value, which may be in the form of YAML (IF_SET)."""
    return Role.IF_SET in option.roles and to_plain(value) == to_plain(option.default)


def check_limits(option: Option, value: Any, path: str) -> None:
    """Raise a ConfigError that names the option, its limits and the value if a limit is violated."""
    if value is None or all(_holds(limit, value) for limit in option.limits):
        return
    or_null = " or null" if type(None) in get_args(option.hint) else ""
    raise ConfigError(f"{path} must be {describe_limits(option.limits)}{or_null}, got {value}")


def describe_limits(limits: tuple[Any, ...]) -> str:
    """Describe the limits in words: `> 0`, `>= 1`, `in [0, 1)`."""
    low = next((limit for limit in limits if isinstance(limit, (Gt, Ge))), None)
    high = next((limit for limit in limits if isinstance(limit, (Lt, Le))), None)
    if low is not None and high is not None:
        start = f"[{low.ge}" if isinstance(low, Ge) else f"({low.gt}"
        return f"in {start}, {f'{high.le}]' if isinstance(high, Le) else f'{high.lt})'}"
    match low or high:
        case Gt(bound):
            return f"> {bound}"
        case Ge(bound):
            return f">= {bound}"
        case Lt(bound):
            return f"< {bound}"
        case Le(bound):
            return f"<= {bound}"
    return ""


def _holds(limit: Any, value: Any) -> bool:
    match limit:
        case Gt(bound):
            return bool(value > bound)
        case Ge(bound):
            return bool(value >= bound)
        case Lt(bound):
            return bool(value < bound)
        case Le(bound):
            return bool(value <= bound)
    raise TypeError(f"{limit} is not a limit that options support")


def resolve_implementation(cls: type[Options]) -> Any:
    """Import and return the class or function that implements a member of a family."""
    return pkgutil.resolve_name(cls.implementation)


def meanings_of(cls: type[Any]) -> dict[str, str]:
    """Map each option to its docstring in one line, parsed from the source (not used while a stage works)."""
    meanings: dict[str, str] = {}
    for base in reversed((cls.complete() if issubclass(cls, Options) else cls).__mro__):
        if issubclass(base, Options) and base is not Options:
            meanings |= _meanings_in(base.__module__).get(base.__name__, {})
    return meanings


@cache
def _meanings_in(module: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            own = found[node.name] = {}
            for field, after in pairwise([*node.body, ast.Pass()]):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    match after:
                        case ast.Expr(value=ast.Constant(value=str(text))):
                            own[field.target.id] = " ".join(text.split())
    return found
