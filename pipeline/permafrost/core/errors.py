"""Base classes of the errors that a user can fix, checks of option values, and errors of the device that computes."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar


class UserError(Exception):
    """Error that a user can fix. Its message names the problem, its location and the remedy.

    It is shown as one line, without a traceback. Subclasses are defined next to the code that raises them.
    """

    lines: Sequence[str] = ()
    """Lines of a message that has several; empty for one line."""
    is_shared: ClassVar[bool] = False
    """True if every shard or record would fail in the same way, so that work stops at the first one."""


class RecordError(UserError, ValueError):
    """Record with invalid bytes. The subclasses for images and for rows of a table describe the fault."""


class FileError(UserError, OSError):
    """File that cannot be read or written. The message includes the operating system's reason."""


class ConfigError(UserError, ValueError):
    """Invalid value of an option. The message names the option, its value and the remedy."""

    is_shared = True


class DeviceError(UserError, RuntimeError):
    """Error of the device that computes, such as one without enough memory."""

    is_shared = True


_AGAIN = "and run the same command again"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"free some space {_AGAIN}"),
    errno.EFBIG: f"allow larger files (ulimit -f, or another file system) {_AGAIN}",
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ETIMEDOUT), f"look at the disk or its server, {_AGAIN}"
    ),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), f"allow more open files (ulimit -n) {_AGAIN}"),
    errno.EROFS: f"make the disk writable {_AGAIN}",
}


def system_remedy(error: object) -> str:
    """Return what to do about an error of the operating system, empty where its kind does not say it."""
    return _REMEDIES.get(getattr(error, "errno", None) or 0, "")


def with_remedy(text: str, error: object) -> str:
    """Return a text about an error, with what to do about it if the operating system raised it."""
    return "; ".join(filter(None, (text, system_remedy(error))))


def printable(text: str) -> str:
    """Return a text with control characters, such as line feeds and ESC, written as escapes.

    Names of files and records are untrusted, and a terminal executes control sequences in them.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def quote(value: object, most: int = 80) -> str:
    """Return a value of an untrusted file in quotes for a message, cut to `most` characters."""
    text = repr(value if isinstance(value, str) else str(value))
    return text if len(text) <= most else f"{text[: most - 4]}...{text[-1]}"


def shorten(names: Sequence[str], most: int = 10) -> str:
    """List up to `most` names for a message."""
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown}, ..." if len(names) > most else shown


def require(condition: bool, message: str, error: type[Exception] = ConfigError) -> None:
    """Check a condition, usually on options.

    Args:
        condition: What must hold.
        message: Message of the error. It is made in any case, so it must be cheap.
        error: Class of the error.

    Raises:
        ConfigError: If the condition does not hold, or another class if `error` names it.
    """
    if not condition:
        raise error(message)


def first_line(error: Exception) -> str:
    """Return the type and the first line of an error of another library, for a message of one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


MAX_NAME_BYTES = 200
"""Bytes of a name, so that with what a run adds to it no file system refuses it (255)."""


def require_name(option: str, name: str, *, may_have_folders: bool = False) -> None:
    """Check that files and folders may have the name that an option gives.

    Args:
        option: The option, for messages.
        name: Its value.
        may_have_folders: The name may be a path of several names, as of a run.

    Raises:
        ConfigError: If they may not.
    """
    parts = name.rstrip("/").split("/") if may_have_folders else [name]
    shown = f"{option}={printable(name)[:80]}"
    require(
        name != "" and name.strip("/.") != "", f"{shown} is not a name; write one such as my-run"
    )
    require(".." not in parts, f"{shown} leaves its folder; write a name without ..")
    require(printable(name) == name, f"{shown} has control characters; leave them out")
    require(may_have_folders or "/" not in name, f"{shown} is a path; write a name without slashes")
    longest = max(len(part.encode(errors="replace")) for part in parts)
    require(
        longest <= MAX_NAME_BYTES,
        f"{shown}... has {longest} bytes of at most {MAX_NAME_BYTES}; shorten it",
    )


# ---- errors of the device --------------------------------------------------------------------------

_OUT_OF_MEMORY = ("out of memory", "allocate memory", "Unable to allocate", "STATUS_ALLOC_FAILED")
_OF_DEVICE = (
    *("CUDA error", "CUDA driver", "CUDA GPUs", "NVIDIA driver", "cuDNN", "CUBLAS_STATUS"),
    *("HIP error", "XPU", "MPS backend"),
)
"""Parts of the messages of torch, NumPy and the libraries below them, which have no classes of their own for each."""


def device_error(error: BaseException, advice: str = "lower the batch size") -> DeviceError | None:
    """Describe an error of the device or of memory in one line, or return None for any other error.

    Args:
        error: Error that torch or NumPy has raised.
        advice: Remedy for a lack of memory, as in "lower trainer.batch_size=64".
    """
    if isinstance(error, UserError) or not isinstance(error, RuntimeError | MemoryError):
        return None
    text = " ".join(str(error).split())
    sentences = ". ".join(text.split(". ")[:3]).rstrip(".")[:300]
    if isinstance(error, MemoryError) or any(part in text for part in _OUT_OF_MEMORY):
        return DeviceError(f"not enough memory ({sentences or 'MemoryError'}); {advice}")
    if any(part in text for part in _OF_DEVICE):
        return DeviceError(
            f"the device does not compute ({sentences}); `permafrost doctor` says what torch finds on this machine"
        )
    return None


@contextmanager
def device_errors(advice: str) -> Iterator[None]:
    """Raise DeviceError in place of errors of the device and of memory in the block.

    Args:
        advice: Remedy for a lack of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (described := device_error(error, advice)) is None:
            raise
        raise described from error
