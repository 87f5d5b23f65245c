"""Facts about a network and about the machine that runs it: weights, input, normalization, classes; cores, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from permafrost.config.distillation import DistillConfig
from permafrost.config.models import (
    RANDOM,
    FoldsModelConfig,
    ModelConfig,
    Picture,
    is_published,
)
from permafrost.config.teaching import TeachConfig
from permafrost.core.digests import SHORT
from permafrost.core.errors import UserError, shorten
from permafrost.core.machine import usable_cores, usable_memory
from permafrost.models.network import Network, describe_input
from permafrost.models.providers import model_normalization, with_preprocessing
from permafrost.models.trained_weights import DESCRIPTION_NAME, count_classes
from permafrost.runs.folder import CONFIG_NAME, read_config
from permafrost.store.facts import ASSUMED, MEASURED, TYPED, UNKNOWN, Fact, FactSheet
from permafrost.store.reader import Store

PUBLISHED = "published with the weights"


def network_facts(
    network: Network, command: Sequence[str], size: tuple[int, int] | None = None
) -> Iterator[Fact]:
    """Iterate over the facts about a network of the options.

    Args:
        network: The network.
        command: Arguments of the command, which tell what was typed.
        size: (height, width) of the store's frame that a teacher's input is taken from; None leaves its input out.
    """
    config = network.config
    origin = "experiment" if any(word.startswith("experiment=") for word in command) else "default"
    origin = "program" if config.kind == "memory" else origin
    yield Fact(
        name="network",
        value=config.label,
        source=_source(network, ("name", "factory"), command, origin),
    )
    value = str(config.weights or "none: trained from random ones")
    origin = _source(network, ("weights",), command, origin)
    if (file := network.file) is not None:
        value = f"{file.path.name}, sha256 {file.sha256()[:SHORT]}"
        origin = f"run {file.path.parent.parent.name}" if file.description is not None else "file"
    yield Fact(name="weights", value=value, source=origin)
    if size is not None and len(config.input_shape(size)) == 3:
        shown = with_preprocessing(config, count_classes(network.classes))
        entry = {"frame": shown.frame, "preprocessing": describe_input(shown)}
        yield Fact(
            name="input",
            value=str(Picture.from_manifest(entry, size)),
            source=_source(
                network,
                ("input_size", "frame", "crop_fraction", "interpolation"),
                command,
                "frame of the store" if shown.interpolation is None else PUBLISHED,
            ),
        )
    yield from normalization_facts(network, command)
    if (layer := getattr(config, "layer", None)) is not None:
        value = layer or "the last output that is a grid"
        yield Fact(name="layer", value=value, source=TYPED if layer else ASSUMED)
    names = network.classes if not isinstance(network.classes, int) else ()
    order = f", in the order {shorten(list(names), 8)}" if len(names) == network.num_classes else ""
    otherwise = "store" if config.weights is None else f"{ASSUMED}: as in the data"
    yield Fact(
        name="classes",
        value=f"{network.num_classes:,}{order}",
        source=_source(network, (), command, otherwise),
    )


def _source(network: Network, names: Sequence[str], command: Sequence[str], otherwise: str) -> str:
    """Return where options of a network come from: typed, the run that trained it, or `otherwise`."""
    starts = [f"{network.section}.{name}=" for name in names]
    starts += [f"{network.section}="] if "name" in names else []
    if any(word.startswith(tuple(starts)) for word in command):
        return TYPED
    file = network.file
    return DESCRIPTION_NAME if file is not None and file.description is not None else otherwise


def normalization_facts(network: Network, command: Sequence[str]) -> Iterator[Fact]:
    """Iterate over the fact about the mean and std of a network, none for one of rows.

    It is doubtful if neither the command nor the weights name them.
    """
    config, section = network.config, network.section
    if config.table_options:
        return
    try:
        mean, std = model_normalization(config)
    except UserError:  # of a network that has none, which is refused elsewhere
        return
    stated = PUBLISHED if is_published(config.weights) else ASSUMED
    stated = "default" if config.weights is None else stated
    defaults = type(config).mean, type(config).std
    if None not in defaults and (config.mean, config.std) != defaults:
        stated = TYPED
    source = _source(network, ("mean", "std"), command, stated)
    warning = (
        f"{section}.mean= and {section}.std= were not typed, and the weights do not name them; a network that was "
        "trained with others gives other outputs, often without a loss of accuracy"
        if source == ASSUMED and config.weights != RANDOM
        else ""
    )
    text = ", ".join(
        f"{name} {' '.join(f'{value:.4g}' for value in values)}"
        for name, values in (("mean", mean), ("std", std))
    )
    yield Fact(name="normalization", value=text, source=source, warning=warning)


def trained_on(config: ModelConfig, store: Store) -> str:
    """Return the records that a run has trained a network on; "unknown" if no run of permafrost did."""
    file = Network(config, ()).file
    if file is None or (description := file.description) is None:
        return "none: random weights" if config.weights == RANDOM else UNKNOWN
    kind = TeachConfig if file.path.parent.name == "teach" else DistillConfig
    parts = {part.fingerprint for part in store.manifest.packed_parts()}
    try:
        named = read_config(file.path.parent / CONFIG_NAME, kind)["inputs"]["store"]
        where = "this" if named in parts | {store.manifest.fingerprint} else "another"
    except (UserError, OSError, KeyError):
        where = "an unknown"
    chosen = ", a subset" * any(map(description.subset.get, ("shots", "holdout")))
    left_out = ", without the record's fold" * isinstance(config, FoldsModelConfig)
    return f"split {description.split} of {where} store{chosen}{left_out}"


def machine_sheet(threads: int, device: str, decode_threads: int | None = None) -> FactSheet:
    """Describe the machine: cores and memory that the process may use, devices and threads.

    Args:
        threads: Number of threads of torch.
        device: Devices that compute.
        decode_threads: Number of threads that decode images.
    """
    facts = [
        Fact(name="cores", value=f"{usable_cores():,} usable", source="affinity, cgroup"),
        Fact(
            name="memory",
            value=f"{usable_memory() / 2**30:.1f} GiB usable",
            source="cgroup, machine",
        ),
        Fact(name="device", value=device, source=MEASURED),
        Fact(
            name="threads",
            value=f"torch {threads}"
            + ("" if decode_threads is None else f", decoding {decode_threads}"),
            source=MEASURED,
        ),
        Fact(name="torch", value=torch.__version__, source=MEASURED),
    ]
    return FactSheet(subject="machine", facts=tuple(facts))
