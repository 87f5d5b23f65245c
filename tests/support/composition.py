"""Composed options, cached per session."""

from functools import cache

from permafrost.config.compose import compose
from permafrost.config.sections import section_names, section_of
from permafrost.config.verbs import VERBS, build_verb_config

NAMED = ("store.path=stores/demo", "run=untitled", "teacher=cifar")
"""Words that name a store, a run and a teacher, which have no defaults."""


@cache
def composed_of(verb: str, *words: str) -> dict:
    """Compose the plain values of a verb's sections. The result is shared and must not be changed."""
    return compose(verb, words)


def config_of(verb: str, *words: str):
    """Build the options of a verb with words, of any store, run and teacher that it needs and the words do not name."""
    named = [word for word in NAMED if section_of(word) in section_names(verb)]
    named = (
        named if VERBS[verb].needs_teacher else [word for word in named if "teacher" not in word]
    )
    return build_verb_config(verb, compose(verb, [*named, *words]))
