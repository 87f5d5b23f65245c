"""Families of options, whose member is chosen by `kind`: section -> kind -> class."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any, cast, get_args, get_origin

from permafrost.config.augment import VIEWS
from permafrost.config.cluster import CLUSTERS
from permafrost.config.data import SOURCES, NoDataConfig
from permafrost.config.explainers import EXPLAINERS
from permafrost.config.methods import METHODS
from permafrost.config.models import MODELS, NoModelConfig
from permafrost.config.options import Option, Options, classes_by_kind
from permafrost.config.plugins import Family
from permafrost.config.teaching import TEACHINGS


def _or_none(members: Mapping[str, Any], none: type[Options]) -> Mapping[str, type[Options]]:
    """Return a view of a family with the member `none`. It is not a copy, because plug-ins add members later."""
    return ChainMap(cast("dict[str, type[Options]]", members), {"none": none})


FAMILIES: Family[Mapping[str, type[Options]]] = Family(
    {
        "data": _or_none(SOURCES, NoDataConfig),
        "teacher": _or_none(MODELS, NoModelConfig),
        "black_box": _or_none(MODELS, NoModelConfig),
        "student": MODELS,
        "network": MODELS,
        "explainer": EXPLAINERS,
        "views": VIEWS,
        "teaching": TEACHINGS,
        "method": METHODS,
        "cluster": CLUSTERS,
    }
)
"""Sections whose class is chosen by `kind`: section -> kind -> class."""


def section_class(option: Option, values: Any) -> type[Options] | None:
    """Return the class of a section's plain values, or None if it is not a section or of unknown kind.

    Args:
        option: Option that is the section.
        values: Its plain values.
    """
    return class_of(option.hint, option.name, values)


def class_of(hint: Any, name: str, values: Any) -> type[Options] | None:
    """Return the class of plain values at an option, or None, as `section_class` does.

    Args:
        hint: Type of the option.
        name: Name of the option.
        values: Its plain values.
    """
    if not isinstance(values, dict):
        return None
    if name in FAMILIES:
        return FAMILIES[name].get(str(values.get("kind")))
    members = get_args(hint) or (hint,)
    classes = [
        member for member in members if isinstance(member, type) and issubclass(member, Options)
    ]
    if len(classes) > 1 and values.get("kind"):
        return classes_by_kind(tuple(classes)).get(str(values["kind"]))
    return next(iter(classes), None)


def element_class(option: Option, values: Any) -> type[Options] | None:
    """Return the class of plain values in a list of sections, or None, as `section_class` does.

    Args:
        option: Option that is the list.
        values: The plain values of one element.
    """
    is_list = get_origin(option.hint) is tuple
    return class_of(get_args(option.hint)[0], "", values) if is_list else None
