"""Completion of command lines in bash, zsh and fish: `source <(permafrost-shell completion bash)`.

The shells call `permafrost-shell completion words <the words so far>`, which prints what may follow, so that members of
families, their options and experiments are those of the installed version.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args, get_origin

from permafrost.config.compose import value_type
from permafrost.config.sections import group_members, option_paths, section_names
from permafrost.config.verbs import VERBS
from permafrost.core.errors import UserError

SCRIPTS = {
    "bash": r"""_permafrost() {
    local line="${COMP_LINE:0:COMP_POINT}" words before="" each
    read -ra words <<< "$line"
    [[ $line == *" " ]] && words+=("")
    local last="${words[-1]}"
    # Bash divides words at = and :, and replaces only what follows them.
    [[ $last == *[=:]* ]] && before="${last%"${last##*[=:]}"}"
    COMPREPLY=()
    while IFS= read -r each; do
        [[ -n $each ]] && COMPREPLY+=("${each#"$before"}")
    done < <(permafrost-shell completion words "${words[@]:1}" 2>/dev/null)
}
complete -o default -o nospace -F _permafrost permafrost
""",
    "zsh": r"""#compdef permafrost
_permafrost() {
    local -a found
    found=("${(@f)$(permafrost-shell completion words "${(@)words[2,$CURRENT]}" 2>/dev/null)}")
    compadd -Q -S '' -- $found
}
compdef _permafrost permafrost
""",
    "fish": r"""complete -c permafrost -f -a \
    '(permafrost-shell completion words (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'
""",
}


def candidates(words: Sequence[str]) -> list[str]:
    """Return completions of the last of the arguments after `permafrost`.

    Args:
        words: The arguments, the last of which may be incomplete; empty for none.
    """
    *before, last = [word.strip() for word in words] or [""]
    if not before:
        return [verb for verb in VERBS if verb.startswith(last)]
    verb = before[0]
    if verb not in VERBS:
        return []
    name, equals, value = last.partition("=")
    if equals:
        return [
            f"{name}={candidate}"
            for candidate in _values(verb, name, before)
            if candidate.startswith(value)
        ]
    members = [
        section for section in (*section_names(verb), "experiment") if group_members(section)
    ]
    names = [*members, "plugins", *option_paths(verb)]
    return sorted({f"{option}=" for option in names if option.startswith(name)})


def _values(verb: str, name: str, before: Sequence[str]) -> list[str]:
    """Return the values that an option may have, as far as they can be listed."""
    if members := group_members(name.rpartition(".")[2] if "." in name else name):
        return members
    try:
        hint = value_type(verb, name, [word for word in before[1:] if "=" in word])
    except UserError:
        return []
    return _listed(hint)


def _listed(hint: object) -> list[str]:
    if hint is bool:
        return ["true", "false"]
    if hint is type(None):
        return ["null"]
    if get_origin(hint) is Literal:
        return [str(member) for member in get_args(hint)]
    is_list = get_origin(hint) in (tuple, dict)
    return [] if is_list else [value for member in get_args(hint) for value in _listed(member)]
