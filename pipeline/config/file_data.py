"""The bases of the options of sources (`data=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from pipeline.config.options import Options, Role, options_of
from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class DataConfig(Options):
    """The base of every source's options."""

    section: ClassVar[str] = "data"

    kind: str = ""

    @property
    def description(self) -> dict[str, Any]:
        """The options that decide what the records are, for the data's fingerprint."""
        return {
            option.name: getattr(self, option.name)
            for option in options_of(type(self))
            if Role.OUTSIDE_DATASET not in option.roles
        }


@dataclass(frozen=True, kw_only=True)
class FileDataConfig(DataConfig):
    """Options of every source that reads files it did not make."""

    on_error: Annotated[Literal["stop", "skip"], Role.OUTSIDE_DATASET] = "stop"
    """What an image that cannot be decoded, or a row that is not all finite numbers, does: end the run, or be
    listed in the store's manifest. Of data=tiny_imagenet skip also takes images without boxes where their
    class has no file of boxes."""
    max_skipped: Annotated[int, Ge(0), Role.OUTSIDE_DATASET] = 100
    """More such records than this end the run all the same."""

    def _require_path(self, path: str, what: str) -> None:
        require(path != "", f"data.path is empty; give {what}")
