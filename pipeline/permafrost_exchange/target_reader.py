"""Interface of the readers of targets that another tool has made.

A reader lists the names of its targets, and reads those of a few records as decoded arrays. Joining names with records,
checks, encoding and storage are the same for all formats.

Shape letters: n targets, V views (1 for targets of the canonical view).
"""

from __future__ import annotations

import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors import SafetensorError

from permafrost.core.errors import FileError, UserError, first_line, require
from permafrost.core.records import IMPOSSIBLE_LOGIT, MOVE_FIELD, WINDOW_FIELD
from permafrost.storage.files import file_at
from permafrost_exchange.format_options import TargetFrame
from permafrost_exchange.formats.unpickling import UnpicklingError, unpickle

Arrays = dict[str, "NDArray[Any]"]
"""Decoded values by what they are, [n, V, ...] each: `logits`, `probabilities`, `top_logits` with `top_class` and
`rest_logits`, `pooled`, `map` with `target_class`, `class_maps`, `attention_<stage>`, `features_<stage>`,
`features_pooled`, `canonical_from_view`, `pixel_values`."""
Item = TypeVar("Item")
NAMES_AT_ONCE = 65_536
MAX_TARGET_BYTES = 2**27
"""Largest size of the file of one record, 128 MB."""


class TargetError(UserError, ValueError):
    """Error for targets that do not match their format. The message names the file and the fix."""


_READ_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, OverflowError),
    *(RecursionError, MemoryError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, pa.ArrowException, SafetensorError),
)
"""Errors of libraries that meet other bytes than they expect."""


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Raise errors of libraries in the block as a TargetError of one line.

    Args:
        where: File, and record or member where there are several.
    """
    try:
        yield
    except UserError:
        raise
    except _READ_ERRORS as error:
        raise TargetError(
            f"{where} cannot be read ({first_line(error)}); fetch it again, or correct format="
        ) from error


class ListedTargets(NamedTuple):
    """Some consecutive targets of a reader."""

    names: Sequence[str]
    """Their names, by which they are joined with records."""
    places: Sequence[str]
    """Texts by which the reader finds them again, such as a file."""


class ReadRequest(NamedTuple):
    """Targets to read, and facts about the records that they belong to."""

    numbers: NDArray[np.int64]
    """Places among the names of the reader, i64 [n]."""
    names: Sequence[str]
    """The n names."""
    places: Sequence[str]
    """The n places, as the reader has listed them."""
    heights: NDArray[np.int64]
    """Heights of the images in pixels, i64 [n], as the tool's loader opens them; `widths` likewise."""
    widths: NDArray[np.int64]
    orientations: NDArray[np.int8]
    """EXIF orientations of the original images, i8 [n]."""
    labels: NDArray[np.int32] | None = None
    """Labels of the records, i32 [n], -1 for none; None in a store of many labels."""
    views: Arrays | None = None
    """Fields of the views that are asked for, windows f32 [n, V, 4] and moves f32 [n, V, 1, 2, 3]; None for those that
    the format stores."""


@dataclass(frozen=True, kw_only=True)
class TargetForm:
    """Facts about all targets of a path."""

    frame: TargetFrame | None = None
    """Part of an image that the teacher received, None where the format does not say it."""
    classes: int | None = None
    """Number of the teacher's classes, None where it is the length of the logits."""
    operations: tuple[dict[str, Any], ...] | None = None
    """Recipe of the stored views as a manifest describes it, None for targets of the canonical view."""
    explainer: dict[str, Any] | None = None
    """Entry of a manifest about the maps, None without maps."""
    has_classes_of_data: bool = False
    """True for maps without logits, whose classes are those of the data."""
    temperatures: tuple[float, ...] = ()
    repeats: bool = False
    """True if a name may be listed several times, of which the first target is taken."""
    remarks: tuple[str, ...] = ()
    """Sentences on what is not exact."""


