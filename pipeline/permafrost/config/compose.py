"""Composition of plain values from `key=value` words and conf/, with Hydra's errors reduced to one clear line.

An override may name only sections that the verb reads. An experiment may set any section.
"""

from __future__ import annotations

import difflib
import hashlib
import pickle
import re
import shlex
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from permafrost.config.environment import CONF
from permafrost.config.evaluation import EVALUATORS
from permafrost.config.models import SavedModelConfig
from permafrost.config.options import Options, Role, options_of, plain_defaults, to_plain
from permafrost.config.plugins import require_named
from permafrost.config.store import StoreOptions
from permafrost.config.training import TrainerOptions
from permafrost.config.verbs import FAMILIES, VERBS
from permafrost.core.errors import ConfigError
from permafrost.core.files import read_regular
from permafrost.core.signed_files import DigestError, check_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from omegaconf import DictConfig


GROUPS = {"store": "zarr", "trainer": "default", "optimizer": "adamw", "augment": "pad_crop"}
"""Groups whose members all share one class, and the default member of each."""
_OWN_DEFAULTS: dict[str, type[Options]] = {"store": StoreOptions, "trainer": TrainerOptions}
"""Groups of which the default member is that of a class, and not a file."""
_NETWORKS = ("teacher", "student", "black_box")
_LISTED = 40
"""Number of names that an error lists."""
FILE_PREFIX = "file-"
"""Prefix of the names under which an experiment's file outside conf/ is registered."""


def with_registered_file(word: str) -> str:
    """Register the file of experiment=<path>.yaml with Hydra, and return the word with its registered name."""
    key, _, value = word.partition("=")
    if key != "experiment":
        return word
    if not value.endswith((".yaml", ".yml")):
        if Path(value).is_file():
            raise ConfigError(
                f"experiment={value} is no .yaml file; a Python file is named with plugins=[{value}]"
            )
        return word
    try:
        text = Path(value).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"experiment={value} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"experiment={value}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"experiment={value} must be a mapping of sections to options")
    from hydra.core.config_store import ConfigStore

    name = FILE_PREFIX + hashlib.sha256(text.encode()).hexdigest()
    ConfigStore.instance().store(group="experiment", name=name, node=values, package="_global_")
    return f"experiment={name}"


def register_defaults(overrides: Sequence[str]) -> None:
    """Register with Hydra the defaults of the dataclasses that a composition may name.

    An experiment may name any member of a family. Without one, only the default members and those of the overrides are
    registered, as each takes two milliseconds of every command.
    """
    _register_sections(tuple(EVALUATORS))
    words = dict(word.partition("=")[::2] for word in overrides)
    for group, members in FAMILIES.items():
        named = {_default_members()[group], words.get(group)}
        for kind in members:
            if "experiment" in words or kind in named:
                _register_member(group, kind)


@cache
def _default_members() -> dict[str, str]:
    """Default member of each group, from conf/config.yaml."""
    entries = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    return {
        group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()
    }


@cache
def _register_member(group: str, kind: str) -> None:
    """Register a member of a family with Hydra."""
    from hydra.core.config_store import ConfigStore

    node = _member_defaults(group, kind)
    nested = [name for name in node if name in GROUPS]  # in a teacher's own training
    if nested:
        choices = [{f"/{name}@{name}": GROUPS[name]} for name in nested]
        own = {name: value for name, value in node.items() if name not in nested}
        node = {"defaults": [*choices, "_self_"], **own}
    ConfigStore.instance().store(group=group, name=kind, node=node)


def _member_defaults(group: str, kind: str) -> dict[str, Any]:
    """Default values of the options of a member of a family."""
    return plain_defaults(FAMILIES[group][kind]) | {"kind": kind}


