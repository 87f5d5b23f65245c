"""Resolution of options against a store: fill in what only the store knows, and reject what its records do not support.

Rows of a table go through the same stages as images. They have no views and no spatial positions, so augmentation and
explanation maps do not apply to them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from permafrost.config.augment import AugmentOptions
from permafrost.config.distillation import DistillConfig
from permafrost.config.methods import METHODS
from permafrost.config.models import AnyModelConfig, NoModelConfig, is_published, rows_of_table
from permafrost.config.store import PAYLOADS, PrecomputeConfig
from permafrost.config.teaching import GuidedTeachingConfig, TeachConfig
from permafrost.core.errors import require
from permafrost.models.trained_weights import check_weights

if TYPE_CHECKING:
    from permafrost.store.reader import Store


def resolve_precompute(config: PrecomputeConfig, store: Store) -> PrecomputeConfig:
    """Return the options resolved for this store. Raises ConfigError if they do not fit it."""
    if store.is_table:
        spatial = [name for name in config.annotate.payloads if not PAYLOADS[name].fits_tables]
        require(
            not spatial,
            f"annotate.payloads names {', '.join(spatial)}, which need images, but {_holds(store)}; set "
            f"annotate.payloads=[{','.join(_table_payloads(config))}]",
        )
        require(
            config.views.kind == "canonical",
            f"views={config.views.kind} transforms images, but {_holds(store)}; set views=canonical",
        )
        _refuse_layout(config.annotate.channels_last is True, store, "annotate")
    require(
        config.annotate.logits == "all" or not store.index.has_many_labels,
        "annotate.logits=topk keeps what a softmax needs, but records of this store have many labels; set "
        "annotate.logits=all",
    )
    takes_graph = config.explainer.needs_graph and "map" in config.annotate.payloads
    require(
        not (config.annotate.compile and takes_graph),
        f"annotate.compile=true: maps of explainer={config.explainer.kind} are gradients through the whole network, "
        "which a compiled forward pass does not have; set annotate.compile=false",
    )
    return replace(config, teacher=resolve_network(config.teacher, store, "teacher"))


def resolve_teach(config: TeachConfig, store: Store) -> TeachConfig:
    """Return the options resolved for this store. Raises ConfigError if they do not fit it."""
    if store.is_table:
        require(
            not isinstance(config.teaching, GuidedTeachingConfig),
            f"teaching=guided needs objects in images, but {_holds(store)}; set teaching=labels",
        )
        _refuse_views(config.teaching.augment, store, "teaching.augment")
        _refuse_layout(config.teaching.trainer.channels_last is True, store, "teaching.trainer")
    return replace(
        config,
        teacher=resolve_network(config.teacher, store, "teacher"),
        black_box=resolve_network(config.black_box, store, "black_box")
        if config.uses_black_box
        else config.black_box,
    )


def resolve_distill(config: DistillConfig, store: Store) -> DistillConfig:
    """Return the options resolved for this store. Raises ConfigError if they do not fit it."""
    if store.is_table:
        require(
            not config.method.needs_places,
            f"method={config.method.kind} needs images, but {_holds(store)}; choose one of "
            f"method={', '.join(k for k, c in METHODS.items() if not c.needs_places)}",
        )
        require(
            config.mode != "replay",
            f"mode=replay trains on stored views of images, but {_holds(store)}; set mode=frozen or mode=live",
        )
        _refuse_views(config.augment, store, "augment")
        _refuse_layout(config.trainer.channels_last is True, store, "trainer")
    return replace(
        config,
        student=resolve_network(config.student, store, "student"),
        teacher=resolve_network(config.teacher, store, "teacher"),
    )


def resolve_network(config: AnyModelConfig, store: Store, option: str) -> AnyModelConfig:
    """Resolve the options of a network for the store's records: the exact name of its weights, and a table's columns.

    option  teacher, black_box or student, for messages
    """
    if isinstance(config, NoModelConfig):
        return config
    check_weights(config, option)
    if is_published(config.weights):
        from permafrost.models.providers import name_weights

        config = name_weights(config)
    columns = store.size[1] if store.is_table else None
    return cast("AnyModelConfig", config.resolve(option, str(store.path), columns))


def require_images(store: Store, option: str, recovery_hint: str) -> None:
    """Raise ConfigError for an option that needs images if the store contains a table."""
    require(not store.is_table, f"{option} needs images, but {_holds(store)}; {recovery_hint}")


def _refuse_views(augment: AugmentOptions, store: Store, section: str) -> None:
    """Raise ConfigError unless the inputs are not augmented."""
    asked: dict[str, object] = {"size": augment.size, **augment.replacing_options}
    if augment.operations:
        asked["operations"] = [operation.kind for operation in augment.operations]
    if augment.pixels:
        asked["pixels"] = [operation.kind for operation in augment.pixels]
    named = " ".join(
        f"{section}.{name}={value}" for name, value in asked.items() if value is not None
    )
    require(
        not named,
        f"{named} changes images, but {_holds(store)}, which have no views; set {section}=none",
    )


def _refuse_layout(channels_last: bool, store: Store, section: str) -> None:
    require(
        not channels_last,
        f"{section}.channels_last=true is a layout of images, but {_holds(store)}; set it to false",
    )


def _table_payloads(config: PrecomputeConfig) -> tuple[str, ...]:
    """Payloads of a table that the teacher can produce."""
    teacher = config.teacher
    return ("logits",) if isinstance(teacher, NoModelConfig) else teacher.table_payloads


def _holds(store: Store) -> str:
    return rows_of_table(str(store.path), store.size[1])