class TargetReader(ABC):
    """Targets of one format at a path. Picklable; opens files on first use."""

    crops_targets: ClassVar[bool] = False
    """True if targets of any crop follow from what is stored (ReadRequest.views)."""
    turns_photographs: ClassVar[bool | None] = None
    """Whether the tool's loader turns photographs as their EXIF orientation says; None if that is unknown. Requests to
    a reader of False, and its arrays, are of the pixels before they are turned."""

    def __init__(self, config: Any, path: Path) -> None:
        self.config: Any = config
        self.path = path

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "path": self.path}

    @abstractmethod
    def files(self) -> Iterator[Path]:
        """Iterate over all files that the targets are read from, in a fixed order."""

    def sha256_of(self, path: Path) -> str:
        """Return the SHA-256 of one of the files."""
        return file_at(path).sha256()

    @abstractmethod
    def listing(self) -> Iterator[ListedTargets]:
        """Iterate over all targets in parts, in the order of their numbers."""

    @abstractmethod
    def form(self) -> TargetForm:
        """Return the facts about all targets."""

    def describe(self) -> str:
        """Describe the files for a message about them; empty where nothing is worth it."""
        return ""

    def checks(self) -> list[Callable[[], Any]]:
        """Return checks of the files besides those of `form`, whose errors are told at once."""
        return []

    @abstractmethod
    def read(self, request: ReadRequest) -> Arrays:
        """Read the targets of a request.

        Raises:
            TargetError: If a file is not what the format says.
        """

    def alternatives(self) -> dict[str, TargetReader]:
        """Return readers of other meanings that the same files could have, by the option that chooses each."""
        return {}


class FileReader(TargetReader):
    """Base of readers of torch files, one of each record, whose tools do not turn photographs."""

    suffix: ClassVar[str]
    turns_photographs = False

    def files(self) -> Iterator[Path]:
        return walk(self.path, self.suffix)

    def listing(self) -> Iterator[ListedTargets]:
        stop = -len(self.suffix)
        paths = (path.relative_to(self.path).as_posix()[:stop] for path in self.record_files())
        yield from (ListedTargets(part, part) for part in parts_of(paths))

    def record_files(self) -> Iterator[Path]:
        """Iterate over the files of records."""
        return self.files()

    def read(self, request: ReadRequest) -> Arrays:
        records = [self._parse_at(request, row) for row in range(len(request.names))]
        return stack_records(records, request.names[0], self.path)

    def _parse_at(self, request: ReadRequest, row: int) -> Arrays:
        path = self.path / f"{request.places[row]}{self.suffix}"
        with reading(str(path)):
            return self.parse(load_pickled(path), request, row)

    @abstractmethod
    def parse(self, content: Any, request: ReadRequest, row: int) -> Arrays:
        """Return the targets of one file, [V, ...] each.

        Args:
            content: Content of the file: lists, mappings, numbers, texts and arrays.
            request: The request.
            row: Place of the record in the request.

        Raises:
            ValueError: If the content differs. The message describes the problem, without the file name.
        """


def stack_records(records: Sequence[Arrays], name: str, path: Path) -> Arrays:
    """Stack the targets of several records, [V, ...] each.

    Args:
        records: Targets of the records.
        name: Name of the first record, for messages.
        path: Path of the targets, for messages.

    Raises:
        TargetError: If they have different views, classes or cells.
    """
    require(
        len({tuple((kind, array.shape) for kind, array in record.items()) for record in records})
        <= 1,
        f"{path}: the targets of {name} and of others near it differ in their views, classes or cells; all records "
        "of a pass have the same",
        TargetError,
    )
    return {kind: np.stack([record[kind] for record in records]) for kind in records[0]}


