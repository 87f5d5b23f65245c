"""Composition of plain values: defaults, members that sections choose, an experiment, and a command's arguments.

A section that has members, such as `method`, chooses one by its `kind`: `method=kd` on a command line, `method: kd` or
`method: {kind: kd, tau: 4}` in an experiment. The options of the member take their defaults, then the values of the
experiment and those that it is based on (`bases`), then the arguments in their order. An argument may set only what
its verb reads, an experiment any section.

A text option keeps the characters that were typed, so that `run=010` is a run called 010. All other values are YAML.

Not here: references between options (`${...}`), environment variables and Python in values.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from permafrost.config.environment import CONF
from permafrost.config.experiments import ExperimentFile, read_experiment
from permafrost.config.families import FAMILIES, class_of
from permafrost.config.models import FoldsModelConfig, SavedModelConfig
from permafrost.config.options import Option, options_of, plain_defaults, to_plain, without_null
from permafrost.config.plugins import require_named
from permafrost.config.sections import (
    DEFAULT_MEMBERS,
    GROUPS,
    OF_CLASS,
    group_members,
    is_section,
    option_paths,
    section_names,
    section_of,
    top_options,
    with_kinds,
)
from permafrost.config.suggestions import SHOWN, no_member, suggest_argument
from permafrost.config.verbs import VERBS
from permafrost.core.errors import ConfigError, printable, require
from permafrost.core.yaml_text import Plain, YamlError, parse_yaml, read_values
from permafrost.storage.files import file_at
from permafrost.storage.signed_files import DigestError, check_json

_NETWORKS = ("teacher", "student", "black_box")

logger = logging.getLogger("permafrost.config")


def compose(verb: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Compose all sections as plain values.

    Args:
        verb: Command that reads them.
        arguments: Arguments of the command line, section.option=text.

    Raises:
        ConfigError: If arguments do not fit the verb or their sections.
    """
    experiment, files, typed = _read(verb, arguments)
    values, typed = _with_members(files, typed)
    for file in files:
        _merge(values, _options_of_members(values, file.sections, experiment))
    for each in typed:
        _assign(verb, values, each)
    hints = {name: option.hint for name, option in top_options().items()}
    resolved = {name: _resolve(value, hints[name], name) for name, value in values.items()}
    return {name: _options_of_run(name, value) for name, value in resolved.items()}


def names_teacher(verb: str, arguments: Sequence[str]) -> bool:
    """Return whether an argument or an experiment names the teacher of a command, or says that there is none.

    Raises:
        ConfigError: If arguments do not fit the verb.
    """
    _, files, typed = _read(verb, arguments)
    return "teacher" in _chosen_members(files, typed)[0]


def _read(
    verb: str, arguments: Sequence[str]
) -> tuple[str, tuple[ExperimentFile, ...], list[_Typed]]:
    """Return the name of a command's experiment, the files that it is made of, and the other arguments."""
    typed = [_typed(verb, argument) for argument in complete_arguments(verb, arguments)]
    named = [argument.text for argument in typed if argument.path == "experiment"]
    files = read_experiment(named[-1]) if named else ()
    if VERBS[verb].checks_teacher:
        files = tuple(
            file._replace(
                sections={
                    name: section for name, section in file.sections.items() if name != "teacher"
                }
            )
            for file in files
        )
    others = [argument for argument in typed if argument.path != "experiment"]
    return (named or [""])[-1], files, others


