"""Options of every variant of a report: those in which variants differ, and those that all variants share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from permafrost.config.augment import READ_BY
from permafrost.config.builder import build_config, flatten_options, to_plain_dict
from permafrost.config.distillation import DistillConfig
from permafrost.config.methods import METHODS
from permafrost.config.store import SubsetOptions
from permafrost.core.errors import UserError
from permafrost.loading.subset import select_training_rows
from permafrost.runs.folder import identity
from permafrost.storage.rooted_paths import names_in
from permafrost.store.reader import Store
from permafrost_report.comparison import group_pairs, seeds_in_words
from permafrost_report.model_selection import curve_of
from permafrost_report.student_results import StudentResult

_RECORDS = "training records"
_UNUSED = ("inputs", "run", "seed", "store", "trainer.num_threads", "trainer.device")
"""Options that every student has for itself, or that do not concern its training."""
_SHARED = {
    "student": "Student's network",
    _RECORDS: "Training records",
    "trainer.epochs": "Epochs",
    "trainer.batch_size": "Batch size",
    "optimizer.kind": "Optimizer",
    "optimizer.lr": "Learning rate",
    "optimizer.weight_decay": "Weight decay",
    "trainer.schedule": "Schedule",
    "augment": "Augmentation",
    "mode": "Teacher's targets",
}
"""Options whose common value is always stated, with their names on the page."""


class OptionCell(NamedTuple):
    """Value of an option in one variant."""

    text: str
    differs: bool
    """True if the variants that have the option do not all have this value."""


class VariantOptions(NamedTuple):
    """Options of one variant, one cell for each column of the table."""

    method: str
    cells: list[OptionCell]


class DescribedVariant(NamedTuple):
    """A variant as text."""

    name: str
    method: str
    """First sentence on the variant's method, empty for a method of another version."""
    options: str
    """Options of the method that are not at their defaults."""


class TrainingFacts(NamedTuple):
    """Options of the variants of a report."""

    shared: dict[str, str]
    """Name -> value, equal for all variants."""
    columns: list[str]
    """Options of the methods, and other options in which the variants differ."""
    variants: list[VariantOptions]


def training_facts(results: Sequence[StudentResult], store: Store) -> TrainingFacts:
    """Collect the options of every variant from the config of its first student."""
    students = group_pairs((result.label, result) for result in results)
    counts: dict[str, str] = {}
    options = {label: _options(first, store, counts) for label, (first, *_) in students.items()}
    names = [
        name
        for name in dict.fromkeys(name for own in options.values() for name in own)
        if any(own.get(name, "null") not in ("null", "[]") for own in options.values())
    ]
    differing = [name for name in names if _differs(name, options)]
    of_method = [name for name in [*differing, *names] if name.startswith("method.")]
    columns = list(dict.fromkeys([*of_method, *differing]))
    shared = {
        title: next(iter(options.values()))[name]
        for name, title in _SHARED.items()
        if name in names and name not in columns
    }
    seeds = sorted({result.seed for result in results if result.seed is not None})
    shared["Seeds"] = f"{', '.join(map(str, seeds))} ({seeds_in_words(len(seeds))})"
    return TrainingFacts(
        shared,
        columns,
        [
            VariantOptions(
                label,
                [
                    OptionCell(own.get(name, ""), name in own and name in differing)
                    for name in columns
                ],
            )
            for label, own in options.items()
        ],
    )


def describe_variants(results: Sequence[StudentResult]) -> list[DescribedVariant]:
    """Describe the method of every variant that has a recorded one. Its grid points are one."""
    methods = group_pairs(
        (curve_of(result), result.training["method"])
        for result in results
        if isinstance(result.training.get("method"), Mapping)
    )
    return [_describe_variant(name, own) for name, own in methods.items()]


def _describe_variant(name: str, methods: Sequence[Mapping[str, Any]]) -> DescribedVariant:
    if (cls := METHODS.get(str(methods[0].get("kind")))) is None:
        return DescribedVariant(name, "", "")
    summary = " ".join((cls.__doc__ or "").partition("\n\n")[0].split())
    texts = []
    for option, default in to_plain_dict(cls()).items():
        values = dict.fromkeys(_text(method.get(option, default)) for method in methods)
        if option != "kind" and list(values) != [_text(default)]:
            texts.append(f"{option.replace('_', ' ')} {' or '.join(values)}")
    return DescribedVariant(name, summary, ", ".join(texts))