class RowsOfFile(Protocol):
    """Rows of one file of several, such as an array [rows, ...]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[Any]: ...


def rows_of_parts(parts: Sequence[RowsOfFile], numbers: NDArray[np.int64]) -> NDArray[Any]:
    """Read rows that are counted through all files, [n, 1, ...].

    Args:
        parts: Rows of each file, of one form.
        numbers: Numbers of the rows, i64 [n].
    """
    starts = np.cumsum([0, *map(len, parts)])
    files = np.searchsorted(starts, numbers, side="right") - 1
    rows = np.empty((len(numbers), 1, *parts[0].shape[1:]), parts[0].dtype)
    for file in np.unique(files).tolist():
        here = np.flatnonzero(files == file)
        rows[here, 0] = parts[file][numbers[here] - starts[file]]
    return rows


def load_pickled(path: Path) -> Any:
    """Read an untrusted torch file in a separate process.

    Raises:
        TargetError: If it cannot be read in bounded memory and time without running code.
    """
    try:
        data = file_at(path).read(MAX_TARGET_BYTES)
    except FileNotFoundError:
        raise TargetError(
            f"{path} was removed since it was listed; run the command again"
        ) from None
    except FileError as error:
        raise TargetError(str(error)) from error
    return unpickled(data, str(path))


def unpickled(data: bytes, where: str) -> Any:
    """Read the bytes of an untrusted torch file in a separate process. `where` names it in messages."""
    try:
        return unpickle(data)
    except UnpicklingError as error:
        raise TargetError(f"{where}: {error}") from error


def walk(folder: Path, suffix: str) -> Iterator[Path]:
    """Iterate over the files below a folder that end in a suffix, folder by folder, sorted by name.

    Raises:
        ConfigError: If there is no such folder or no such file.
    """
    require(folder.is_dir(), f"path={folder} is not a folder; name the folder of the targets")
    count = 0
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.endswith(suffix):
                count += 1
                yield Path(root, name)
    require(
        count > 0,
        f"path={folder} has no file *{suffix}; name the folder of the targets, or another format=",
    )


def parts_of(names: Iterator[Item]) -> Iterator[Sequence[Item]]:
    """Divide names into parts of NAMES_AT_ONCE."""
    while part := list(islice(names, NAMES_AT_ONCE)):
        yield part


def crop_views(
    boxes: NDArray[np.float64],
    flips: NDArray[np.bool_],
) -> Arrays:
    """Return the fields of crops of the whole image: windows f32 [V, 4], and moves f32 [V, 1, 2, 3] that move nothing.

    The move is the place of the turn of a photograph that EXIF turns.

    A crop with the left edge x0, the width w (as fractions of the image's width) and no flip shows at x in [-1, 1] the
    point w x + 2 x0 + w - 1. A flip after the crop replaces x by -x.

    Args:
        boxes: top, left, height and width as fractions of the image's sides, [V, 4].
        flips: True where the crop is flipped horizontally, [V].
    """
    top, left, height, width = boxes.astype(np.float64).T
    windows = [np.where(flips, -width, width), height, 2 * left + width - 1, 2 * top + height - 1]
    return {
        WINDOW_FIELD.name: np.stack(windows, axis=1).astype(np.float32),
        MOVE_FIELD.name: np.tile(np.eye(3, dtype=np.float32)[:2], (len(boxes), 1, 1, 1)),
    }


MIN_PROBABILITY = 1e-7
"""Probability in place of a stored 0 where it may be one that float16 has rounded, as it does half of this."""


def log_probabilities(values: NDArray[np.float64], temperature: float = 1.0) -> NDArray[np.float64]:
    """Return logits whose softmax at a temperature is this, up to a constant, with that of 0 at all temperatures."""
    logs = temperature * np.log(np.where(values > 0, values, 1.0))
    return np.where(values > 0, logs, IMPOSSIBLE_LOGIT)


def top_outcomes(
    probabilities: NDArray[Any],
    classes: NDArray[Any],
    num_classes: int,
    temperature: float = 1.0,
    rest: NDArray[np.float64] | None = None,
) -> Arrays:
    """Return the largest logits of a partly stored softmax.

    With p = softmax(z / T), the logits are z = T log p up to a constant, and the sum over all other classes at the
    temperature T is log(1 - sum p), whatever its parts are.

    Args:
        probabilities: Probabilities of k classes, [..., k].
        classes: Their classes, [..., k].
        num_classes: Number K of classes.
        temperature: Temperature T.
        rest: Probability of all other classes, [...]; None is 1 - sum p.

    Raises:
        ValueError: If they are not probabilities of different classes.
    """
    values, numbers = probabilities.astype(np.float64), classes.astype(np.float64)
    if (
        not np.array_equal(numbers, np.rint(numbers))
        or not ((numbers >= 0) & (numbers < num_classes)).all()
    ):
        raise ValueError(
            f"it has class {numbers.max():g} of {num_classes}; format.classes= is the number of the teacher's classes"
        )
    total = values.sum(axis=-1)
    require(
        bool(np.isfinite(values).all()) and values.min() >= -1e-3 and total.max() <= 1.02,
        f"its probabilities are invalid: their sum is {total.max():.3g}",
        ValueError,
    )
    ordered = np.sort(numbers, axis=-1)
    require(
        not (ordered[..., 1:] == ordered[..., :-1]).any(),
        "it lists a class twice for one view",
        ValueError,
    )
    order = np.argsort(-values, axis=-1, kind="stable")
    values = np.take_along_axis(values, order, -1)
    remaining = 1 - total if rest is None else rest
    has_others = values.shape[-1] < num_classes
    tail = np.log(np.maximum(remaining, MIN_PROBABILITY)) if has_others else np.zeros_like(total)
    return {
        "top_logits": log_probabilities(values, temperature).astype(np.float32),
        "top_class": np.take_along_axis(numbers, order, -1).astype(np.int32),
        "rest_logits": tail[..., None].astype(np.float32),
    }
