"""YAML from users and untrusted sources, such as experiments and values of arguments, and YAML of runs' configs.

A text has mappings with unique names, lists and scalars, no aliases, anchors or tags, and is bounded in size and
depth, so that reading takes time in proportion to its size. What a scalar without quotes means depends on the option
that it is for: `010` may be a class or a number, `no` a run. Such scalars stay `Plain` texts until their type is known.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from permafrost.core.errors import require

_MAX_BYTES = 2**20
"""Size of the largest text; a config of a run has a few kilobytes."""
_MAX_LEVELS = 24
"""Largest number of mappings and lists within each other."""
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CONSTANTS = {
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", "+.inf", "inf"), float("inf")),
    **dict.fromkeys(("-.inf", "-inf"), -float("inf")),
    **dict.fromkeys((".nan", "nan"), float("nan")),
}


_SIGNS = (
    (r"(?m)^(<{7}|={7}|>{7})( |$)", "; decide the conflict of versions that is marked"),
    (r"(?m)^ *\t", "; write blanks instead of tabs"),
)
"""Signs of what a text has that is not YAML, and advice."""


class YamlError(ValueError):
    """Error for text that is not YAML of this kind; the reader of the file or argument adds its name."""


class Plain(str):
    """Scalar without quotes, as it was written."""

    __slots__ = ()

    @property
    def value(self) -> Any:
        """Value by YAML 1.2: null, true, false, a number, or else the text. Numbers have no leading zeros."""
        if self in _CONSTANTS:
            return _CONSTANTS[self]
        if _WHOLE.fullmatch(self) and len(self) <= _MAX_DIGITS:
            return int(self)
        number = float(self) if _NUMBER.fullmatch(self) else math.inf
        return number if math.isfinite(number) else str(self)


_MAX_DIGITS = 1000
"""Number of digits of the longest whole number that is read."""


def parse_yaml(text: str | bytes) -> Any:
    """Return the mappings, lists and scalars of a text, which are `Plain` or, if quoted, `str`; None of an empty one.

    Raises:
        YamlError: If it is not such YAML, with a message of one line.
    """
    require(
        len(text) <= _MAX_BYTES, f"it has {len(text):,} bytes, of at most {_MAX_BYTES:,}", YamlError
    )
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        _check_events(yaml.parse(text, Loader=loader))
        return _tree_of(yaml.compose(text, Loader=loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        place += next((advice for sign, advice in _SIGNS if re.search(sign, str(text))), "")
        raise YamlError(f"{error.problem}{place}") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise YamlError(" ".join(str(error).split())) from error


def read_values(text: str | bytes) -> Any:
    """Return the values of a text by YAML 1.2.

    Raises:
        YamlError: If it is not such YAML, with a message of one line.
    """
    return values_of(parse_yaml(text))


def values_of(tree: Any) -> Any:
    """Replace the scalars without quotes by their values."""
    if isinstance(tree, dict):
        return {name: values_of(member) for name, member in tree.items()}
    if isinstance(tree, list):
        return [values_of(member) for member in tree]
    return tree.value if isinstance(tree, Plain) else tree


def dump_yaml(values: Any) -> str:
    """Format plain values so that `read_values` returns the same, in the order of mappings."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False)
    return text


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
    """Dumper without aliases, which quotes the texts that YAML 1.2 reads as other values."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    is_other = type(Plain(text).value) is not str
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if is_other else None)


_Dumper.add_representer(str, _text_node)


def _check_events(events: Any) -> None:
    """Raise YamlError for what is not supported, before any node is made."""
    levels = documents = 0
    for event in events:
        documents += isinstance(event, yaml.DocumentStartEvent)
        require(documents <= 1, "it has several documents", YamlError)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise YamlError("it has an anchor or an alias (& or *), which is not supported")
        if getattr(event, "tag", None) is not None:
            raise YamlError(f"it has the tag {event.tag}, which is not supported")
        levels += isinstance(event, yaml.CollectionStartEvent)
        levels -= isinstance(event, yaml.CollectionEndEvent)
        require(levels <= _MAX_LEVELS, f"it has more than {_MAX_LEVELS} levels", YamlError)


def _tree_of(node: yaml.Node | None) -> Any:
    if node is None:
        return None
    if isinstance(node, yaml.ScalarNode):
        return str(node.value) if node.style else Plain(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_tree_of(member) for member in node.value]
    tree: dict[str, Any] = {}
    for name_node, value_node in node.value:
        if not isinstance(name_node, yaml.ScalarNode):
            raise YamlError("it has a mapping or a list as a name")
        name, value = str(name_node.value), _tree_of(value_node)
        require(name not in tree, f"it has the name {name[:80]!r} twice", YamlError)
        require(
            value != "" or type(value) is not Plain or ":" not in name,
            f"write a space after the colon of {name[:80]}",
            YamlError,
        )
        tree[name] = value
    return tree
