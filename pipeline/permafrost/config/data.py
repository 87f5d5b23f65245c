"""Sources of the input records (`data=`): images, tars, tables of numbers, and published sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Lt

from permafrost.config.cluster import ClusterConfig, ExecutorName
from permafrost.config.options import Command, Options, Role, is_left_out, options_of
from permafrost.config.plugins import Family
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
            and not is_left_out(option, getattr(self, option.name))
        }


@dataclass(frozen=True, kw_only=True)
class NoDataConfig(DataConfig):
    """The records of a finished store. Nothing is packed."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class FileDataConfig(DataConfig):
    """Options of every source that reads the user's files."""

    minimal: ClassVar[tuple[str, ...]] = ("data.path=somewhere",)
    path_is: ClassVar[str] = ""
    """Object that data.path names, for messages."""

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
    accept: Annotated[tuple[str, ...], Role.OUTSIDE_DATASET] = ()
    """Names of findings of `preview` that are as you mean them: an error of this name is a warning."""

    def _check_together(self) -> None:
        require(
            len(set(self.only_classes)) == len(self.only_classes),
            f"data.only_classes names a class twice: {list(self.only_classes)}",
        )
        require(
            not self.path_is or getattr(self, "path", "") != "",
            f"data.path is empty; set it to {self.path_is}",
        )


@dataclass(frozen=True, kw_only=True)
class DrawnTestDataConfig(FileDataConfig):
    """Options of sources whose test split may be drawn."""

    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Fraction of split train that is moved to split test, in the order of the keys' hashes: exactly this share of
    classes below 1,000 records at the first packing, and about this share of larger ones. Packed records stay."""


@dataclass(frozen=True, kw_only=True)
class ImageFileDataConfig(FileDataConfig):
    """Options of every source that reads the user's image files."""

    bit_range: Annotated[tuple[int, ...], Role.IF_SET] = ()
    """Values of images of 16 bits that are black and white, such as [0,4095] for 12 bits. Such images are then
    packed as PNG of 8 bits. Empty: black is 0 and white is 65535."""
    boxes_of: Annotated[Literal["upright", "stored"], Role.IF_SET] = "upright"
    """Image in whose pixels boxes and masks are measured: the upright one, as a viewer shows it, or the one that is
    stored in the file, before the EXIF orientation turns it."""

    def _check_together(self) -> None:
        super()._check_together()
        limits = self.bit_range
        require(
            not limits or (len(limits) == 2 and 0 <= limits[0] < limits[1] <= 65535),
            f"data.bit_range={list(limits)} must be two values, black below white, from 0 to 65535, as in [0,4095]",
        )
        require(
            not getattr(self, "keep_groups", False)
            or bool(getattr(self, "group", ()) and getattr(self, "test_fraction", 0)),
            "data.keep_groups=true keeps groups whole when a test split is drawn; name their column (of a folder: "
            "burst) and the fraction, as in 'data.group=[patient] data.test_fraction=0.2'",
        )


def require_one_form(label: str | None, labels: str | tuple[str, ...]) -> None:
    """Raise ConfigError unless data.labels is all that names labels, and its columns are two or more, each once."""
    require(
        label in (None, "label"),
        f"data.label={label} and data.labels={labels} exclude each other; set one to null",
    )
    require(
        isinstance(labels, str) or len(set(labels)) == len(labels) > 1,
        f"data.labels={list(labels)} must list the columns of two classes or more, each once; for one column of all "
        "labels write its name without brackets",
    )


# ---- one dataclass per source --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImageFolderDataConfig(ImageFileDataConfig, DrawnTestDataConfig):
    """Folder of images: <path>/<class>/.../image, or <path>/<split>/<class>/.../image."""

    implementation: ClassVar[str] = "permafrost.sources.image_folder:ImageFolderSource"
    path_is: ClassVar[str] = "the folder of the images"

    kind: Literal["image_folder"] = "image_folder"
    path: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = ""
    """Folder of the images."""
    splits: dict[str, str] = field(default_factory=dict)
    """Mapping from folder to split; other folders are left out. If empty, top-level folders named train, val,
    valid, validation, dev, eval or test are the splits, in any case and with the usual additions (Training, test_set),
    provided that all of them have such names (if only some do, that is an error). Otherwise all records belong to
    split train."""
    classes: Annotated[str | None, Role.FILE, Role.OUTSIDE_DATASET] = None
    """File with one class folder per line, in label order; null sorts the folders with images by name, whole numbers
    by value."""
    group: Annotated[tuple[Literal["burst"], ...], Role.IF_SET] = ()
    """burst: groups of photographs of one scene, by EXIF data and names of files: those of one class and camera, each
    taken at most 10 s after another one, and copies. data.keep_groups and subset.keep_groups keep them whole. They get
    no accuracy of their own."""
    keep_groups: Annotated[bool, Role.IF_SET] = False
    """Move whole groups of data.group to split test, in the order of the groups' hashes, and as near to the fraction of
    each class as whole groups allow. New photographs of a packed group join its split."""


