"""Base classes of the options of sources (`data=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from permafrost.config.options import Options, Role, options_of
from permafrost.core.errors import require


@dataclass(frozen=True, kw_only=True)
class DataConfig(Options):
    """Base class of the options of all sources."""

    section: ClassVar[str] = "data"

    kind: str = ""

    @property
    def description(self) -> dict[str, Any]:
        """Options that determine the records' content, for the data's fingerprint."""
        return {
            option.name: getattr(self, option.name)
            for option in options_of(type(self))
            if Role.OUTSIDE_DATASET not in option.roles
        }


@dataclass(frozen=True, kw_only=True)
class NoDataConfig(DataConfig):
    """The records of a finished store. Nothing is packed."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class FileDataConfig(DataConfig):
    """Options of every source that reads the user's files."""

    on_error: Annotated[Literal["stop", "skip"], Role.OUTSIDE_DATASET] = "stop"
    """Treatment of an image that cannot be decoded, or of a row with values that are not finite. stop: end the
    run. skip: list it in the store's manifest. With data=image_table, skip also leaves out rows whose file is
    missing, with a warning. With data=tiny_imagenet, skip also accepts images without boxes
    if their class has no file of boxes."""
    only_classes: Annotated[tuple[str, ...], Role.OUTSIDE_DATASET] = ()
    """Names of the classes to keep, in label order; empty keeps all. Images are then packed, also those of tars that
    could be used in place."""
    max_skipped: Annotated[int, Ge(0), Role.OUTSIDE_DATASET] = 100
    """Largest number of skipped records; more of them end the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(set(self.only_classes)) == len(self.only_classes),
            f"data.only_classes names a class twice: {list(self.only_classes)}",
        )

    def _require_path(self, path: str, what: str) -> None:
        require(path != "", f"data.path is empty; set it to {what}")