@lru_cache(maxsize=1)
def _register_sections(evaluators: tuple[str, ...]) -> None:
    """Register all sections outside families with Hydra, again if a plug-in has added one of an evaluator."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for group, options in _OWN_DEFAULTS.items():
        store.store(group=group, name=GROUPS[group], node=plain_defaults(options))
    store.store(name="defaults", node=_section_defaults())


def _section_defaults() -> dict[str, Any]:
    """Default values of the sections and options of all verbs that belong to no group."""
    values: dict[str, Any] = {"plugins": []}
    for cls in VERBS.values():
        for option in options_of(cls):
            if option.name in FAMILIES or option.name in GROUPS:
                continue
            if Role.SET_BY_STAGE in option.roles:
                continue
            if isinstance(option.hint, type) and issubclass(option.hint, Options):
                values[option.name] = plain_defaults(option.hint)
            else:
                values[option.name] = to_plain(option.default)
    return values


# ---- plug-ins ------------------------------------------------------------------------------------


def plugin_names(overrides: Sequence[str]) -> list[str]:
    """Return the plug-ins that `plugins=` names in these words, or else in their experiment.

    They are read before everything else is composed, because a word may name a member of theirs.
    """
    names: Any = []
    words = dict(word.partition("=")[::2] for word in overrides)
    if "experiment" in words:
        names = _plugins_of_experiment(words["experiment"])
    if "plugins" in words:
        try:
            names = yaml.safe_load(words["plugins"])
        except yaml.YAMLError:
            names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"plugins={words.get('plugins', names)} must be a list of Python files and modules, as in "
            "plugins=[my_losses.py]"
        )
    return names


def _plugins_of_experiment(name: str) -> Any:
    """Return the entry `plugins` of an experiment's file, or of the last one that it is based on."""
    own = Path(name) if name.endswith((".yaml", ".yml")) else CONF / "experiment" / f"{name}.yaml"
    try:
        values = yaml.safe_load(own.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return []  # named by the composition
    if not isinstance(values, dict):
        return []
    names = values.get("plugins")
    bases = [base for base in values.get("defaults") or () if isinstance(base, str)]
    for base in reversed(bases):
        if names is None and base != "_self_":
            names = _plugins_of_experiment(base)
    return names or []


# ---- compose ---------------------------------------------------------------------------------------


_PLAIN = re.compile(r"[\w./:@%+*?|$ \\-]*", re.ASCII)
"""Values that Hydra's grammar accepts without quotes."""
_SWEPT_VERBS = ("distill", "evaluate")


def compose(verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Compose all sections as plain values: defaults, then the experiment, then `overrides`."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for word in overrides:
        _check_word(verb, word, overrides)
    overrides = [_quoted(with_registered_file(word)) for word in overrides]
    set_values = [word for word in overrides if _sets_a_value(word)]
    try:
        of_groups = tuple(word for word in overrides if word not in set_values)
        composed = pickle.loads(_compose_groups(of_groups, tuple(EVALUATORS)))  # noqa: S301, made below
        if not _apply(composed, _replacing_mappings(set_values)):
            composed = _compose(_replacing_mappings(overrides))
        values = OmegaConf.to_container(composed, resolve=True)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: of data=0
        raise ConfigError(_explain(verb, overrides, error)) from error
    assert isinstance(values, dict)
    return {str(key): _options_of_run(str(key), value) for key, value in values.items()}


_DESCRIPTION, _WEIGHTS = "model.json", "model.safetensors"


def _options_of_run(section: str, values: Any) -> Any:
    """Return the options of a network, those of kind=saved replaced by the options of the run that trained it."""
    is_saved = section in _NETWORKS and values["kind"] == SavedModelConfig.kind
    if not is_saved or values["weights"] is None:
        return values
    typed = {
        name: value
        for name, value in values.items()
        if name not in ("kind", "name", "weights")
        and value != plain_defaults(SavedModelConfig)[name]
    }
    path = Path(values["weights"])
    folder = path.parent if path.name == _WEIGHTS else path
    try:
        described = check_json(read_regular(folder / _DESCRIPTION))
        own = described["model"]
        sides = set(described["input_size"])
    except (OSError, DigestError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{section}=saved needs {section}.weights=, the folder of a network that teach or distill has finished, "
            f"such as runs/my-teacher/teach; {section}.weights={values['weights']} is none ({error})"
        ) from error
    require_named(own.get("factory"), folder / _DESCRIPTION)
    if own.get("input_size") is None and len(sides) == 1:
        own = own | {"input_size": sides.pop()}
    return own | {"weights": str(folder / _WEIGHTS), "frame": "auto"} | typed


def _quoted(word: str) -> str:
    """Quote a text such as a path with parentheses, which Hydra's grammar rejects; lists and mappings stay as typed."""
    key, equals, value = word.partition("=")
    if not equals or value[:1] in ("[", "{", "'", '"') or "${" in value or _PLAIN.fullmatch(value):
        return word
    # A backslash is an escape before a quote only, such as the closing one.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"{key}='{escaped}'"


def _compose(overrides: Sequence[str]) -> DictConfig:
    """Compose all sections with Hydra, which takes about a tenth of a second."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    register_defaults(overrides)
    with initialize_config_dir(version_base=None, config_dir=str(CONF)):
        composed: DictConfig = hydra_compose("config", overrides=list(overrides))
    return composed


@lru_cache(maxsize=512)
def _compose_groups(overrides: tuple[str, ...], evaluators: tuple[str, ...]) -> bytes:
    """Composition of an experiment and members of groups, shared by all points of a sweep that set values only.

    It is pickled, because OmegaConf takes four times as long to copy a config. Members and the experiment's values take
    their places in the composition of no words, without Hydra, unless only Hydra can tell what a word means.

    evaluators  those that have sections, to which a plug-in may add
    """
    from omegaconf import OmegaConf

    words = dict(word.partition("=")[::2] for word in overrides)
    is_repeated = len(words) < len(overrides)
    experiment = _read_experiment(words.pop("experiment", None))
    if not overrides or experiment is None or is_repeated:
        return pickle.dumps(_compose(overrides), pickle.HIGHEST_PROTOCOL)
    chosen = experiment.members | words
    # A member of a group within a section takes its place after the section.
    keys = sorted(chosen, key=lambda key: "@" in key)
    members = [_load_member(key.partition("@")[0], chosen[key]) for key in keys]
    if None in members:
        return pickle.dumps(_compose(overrides), pickle.HIGHEST_PROTOCOL)
    composed = pickle.loads(_compose_groups((), evaluators))  # noqa: S301, as above
    OmegaConf.set_struct(composed, False)
    for key, member in zip(keys, members, strict=True):
        OmegaConf.update(composed, key.rpartition("@")[2], member, merge=False, force_add=True)
    composed.merge_with(*experiment.files)
    OmegaConf.set_struct(composed, True)
    return pickle.dumps(composed, pickle.HIGHEST_PROTOCOL)


def _load_member(group: str, kind: str) -> Any:
    """Return the options of a member of a group, None if only Hydra can tell."""
    if kind in FAMILIES.get(group, ()):
        options = _member_defaults(group, kind)
        return options | {
            name: _load_member(name, GROUPS[name]) for name in options if name in GROUPS
        }
    if group in _OWN_DEFAULTS and kind == GROUPS[group]:
        return plain_defaults(_OWN_DEFAULTS[group])
    path = CONF / group / f"{kind}.yaml"
    own = yaml.safe_load(path.read_text()) if group in GROUPS and path.is_file() else None
    return own if isinstance(own, dict) and "defaults" not in own else None


class _Experiment(NamedTuple):
    """Contents of an experiment in conf/ and of those that it is based on."""

    members: dict[str, str]
    """Members of groups by group, or by group and place as in optimizer@teaching.optimizer."""
    files: tuple[DictConfig, ...]
    """Their values, in the order in which they apply."""


@cache
def _read_experiment(name: str | None) -> _Experiment | None:
    """Read an experiment of conf/, None if only Hydra can tell, as of a file elsewhere."""
    from omegaconf import DictConfig, OmegaConf

    if name is None:
        return _Experiment({}, ())
    path = CONF / "experiment" / f"{name}.yaml"
    own = OmegaConf.load(path) if path.is_file() else None
    if not isinstance(own, DictConfig):
        return None
    entries = own.pop("defaults", [])
    chosen = [entry for entry in entries if not isinstance(entry, str)]
    if not all(_chooses_a_member(entry) for entry in chosen):
        return None
    members = {
        key.removeprefix("override /"): kind for entry in chosen for key, kind in entry.items()
    }
    bases = [entry for entry in entries if isinstance(entry, str)]
    files: list[DictConfig] = []
    for base in bases if "_self_" in bases else [*bases, "_self_"]:
        based_on = _Experiment({}, (own,)) if base == "_self_" else _read_experiment(base)
        if based_on is None:
            return None
        members = based_on.members | members
        files += based_on.files
    return _Experiment(members, tuple(files))


def _chooses_a_member(entry: Any) -> bool:
    """Return whether an entry of an experiment's defaults is `override /group: member`."""
    return all(
        key.startswith("override /") and isinstance(kind, str) for key, kind in entry.items()
    )


def _sets_a_value(word: str) -> bool:
    """Return whether an override sets one value, such as trainer.epochs=3, rather than choose a group's member."""
    key = word.partition("=")[0]
    return re.fullmatch(r"[a-z_]+(\.\w+)*", key) is not None and not group_members(key)


def _apply(composed: DictConfig, overrides: list[str]) -> bool:
    """Set values in a composed config as Hydra would, or return False to leave the words, and their errors, to it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parser = OverridesParser.create()
    try:
        for word in overrides:
            try:
                override = parser.parse_override(word)
                key, value = override.key_or_group, override.value()
            except HydraException:
                key, value = word.partition("=")[0], _flow_of(word)
            OmegaConf.update(composed, key, value, merge=True)
    except (HydraException, OmegaConfBaseException):
        return False
    return True


def _flow_of(word: str) -> list[Any] | dict[str, Any]:
    """Read a list or mapping as YAML, with characters outside Hydra's grammar. Raises HydraException otherwise."""
    from hydra.errors import HydraException

    try:
        value = yaml.safe_load(word.partition("=")[2])
    except yaml.YAMLError as error:
        raise HydraException(str(error)) from error
    if not isinstance(value, (list, dict)):
        raise HydraException(f"{word} is neither a list nor a mapping")
    return value


def group_members(group: str) -> list[str]:
    """Member names of a group, such as the methods of `method=`; empty if there is no such group."""
    files = CONF / group
    named = {p.relative_to(files).with_suffix("").as_posix() for p in files.rglob("*.yaml")}
    own = {GROUPS[group]} if group in GROUPS else set()
    return sorted({*named, *own, *FAMILIES.get(group, ())}) if group else []


def sections(verb: str, composed: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a composed config that the verb reads."""
    return {name: value for name, value in composed.items() if name in section_names(verb)}


def section_names(verb: str) -> list[str]:
    """Names of the sections and options that a verb reads; for a sweep also those of its students."""
    verbs = (verb, *_SWEPT_VERBS) if verb == "sweep" else (verb,)
    return list(
        dict.fromkeys(
            option.name
            for name in verbs
            for option in options_of(VERBS[name])
            if Role.SET_BY_STAGE not in option.roles
        )
    )


def _replacing_mappings(overrides: Sequence[str]) -> list[str]:
    """Make a mapping such as `arms={...}` replace the experiment's, which Hydra would merge with it or reject."""
    words = []
    for word in overrides:
        name, _, value = word.partition("=")
        words += (
            [f"{name}=null", word] if value.startswith("{") and name[:1] not in "+~" else [word]
        )
    return words


def section_of(word: str) -> str:
    """Name of the section that an override changes."""
    key = word.lstrip("+~").split("=", 1)[0]
    return key.split("@")[-1].split(".")[0].split("/")[0]


def _check_word(verb: str, word: str, overrides: Sequence[str]) -> None:
    section = section_of(word)
    names = [*section_names(verb), "experiment", "plugins"]
    is_assignment = "=" in word or word.startswith("~")
    if is_assignment and section in names:
        return
    if split := _split_by_the_shell(overrides):
        raise ConfigError(
            f"cannot read {word!r}, as the shell divides words at spaces; quote the whole word: {shlex.quote(split)}"
        )
    if not is_assignment:
        raise ConfigError(f"cannot read {word!r}; options are written key=value, see --help")
    hint = _suggest_places(verb, section) or _suggest(section, names)
    if verb == "teach" and section in GROUPS:
        hint = f" (did you mean teaching.{section}?)"
    raise ConfigError(f"{verb} takes no {section}={hint}; it takes: {', '.join(names)}")


def _split_by_the_shell(words: Sequence[str]) -> str:
    """Return the list or mapping that a shell has divided at its spaces, empty if all words are whole."""
    for start, word in enumerate(words):
        if not _is_open(word):
            continue
        ends = range(start + 2, len(words) + 1)
        joined = (" ".join(words[start:end]) for end in ends)
        return next((text for text in joined if not _is_open(text)), "")
    return ""


def _is_open(word: str) -> bool:
    """Return whether a bracket or brace of a word is not closed in it."""
    return any(word.count(first) > word.count(last) for first, last in ("[]", "{}"))


def _suggest_places(verb: str, name: str) -> str:
    """Suggest the options of a verb whose last part is `name`, if there are few."""
    places = [place for place in option_places(verb) if place.rpartition(".")[2] == name]
    if not 0 < len(places) <= _MOST_PLACES:
        return ""
    return f" (did you mean {' or '.join(f'{place}=' for place in places)}?)"


_MOST_PLACES = 3
"""Largest number of options that a message suggests."""


def option_places(verb: str) -> list[str]:
    """Return the full names of all options of a verb, of every member of its families, and of a sweep's students."""
    verbs = (verb, *_SWEPT_VERBS) if verb == "sweep" else (verb,)
    classes = [VERBS[name] for name in verbs]
    return list(dict.fromkeys(place for cls in classes for place in _places_in(cls, "")))


def _places_in(cls: type[Options], prefix: str) -> Iterator[str]:
    for option in options_of(cls):
        if Role.SET_BY_STAGE in option.roles:
            continue
        where = f"{prefix}{option.name}"
        is_section = isinstance(option.hint, type) and issubclass(option.hint, Options)
        members = () if prefix else FAMILIES.get(option.name, {}).values()
        for member in members or ([option.hint] if is_section else []):
            yield from _places_in(member, f"{where}.")
        if not members and not is_section:
            yield where


def _explain(verb: str, overrides: Sequence[str], error: Exception) -> str:
    """Rephrase Hydra's error in terms of what was typed and what is allowed."""
    from hydra.errors import OverrideParseException

    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        options = group_members(key.split("@")[0])
        if options:
            if value not in options and not value.startswith(FILE_PREFIX):
                return f"{key}={value} does not exist{_suggest(value, options)}; {_choices(value, options)}"
        elif f"Could not override '{key}'" in str(error):
            known = _known_keys(key, overrides)
            last = key.split(".")[-1]
            hint = _suggest_places(verb, last) or _suggest(last, known)
            return f"unknown option {key}{hint}; available options: {', '.join(known)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: {error.message.split(chr(10))[0]}; quote lists and braces"
    return " ".join(str(error).split())


def _known_keys(key: str, overrides: Sequence[str]) -> list[str]:
    """Names of the options next to `key`, in the config that the other words produce."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    groups = [w for w in overrides if group_members(w.split("=")[0].split("@")[0])]
    register_defaults(groups)
    with initialize_config_dir(version_base=None, config_dir=str(CONF)):
        node: Any = hydra_compose("config", overrides=groups)
    for part in key.split(".")[:-1]:
        child = node.get(part) if hasattr(node, "get") else None
        if child is None:
            break
        node = child
    return sorted(str(name) for name in node) if hasattr(node, "keys") else []


def _choices(word: str, allowed: Sequence[str]) -> str:
    """List what is allowed, or what resembles the word if that is more than anyone reads."""
    if len(allowed) <= _LISTED:
        return f"choose one of: {', '.join(allowed)}"
    close = difflib.get_close_matches(word, allowed, n=8, cutoff=0.3) or allowed[:8]
    return f"choose one of {len(allowed)}, such as: {', '.join(close)}"


def _suggest(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
