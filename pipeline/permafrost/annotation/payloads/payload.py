"""The interface of a payload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from permafrost.core.records import FieldSpec
from permafrost.models.classifier import Classifier
from permafrost.models.output import Intermediates, ModelOutput


class BatchInfo(NamedTuple):
    """Keys and labels of the n records of a batch, from the index."""

    keys: Sequence[str]
    labels: Tensor
    """Labels in the form of Batch."""


class EncodedFields(NamedTuple):
    """Stored form of one payload for a batch of n records."""

    values: dict[str, NDArray[np.generic]]
    """Field -> [n, *shape] of its FieldSpec."""
    fidelity: dict[str, float]
    """Lowest cosine between a record's values and their stored form, for each lossy field."""


class Payload(Protocol):
    """One kind of teacher output to store."""

    @property
    def intermediates(self) -> Intermediates:
        """Intermediates of a forward pass that it needs in addition to logits and features."""

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        """Return the fields that it stores, given an example output."""

    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        """Encode the fields of a batch. The values of a record depend on that record only."""