@dataclass(frozen=True, kw_only=True)
class ImageTableDataConfig(ImageFileDataConfig, DrawnTestDataConfig):
    """CSV or Parquet file with one row per image, or Parquet files with the images; options name the columns."""

    implementation: ClassVar[str] = "permafrost.sources.image_table:ImageTableSource"
    path_is: ClassVar[str] = "the CSV or Parquet file"

    kind: Literal["image_table"] = "image_table"
    path: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = ""
    """CSV or Parquet file, or a folder, a glob or a {00000..00003} range of Parquet files."""
    root: Annotated[str | None, Role.FILE, Role.OUTSIDE_DATASET] = None
    """Folder that image and mask paths are relative to; null takes the folder of the table."""
    image: str = "path"
    """Column of the image's path, or in Parquet of its bytes, as Hugging Face's datasets writes them (the only such
    column is found by itself)."""
    label: str | None = "label"
    """Column of the class: its name, or the label itself if all values are numbers. null: no labels. Not read with
    data.labels."""
    labels: str | tuple[str, ...] | None = None
    """Several classes per record. A list names a column for each class, with 1, 0 or nothing where it is unknown. A
    name is that of one column: of lists (in a CSV as JSON) of the record's classes, or of 1, 0 or null for each line of
    data.classes; or of names between separators."""
    label_separator: Annotated[str | None, Role.OUTSIDE_DATASET] = None
    """Separator of the names in a cell of data.labels; an empty text keeps cells whole. null takes the
    first of | ; , / + & and blank whose pieces also occur in other cells."""
    cache: Annotated[str, Role.FILE, Role.CACHE, Role.OUTSIDE_DATASET] = "data"
    """Folder into which images inside of Parquet files are copied once, from which they are read."""
    group: tuple[str, ...] = ()
    """Columns whose combination is the group, the first varying slowest, such as [y, place] for Waterbirds.
    Whole numbers are used as they are; other values are numbered in sorted order."""
    weight: Annotated[str | None, Role.IF_SET] = None
    """Column of a number >= 0 by which the loss of a record is multiplied in every training, divided by its mean over
    the records of the training. null: no weights."""
    split: str | None = None
    """Column of the split; null puts all records into split train, or those of several files into the splits of their
    names (train-00000-of-00004.parquet). If cells are empty, data.test_fraction draws only the records of these, into
    train and test."""
    split_names: dict[str, str] = field(default_factory=dict)
    """Mapping from values of that column to splits; empty takes the values as they are, and the usual spellings of a
    split (Training, TEST) as that split."""
    boxes: str | None = None
    """Column of boxes in pixels: a list of {x0, y0, x1, y1} and optionally label (JSON text in a CSV). x1 and
    y1 are exclusive."""
    mask: str | None = None
    """Column of the mask's path; 0 is the background."""
    classes: Annotated[str | None, Role.FILE, Role.OUTSIDE_DATASET] = None
    """File with one class name per line, in label order; null takes the sorted names of the label column (of Hugging
    Face's Parquet those of its features), or the numbers up to the largest label."""
    keep_groups: Annotated[bool, Role.IF_SET] = False
    """Move whole groups of data.group to split test, such as all pictures of a patient, in the order of the groups'
    hashes, and as near to the fraction of the records as whole groups allow (of each class, if no group has several).
    New records of a packed group join its split."""

    def _check_together(self) -> None:
        super()._check_together()
        require(
            self.label_separator is None or self.labels is not None,
            f"data.label_separator={self.label_separator!r} separates the names of data.labels, which is null; set "
            f"data.label=null data.labels={self.label}",
        )
        if self.labels is not None:
            require_one_form(self.label, self.labels)
            object.__setattr__(self, "label", None)
        require(
            not isinstance(self.labels, tuple)
            or (self.classes, self.label_separator) == (None, None),
            "data.labels lists the columns of the classes, in label order; leave out data.classes and "
            "data.label_separator",
        )


@dataclass(frozen=True, kw_only=True)
class MemoryDataConfig(DrawnTestDataConfig):
    """Dataset of a Python program: `permafrost.precompute(dataset=dataset)`."""

    implementation: ClassVar[str] = "permafrost.sources.memory_dataset:MemorySource"
    minimal: ClassVar[tuple[str, ...]] = ()

    kind: Literal["memory"] = "memory"
    sizes: Annotated[Literal["equal", "any"], Role.OUTSIDE_DATASET] = "any"
    """Sizes of decoded images. equal: an image of another size than the first is an error."""
    classes: Annotated[int | None, Ge(1), Role.OUTSIDE_DATASET] = None
    """Number of classes of a dataset that does not name them; null counts up to the largest label."""
    dataset: Any = field(default=None, repr=False)


SOURCES: Family[type[DataConfig]] = Family(
    {
        cls.kind: cls
        for cls in (
            ImageFolderDataConfig,
            ImageTableDataConfig,
            MemoryDataConfig,
        )
    }
)
"""Sources of records (`data=`) by name."""


FINDINGS: Family[Any] = Family({})
"""Rules by the name of their findings: a function of a Preview that yields (level, message), and facts that the sheet
of the data then has, or module:name of one."""
STORE_FINDINGS: Family[str] = Family({})
"""Rules about packed stores by their subject: module:name of a function of a Store that returns findings and facts."""
FACTS_OF_FINDINGS: dict[str, str] = {}
"""Names of the facts of the data that findings mark as doubtful, by the name of the finding."""


@dataclass(frozen=True, kw_only=True)
class PreviewOptions(Options):
    """Number of files that a preview reads."""

    section: ClassVar[str] = "preview"

    files: Annotated[int, Ge(1)] = 500
    """Number of files whose headers are read, drawn at random."""
    all: bool = False
    """Read the headers of all files."""

    @property
    def limit(self) -> int | None:
        """Number of files to read, None for all."""
        return None if self.all else self.files


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(Options):
    """Sections that `preview` reads."""

    data: DataConfig
    preview: PreviewOptions
    cluster: ClusterConfig
    executor: ExecutorName = "auto"
    """Executor of the listing, as in precompute."""
    scratch: Annotated[str | None, Role.FILE] = None
    """Folder for a temporary listing, which all hosts of a cluster must see; null takes one of this machine."""
    against: Annotated[str | None, Role.FILE] = None
    """Store to which the records may be appended. New ones are compared with its own, and only their files are read."""
    command: Command = ()
    """Command that previews them."""
