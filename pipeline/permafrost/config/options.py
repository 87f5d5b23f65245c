"""Declaration of options: one dataclass field per option, with its type, limits, docstring and role.

    @dataclass(frozen=True, kw_only=True)
    class KDConfig(Options):
        tau: Annotated[float, Gt(0)] = 1.0
        \"\"\"Temperature of the soft targets.\"\"\"
        weights: Annotated[str | None, Role.FILE, Role.OUTSIDE_IDENTITY] = None

Defaults, YAML groups, checks, the list of paths, a run's identity, `--help` and docs/reference/options.md are all
derived from it. Types and limits (of the package annotated_types, which comes with pydantic) are checked by pydantic,
strictly: a whole number is a number, and nothing else is taken for another type. null satisfies every limit.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import sys
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Gt, Le, Lt

from permafrost.core.errors import ConfigError, require


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
"""Verb and arguments of the command that made a run, as typed; empty if it was not made by a command."""


@dataclass(frozen=True)
class Option:
    """Field of an options class."""

    name: str
    hint: Any
    """Type without limits and roles."""
    limits: tuple[Any, ...]
    roles: frozenset[Role]
    default: Any
    """Default value; MISSING if the option is required. Of a section its class, whose options have defaults."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of all options classes; checks the types and limits of its fields."""

    section: ClassVar[str] = ""
    """Section that its fields belong to, for messages; empty if several sections use this class."""
    implementation: ClassVar[str] = ""
    """`module:name` of the implementation of a member of a family, imported on first use."""
    minimal: ClassVar[tuple[str, ...]] = ()
    """Overrides required by a member of a family, such as data.path=folder."""

    @classmethod
    def added_by(cls) -> tuple[tuple[str, type[Options]], ...]:
        """Return the sections that the members of a family add, by name, and the classes of added options, by ""."""
        return ()

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Build an instance from the values of its options, also of those that members have added.

        Raises:
            OptionError: If a value has another type or is out of range.
        """
        return cls(**values)

    def __post_init__(self) -> None:
        every = {option.name: getattr(self, option.name) for option in options_of(type(self))}
        given = {
            name: tuple(option_value) if isinstance(option_value, list) else option_value
            for name, option_value in every.items()
        }
        for name, value in validated(type(self), given).items():
            object.__setattr__(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        """Check options against each other once each alone is valid; classes with rules override it."""


@dataclass(frozen=True, kw_only=True)
class OpenOptions(Options):
    """Base class of a section to which the members of a family add options and sections (`added_by`).

    They are attributes like the others. An instance that is made in Python takes them in `added`.
    """

    added: dict[str, Any] = field(default_factory=dict, repr=False)
    """Values of added options and sections by name; defaults take the place of those that it lacks."""

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        field_names = {spec.name for spec in fields(cls)}
        added = {name: value for name, value in values.items() if name not in field_names}
        return cls(**{name: values[name] for name in values if name in field_names}, added=added)

    def __post_init__(self) -> None:
        field_names = {spec.name for spec in fields(self)}
        defaults = {
            option.name: option.default
            for option in options_of(type(self))
            if option.name not in field_names
        }
        for name in self.added:
            if name not in defaults:
                raise OptionError(self.section, name, "is not an option that a member has added")
        for name, value in (defaults | self.added).items():
            object.__setattr__(self, name, value() if isinstance(value, type) else value)
        super().__post_init__()
        object.__setattr__(self, "added", {name: getattr(self, name) for name in defaults})


def options_of(cls: type[Any]) -> tuple[Option, ...]:
    """Return the options of a class in the order of its fields, inherited ones first, and those that were added."""
    return _options_of(cast("Hashable", cls), cls.added_by() if issubclass(cls, Options) else ())


@cache
def _options_of(cls: Hashable, added: tuple[tuple[str, type[Options]], ...]) -> tuple[Option, ...]:
    declaring = cast("type[Any]", cls)
    hints = [
        get_type_hints(base, include_extras=True)
        for base in declaring.__mro__
        if issubclass(base, Options) and base not in (Options, OpenOptions)
    ]
    all_options = [
        _option(spec, [hint[spec.name] for hint in hints if spec.name in hint])
        for spec in fields(declaring)
        if spec.repr  # others hold what no file has
    ]
    for name, options in added:
        outside = frozenset({Role.OUTSIDE_IDENTITY})
        all_options += (
            [Option(name, options, (), outside, options)] if name else options_of(options)
        )
    return tuple(all_options)


def _option(spec: Any, hints: list[Any]) -> Option:
    """Build the option that a field declares. A field redeclared with another default keeps its limits and roles.

    `hints` are the type hints of the field in each class that declares it, the most derived first.
    """
    extras: tuple[Any, ...] = ()
    for hint in hints:
        if get_origin(hint) is Annotated:
            extras = get_args(hint)[1:]
            break
    hint = get_args(hints[0])[0] if get_origin(hints[0]) is Annotated else hints[0]
    if (default := spec.default) is MISSING and spec.default_factory is not MISSING:
        factory = spec.default_factory
        is_section = isinstance(factory, type) and issubclass(factory, Options)
        default = factory if is_section else factory()
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
    if isinstance(value, type):
        return plain_defaults(value)
    if isinstance(value, Options):
        return plain_defaults(type(value))
    if isinstance(value, (list, tuple)):
        return [to_plain(member) for member in value]
    return (value or None) if isinstance(value, dict) else value


def is_left_out(option: Option, value: Any) -> bool:
    """Return whether an identity leaves out an option at this value.

    Args:
        option: The option, which is left out at its default if it has the role IF_SET.
        value: Its value, which may be in the form of YAML.
    """
    return Role.IF_SET in option.roles and to_plain(value) == to_plain(option.default)


def identifying_values(options: Options) -> dict[str, Any]:
    """Return the values of options that are part of an identity, by name."""
    values = {
        option.name: (option, getattr(options, option.name)) for option in options_of(type(options))
    }
    return {
        name: value for name, (option, value) in values.items() if not is_left_out(option, value)
    }


@cache
def classes_by_kind(classes: tuple[type[Any], ...]) -> dict[str, type[Any]]:
    """Return classes of options by the values that their option `kind` may have."""
    return {kind: cls for cls in classes for kind in _literals(get_type_hints(cls)["kind"])}


def class_of_kind(hint: Any, kind: Any, where: str) -> type[Any]:
    """Return the class of a union of sections that has a kind.

    Args:
        hint: Type, of one or of several classes of options.
        kind: Value of the option `kind`.
        where: Full name of that option, for the message.

    Raises:
        ConfigError: If no class has this kind.
    """
    kinds = classes_by_kind(get_args(hint) or (hint,))
    require(
        isinstance(kind, str) and kind in kinds,
        f"{where} must be one of {', '.join(kinds)}; got {kind!r}",
    )
    return kinds[kind]


class OptionError(ConfigError):
    """Value that an option does not take."""

    def __init__(self, section: str, name: str, reason: str) -> None:
        super().__init__(f"{section}.{name} {reason}" if section else f"{name} {reason}")
        self.name, self.reason = name, reason


def validated(cls: type[Options], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of some options in their declared types. Sections must be instances, and lists may be tuples.

    Args:
        cls: Class of the options.
        values: Values by option name; some may be missing.

    Raises:
        OptionError: For the first value of another type or outside of its limits.
    """
    validator, validation_error = _validator(cast("Hashable", cls), cls.added_by())
    try:
        checked: dict[str, Any] = validator.validate_python(values)
    except validation_error as error:
        first = error.errors(include_url=False)[0]
        name, *inner = first["loc"][:-1] if first["type"] == "missing" else first["loc"]
        option = next(field for field in options_of(cls) if field.name == name)
        path = str(name) + "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in inner
        )
        raise OptionError(cls.section, path, _reason(first, option)) from None
    return checked


