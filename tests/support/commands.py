"""Commands of the pages: from the lines of a shell block to what each would do."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import product, takewhile

from permafrost.config.compose import names_teacher
from permafrost.config.paths import place_paths
from permafrost.config.sections import experiment_files, section_names, section_of, sections_of_verb
from permafrost.config.verbs import VERBS, build_verb_config
from tests.support.composition import composed_of
from tests.support.paths import ROOT

TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M)) | set(VERBS)
"""Targets of the Makefile."""


class UnknownCommandError(ValueError):
    """Line of a page that no test understands."""


def header_of(recipe: str) -> str:
    """Return the comment at the beginning of a recipe."""
    text = experiment_files()[recipe].read_text()
    return "".join(takewhile(lambda line: line[0] == "#", text.splitlines(keepends=True)))


def commands_in(header: str) -> list[list[str]]:
    """Return the words after `permafrost` of each command in the header of a recipe."""
    joined = re.sub(r" \\\n# +", " ", header)
    return [shlex.split(line) for line in re.findall(r"^#   permafrost (.*)$", joined, re.M)]


def lines_of(code: str) -> Iterator[str]:
    """Iterate over the commands of a shell block: joined lines without comments, loops written out."""
    joined = re.sub(r"\\\n\s*", " ", code)
    for line in joined.splitlines():
        command = " ".join(shlex.split(line, comments=True, posix=False))
        if not command:
            continue
        loop = re.fullmatch(r"for (\w+) in ([^;]+); do (.+); done", command)
        if loop is None:
            yield command
            continue
        name, values, body = loop.groups()
        for value, part in product(values.split(), body.split("; ")):
            yield part.replace(f"${name}", value)


def verb_and_arguments(command: str) -> tuple[str, list[str]] | None:
    """Verb and options of a command that runs a stage, None for another command."""
    words = shlex.split(command.partition(" > ")[0])
    if words[0] == "permafrost" and len(words) > 1:
        return words[1], words[2:]
    if words[:2] == ["python", "-m"] and words[2].startswith("stages."):
        return words[2].removeprefix("stages."), words[3:]
    return None


def check(command: str) -> None:
    """Resolve a command up to the first byte of work. Raises an error if it could not begin."""
    staged = verb_and_arguments(command)
    if staged is not None:
        resolve(*staged)
        return
    words = shlex.split(command.partition(" > ")[0])
    if words[0] == "make":
        _check_make(words[1:])
    elif words[0] == "source":
        if words[1:] != [".venv/bin/activate"]:
            raise UnknownCommandError(command)
    elif words[:2] == ["python", "-m"]:
        if not (ROOT / f"{words[2].replace('.', '/')}.py").exists():
            raise UnknownCommandError(command)
    else:
        raise UnknownCommandError(command)


def resolve(verb: str, words: list[str]) -> object:
    """Compose and build the config of a stage, as its command line does."""
    if verb not in VERBS:
        raise UnknownCommandError(f"permafrost {verb}")
    if "--help" in words:
        names = (*section_names(verb), "experiment")
        return composed_of(verb, *(word for word in words if section_of(word) in names))
    if words[:1] == ["--cfg"]:
        return sections_of_verb(verb, composed_of(verb, *words[2:]))
    is_named = any(word.startswith("teacher=") for word in words) or names_teacher(verb, words)
    assert is_named or not VERBS[verb].needs_teacher, "it names no teacher"
    words = without_saved_networks(words)
    composed = composed_of(verb, *words)
    if VERBS[verb].takes_store_of_run and not composed["store"]["path"]:
        composed = composed | {"store": composed["store"] | {"path": "stores/of-the-run"}}
    return place_paths(build_verb_config(verb, composed))


def without_saved_networks(words: list[str]) -> list[str]:
    """Words with a new network for each of a run, which an earlier command has made. Checks their folders."""
    options = [word.partition("=")[0] for word in words if word.endswith(("=saved", "=folds"))]
    for option in options:
        (folder,) = (word for word in words if word.startswith(f"{option}.weights="))
        assert re.fullmatch(rf"{option}\.weights=runs/[\w/-]+/(teach|distill)", folder), folder
    kept = [word for word in words if word.partition("=")[0].partition(".")[0] not in options]
    return [*kept, *(f"{option}=cifar" for option in options)]


def _check_make(words: list[str]) -> None:
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z]+=", word))
    for target in (word for word in words if not re.match(r"[A-Z]+=", word)):
        if target not in TARGETS:
            raise UnknownCommandError(f"make {target}")
        verb = variables.get("VERB", "sweep" if target == "demo" else target)
        if verb in VERBS and "ARGS" in variables:
            options = shlex.split(variables["ARGS"])
            own = ["experiment=demo"] if target == "demo" else []
            resolve(verb, [*own, *options])
