"""Which rows of a store a run reads. Selection is not data: the store always holds the whole set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import ConfigError
from pipeline.records import NO_LABEL
from pipeline.seeds import derive_seed

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from pipeline.config import SubsetConfig


def rows_of_split(index: pa.Table, split: str) -> NDArray[np.int64]:
    """Rows of the index that belong to `split`, in the index's order."""
    splits = np.asarray(index["split"].to_pylist())
    rows = np.flatnonzero(splits == split)
    if len(rows) == 0:
        known = ", ".join(sorted(set(splits.tolist())))
        raise ConfigError(f"the store has no split {split!r}; it has: {known}")
    return rows


def select_training_rows(index: pa.Table, split: str, subset: SubsetConfig) -> NDArray[np.int64]:
    """Rows that `subset` chooses from a split, in the index's order.

    Each class is permuted by (subset.seed, class); the first `holdout` are kept out, the next `shots`
    taken. So more shots contain fewer, and the choice depends neither on `seed` nor on the method.
    """
    rows = rows_of_split(index, split)
    if subset.shots is None and subset.holdout == 0:
        return rows
    labels = index["label"].to_numpy()[rows]
    if (labels == NO_LABEL).any():
        raise ConfigError(
            f"subset.shots and subset.holdout need labels, split {split!r} has records without"
        )
    keys = np.asarray(index["key"].to_pylist())[rows]
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(keys[members])]
        seed = derive_seed(subset.seed, "subset", int(label))
        members = np.random.default_rng(seed).permutation(members)[subset.holdout :]
        if subset.shots is not None and len(members) < subset.shots:
            raise ConfigError(
                f"subset.shots={subset.shots}, but class {label} of split {split!r} has "
                f"{len(members)} records after the holdout"
            )
        chosen.append(members[: subset.shots])
    selected: NDArray[np.int64] = rows[np.sort(np.concatenate(chosen))]
    return selected
