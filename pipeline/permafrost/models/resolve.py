"""Resolution of options against a store: fill in what depends on the store, and reject what its records do not support.

Rows of a table go through the same stages as images. They have no views and no spatial positions, so augmentation and
explanation maps do not apply to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from permafrost.config.augment import AugmentOptions
from permafrost.config.distillation import DistillConfig
from permafrost.config.methods import METHODS
from permafrost.config.models import AnyModelConfig, ModelConfig, NoModelConfig, rows_of_table
from permafrost.config.store import OUTPUTS, PrecomputeConfig
from permafrost.config.teaching import TeachConfig
from permafrost.core.errors import ConfigError, require
from permafrost.models.network import Network

if TYPE_CHECKING:
    from permafrost.store.reader import Store


def resolve_precompute(config: PrecomputeConfig, store: Store) -> PrecomputeConfig:
    """Return the options resolved for this store.

    Raises:
        ConfigError: If they do not fit the store.
    """
    _check_form(store, _need_images_in_precompute(config))
    require(
        config.annotate.logits == "all" or not store.index.has_many_labels,
        "annotate.logits=topk keeps what a softmax needs, but records of this store have many labels; set "
        "annotate.logits=all",
    )
    explainer = config.explainer
    takes_graph = explainer.needs_graph or explainer.reads == "images"
    takes_graph &= "maps" in config.annotate.outputs
    require(
        not (config.annotate.compile and takes_graph),
        f"annotate.compile=true: maps of explainer={config.explainer.kind} need gradients of the whole network, which "
        "a compiled forward pass lacks; set annotate.compile=false",
    )
    size = "teacher.input_size", getattr(config.teacher, "input_size", None)
    return replace(config, teacher=resolve_network(config.teacher, store, "teacher", size))


def resolve_teach(config: TeachConfig, store: Store) -> TeachConfig:
    """Return the options resolved for this store.

    Raises:
        ConfigError: If they do not fit the store.
    """
    _check_form(store, _need_images_in_teach(config))
    size = config.teaching.augment.size
    _check_trained_size(config.teacher, store, "teacher", "teaching.augment.size", size)
    return replace(
        config,
        teacher=resolve_network(config.teacher, store, "teacher", ("teaching.augment.size", size)),
        black_box=resolve_network(config.black_box, store, "black_box")
        if config.teaching.uses_black_box(config.teacher)
        else config.black_box,
    )


def resolve_distill(config: DistillConfig, store: Store) -> DistillConfig:
    """Return the options resolved for this store.

    Raises:
        ConfigError: If they do not fit the store.
    """
    _check_form(store, _need_images_in_distill(config))
    _check_trained_size(config.student, store, "student", "augment.size", config.augment.size)
    return replace(
        config,
        student=resolve_network(
            config.student, store, "student", ("augment.size", config.augment.size)
        ),
        teacher=resolve_network(config.teacher, store, "teacher"),
    )


def resolve_network(
    config: AnyModelConfig, store: Store, option: str, size: tuple[str, int | None] | None = None
) -> AnyModelConfig:
    """Resolve the options of a network for the store's records: the exact name of its weights, and a table's columns.

    A teacher whose weights a run has trained receives images of the size that it was trained on.

    Args:
        config: Options of the network.
        store: Store of the records.
        option: Section of the options, teacher, black_box or student, for messages.
        size: Option of the size of the network's inputs and its value, None for a network that ran on them before.

    Raises:
        ConfigError: If the network does not fit the store's records, or a run has trained its weights with other
            options, or if it is one for small images, and large ones were not asked for.
    """
    if isinstance(config, NoModelConfig):
        return config
    network = Network(config, store.manifest.classes, option)
    network.check(reads_head=False)
    columns = store.form.num_columns
    resolved = network.config.resolve(option, str(store.path), columns)
    described = None if network.file is None else network.file.description
    if size is not None and columns is None and described is None:
        (size_option, side), (height, width) = size, store.size
        require(
            side is not None or max(height, width) <= resolved.largest_side,
            f"{option}={resolved.kind} {option}.name={resolved.name} is a network for images of 32 pixels, and the "
            f"frames of {store.path} are {width}x{height}; choose {option}=torchvision {option}.name=resnet18, or set "
            f"{size_option}=32",
        )
    if described is not None and columns is None and described.model.get("input_size") is None:
        height, width = described.input_size
        if store.size == (resolved.input_size,) * 2:
            resolved = replace(
                resolved, input_size=None
            )  # as the run had it: one identity for both
        elif option == "teacher" and resolved.input_size is None and store.size != (height, width):
            require(
                height == width,
                f"{option}.weights={config.weights} were trained on images of {width}x{height} pixels, and the frames "
                f"of {store.path} are {store.size[1]}x{store.size[0]}; set {option}.input_size=",
            )
            resolved = replace(resolved, input_size=height)
    return cast("AnyModelConfig", resolved)


def _check_trained_size(
    network: ModelConfig, store: Store, option: str, size_option: str, size: int | None
) -> None:
    """Refuse an input size that is not the size of the views by which a network is trained."""
    wanted, views = network.input_size, store.size if size is None else (size, size)
    require(
        wanted is None or views == (wanted, wanted) or not store.form.has_places,
        f"{option}.input_size={wanted} is not the size of the views that it is trained on, {views[1]}x{views[0]}; set "
        f"{size_option}={wanted}, or {option}.input_size to the size of the views",
    )


# ---- options that need images --------------------------------------------------------------------


def require_images(store: Store, option: str, recovery_hint: str) -> None:
    """Raise ConfigError for an option that needs images if the store has rows of numbers.

    Args:
        store: Store of the records.
        option: Option that needs images, for the message.
        recovery_hint: Fix, for the message.
    """
    _check_form(store, [(f"{option} needs images", f"; {recovery_hint}")])


def _check_form(store: Store, need_images: Iterable[tuple[str, str]]) -> None:
    """Raise ConfigError for the first option that needs images, with the fix, if the store has rows of numbers."""
    if (columns := store.form.num_columns) is None:
        return
    for need, remedy in need_images:
        raise ConfigError(f"{need}, but {rows_of_table(str(store.path), columns)}{remedy}")


def _need_images_in_precompute(config: PrecomputeConfig) -> Iterator[tuple[str, str]]:
    if spatial := [name for name in config.annotate.outputs if not OUTPUTS[name].fits_tables]:
        teacher = config.teacher
        others = ("logits",) if isinstance(teacher, NoModelConfig) else teacher.pass_outputs
        yield (
            f"annotate.outputs names {', '.join(spatial)}, which need images",
            f"; set annotate.outputs=[{','.join(others)}]",
        )
    if config.views.kind != "canonical":
        yield f"views={config.views.kind} transforms images", "; set views=canonical"
    yield from _channels_last(config.annotate.channels_last, "annotate")


def _need_images_in_teach(config: TeachConfig) -> Iterator[tuple[str, str]]:
    if config.teaching.reads_regions:
        yield f"teaching={config.teaching.kind} needs objects in images", "; set teaching=labels"
    yield from _views(config.teaching.augment, "teaching.augment")
    yield from _channels_last(config.teaching.trainer.channels_last, "teaching.trainer")


def _need_images_in_distill(config: DistillConfig) -> Iterator[tuple[str, str]]:
    if config.method.needs_places:
        others = ", ".join(kind for kind, cls in METHODS.items() if not cls.needs_places)
        yield f"method={config.method.kind} needs images", f"; choose one of method={others}"
    if config.mode == "replay":
        yield "mode=replay trains on stored views of images", "; set mode=frozen or mode=live"
    yield from _views(config.augment, "augment")
    yield from _channels_last(config.trainer.channels_last, "trainer")


def _views(augment: AugmentOptions, section: str) -> Iterator[tuple[str, str]]:
    options: dict[str, object] = {"size": augment.size}
    if augment.mixes:
        options["mix"] = [mixture.kind for mixture in augment.mix]
    if augment.operations:
        options["operations"] = [operation.kind for operation in augment.operations]
    named = [f"{section}.{name}={value}" for name, value in options.items() if value is not None]
    if named:
        yield f"{' '.join(named)} changes images", f", which have no views; set {section}=none"


def _channels_last(value: bool | None, section: str) -> Iterator[tuple[str, str]]:
    if value:
        yield f"{section}.channels_last=true is a layout of images", "; set it to false"
