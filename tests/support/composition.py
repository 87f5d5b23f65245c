"""Composed options, cached per session."""

from functools import cache

from permafrost.config.compose import compose


@cache
def composed_of(verb: str, *words: str) -> dict:
    """Compose the plain values of a verb's sections. The result is shared and must not be changed."""
    return compose(verb, words)
