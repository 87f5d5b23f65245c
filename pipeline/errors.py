"""The base of every error that a user can mend; its message says what, where and the way out."""


class UserError(Exception):
    """Shown as one line, without a traceback. Its subclasses stand beside the code that raises them."""


class RecordError(UserError, ValueError):
    """A record whose bytes are not what they should be; the image's or the row's own error says how."""
