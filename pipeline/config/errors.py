"""The error of an option that cannot be meant."""

from __future__ import annotations

from pipeline.errors import UserError


class ConfigError(UserError, ValueError):
    """An option that cannot be meant; the message names it, its value and the way out."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_fraction(option: str, value: float) -> None:
    """Raise ConfigError unless the value lies in [0, 1)."""
    require(0 <= value < 1, f"{option} must be in [0, 1), got {value}")
