"""Verbs `ingest`, `attach` and `share`, and a `verify` that runs a teacher: their options, and how they enter."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from permafrost.config.augment import AugmentOptions, CanonicalViewsConfig, ViewsConfig
from permafrost.config.cluster import ClusterConfig, ExecutorName
from permafrost.config.families import FAMILIES
from permafrost.config.models import ModelConfig, NoModelConfig
from permafrost.config.options import Options, Role
from permafrost.config.sections import DEFAULT_MEMBERS
from permafrost.config.store import StoreOptions, SubsetOptions
from permafrost.config.verbs import VERBS, Verb, VerifyConfig
from permafrost.core.errors import require, require_name
from permafrost_exchange.format_options import TARGET_FORMATS, TargetFormatConfig

CauseKind = Literal["temperature", "classes", "rows", "preprocessing", "maps", "unknown"]


@dataclass(frozen=True, kw_only=True)
class PassportOptions(Options):
    """Comparison of targets with the teacher that they are said to be of, on a sample of records."""

    section: ClassVar[str] = "passport"

    records: Annotated[int | None, Ge(1)] = 256
    """Number of records that `teacher=` is run on; null runs it on all."""
    views: Annotated[int, Ge(1)] = 2
    """Number of stored views of each of these records that it is run on."""
    accept: tuple[CauseKind, ...] = ()
    """Differences that are accepted as they are, while all others stop: temperature, classes (their order), rows (of
    other records), preprocessing (the part of the image, its size, channels or normalization), maps (their direction,
    or their records), and unknown for those without an explanation."""


@dataclass(frozen=True, kw_only=True)
class JoinConfig(Options):
    """Sections of verbs that join targets with the records of a store."""

    store: StoreOptions
    missing: Annotated[str | None, Role.FILE] = None
    """File to which the keys of records without targets are written; null stops at such records. Splits without any
    targets are left out of the pass by ingest."""
    cluster: ClusterConfig
    executor: ExecutorName = "auto"
    """Executor of the work, as in precompute."""


@dataclass(frozen=True, kw_only=True)
class IngestConfig(JoinConfig):
    """Sections that `ingest` reads."""

    format: TargetFormatConfig
    path: Annotated[str, Role.FILE] = ""
    """File or folder of the targets."""
    teacher: ModelConfig | NoModelConfig = field(default_factory=NoModelConfig)
    """Network that made the targets, which is run on a sample of the same views and compared with them."""
    passport: PassportOptions
    name: str | None = None
    """Name of the new pass, before its fingerprint; null takes the name of the format."""
    views: ViewsConfig = field(default_factory=CanonicalViewsConfig)
    """Views to compute targets of, with format=relabel; other formats have targets of the views that they store."""
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    subset: SubsetOptions = field(default_factory=SubsetOptions)
    split: str = "train"
    """Split of these views."""

    def _check_together(self) -> None:
        if self.name is not None:
            require_name("name", self.name, may_have_folders=True)


_LICENSED = ("images", "weights", "targets")
_NO_LICENSE = re.compile(
    r"(?i)\W*((is |was )?not (found|known|stated|specified|available)|unknown|none|null|n/?a|tbd|todo|\?+)?\W*"
)
"""Texts that say no license."""


@dataclass(frozen=True, kw_only=True)
class ShareConfig(Options):
    """Sections that `share` reads."""

    store: StoreOptions
    """Store of the pass, which `pass=` (or store.teacher=) names."""
    to: str = ""
    """New folder, or hf://<user>/<name> for a data set on the Hugging Face hub (needs huggingface_hub)."""
    form: Literal["webdataset", "embeddings", "huggingface"] = "webdataset"
    """Form of the files. webdataset: tars with all fields, which `attach` joins to another store bit for bit.
    embeddings: the field `pooled` as npy next to Parquet, as clip-retrieval writes it. huggingface: Parquet with a
    column per field, and a card."""
    images: bool = False
    """Write the images, too."""
    keys: bool = True
    """Write the key of each record, which is the name of its file; false writes a number in its place."""
    pixels: bool = False
    """Write the SHA-256 of each decoded frame, so that the pass fits stores whose files differ and whose pixels do
    not. Every image is decoded once."""
    licenses: dict[str, str] = field(default_factory=dict)
    """Licenses of the images, the weights and the targets (SPDX names or a sentence each), as they are written into
    the card: {images: CC-BY-4.0, weights: MIT, targets: CC-BY-4.0}."""

    def require_complete(self) -> None:
        """Check that the options name a folder and all licenses.

        Raises:
            ConfigError: If one is missing.
        """
        require(self.to != "", "to is empty; set it to a new folder, or to hf://<user>/<name>")
        missing = [
            name for name in _LICENSED if _NO_LICENSE.fullmatch(self.licenses.get(name) or "")
        ]
        odd = sorted(self.licenses.keys() - set(_LICENSED))
        require(
            not odd,
            f"licenses={self.licenses}: {', '.join(odd)} is not asked for; name images, weights and targets",
        )
        require(
            not missing,
            f"licenses={self.licenses} must say under which license {' and '.join(missing)} are, as in "
            "licenses={images: CC-BY-4.0, weights: MIT, targets: CC-BY-4.0}",
        )


@dataclass(frozen=True, kw_only=True)
class AttachConfig(JoinConfig):
    """Sections that `attach` reads."""

    path: Annotated[str, Role.FILE] = ""
    """Folder that `share` has written with form=webdataset; `from=` is the same option."""


@dataclass(frozen=True, kw_only=True)
class VerifyTeacherConfig(VerifyConfig):
    """Sections that `verify` reads."""

    teacher: ModelConfig | NoModelConfig = field(default_factory=NoModelConfig)
    """Network that is said to have made the passes of store.teacher, or the only one: it is run on a sample of their
    views, and its agreement with them is written into their manifests."""
    passport: PassportOptions = field(default_factory=PassportOptions)


FAMILIES["format"] = TARGET_FORMATS
DEFAULT_MEMBERS["format"] = "npz"
VERBS["ingest"] = Verb(
    options=IngestConfig,
    function="permafrost_exchange.ingest:ingest_files",
    order=25,
    group="data",
    common=(
        "store.path format path name missing format.column format.fields format.split "
        "format.temperature format.index_map teacher teacher.name teacher.weights "
        "passport.records passport.accept"
    ),
    checks_teacher=True,
    python="Make a pass of targets of another tool. The result has its name, and the number of `records`.",
)
VERBS.replace(
    "verify",
    Verb(
        options=VerifyTeacherConfig,
        function="permafrost_exchange.verify_teacher:verify_teacher",
        order=40,
        group="data",
        common=(
            "store.path store.teacher teacher teacher.name teacher.weights passport.records "
            "passport.views passport.accept store.cache store.allow_links"
        ),
        checks_teacher=True,
    ),
)
VERBS["share"] = Verb(
    options=ShareConfig,
    function="permafrost_exchange.share:share_targets",
    order=80,
    common="store.path store.teacher to form images keys pixels licenses",
    python="""Write a pass for others, without images. The result has the folder or address, `shared`.

    The pass is named by the argument `pass=...`, as `pass` cannot be a keyword argument in Python.
    """,
)
VERBS["attach"] = Verb(
    options=AttachConfig,
    function="permafrost_exchange.attach:attach_targets",
    order=85,
    group="data",
    common="path store.path missing executor store.cache store.allow_links",
    python="Join a shared pass, the folder `path`, to a store of the same images. The result has its name.",
)
