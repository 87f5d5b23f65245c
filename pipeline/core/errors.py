"""The base of every error that a user can mend; its message says what, where and the way out."""


class UserError(Exception):
    """Shown as one line, without a traceback. Its subclasses stand beside the code that raises them."""


class RecordError(UserError, ValueError):
    """A record whose bytes are not what they should be; the image's or the row's own error says how."""


class ConfigError(UserError, ValueError):
    """An option that cannot be meant; the message names it, its value and the way out."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_fraction(option: str, value: float) -> None:
    """Raise ConfigError unless the value lies in [0, 1)."""
    require(0 <= value < 1, f"{option} must be in [0, 1), got {value}")
