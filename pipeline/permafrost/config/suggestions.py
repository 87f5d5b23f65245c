"""Suggestions for names that do not exist: sections, their members, and options."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Sequence

from permafrost.config.families import FAMILIES
from permafrost.config.options import new_name, options_of
from permafrost.config.sections import group_members, option_paths, section_names
from permafrost.config.verbs import VERBS
from permafrost.core.errors import ConfigError, printable

SHOWN = 200
"""Characters of a value that an error shows."""
_MAX_PLACES, _MAX_MEMBERS = 3, 6
"""Largest numbers of options, and of members that have one, that a message suggests."""


def suggest_argument(verb: str, path: str, text: str | None = None) -> str:
    """Suggest what an unknown option of a verb may mean; empty without a likely meaning.

    Of names that resemble the last part of the path, sections and members come before options inside of them; what was
    typed is never suggested.

    Args:
        verb: Command of the option.
        path: Name as it was typed, with its section if there was one.
        text: Value that was typed, which the suggestion then has, too.
    """
    section, _, name = path.rpartition(".")
    if renamed := new_name(path):
        return renamed
    first = path.partition(".")[0]
    if first in section_names(verb) and (of_members := _members_with(section, name)):
        return f"; it is an option of {' and '.join(of_members)}, so choose one of them, too"
    every: dict[str, list[str]] = {}
    for place in option_paths(verb):
        every.setdefault(place.rpartition(".")[2], []).append(place)
    siblings = [place for place in option_paths(verb) if place.rpartition(".")[0] == section != ""]
    close = difflib.get_close_matches(path, siblings, n=1, cutoff=0.8)
    wanted = _WORDS.get(name, name)
    known = every | {each: [each] for each in section_names(verb)}
    if close or wanted in option_paths(verb):
        places = close or [wanted]
    else:
        others = [other for other in VERBS if first in section_names(other)]
        is_of_others = bool(others) and first not in section_names(verb)
        cutoff = 0.65 if not is_of_others else 2.0 if section else 0.85
        closest = difflib.get_close_matches(wanted, known, n=1, cutoff=min(cutoff, 1.0))
        places = known[closest[0]] if closest and cutoff <= 1 else []
        if is_of_others and not places:
            return f"; it is an option of {' and '.join(others[:_MAX_PLACES])}"
    places = [place for place in places if place != path]
    if not 0 < len(places) <= _MAX_PLACES:
        return ""
    value = "" if text is None else shlex.quote(printable(text)[:SHOWN]) if text else ""
    return f" (did you mean {' or '.join(f'{place}={value}' for place in places)}?)"


_WORDS = {
    "model": "student",
    "net": "student",
    "arch": "student.name",
    "loss": "method",
    "dataset": "data",
    "teacher_pass": "store.teacher",
    "temperature": "method.tau",
    "workers": "trainer.loader_processes",
    "num_workers": "trainer.loader_processes",
    "gpus": "trainer.ranks",
    "devices": "trainer.ranks",
    "logger_maps": "curve.maps",
    "logger_maps_every": "curve.maps_every",
}
"""Options by their names in other programs."""


def _members_with(section: str, name: str) -> list[str]:
    """Return the members of a family that have an option, as arguments; of a section without members none."""
    return [
        f"{section}={kind}"
        for kind, cls in FAMILIES.get(section, {}).items()
        if any(option.name == name for option in options_of(cls))
    ][:_MAX_MEMBERS]


def choices(word: str, allowed: Sequence[str]) -> str:
    """List what is allowed, or what resembles the word if the list is too long to read.

    Args:
        word: Word that was typed.
        allowed: Words that would have been allowed.
    """
    if len(allowed) <= 40:
        return f"choose one of: {', '.join(allowed)}"
    close = difflib.get_close_matches(word, allowed, n=8, cutoff=0.3) or allowed[:8]
    return f"choose one of {len(allowed)}, such as: {', '.join(close)}"


def suggest(word: str, allowed: Iterable[str]) -> str:
    """Suggest the allowed word that resembles a word, empty if none does."""
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def no_member(group: str, kind: str, path: str = "") -> ConfigError:
    """Return the error for a member that does not exist.

    Args:
        group: Section or family of the member.
        kind: Name of the member.
        path: Place of the section in the config; empty is `group` itself.
    """
    allowed = group_members(group)
    is_network = group in ("teacher", "student", "black_box") and not suggest(kind, allowed)
    network = (
        f"; a network is named by its provider and its name, as in {group}=torchvision {group}.name=resnet18 or "
        f"{group}=timm {group}.name=resnet18.a1_in1k"
    ) * is_network
    return ConfigError(
        f"{path or group}={printable(kind)[:SHOWN]} does not exist{suggest(kind, allowed)}; {choices(kind, allowed)}"
        f"{network}"
    )