def complete_arguments(verb: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments, with the section added to options that are named without one, such as `lr=0.1`.

    Raises:
        ConfigError: If several sections of the verb and its members have the option.
    """
    unnamed = (
        option
        for option in VERBS[verb].positional
        if not any(argument.startswith(f"{option}=") for argument in arguments)
    )
    named = (
        each if "=" in each else f"{next(unnamed, '')}={each}".lstrip("=") for each in arguments
    )
    arguments = [_without_synonym(verb, argument) for argument in named]
    names = [*section_names(verb), "experiment", "plugins"]
    short = {
        argument
        for argument in arguments
        if "=" in argument
        and argument.partition("=")[0].isidentifier()
        and section_of(argument) not in names
    }
    if not short:
        return list(arguments)
    composed = compose(verb, [argument for argument in arguments if argument not in short])
    places = {
        name: [
            section
            for section in names
            if isinstance(composed.get(section), dict) and name in composed[section]
        ]
        for name in map(section_of, short)
    }
    for name, having in places.items():
        if len(having) > 1:
            ways = " or ".join(f"{section}.{name}=" for section in having)
            raise ConfigError(f"{name} is an option of {', '.join(having)}; write {ways}")
    return [
        f"{places[section_of(argument)][0]}.{argument}"
        if argument in short and places[section_of(argument)]
        else argument
        for argument in arguments
    ]


_SYNONYMS = {
    ("share", "pass"): "store.teacher",
    ("attach", "from"): "path",
    ("report", "format"): "report.format",
}
"""Options named like Python keywords, which cannot be field names, by verb and keyword."""


def _without_synonym(verb: str, argument: str) -> str:
    """Return an argument with the name of its option."""
    path, equals, text = argument.partition("=")
    option = _SYNONYMS.get((verb, path)) if equals else None
    if path == "store" and text[:1] != "{" and "/" in text:
        return f"store.path={text}"  # as in Python
    if option is None:
        return argument
    is_list = option == "store.teacher" and not text.startswith("[")
    return f"{option}=[{text}]" if is_list else f"{option}={text}"


# ---- members ---------------------------------------------------------------------------------------


def _chosen_members(
    files: Iterable[ExperimentFile], typed: list[_Typed]
) -> tuple[dict[str, str], list[_Typed]]:
    """Return the members that files and arguments choose, by place, and the other arguments."""
    chosen: dict[str, str] = {}
    for file in files:
        for section, value in file.sections.items():
            chosen |= _kinds_in(section, value)
    others = []
    for each in typed:
        place = each.path.removesuffix(".kind")
        if _has_members(place) and each.text[:1] != "{":
            chosen[place] = each.text
            continue
        if _has_members(place):
            chosen |= _kinds_in(place, with_kinds(place, _value_of(each, Any)))
        others.append(each)
    return chosen, others


def _with_members(
    files: Iterable[ExperimentFile], typed: list[_Typed]
) -> tuple[dict[str, Any], list[_Typed]]:
    """Return the defaults of all sections with the members that files and arguments choose, and the other arguments."""
    chosen, others = _chosen_members(files, typed)
    values: dict[str, Any] = {}
    for name, option in top_options().items():
        if name in FAMILIES or name in GROUPS:
            values[name] = _member(name, chosen.get(name, DEFAULT_MEMBERS[name]), name)
        elif is_section(option):
            values[name] = plain_defaults(option.hint)
        else:
            values[name] = to_plain(option.default)
    for place, kind in chosen.items():
        section, _, nested = place.partition(".")
        if nested:
            values[section][nested] = _member(nested, kind, place)
    return values, others


def _has_members(path: str) -> bool:
    """Return whether a member is chosen at a path, such as `method` or `teaching.optimizer`."""
    section, _, nested = path.partition(".")
    if not nested:
        return section in FAMILIES or section in GROUPS
    return nested in GROUPS and any(
        option.name == nested
        for member in FAMILIES.get(section, {}).values()
        for option in options_of(member)
    )


def _kinds_in(section: str, value: Any) -> dict[str, str]:
    """Return the members that a section of an experiment chooses, by place."""
    if not isinstance(value, dict) or not _has_members(section):
        return {}
    kinds = {section: str(value["kind"])} if "kind" in value else {}
    nested = {f"{section}.{name}": member for name, member in value.items() if name in GROUPS}
    return kinds | {
        place: str(member["kind"])
        for place, member in nested.items()
        if isinstance(member, dict) and "kind" in member
    }


def _member(group: str, kind: str, path: str) -> dict[str, Any]:
    """Return the default options of a member."""
    if kind not in group_members(group):
        raise no_member(group, kind, path)
    if group in FAMILIES:
        options = plain_defaults(FAMILIES[group][kind]) | {"kind": kind}
        return options | {
            name: _member(name, DEFAULT_MEMBERS[name], f"{path}.{name}")
            for name in options
            if name in GROUPS
        }
    options_of_group = plain_defaults(GROUPS[group]) if group in OF_CLASS else {}
    if kind != OF_CLASS.get(group):
        options_of_group |= read_values((CONF / group / f"{kind}.yaml").read_bytes())
    return options_of_group


def _options_of_members(
    values: Mapping[str, Any], sections: Mapping[str, Any], experiment: str
) -> dict[str, Any]:
    """Return the values of an experiment without options that another member than its own does not have.

    Args:
        values: Options of the members that were chosen.
        sections: Values of the experiment by section.
        experiment: Its name, for the log.
    """
    kept: dict[str, Any] = {}
    for name, section in sections.items():
        kept[name] = section
        known = values.get(name)
        other = isinstance(section, dict) and section.get("kind") not in (
            None,
            (known or {}).get("kind"),
        )
        if name in FAMILIES and isinstance(known, dict) and other:
            kept[name] = {option: value for option, value in section.items() if option in known}
            if left_out := sorted(section.keys() - known.keys()):
                logger.info(
                    "options of experiment=%s that %s=%s does not have are left out: %s",
                    experiment,
                    name,
                    known["kind"],
                    ", ".join(left_out),
                )
    return kept


def _merge(values: dict[str, Any], changes: Mapping[str, Any], path: str = "") -> None:
    """Merge the values of an experiment into those of all sections. Lists and scalars are replaced."""
    for name, change in changes.items():
        value = values.get(name)
        is_member = name == "kind" and (path in FAMILIES or path in GROUPS)
        if isinstance(value, dict) and isinstance(change, dict):
            _merge(value, change, name)
        elif not is_member:  # which is chosen, perhaps by an argument
            values[name] = copy.deepcopy(change)


# ---- arguments -------------------------------------------------------------------------------------


class _Typed(NamedTuple):
    """Argument of a command, section.option=text."""

    path: str
    text: str


def _typed(verb: str, argument: str) -> _Typed:
    """Divide an argument. Raises ConfigError if it sets nothing that the verb reads."""
    path, equals, text = argument.partition("=")
    names = [*section_names(verb), "experiment", "plugins"]
    if equals and section_of(argument) in names:
        return _Typed(path, text)
    is_part = any(bracket in argument for bracket in "[]{}")
    quoting = "; the shell splits arguments at spaces, so quote a list or mapping" * is_part
    option = (
        "store.path"
        if verb in ("verify", "share") or argument.startswith("stores/")
        else "data.path"
    )
    require(
        equals != "",
        f"cannot read {argument!r}; options are written key=value, as in "
        f"{f'{argument[2:]}=...' if argument.startswith('--') else f'{option}={argument}'}, see --help{quoting}",
    )
    section = section_of(argument)
    hint = suggest_argument(verb, path, text)
    paths = [option.split(".") for option in option_paths(verb)]
    nested = {".".join(parts[:2]) for parts in paths if section in parts[1:2]}
    if section in GROUPS and nested:
        whole = f"{min(nested)}{path.removeprefix(section)}={text}"
        hint = f" (did you mean {printable(whole)[:SHOWN]}?)"
    raise ConfigError(
        f"{verb} takes no {printable(path)}={hint}; it takes: {', '.join(names)}{quoting}"
    )


def _assign(verb: str, values: dict[str, Any], typed: _Typed) -> None:
    """Set the value of an argument. A mapping replaces an option's mapping, and is merged with a section's options."""
    node, hint_of_node, hint = _locate(values, typed.path)
    last = typed.path.rpartition(".")[2]
    if not isinstance(node, dict) or not (last in node or get_origin(hint_of_node) is dict):
        known = sorted(node) if isinstance(node, dict) else []
        close = suggest_argument(verb, typed.path, typed.text)
        among = f"; available options: {', '.join(known)}" if known else ""
        raise ConfigError(f"unknown option {printable(typed.path)}{close}{among}")
    value = with_kinds(typed.path, _value_of(typed, hint))
    if isinstance(value, dict) and class_of(hint, last, node[last]) is not None:
        _merge(node[last], value, last)
    else:
        node[last] = value


def _locate(values: dict[str, Any], path: str) -> tuple[Any, Any, Any]:
    """Return the section or mapping that has the last name of a path, its type, and that of the entry."""
    *parents, last = path.split(".")
    node: Any = values
    hint: Any = None
    section = ""
    for name in parents:
        hint = _hint_of(hint, section, node, name)
        node, section = (node.get(name) if isinstance(node, dict) else None), name
    return node, hint, _hint_of(hint, section, node, last)


def _hint_of(hint: Any, section: str, node: Any, name: str) -> Any:
    """Return the type of an entry of a section or mapping, Any if it is not known.

    `hint` is the type of the section, None of all sections.
    """
    if hint is None:
        options: Iterable[Option] = top_options().values()
    elif get_origin(hint) is dict:
        return get_args(hint)[1]
    else:
        cls = class_of(hint, section, node)
        options = () if cls is None else options_of(cls)
    return next((option.hint for option in options if option.name == name), Any)


def _value_of(typed: _Typed, hint: Any) -> Any:
    """Read the value of an argument: text as it was typed for a text option, YAML for others."""
    text = typed.text
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    is_structure = text[:1] == "[" and _list_hint(hint) is not hint
    if not is_quoted and not is_structure and (_is_text(hint) or text[:1] not in ("[", "{")):
        return Plain(text)
    try:
        value = parse_yaml(text)
    except YamlError as error:
        if is_quoted:
            return text
        is_tight = re.search(r"\w:[^\s/\\]", text) and "space" not in str(error)
        remedy = "; write a space after each colon" if is_tight else ""
        shown = printable(text)[:SHOWN]
        raise ConfigError(f"cannot read {typed.path}={shown}: {error}{remedy}") from error
    return text if is_quoted and not isinstance(value, str) else value


def _resolve(value: Any, hint: Any, name: str = "") -> Any:
    """Give scalars without quotes the values that the type of their option takes, and copy the others."""
    if isinstance(value, Plain):
        return _scalar(value, hint)
    if isinstance(value, dict):
        if (cls := class_of(hint, name, value)) is None:
            member = get_args(hint)[1] if get_origin(hint) is dict else Any
            return {key: _resolve(member_value, member) for key, member_value in value.items()}
        hints = {option.name: option.hint for option in options_of(cls)}
        return {
            key: _resolve(member_value, hints.get(key, Any), key)
            for key, member_value in value.items()
        }
    if isinstance(value, list):
        members = get_args(without_null(_list_hint(hint)))
        is_fixed = len(members) > 1 and members[-1] is not Ellipsis
        each = members if is_fixed else [members[0] if members else Any] * len(value)
        padded = [*each, *[Any] * max(0, len(value) - len(each))]
        return [
            _resolve(member_value, padded[position]) for position, member_value in enumerate(value)
        ]
    return value


def _scalar(text: Plain, hint: Any) -> Any:
    """Return the value of a scalar for an option: its characters for a text."""
    members = _alternatives(hint)
    if (value := text.value) is None and (text != "" or type(None) in members):
        return None
    return value if Any in members or not _is_text(hint) else str(text)


def _is_text(hint: Any) -> bool:
    """Return whether the option takes a text, and no number."""
    members = _alternatives(hint)
    return str in members and not {int, float, bool, Any} & set(members)


def _list_hint(hint: Any) -> Any:
    """Return the type of the lists that an option takes in place of a text, the hint itself if there is none."""
    return next((each for each in _alternatives(hint) if get_origin(each) is tuple), hint)


def _alternatives(hint: Any) -> list[Any]:
    """Return the types that a hint allows, str for literal texts."""
    if (origin := get_origin(hint)) in (Union, UnionType):
        return [alternative for member in get_args(hint) for alternative in _alternatives(member)]
    return [type(member) for member in get_args(hint)] if origin is Literal else [hint]


# ---- networks of runs ------------------------------------------------------------------------------


_DESCRIPTION, _WEIGHTS = "model.json", "model.safetensors"


_OF_RUN = {cls.kind: cls for cls in (SavedModelConfig, FoldsModelConfig)}
"""Kinds of networks whose other options are those of the run that trained them."""


def _options_of_run(section: str, values: Any) -> Any:
    """Return the options of a network, those of a kind of _OF_RUN replaced by the options of the run."""
    is_network = section in _NETWORKS and isinstance(values, dict)
    if not is_network or values["kind"] not in _OF_RUN or values["weights"] is None:
        return values
    kind = values["kind"]
    typed = {
        name: value
        for name, value in values.items()
        if name not in ("kind", "name", "weights") and value != plain_defaults(_OF_RUN[kind])[name]
    }
    path = Path(values["weights"])
    folder = path.parent if path.name == _WEIGHTS else path
    try:
        described = check_json(file_at(folder / _DESCRIPTION).read())
        options = described["model"]
        sides = set(described["input_size"])
        require(kind in ("saved", options["kind"]), "it has one network; set teacher=saved")
    except (OSError, DigestError, KeyError, TypeError, ConfigError) as error:
        raise ConfigError(
            f"{section}={kind} needs {section}.weights=, the folder of a network that teach or distill has finished, "
            f"such as runs/my-teacher/teach; {section}.weights={values['weights']} is not one "
            f"({folder / _DESCRIPTION}: {error})"
            + "; if its folds are not finished, repeat permafrost teach"
            * (kind == FoldsModelConfig.kind)
        ) from error
    require_named(options.get("factory"), folder / _DESCRIPTION)
    if options.get("input_size") is None and len(sides) == 1:
        options = options | {"input_size": sides.pop()}
    return options | {"weights": str(folder / _WEIGHTS), "frame": "auto"} | typed
