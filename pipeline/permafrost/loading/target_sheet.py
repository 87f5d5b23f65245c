"""Facts about the targets of a pass, measured on stored records: accuracy, spread, outputs and empty maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc, expit, log_softmax

from permafrost.core.errors import printable
from permafrost.core.records import NO_LABEL, REST_LOGITS, TOP_CLASS, TOP_LOGITS
from permafrost.store.codecs import decode_scaled
from permafrost.store.facts import MEASURED, UNKNOWN, Fact, FactSheet, read_data_facts, read_sheets
from permafrost.store.frames import labels_of_rows
from permafrost.store.reader import Store, TeacherPass
from permafrost.store.shards import ShardEntry

_SHARDS_OF_SPLIT, _ROWS_OF_SHARD = 4, 512
"""Shards of a split, and records of each, that are read, of large targets fewer."""
_SHARD_BYTES = 2**22
"""Stored bytes of a shard's records from which on fewer are read, as a record of 20,000 classes takes 40 kB."""
FLAT, FLAT_AT_TAU, SURE = 0.9, 0.99, 1e-3
"""Mean entropy from which targets are flat, as a part of ln K at tau=1 and at another temperature, and mean entropy in
nats below which they say hardly more than labels."""
MAX_EMPTY = 0.5
"""Share of empty maps from which it is doubtful."""
_FIELDS = ("logits", TOP_LOGITS, TOP_CLASS, REST_LOGITS, "map", "map_scale", "target_class")
_MIN_RECORDS = 8
_SKILL = 0.05
"""Largest p-value of an accuracy that is taken as better than guessing."""


@dataclass(frozen=True, kw_only=True)
class TargetSample:
    """Targets of some records of a pass."""

    split: str
    log_probs: NDArray[np.float64] | None
    """Log probabilities of the classes, or of those stored and all others together, [n, K or k + 1]; None for none."""
    logits: NDArray[np.float64] | None
    """Logits of all classes [n, K], None if the pass does not have them."""
    labels: NDArray[np.int64]
    """Labels of the labeled records, [l]; of many labels 1 or 0 for each known pair of record and class."""
    predicted: NDArray[np.int64]
    """Predictions of the teacher for these, [l]."""
    target_class: NDArray[np.int64]
    """Class that each map explains, [m]."""
    is_empty: NDArray[np.bool_]
    """True for each map that is constant, [m]."""


