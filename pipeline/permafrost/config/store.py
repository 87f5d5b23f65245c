"""Options of a store, of a teacher pass, and of the records that a run reads; what precompute reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

from annotated_types import Ge, Le, Lt

from permafrost.config.augment import (
    AugmentOptions,
    CanonicalViewsConfig,
    RandomViewsConfig,
    ViewsConfig,
)
from permafrost.config.cluster import ClusterConfig, SharedExecutorName
from permafrost.config.data import DataConfig, PreviewOptions
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.models import ModelConfig, NoModelConfig, whole_frame
from permafrost.config.options import Command, OpenOptions, Options, Role, options_of
from permafrost.config.plugins import Family
from permafrost.core.errors import require, require_name
from permafrost.storage.addresses import Bucket, is_address, parse_bucket
from permafrost.storage.rooted_paths import RootedPath


@dataclass(frozen=True, kw_only=True)
class StoreOptions(Options):
    """Location and format of a store. Readers use only `path`, `allow_links` and `teacher`."""

    section: ClassVar[str] = "store"

    path: Annotated[str, Role.FILE, Role.OUTSIDE_IDENTITY] = ""
    """Folder of the store, or of a bucket (s3://bucket/folder). If nothing names one, evaluate, export and report read
    the store that the run was trained from."""
    cache: Annotated[str | None, Role.OUTSIDE_IDENTITY] = None
    """Folder of each node for copies of the objects of a bucket, which its processes share; null takes the environment
    variable PERMAFROST_CACHE, or ~/.cache/permafrost."""
    cache_bytes: Annotated[int | None, Ge(1), Role.OUTSIDE_IDENTITY] = None
    """Largest size of that folder in bytes; null for any. Copies that were used longest ago are removed."""
    allow_links: Annotated[bool, Role.OUTSIDE_IDENTITY] = False
    """Follow symbolic links inside the store, for a store of your own. They are an error otherwise, because those of a
    store from someone else can lead to any file of this machine. The path of the store itself may contain links."""
    backend: Annotated[Literal["zarr", "webdataset"], Role.OUTSIDE_IDENTITY] = "zarr"
    """Storage format of the teacher fields."""
    shard_size: Annotated[int | None, Ge(1), Role.OUTSIDE_IDENTITY] = None
    """Records per shard, the unit of work, retry and checksum. null is 512, or as many that the shards of small splits
    are nearly full, because the arrays of a pass have room for whole shards."""
    seed: Annotated[int, Ge(0), Lt(2**63), Role.OUTSIDE_IDENTITY] = 0
    """Seed of the global permutation that assigns records to shards."""
    image_size: Annotated[int | None, Ge(8), Le(4096), Role.OUTSIDE_IDENTITY] = None
    """Side in pixels of the canonical frame; null takes the images' common size if they have one, else 256.
    Re-encoded frames need it before the images are read, and then null is 256 unless the source declares a
    size."""
    format: Annotated[Literal["original", "jpeg95", "raw"], Role.OUTSIDE_IDENTITY] = "original"
    """Format of the images: the original bytes of the files, or the frame as a JPEG of quality 95 or as raw
    pixels."""
    relist: Annotated[bool, Role.OUTSIDE_IDENTITY] = False
    """List the data, read all packed records again and compare their bytes with a finished store, also if the options
    and the places of the files are those that it was made with. Without it, such a store is only checked for missing
    files: a file that was overwritten may not be noticed."""
    append: Annotated[bool, Role.OUTSIDE_IDENTITY] = False
    """Pack records that a finished store has not as a further generation (docs/howto/growing-data.md). Without it, a
    store of other data is left as it is."""
    changed: Annotated[Literal["stop", "keep"], Role.OUTSIDE_IDENTITY] = "stop"
    """Treatment of records of a finished store that are listed with another label, split or number of bytes, or not at
    all, or of other bytes with store.relist=true. keep: continue with the packed ones."""
    teacher: Annotated[tuple[str, ...], Role.BY_FINGERPRINT] = ()
    """Teacher passes to read if the store holds several: folder names, or the name before or the 8 digits after the
    last hyphen. A run that has read a pass keeps to it, as its config.yaml has the name."""

    unknown_views: Annotated[bool, Role.IF_SET] = False
    """Accept passes that do not record which part of an image the teacher received, as if it was the whole image."""

    def _check_together(self) -> None:
        require(
            self.path != "",
            "store.path is empty; name the folder of the store, as in store.path=stores/photos",
        )
        if is_address(self.path):
            parse_bucket("store.path", self.path)
        else:
            require(
                self.cache is None and self.cache_bytes is None,
                f"store.cache and store.cache_bytes are for buckets, but store.path={self.path} is a local folder; "
                "leave them out",
            )

    @property
    def folder(self) -> RootedPath:
        """Folder of the store."""
        return self.at(None)

    def at(self, other: str | None) -> RootedPath:
        """Return the folder of another store, which is read in the same way.

        Args:
            other: Folder or address of the other store; None returns this one's own.

        Raises:
            ConfigError: If the address cannot be used.
        """
        path = other or self.path
        if is_address(path):
            return RootedPath(
                Bucket(parse_bucket("store.path", path), self.cache, self.cache_bytes)
            )
        return RootedPath(Path(path), allow_links=self.allow_links)


class OutputInfo(NamedTuple):
    """Output that a teacher pass may store."""

    implementation: str
    """Same as Options.implementation."""
    fits_tables: bool
    """True if a teacher of a table's rows can produce it."""
    options: tuple[str, ...] = ()
    """Options of PassOptions that it reads."""
    adds: type[Options] | None = None
    """Class of the options that it adds to PassOptions."""
    describe: str = ""
    """`module:name` of a function (teacher network) -> entries of the pass's manifest that its fingerprint covers."""
    networks: tuple[str, ...] = ()
    """Kinds of networks that can produce it; empty if the kind does not decide."""

    @property
    def read_options(self) -> tuple[str, ...]:
        """Names of the options of `annotate` that it reads."""
        added = () if self.adds is None else tuple(option.name for option in options_of(self.adds))
        return (*self.options, *added)


_AUTO_BATCH = 64
"""Records of a batch with annotate.batch_size=auto."""
_MODULE = "permafrost.annotation.outputs"
OUTPUTS: Family[OutputInfo] = Family(
    {
        "logits": OutputInfo(
            f"{_MODULE}:LogitsOutput", True, ("logits", "k", "temperatures", "logits_dtype")
        ),
        "maps": OutputInfo(f"{_MODULE}:MapsOutput", False, ("map_dtype",)),
        "attention": OutputInfo(f"{_MODULE}:AttentionOutput", False),
        "class_maps": OutputInfo(f"{_MODULE}:ClassMapsOutput", False, ("class_map_size",)),
        "features": OutputInfo(
            f"{_MODULE}:FeaturesOutput",
            False,
            (
                "features_stages",
                "features_dtype",
                "features_size",
                "features_mirror",
                "features_margin",
                "features_channels",
            ),
        ),
        "pooled": OutputInfo(f"{_MODULE}:PooledOutput", False),
    }
)
"""Outputs of a pass (`annotate.outputs=`) by name."""


PROJECTION_RECORDS = 1024
"""Number of records on which annotate.features_channels is fitted, or all of the split if it has fewer."""

WITHOUT_HEAD = ("attention", "features", "pooled")
"""Outputs that a pass may have without logits. They do not read the teacher's last layer."""


def require_stages(option: str, stages: tuple[int, ...]) -> None:
    """Check that stages are counted from 1, or all from -1, each once.

    Args:
        option: Option that lists them, for the message.
        stages: Its value; empty is accepted.

    Raises:
        ConfigError: If they are not.
    """
    require(
        not stages or ((min(stages) >= 1 or max(stages) <= -1) and len(set(stages)) == len(stages)),
        f"{option} must list stages from 1, or all from -1, each once, got {list(stages)}",
    )


LogitsDtype = Literal["auto", "float16", "float32"]
PassPrecision = Literal["auto", "float32", "tf32", "bfloat16", "float16"]
"""Precision of the forward pass of a teacher."""


@dataclass(frozen=True, kw_only=True)
class PassOptions(OpenOptions):
    """Contents of a teacher pass."""

    section: ClassVar[str] = "annotate"

    name: str | None = None
    """Name of a new pass, before its fingerprint, which `store.teacher=` accepts; null takes the teacher's name."""
    outputs: tuple[str, ...] = ("logits", "maps")
    """Outputs to store. logits: the logits. maps: explanation maps. attention: activation energy of each
    stage, for method=at. class_maps: maps of all classes, for method=cat_kd. features: outputs of whole stages,
    for method=features, review_kd and ft. pooled: the pooled feature before the classifier, for method=embedding,
    crd and sskd. A pass of attention, features and pooled needs no logits, and a teacher of it no last layer."""
    logits: Literal["all", "topk"] = "all"
    """Logits to store. all: those of all classes. topk: the k largest, and the sum of all others at each of the
    temperatures, which suits thousands of classes (method.logits=softmax only)."""
    k: Annotated[int, Ge(1)] = 100
    """Number of stored logits of a record, at most the number of classes."""
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Temperatures (method.tau) at which the sum over the other classes is stored. 1 is among them, for agreement and
    divergence from the teacher."""
    logits_dtype: LogitsDtype = "auto"
    """Storage dtype of logits. auto: that of an existing pass of these options; for a new pass float16, unless it
    loses too much of what tells the classes of a sample of the records apart (large logits with small differences)."""
    map_dtype: Literal["float32", "float16", "int8"] = "float16"
    """Storage dtype of maps, which are divided by their largest absolute value. Maps that are far above their
    mean in a few places lose most in int8."""
    class_map_size: Annotated[int, Ge(1)] = 2
    """Cells per side to which class_maps are pooled. A student's views warp these cells, which is more exact at
    the size of the features (7 for a ResNet at 224 pixels) than at the 2 that CAT-KD compares."""
    features_stages: tuple[int, ...] = ()
    """Stages of the output features, counted from 1 at the finest, or from -1 at the deepest; empty stores all."""
    features_dtype: Literal["float16", "int8"] = "int8"
    """Storage dtype of features, relative to the largest value of each channel of a record."""
    features_size: Annotated[int | None, Ge(1)] = None
    """Cells per side to which features of finer grids are pooled; null keeps the teacher's grids."""
    features_mirror: bool = True
    """Store the features of the flipped image, too, for views that flip: at twice the bytes, without the error that
    features of the image itself have there (hidden channels tell left from right)."""
    features_margin: Annotated[float, Ge(0), Le(1)] = 0.0
    """Width of a black border around the teacher's image in units of its side, so that features of views that reach
    beyond the frame (augment=pad_crop_flip: 0.125) are those of such an image. It must be whole cells of each
    stage."""
    features_channels: Annotated[int | None, Ge(1)] = None
    """Most channels of a stage to store: stages with more are projected on that many principal components of their
    channels, fitted on 1,024 records of the training split. The manifest states the fraction of the variance that these
    keep. null stores all channels."""
    precision: PassPrecision = "float32"
    """Precision of the teacher's forward pass (autocast); explanations are computed in float32 from its features.
    float32 is that of IEEE 754 on GPUs, too, and tf32 what torch calls so by default on NVIDIA GPUs since
    Ampere: convolutions and products of 10 bits. Maps that are gradients through the whole network (B-cos
    weights) take one float32 pass, which also gives the logits. Other precisions are compared with float32 on a
    sample of the records, and refused if they differ too much. auto: that of an existing pass of these options;
    for a new pass bfloat16 if the hardware is several times as fast with it (a GPU with tensor cores, a CPU with
    AMX) and the sample agrees, else float32."""
    channels_last: bool | None = None
    """Channels-last memory format of the teacher and its images, which is faster for most convolutions and changes
    at most the last bits; null takes it for networks of torchvision and timm."""
    compile: bool = False
    """torch.compile of the teacher's forward pass, by each actor: a minute or more, for passes of many hours."""
    batch_size: int | Literal["auto"] = 64
    """Records per forward pass of the teacher; constant, because it may change the last bits of the result. auto: 64,
    and half of it wherever the memory of the device has no room for as many."""
    min_fidelity: Annotated[float, Ge(0), Le(1)] = 0.999
    """Lowest cosine between a map and its stored form that may be written."""

    @property
    def records_per_batch(self) -> int:
        """Number of records of a batch."""
        return _AUTO_BATCH if self.batch_size == "auto" else self.batch_size

    @property
    def memory_advice(self) -> str:
        """Remedy for a teacher that the memory has no room for."""
        if self.batch_size in ("auto", 1):
            return "take a smaller teacher.input_size, a GPU with more memory, or fewer teachers on each"
        return f"lower annotate.batch_size={self.batch_size}, or set it to auto"

    @property
    def reads_head(self) -> bool:
        """True if the teacher's logits are stored, so that its last layer must be trained."""
        return "logits" in self.outputs

    @classmethod
    def added_by(cls) -> tuple[tuple[str, type[Options]], ...]:
        return tuple(("", output.adds) for output in OUTPUTS.values() if output.adds is not None)

    def read_by(self, output_name: str) -> tuple[str, ...]:
        """Return the names of the options that an output reads."""
        unset = {"features_channels"} if self.features_channels is None else set()
        unset |= {"logits_dtype"} if self.logits_dtype != "float32" else set()
        unset |= {"k", "temperatures", "logits"} if self.logits == "all" else set()
        return tuple(name for name in OUTPUTS[output_name].read_options if name not in unset)

    def _check_together(self) -> None:
        if self.name is not None:
            require_name("annotate.name", self.name, may_have_folders=True)
        require(
            self.batch_size == "auto" or self.batch_size >= 1,
            f"annotate.batch_size={self.batch_size} must be >= 1, or auto",
        )
        unknown = [name for name in self.outputs if name not in OUTPUTS]
        require(
            not unknown,
            f"annotate.outputs must be among {', '.join(OUTPUTS)}; got {', '.join(unknown)}",
        )
        require(len(self.outputs) > 0, "annotate.outputs=[] stores nothing; name an output")
        others = [name for name in self.outputs if name not in WITHOUT_HEAD]
        require(
            self.reads_head or not others,
            f"annotate.outputs must contain logits in addition to {', '.join(others)}; only {', '.join(WITHOUT_HEAD)} "
            "are stored without",
        )
        require(
            1.0 in self.temperatures and min(self.temperatures) > 0,
            f"annotate.temperatures={list(self.temperatures)} must be positive, and 1 among them",
        )
        require(
            list(self.temperatures) == sorted(set(self.temperatures)),
            f"annotate.temperatures={list(self.temperatures)} must rise, each named once",
        )
        require_stages("annotate.features_stages", self.features_stages)
        require(
            len(set(self.outputs)) == len(self.outputs),
            f"annotate.outputs lists an output twice: {self.outputs}",
        )


@dataclass(frozen=True, kw_only=True)
class SubsetOptions(Options):
    """Subset of the training split that a run reads; the store itself always contains the whole set."""

    section: ClassVar[str] = "subset"

    shots: Annotated[int | None, Ge(1)] = None
    """Records per class, or at least that many if records have several labels; null takes all."""
    seed: int = 0
    """Seed of the selection, separate from `seed` so that the shots stay fixed while initialization varies."""
    holdout: Annotated[int, Ge(0)] = 0
    """Records per class kept out of training for validation, selected before the shots."""
    keep_groups: Annotated[bool, Role.IF_SET] = False
    """Hold out whole groups (data.group), such as all pictures of a patient: all records of the groups that `holdout`
    selects from, which may be more per class."""
    rule: Annotated[Literal["auto", "permutation", "by_key"], Role.IF_SET] = "auto"
    """Order in which the records of a class are selected. auto: permutation, or by_key in a store to which records
    were appended. permutation: one permutation of each class, which is another one if the split of the store has other
    records of the class or other classes. by_key: by a digest of subset.seed and the key of each record, so that two
    records have the same order in any store that has them."""


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(Options):
    """Sections that `precompute` reads.

    `augment`, `split` and `subset` determine the views and records of a pass of stored views. The
    canonical pass always covers all records.
    """

    data: DataConfig
    store: StoreOptions
    teacher: ModelConfig | NoModelConfig
    explainer: ExplainerConfig
    annotate: PassOptions
    cluster: ClusterConfig
    preview: PreviewOptions = field(default_factory=PreviewOptions)
    views: ViewsConfig = field(default_factory=CanonicalViewsConfig)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    subset: SubsetOptions = field(default_factory=SubsetOptions)
    split: str = "train"
    """Split that a pass of stored views covers."""
    executor: SharedExecutorName = "auto"
    """Executor of the work: Ray, this process alone (serial), or this process as a task of a job array
    (array), of which each start of the same command does a part. auto: serial for at most 10,000 records with
    cluster=local without more cluster.actors, Ray otherwise."""
    run: str = ""
    """Folder below runs/, shared by all stages; an absolute path is taken as it is (required on a cluster). Without
    one, neither the options nor the time of a pass are recorded."""
    command: Command = ()
    """Command, which tells what was typed."""

    def _check_together(self) -> None:
        require(
            self.views.kind == "canonical" or self.teacher.frame != "center_crop",
            f"views={self.views.kind} are views of the whole frame: set teacher.frame=full",
        )
        if self.views.kind != "canonical":
            object.__setattr__(self, "teacher", whole_frame(self.teacher))
        mixes = isinstance(self.views, RandomViewsConfig) and self.views.mixes
        require(
            self.views.kind != "random" or len(self.augment.operations) > 0 or mixes,
            "views=random draws from augment.operations, which is empty: set augment=, or views.mix=",
        )
        if mixes:
            chosen = self.explainer.target_classes
            require(
                chosen in ("top1", "topk"),
                f"explainer.target_classes={chosen} reads a record's labels, and views.mix shows two records; set "
                "explainer.target_classes=top1, or views.mix=[]",
            )
            require(
                self.annotate.records_per_batch > 1,
                "views.mix draws second records within batches of annotate.batch_size=1; raise it",
            )


STORE_SECTIONS: Family[str] = Family({})
"""Sections about a store that packages add to a report, by name: module:name of functions (store) -> StoreSection, or
None without anything to show."""
STORE_METHODS: Family[str] = Family({})
"""Methods that packages add to an opened store (`permafrost.open_store`), by name: module:name of functions whose first
argument is the store."""