@cache
def _validator(cls: Hashable, _: tuple[tuple[str, type[Options]], ...]) -> tuple[Any, type[Any]]:
    """Return the validator of a class's options, all of them optional, and the type of its errors."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
    from typing_extensions import TypedDict

    declaring = cast("type[Options]", cls)
    hints = {option.name: _checked_hint(option) for option in options_of(declaring)}
    typed_dict: Any = TypedDict(declaring.__name__, hints, total=False)  # type: ignore[misc]
    return TypeAdapter(with_config(ConfigDict(strict=True))(typed_dict)), ValidationError


def _checked_hint(option: Option) -> Any:
    """Return the type of an option for pydantic. Sections have checked themselves."""
    hint = _without_sections(option.hint)
    return Annotated[(hint, *option.limits)] if option.limits else hint


def _without_sections(hint: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, Options):
        return Any
    members = tuple(map(_without_sections, get_args(hint)))
    if get_origin(hint) is UnionType or get_origin(hint) is Union:
        return Any if Any in members else hint
    return (
        tuple.__class_getitem__(members) if get_origin(hint) is tuple and Any in members else hint
    )


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "tuple": "a list",
    "dict": "a mapping",
}


def _reason(error: Mapping[str, Any], option: Option) -> str:
    """Say what pydantic has found wrong with a value of an option."""
    value, kind = to_plain(error["input"]), error["type"]
    shown = f"got {value!r}"
    if kind == "literal_error":
        return f"must be one of {', '.join(map(str, _literals(option.hint)))}; {shown}"
    if kind in ("missing", "too_long", "too_short"):
        count = len(get_args(without_null(option.hint)))
        return f"must have {count} values, got {len(error['input'])}: {value!r}"
    if kind.startswith(("greater_than", "less_than")):
        or_null = " or null" if type(None) in get_args(option.hint) else ""
        return f"must be {describe_limits(option.limits)}{or_null}, got {value}"
    if kind == "float_type" and type(value) is int:
        return f"must be a number of at most {sys.float_info.max:.2g}"
    return f"must be {_KINDS.get(kind.partition('_')[0], option.hint)}, {shown}"


def without_null(hint: Any) -> Any:
    """Return the type of an option without null."""
    is_union = get_origin(hint) in (Union, UnionType)
    return (
        next(member for member in get_args(hint) if member is not type(None)) if is_union else hint
    )


def _literals(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [literal for member in get_args(hint) for literal in _literals(member)]


def describe_limits(limits: tuple[Any, ...]) -> str:
    """Describe the limits as text: `> 0`, `>= 1`, `in [0, 1)`."""
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


def resolve_implementation(cls: type[Options]) -> Any:
    """Import and return the class or function that implements a member of a family."""
    return pkgutil.resolve_name(cls.implementation)


def meanings_of(cls: type[Any]) -> dict[str, str]:
    """Map each option to its docstring in one line, parsed from the source (not used while a stage works)."""
    meanings: dict[str, str] = {}
    added = cls.added_by() if issubclass(cls, Options) else ()
    for base in (*cls.__mro__[::-1], *(options for name, options in added if not name)):
        if issubclass(base, Options) and base not in (Options, OpenOptions):
            meanings |= _meanings_in(base.__module__).get(base.__name__, {})
    return meanings


@cache
def _meanings_in(module: str) -> dict[str, dict[str, str]]:
    by_class: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            by_field = by_class[node.name] = {}
            for field, after in pairwise([*node.body, ast.Pass()]):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    match after:
                        case ast.Expr(value=ast.Constant(value=str(text))):
                            by_field[field.target.id] = " ".join(text.split())
    return by_class


_RENAMED = {"arms": "variants", "explained_classes": "target_classes"}
_RENAMED |= {"payloads": "outputs", "outputs": "returns"}
"""Options by their former names. `outputs` was one of a network, before annotate.outputs was."""


def new_name(path: str) -> str:
    """Say how an unknown option is called now, empty if it never had another name.

    Args:
        path: Name as it was typed, with its section if there was one.
    """
    section, dot, name = path.rpartition(".")
    is_former = name in _RENAMED and path != "annotate.outputs"
    return f"; it is called {section}{dot}{_RENAMED[name]} now" if is_former else ""