def entropy_and_peak(log_probs: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean entropy in nats and the mean largest probability of distributions [n, K]."""
    probs = np.exp(log_probs)
    terms = probs * np.where(probs > 0, log_probs, 0)
    return float(-terms.sum(axis=1).mean()), float(probs.max(axis=1).mean())


def describe_spread(entropy: float, classes: int, tau: float, records: int) -> str:
    """Say why a mean entropy in nats is doubtful at a temperature; empty if it is not."""
    if classes < 3 or records < _MIN_RECORDS:
        return ""
    if entropy >= (FLAT if tau == 1 else FLAT_AT_TAU) * np.log(classes):
        return (
            "the targets are nearly uniform, so a student learns little from them. Similarities between -1 and 1 need "
            "the scale of their network (100 for CLIP), an untrained teacher needs training, and a temperature may be "
            "too high"
        )
    if entropy < SURE:
        return (
            "the targets name a single class, as those of a teacher on its own training records may, or of one whose "
            "inputs are too large. If it is right, raise method.tau, or let it see stronger views (views=)"
        )
    return ""


def describe_empty(share: float, maps: int) -> str:
    """Say that a share of empty maps is doubtful; empty if it is not."""
    if share < MAX_EMPTY or maps < _MIN_RECORDS:
        return ""
    return (
        f"{share:.0%} of the maps are empty, and teach nothing: the class is not visible in the explained layer, or "
        "its evidence is negative. Choose another layer or explainer, or explain the label "
        "(explainer.target_classes=all_gt)"
    )


def read_targets(
    teacher: TeacherPass, split: str | None = None, tau: float = 1.0
) -> Iterator[TargetSample]:
    """Read targets of records at the start of shards at equal distances.

    Args:
        teacher: The pass; of stored views the first one of each record is read.
        split: Split of the records; None reads each.
        tau: Temperature of the probabilities.
    """
    store = teacher.store
    for name, numbers in store.shards.splits.items():
        if split in (None, name):
            at = np.linspace(0, len(numbers) - 1, min(len(numbers), _SHARDS_OF_SPLIT)).astype(int)
            for number in np.unique(numbers[at]).tolist():
                sample = _read_shard(
                    teacher, store.shards[number], store.rows_of_shard(number), tau
                )
                if sample is not None:
                    yield sample


def _read_shard(
    teacher: TeacherPass, entry: ShardEntry, rows: range, tau: float
) -> TargetSample | None:
    most = max(_MIN_RECORDS, int(_SHARD_BYTES * teacher.num_views / teacher.bytes_per_record))
    places = teacher.rows_of(entry)[: min(most, _ROWS_OF_SHARD)]
    covered = np.flatnonzero(places >= 0)
    if not len(covered):
        return None
    at = places[covered], np.zeros(len(covered), np.int64)  # in the first view
    stored = teacher.open_shard(entry, _FIELDS)
    values = {name: np.asarray(field[at]) for name, field in stored.items()}
    logits = values["logits"].astype(np.float64) if "logits" in values else None
    sample = TargetSample(
        split=entry.split,
        logits=logits,
        log_probs=_log_probs(teacher, values, tau),
        **_predictions(teacher, values, np.asarray(rows)[covered]),
        target_class=np.empty(0, np.int64),
        is_empty=np.empty(0, bool),
    )
    if "map" not in values:
        return sample
    maps = decode_scaled(values["map"], values.get("map_scale")).astype(np.float32)
    classes = values["target_class"].astype(np.int64)  # [n, C]
    maps = maps.reshape(*classes.shape, -1)
    explained = classes >= 0
    is_empty = np.ptp(maps, axis=-1) == 0
    return replace(sample, target_class=classes[explained], is_empty=is_empty[explained])


def _log_probs(
    teacher: TeacherPass, values: Mapping[str, NDArray[Any]], tau: float
) -> NDArray[np.float64] | None:
    if "logits" in values:
        return np.asarray(log_softmax(values["logits"].astype(np.float64) / tau, axis=1))
    temperatures = teacher.manifest.temperatures
    if TOP_LOGITS not in values or not temperatures:
        return None
    parts = [values[TOP_LOGITS].astype(np.float64)]
    place = temperatures.index(tau) if tau in temperatures else 0
    parts[0] /= temperatures[place]
    if REST_LOGITS in values:
        parts.append(values[REST_LOGITS][:, place : place + 1].astype(np.float64))
    return np.asarray(log_softmax(np.concatenate(parts, axis=1), axis=1))


def _predictions(
    teacher: TeacherPass, values: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]
) -> dict[str, NDArray[np.int64]]:
    """Return labels and predictions, as in TargetSample; empty if the teacher has other classes."""
    names = teacher.store.manifest.classes_of(teacher.num_classes)
    store, logits = teacher.store.known_to(names), values.get("logits")
    many = store.index.has_many_labels
    labels = predicted = np.empty(0, np.int64)
    if names and (logits is not None or (TOP_CLASS in values and not many)):
        truth = labels_of_rows(store, rows).numpy()
        if many:
            known = ~np.isnan(truth)
            labels, predicted = truth[known], values["logits"][known] >= 0
        else:
            known = truth != NO_LABEL
            largest = values[TOP_CLASS][:, 0] if logits is None else logits.argmax(axis=1)
            labels, predicted = truth[known], largest[known]
    return {"labels": labels.astype(np.int64), "predicted": predicted.astype(np.int64)}


def target_sheet(
    teacher: TeacherPass,
    *,
    split: str | None = None,
    tau: float = 1.0,
    accuracy: Mapping[str, float] | None = None,
    trained_on: str = UNKNOWN,
) -> FactSheet:
    """Describe the targets of a pass.

    Args:
        teacher: The pass.
        split: Split that is described; None describes all.
        tau: Temperature of the probabilities.
        accuracy: Accuracy by split over all records; None measures it on the sample.
        trained_on: Records on which the teacher was trained, if that is known.
    """
    samples = list(read_targets(teacher, split, tau))
    sizes = (len(each.is_empty if each.log_probs is None else each.log_probs) for each in samples)
    total = teacher.shards.num_rows if split is None else teacher.store.num_records(split)
    read = sum(sizes)
    source = f"{read:,} of {total:,} records" if read < total else f"{read:,} records"
    source += f", the first of {teacher.num_views} views" * (teacher.num_views > 1)
    origin = UNKNOWN if trained_on == UNKNOWN else "model.json"
    facts = [
        _accuracy(teacher.store, samples, accuracy, source),
        Fact(name="trained on", value=trained_on, source=origin),
    ]
    log_probs = [each.log_probs for each in samples if each.log_probs is not None]
    many = teacher.store.index.has_many_labels
    if log_probs and not many:
        joined = np.concatenate(log_probs)
        (entropy, largest), classes = entropy_and_peak(joined), teacher.num_classes
        shown = f"{entropy:.3g}" if entropy >= SURE else f"below {SURE:g}"
        facts += [
            Fact(
                name="entropy",
                value=f"{shown} of {np.log(max(classes, 1)):.3g} nats (mean, tau={tau:g})",
                source=source,
                warning=describe_spread(entropy, classes, tau, len(joined)),
            ),
            Fact(name="largest p", value=f"{largest:.3g} (mean, tau={tau:g})", source=source),
        ]
    logits = [each.logits for each in samples if each.logits is not None]
    if logits:
        values = np.concatenate(logits)
        sums = np.median(expit(values).sum(axis=1))
        facts.append(
            Fact(
                name="logits",
                value=f"{values.min():.4g} to {values.max():.4g}; sigmoids sum to {sums:.3g} (median)",
                source=source,
            )
        )
    facts += _map_facts(teacher, samples, source)
    facts += [
        Fact(
            name="views",
            value=f"{teacher.num_views} {teacher.views['sampler']}",
            source="manifest.json",
        ),
        Fact(name="bytes", value=f"{teacher.bytes_per_record:,.0f} a record", source=MEASURED),
    ]
    return FactSheet(subject="targets", facts=tuple(facts))


def _accuracy(
    store: Store,
    samples: list[TargetSample],
    accuracy: Mapping[str, float] | None,
    source: str,
) -> Fact:
    """Return the fact about the accuracy by split, or F1 for many labels."""
    many = store.index.has_many_labels
    name, score = ("F1", _f1) if many else ("accuracy", _share_of_equal)
    measured: dict[str, float] = {}
    of_classes: dict[str, str] = {}
    for split in dict.fromkeys(sample.split for sample in samples):
        parts = [sample for sample in samples if sample.split == split and len(sample.labels)]
        if parts:
            measured[split] = score(*_joined(parts))
            of_classes[split] = "" if many else _mean_over_classes(*_joined(parts))
    shown = accuracy or measured
    if not shown:
        return Fact(name=name, value="no logits, or no labels of their classes", source=UNKNOWN)
    return Fact(
        name=name,
        value=", ".join(
            f"{printable(split)} {value:.4g}{of_classes.get(split, '')}"
            for split, value in shown.items()
        ),
        source="all records" if accuracy else source,
        warning="" if many or not measured else describe_guessing(*_joined(samples)),
    )


def _joined(samples: list[TargetSample]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return (
        np.concatenate([sample.labels for sample in samples]),
        np.concatenate([sample.predicted for sample in samples]),
    )


def _share_of_equal(labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    return float((labels == predicted).mean())


def _mean_over_classes(labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> str:
    """Return the mean over classes of their accuracies as text, empty if one class is less than twice another."""
    present, members, counts = np.unique(labels, return_inverse=True, return_counts=True)
    right = np.bincount(members, labels == predicted, len(present))
    is_equal = counts.max() < 2 * counts.min()
    return "" if is_equal else f" (mean over {len(present)} classes {(right / counts).mean():.4g})"


def _f1(labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    return float(2 * (labels & predicted).sum() / max(labels.sum() + predicted.sum(), 1))


def correct_and_chance(
    labels: NDArray[np.int64], predicted: NDArray[np.int64]
) -> tuple[int, float]:
    """Count correct predictions, and return the probability that a guess with the same frequencies is correct."""
    size = 1 + int(max(labels.max(), predicted.max()))
    shares = [np.bincount(column, minlength=size) / len(labels) for column in (labels, predicted)]
    return int((labels == predicted).sum()), float(shares[0] @ shares[1])


def describe_guessing(labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> str:
    """Say that predictions are not better than guessing with the same frequencies; empty if they are."""
    if len(labels) < _MIN_RECORDS or np.ptp(labels) == 0:
        return ""
    correct, chance = correct_and_chance(labels, predicted)
    if bdtrc(correct - 1, len(labels), chance) <= _SKILL:
        return ""
    return (
        f"not better than guessing, which is right for {chance:.1%}: the teacher is hardly trained, or its inputs or "
        "labels are not those of its training (mean, std, input_size, frame, order of classes)"
    )


def _map_facts(teacher: TeacherPass, samples: list[TargetSample], source: str) -> Iterator[Fact]:
    if not teacher.map_cells:
        return
    explained = teacher.manifest.explainer.get("target_classes", "")
    yield Fact(
        name="maps",
        value=f"{teacher.map_cells} cells, {teacher.explainer}{f' of {explained}' if explained else ''}",
        source="manifest.json",
    )
    is_empty = np.concatenate([sample.is_empty for sample in samples] or [np.empty(0, bool)])
    if not len(is_empty):
        return
    classes, worst = np.concatenate([sample.target_class for sample in samples]), ""
    share = float(is_empty.mean())
    if share:
        count = np.bincount(classes)
        shares = np.bincount(classes, is_empty) / np.maximum(count, 1)
        label, names = int(shares.argmax()), teacher.store.manifest.classes_of(teacher.num_classes)
        known = names[label] if names else f"class {label}"
        worst = f"; most for {printable(known)}, {shares[label]:.1%} of {count[label]:,}"
    yield Fact(
        name="empty maps",
        value=f"{share:.1%} of {len(is_empty):,}{worst}",
        source=source,
        warning=describe_empty(share, len(is_empty)),
    )


def sheets_of(store: Store, teacher: TeacherPass | None = None) -> dict[str, FactSheet]:
    """Return the facts about a store's data and about one of its passes, by subject.

    Of a store or a pass without facts.json they are what its manifest says, and targets are measured.

    Args:
        store: The store.
        teacher: The pass; None describes the data alone.
    """
    kept = read_data_facts(store.folder)
    if kept is not None:
        sheets = {"data": kept.sheet}
    else:
        manifest = store.manifest
        records = ", ".join(
            f"{printable(split)} {count:,}" for split, count in manifest.records.items()
        )
        values = {
            "records": records,
            "classes": f"{len(manifest.classes):,}",
            "brightness": UNKNOWN,
        }
        facts = tuple(
            Fact(name=name, value=value, source=UNKNOWN if value == UNKNOWN else "manifest.json")
            for name, value in values.items()
        )
        sheets = {"data": FactSheet(subject="data", facts=facts)}
    if teacher is not None:
        sheets |= read_sheets(teacher.folder) or {"targets": target_sheet(teacher)}
    return sheets
