"""Agreement of a pass of lower precision with float32, measured on a sample of its records before it begins.

Both passes annotate the same records, and what they would store is compared: the class of the largest logit, the
divergence KL(float32 || lower) of the softmax of the logits in nats (not in a pass without logits), and the cosine of
every stored map or feature, in the network's units. Maps are compared for classes that both passes explain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permafrost.annotation.samples import Sample, SampleTask
from permafrost.config.store import PassPrecision
from permafrost.core.errors import UserError
from permafrost.core.records import FieldSpec
from permafrost.models.compute import fastest_precision, require_tf32, resolve_device
from permafrost.store.codecs import cosines, decode_scaled
from permafrost.store.manifest import Agreement

PRECISION_RECORDS = 256
"""Number of records that are compared, or all if there are fewer."""
LOWEST_TOP1 = 0.97
"""Lowest fraction of records with the same largest logit."""
HIGHEST_KL = 0.01
"""Highest mean divergence in nats."""
LOWEST_COSINE = 0.995
"""Lowest mean cosine of a field."""


class PrecisionError(UserError, ValueError):
    """Error for a precision whose outputs of the teacher differ too much from float32."""


def describe_shortfall(agreement: Agreement) -> str:
    """Say which limits the sample misses, nothing if it keeps all."""
    misses = []
    if agreement.top1 is not None and not agreement.top1 >= LOWEST_TOP1:
        misses.append(
            f"the largest logit is the same for {agreement.top1:.1%}, not {LOWEST_TOP1:.0%}"
        )
    if agreement.kl_mean is not None and not agreement.kl_mean <= HIGHEST_KL:
        misses.append(f"the logits diverge by {agreement.kl_mean:.2g} nats, not {HIGHEST_KL:g}")
    misses += [
        f"the mean cosine of {name} is {cosine:.4f}, not {LOWEST_COSINE:g}"
        for name, cosine in agreement.cosine_mean.items()
        if not cosine >= LOWEST_COSINE
    ]
    return "; ".join(misses)


def describe_agreement(agreement: Agreement) -> str:
    """Describe the agreement in one line."""
    parts = [f"mean cosine of {name} {value:.5f}" for name, value in agreement.cosine_mean.items()]
    if agreement.top1 is not None:
        parts.insert(0, f"largest logit equal for {agreement.top1:.1%}")
        parts.insert(1, f"divergence {agreement.kl_mean:.2g} nats")
    return f"{', '.join(parts) or 'nothing compared'}, in a sample of {agreement.records} records"


@dataclass(frozen=True, kw_only=True)
class ComparePrecision(SampleTask[tuple[PassPrecision, Agreement | None]]):
    """Task that annotates a sample in the precision of the options and in float32, and writes nothing.

    With precision=auto it takes that of `fastest_precision` on its device, and compares nothing if that is float32.
    """

    def measure(self, sample: Sample) -> tuple[int, tuple[PassPrecision, Agreement | None]]:
        precision: PassPrecision = self.config.precision
        if precision == "auto":
            precision = fastest_precision(resolve_device("annotate.precision"))
        if precision == "float32":
            return 0, (precision, None)
        if precision == "tf32":
            require_tf32("annotate.precision", resolve_device("annotate.precision"))
        agreement = self._compare(precision, sample)
        return agreement.records, (precision, agreement)

    def _compare(self, precision: str, sample: Sample) -> Agreement:
        exact = self.build_annotator(precision="float32", logits="all")
        lower = exact.with_precision(precision)
        column_parts: dict[str, list[NDArray[Any]]] = {}
        keys: list[str] = []
        specs = exact.fields()
        for batch, batch_keys in self.iter_batches(sample):
            values = [annotator.annotate([batch], batch_keys)[0] for annotator in (exact, lower)]
            for name, column in compare_values(specs, *values).items():
                column_parts.setdefault(name, []).append(column)
            keys += batch_keys
        columns = {name: np.concatenate(parts) for name, parts in column_parts.items()}
        return agreement_of(precision, len(keys), keys, columns)


def agreement_of(
    precision: str, records: int, keys: Sequence[str], columns: Mapping[str, NDArray[Any]]
) -> Agreement:
    """Summarize what the views of a sample have in common.

    Args:
        precision: Precision of what is compared.
        records: Number of records.
        keys: Key of each view.
        columns: `top1` and `kl` of each view if there are logits, and the cosines of each other field.
    """
    of_logits: dict[str, Any] = {}
    if "kl" in columns:
        divergence = columns["kl"]
        of_logits = {
            "top1": float(columns["top1"].mean()),
            "kl_mean": float(divergence.mean()),
            "kl_largest": float(divergence.max()),
            "kl_largest_key": keys[int(divergence.argmax())],
        }
    fields = {
        name: column
        for name, column in columns.items()
        if name not in ("top1", "kl") and len(column)
    }
    return Agreement(
        precision=precision,
        records=records,
        cosine_mean={name: float(column.mean()) for name, column in fields.items()},
        cosine_lowest={name: float(column.min()) for name, column in fields.items()},
        **of_logits,
    )


def compare_values(
    specs: Sequence[FieldSpec],
    exact: Mapping[str, NDArray[np.generic]],
    lower: Mapping[str, NDArray[np.generic]],
) -> dict[str, NDArray[Any]]:
    """Compare the values that two passes would store for the same records.

    A field with a scale is compared after multiplication by it, because a cosine over several scaled parts depends on
    their scales.

    Args:
        specs: Fields of the passes.
        exact: Values [n, 1, *shape] of the fields in float32.
        lower: Values [n, 1, *shape] of the fields in the lower precision.

    Returns:
        `top1` bool [n] and `kl` f64 [n] in nats if there are logits, and the cosines of each field that is neither
        logits nor a scale nor integer, one for each record, or for each class that both passes explain.
    """
    compared: dict[str, NDArray[Any]] = {}
    if "logits" in exact:
        one, other = (values["logits"][:, 0] for values in (exact, lower))
        log_one, log_other = log_softmax(one), log_softmax(other)
        compared["top1"] = one.argmax(axis=1) == other.argmax(axis=1)
        compared["kl"] = np.maximum((np.exp(log_one) * (log_one - log_other)).sum(axis=1), 0.0)
    for spec in specs:
        if spec.name == "logits" or spec.name.endswith("_scale") or spec.dtype == "int32":
            continue
        one, other = (in_network_units(values, spec.name) for values in (exact, lower))
        if spec.axes[:1] == ("target",):
            same = exact["target_class"][:, 0] == lower["target_class"][:, 0]
            one, other = one[same], other[same]
        compared[spec.name] = cosines(one, other)
    return compared


def in_network_units(values: Mapping[str, NDArray[np.generic]], name: str) -> NDArray[np.float32]:
    """Return the first view of a field [n, V, *shape] in the units of the network, [n, *shape]."""
    scale = values.get(f"{name}_scale")
    units = decode_scaled(values[name][:, 0], None if scale is None else scale[:, 0])
    return units.astype(np.float32, copy=False)


def log_softmax(logits: NDArray[np.generic]) -> NDArray[np.float64]:
    """Compute log softmax of logits [n, K] over the classes, f64 [n, K]."""
    shifted = logits.astype(np.float64) - logits.astype(np.float64).max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