def describe_data(store: Store) -> dict[str, str]:
    """Describe the records of a store: number, classes, splits and size."""
    manifest = store.manifest
    splits = manifest.records
    records = store.num_records()
    return {
        "Data": f"{manifest.dataset.name}: {records:,} records, {len(manifest.classes):,} classes, "
        f"{store.form.noun} of {store.form.describe()}",
        "Splits": ", ".join(f"{split} {number:,}" for split, number in sorted(splits.items())),
    }


def _differs(name: str, options: Mapping[str, Mapping[str, str]]) -> bool:
    """Return whether the variants that have an option have different values of it."""
    values = {own[name] for own in options.values() if name in own}
    is_shared = all(name in own for own in options.values()) or name.startswith("method.")
    return len(values) > 1 or not is_shared


def _options(result: StudentResult, store: Store, counts: dict[str, str]) -> dict[str, str]:
    """Return the options of a student by name, as text. Networks and augmentations are one option each.

    `counts` has the numbers of training records by the options that determine them, to which new ones are added.
    """
    config = result.training
    inputs = config.get("inputs", {})
    values = identity(config, DistillConfig)
    options = {}
    store = store.part_with(inputs.get("store"))
    if inputs.get("store") == store.manifest.fingerprint:
        subset = values.get("subset", {})
        key = json.dumps([inputs["store"], values.get("split"), subset], sort_keys=True)
        if key not in counts:
            counts[key] = _training_records(store, str(values.get("split")), subset)
        options[_RECORDS] = counts[key]
    if values.get("mode") != "live":  # unread
        values = {
            name: value for name, value in values.items() if name not in ("teacher", "explainer")
        }
    for section, describe in (
        ("student", network_text),
        ("teacher", network_text),
        ("augment", describe_augmentation),
    ):
        if section in values:
            options[section] = describe(values.pop(section))
    others = {name: value for name, value in values.items() if name not in ("subset", "split")}
    flat = {name: _text(value) for name, value in flatten_options(others).items()}
    return options | {name: value for name, value in flat.items() if name not in _UNUSED}


def _training_records(store: Store, split: str, subset: Mapping[str, Any]) -> str:
    try:
        options = build_config(SubsetOptions, dict(subset), "subset")
        chosen = len(select_training_rows(store.index, split, options))
        whole = store.num_records(split)
    except UserError:
        return f"split {split}"
    if chosen == whole:
        return f"{chosen:,} (all of split {split})"
    shots = f", {options.shots} per class" if options.shots is not None else ""
    held_out = f", {options.holdout} per class held out" if options.holdout else ""
    return f"{chosen:,} of {whole:,} of split {split}{shots}{held_out}"


def network_text(config: Mapping[str, Any]) -> str:
    """Name a network in words: provider, name, and its other options if they are not empty."""
    shown = {
        name: value
        for name, value in sorted(config.items())
        if name
        not in (
            *("kind", "name", "weights", "weights_key", "sha256"),
            *("mean", "std", "classes", "frame"),
        )
        and value not in (None, "none")
    }
    extra = ", ".join(f"{name.replace('_', ' ')} {_text(value)}" for name, value in shown.items())
    return f"{config.get('name')} ({', '.join(filter(None, [str(config.get('kind')), extra]))})"


def describe_augmentation(config: Mapping[str, Any]) -> str:
    """Describe an augmentation: its operations and mixtures with their options, and what else is set."""
    operations = [
        " ".join(
            [
                str(operation.get("kind")).replace("_", " "),
                *_describe_options(operation, READ_BY.get(str(operation.get("kind")), ())),
            ]
        )
        for operation in [*(config.get("operations") or []), *(config.get("mix") or [])]
    ]
    lists = ("operations", "mix")
    others = _describe_options(config, [name for name in config if name not in lists])
    return ", ".join([*operations, *others]) or "none"


def _describe_options(values: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Options that are set, with their names."""
    return [
        f"{name.replace('_', ' ')} {_text(values[name])}"
        for name in names
        if values.get(name) not in (None, _USUAL.get(name))
    ]


_USUAL = {
    "padding_mode": "constant",
    "edges": "window",
    "interpolation": "bilinear",
    "scaled_decoding": False,
}
"""Values of options of an augmentation that are not stated."""


def _set_options(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options of a method of several that differ from its defaults, and its kind; other values unchanged."""
    cls = METHODS.get(str(values.get("kind")))
    defaults = {} if cls is None else to_plain_dict(cls()) | {"kind": None}
    return {name: each for name, each in values.items() if defaults.get(name, values) != each}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{name} {_text(each)}" for name, each in _set_options(value).items())
            + "}"
        )
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(names_in(value))
